"""Whether a sweep before a run puts objectives and hyper-parameters in the order of their finished runs."""

from __future__ import annotations

import numpy as np
from pandas import DataFrame

from unlearn.study.prediction import FEWEST, related
from unlearn.study.rates import over_seeds

POINT = ("e_u", "e_r", "ratio", "cos_u", "cos_r")
OUTCOME = ("forget_ps", "forget_ps_end", "retain_ps_end", "price")


def beside(points: DataFrame, ends: DataFrame) -> DataFrame:
    """Each objective's point at each step beside what came of its run.

    Args:
        points: of sweeps: step, risk, method, hyper_param (NaN: the default), geffect and, with `sweep_norms`, cosine.
        ends: that of `rates.stopped`; where a method was run at several rates and seeds, the mean is taken over the seeds and
            the best over the rates.

    Returns:
        Columns step, method, hyper, e_u, e_r, ratio (e_r / |e_u|), cos_u, cos_r where there are cosines, forget_ps,
        forget_ps_end, retain_ps_end, price.

    Raises:
        ValueError: an objective has two points at a step.
    """
    twice = points[points.duplicated(["step", "risk", "method", "hyper_param"])]
    if len(twice):
        line = twice.iloc[0]
        raise ValueError(f"sweeps: {line['method']} has two points at step {line['step']}; give one sweep of each step")
    values = [name for name in ("geffect", "cosine") if name in points]
    wide = points.pivot_table(index=["step", "method", "hyper_param"], columns="risk", values=values, dropna=False)
    wide = wide.dropna(how="all")
    letters = {"geffect": "e", "cosine": "cos", "unlearn": "u", "retain": "r"}
    wide.columns = [f"{letters[value]}_{letters[risk]}" for value, risk in wide.columns]
    wide = wide.reset_index().rename(columns={"hyper_param": "hyper"})
    wide["ratio"] = wide["e_r"] / wide["e_u"].abs().replace(0, np.nan)
    keys = ["method", "hyper"]
    of_runs = over_seeds(ends).sort_values("forget_ps", kind="stable").drop_duplicates(keys)[[*keys, "lr", *OUTCOME]]
    return wide.merge(of_runs, on=keys)  # NaN, the default, meets NaN


def compared(points: DataFrame, ends: DataFrame) -> DataFrame:
    """Spearman's rho of each of the points' numbers with what came, by step, over objectives and hyper-parameters.

    Returns:
        Columns step, predictor, outcome, runs, rho, low, high (as `prediction.correlations`).

    Raises:
        ValueError: fewer than `FEWEST` of the sweep's objectives were run.
    """
    found = []
    table = beside(points, ends)
    if len(table) and (most := table.groupby("step").size().max()) < FEWEST:
        raise ValueError(f"{most} objectives of the sweep were run: a rank correlation is told of at least {FEWEST}")
    for step, at in table.groupby("step"):
        for name in (name for name in POINT if name in at):
            for outcome in OUTCOME:
                if (told := related(at, name, outcome)) is not None:
                    found.append({"step": step, "predictor": name, "outcome": outcome} | told)
    return DataFrame(found)
