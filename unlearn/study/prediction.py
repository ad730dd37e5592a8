"""Does it predict: rank correlations over runs between what is known at a step and what comes of the run, with intervals."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pandas import DataFrame, Series

from unlearn.study.rates import RISE

Array = NDArray[np.float64]

GEFFECT = ("e_u", "e_r", "cos_u", "cos_r", "lr_e_u", "lr_e_r", "update_u", "update_r")
RIVALS = ("lr", "lr_norm", "loss", "batch_u", "batch_r", "forget_rise", "retain_rise")
OUTCOMES = ("forget_rise_end", "retain_rise_end", "forget_ps_end", "retain_ps_end", "forget_ps_stopped", "price")
RESAMPLES, SEED, FEWEST = 2000, 0, 5


def table(lines: DataFrame, ends: DataFrame) -> DataFrame:
    """The lines with what is known at each beside what comes of its run.

    Args:
        lines: a table of `runs.lines_of`.
        ends: that of `rates.stopped` of it.

    Returns:
        `lines` and, known at the step, lr_e_u, lr_e_r (lr times e), forget_rise, retain_rise (loss there less loss at step 0,
        nats a token). What comes is in forget_rise_end, retain_rise_end (loss at the end less loss there), forget_ps_end,
        retain_ps_end, forget_ps_stopped and price, those of `rates.stopped`; NaN where it has come already: at and after the
        step at which the run is stopped, and once the forget loss has risen by what a price is of. The last step is left out,
        as nothing follows.
    """
    found = with_starts(lines.sort_values(["run", "step"]).reset_index(drop=True))
    of_run = found.groupby("run", sort=False)
    for risk in ("forget", "retain"):
        loss = found[f"{risk}_loss"]
        found[f"{risk}_rise"] = loss - of_run[f"{risk}_loss"].transform("first")
        found[f"{risk}_rise_end"] = of_run[f"{risk}_loss"].transform(_last) - loss
        found[f"{risk}_ps_end"] = of_run[f"{risk}_ps"].transform(_last)
    for letter in ("u", "r"):
        if f"e_{letter}" in found:
            found[f"lr_e_{letter}"] = found["lr"] * found[f"e_{letter}"]
    of_ends = ends.set_index("run")
    ends_at, stopped, price = (found["run"].map(of_ends[name]) for name in ("step", "forget_ps", "price"))
    found["forget_ps_stopped"] = stopped.where(found["step"] < ends_at)
    risen = (found["forget_rise"] >= RISE).groupby(found["run"]).cummax()
    found["price"] = price.where(~risen)
    return found[found["step"] < of_run["step"].transform("max")]


def _last(values: Series) -> float:
    """Pandas' own skips what is not finite: a run that has diverged would end before that."""
    return float(values.iloc[-1])


def with_starts(lines: DataFrame) -> DataFrame:
    """The lines with step 0's G-effects also for runs that were not measured: those of the same objective at another rate."""
    values = [name for name in ("e_u", "e_r", "cos_u", "cos_r") if name in lines]
    start = lines["step"] == 0
    of_objective = lines[start].groupby(["method", "hyper", "seed"], dropna=False)
    return lines.assign(**{name: lines[name].fillna(of_objective[name].transform("first")) for name in values})


def correlations(known: DataFrame) -> DataFrame:
    """Spearman's rank correlation of every predictor with every outcome at every step, over the runs.

    Args:
        known: a table of `table`.

    Returns:
        Columns step, predictor, kind (G-effect or rival), outcome, runs, rho, and low and high, its 95% interval by bootstrap
        over methods (`RESAMPLES` draws from seed `SEED`): a method's runs at several rates are drawn together, as they are not
        independent. All predictors of a step are compared on the same runs, those that have every one of them. Left out:
        outcomes of fewer than `FEWEST` of these, and values that are all the same.

    Raises:
        ValueError: there are fewer runs than `FEWEST`.
    """
    if (runs := known["run"].nunique()) < FEWEST:
        raise ValueError(f"{runs} runs: a rank correlation is told of at least {FEWEST}")
    found = []
    for step, at in known.groupby("step"):
        there = [name for name in (*GEFFECT, *RIVALS) if name in at and at[name].nunique() > 1]
        at = at.dropna(subset=there)
        for predictor in there:
            for outcome in OUTCOMES:
                if (told := related(at, predictor, outcome)) is not None:
                    kind = "G-effect" if predictor in GEFFECT else "rival"
                    found.append({"step": step, "predictor": predictor, "kind": kind, "outcome": outcome} | told)
    return DataFrame(found)


def by_rate(known: DataFrame) -> DataFrame:
    """`correlations` of all runs, and, where those compared have several learning rates, of each rate's alone.

    Over runs of several rates a predictor may tell no more than the rate does; within one it has to tell the methods apart.

    Returns:
        Column lr ("all", or a rate that `FEWEST` runs have), and those of `correlations`.

    Raises:
        ValueError: there are fewer runs than `FEWEST`.
    """
    whole = correlations(known)
    parts = {f"{lr:g}": correlations(at) for lr, at in known.groupby("lr") if at["run"].nunique() >= FEWEST}
    apart = {"all": whole} | {name: table for name, table in parts.items() if not table.equals(whole)}
    return pd.concat([table.assign(lr=name)[["lr", *whole]] for name, table in apart.items()], ignore_index=True)


def related(at: DataFrame, predictor: str, outcome: str) -> dict[str, float] | None:
    """runs, rho, low, high of the lines that have both; None for fewer than `FEWEST`, or where either is all the same.

    Lines of one `method`, where there is such a column, are drawn together.
    """
    pair = at.dropna(subset=[predictor, outcome])
    x, y = (pair[name].to_numpy(dtype=float) for name in (predictor, outcome))
    if len(pair) < FEWEST or not ((x != x[0]).any() and (y != y[0]).any()):
        return None
    return {"runs": len(pair)} | interval(x, y, pair["method"] if "method" in pair else range(len(pair)))


def interval(x: Array, y: Array, groups: Iterable[Any]) -> dict[str, float]:
    """rho of all, and the 2.5th and 97.5th percentile of that of groups drawn with replacement, each with all its members."""
    group = pd.factorize(np.asarray(groups))[0]
    n = group.max() + 1
    drawn = np.random.default_rng(SEED).integers(n, size=(RESAMPLES, n))
    times = (drawn[:, :, None] == np.arange(n)).sum(axis=1)[:, group]
    low, high = np.nanpercentile(_of_draws(x, y, times.astype(float)), [2.5, 97.5])
    return {"rho": spearman(x, y), "low": float(low), "high": float(high)}


def spearman(x: Array, y: Array) -> float:
    """Spearman's rho, ties at their mean rank; NaN where either is constant."""
    return float(_of_draws(x, y, np.ones((1, len(x))))[0])


def _of_draws(x: Array, y: Array, times: Array) -> Array:
    """Spearman's rho of each draw that has pair i `times[draw, i]` times: Pearson's of its mean ranks by these weights."""
    ranks = []
    for values in (x, y):
        below = (values[:, None] > values) + 0.5 * (values[:, None] == values)
        rank = times @ below.T
        ranks.append(rank - (times * rank).sum(axis=1, keepdims=True) / times.sum(axis=1, keepdims=True))
    a, b = ranks
    with np.errstate(invalid="ignore", divide="ignore"):
        rho: Array = (times * a * b).sum(axis=1) / np.sqrt((times * a**2).sum(axis=1) * (times * b**2).sum(axis=1))
    return rho
