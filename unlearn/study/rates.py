"""At which learning rate, and until which step, each method forgets most while it keeps what it is asked to."""

from __future__ import annotations

import numpy as np
from pandas import DataFrame

RISE = 0.5  # nats a token that the forget loss has to rise by for a run to have a price
KEYS = ["method", "hyper", "seed"]
ENDS = ["forget_ps", "retain_ps", "forget_ps_end", "retain_ps_end", "price", "price_ps", "price_span"]


def stopped(lines: DataFrame, share: float = 0.9) -> DataFrame:
    """Each run stopped where its forget PS is lowest among the steps that keep `share` of the original's retain PS.

    Step 0 always keeps it, so that every run has a line: it costs nothing, where arXiv 2406.09179's control search mixes
    weights (`evaluation_everything.py control=true`).

    Args:
        lines: a table of `runs.lines_of`.

    Returns:
        Columns run, method, lr, seed, hyper, epochs, step, forget_ps, retain_ps, forget_ps_end, retain_ps_end, and those of
        `price`, in the order of the lines; `share` of the retain PS at the run's first step is the bar.

    Raises:
        ValueError: a run has no retain PS at its first step.
    """
    found = []
    for run, table in lines.groupby("run", sort=False):
        table = table.sort_values("step")
        first, last = table.iloc[0], table.iloc[-1]
        if np.isnan(first["retain_ps"]):
            raise ValueError(f"{run}: no retain PS at step {first['step']}, its first; what it keeps is told from there")
        best = table[table["retain_ps"] >= share * first["retain_ps"]].sort_values("forget_ps", kind="stable").iloc[0]
        line = {"run": run} | {name: best[name] for name in ("method", "lr", "seed", "hyper", "epochs", "step")}
        line |= {name: best[name] for name in ("forget_ps", "retain_ps")}
        line |= {f"{name}_end": last[name] for name in ("forget_ps", "retain_ps")}
        found.append(line | price(table))
    return DataFrame(found)


def price(table: DataFrame, rise: float = RISE) -> dict[str, float]:
    """What a run's retain loss has risen by, in nats a token, when its forget loss has first risen by `rise`.

    It compares methods where they have raised the forget loss by as much, whatever their rates, and has a value where the
    retain PS has hardly moved. On straight lines between the scored steps: the more the loss rises between the two, the less
    is known of what is between.

    Returns:
        price; price_ps, the forget PS there; price_span, what the forget loss rises by between the two scored steps around it,
        in nats a token. NaN where it never rises by `rise`.
    """
    table = table.sort_values("step")
    forget, retain = (table[f"{name}_loss"].to_numpy() - table[f"{name}_loss"].iloc[0] for name in ("forget", "retain"))
    reached = np.flatnonzero(forget >= rise)
    if not len(reached) or reached[0] == 0:
        return dict.fromkeys(("price", "price_ps", "price_span"), float("nan"))
    around = slice(reached[0] - 1, reached[0] + 1)
    span = float(np.diff(forget[around])[0])
    weight = (rise - forget[around][0]) / span
    there = {"price": retain[around], "price_ps": table["forget_ps"].to_numpy()[around]}
    return {name: float(before + weight * (after - before)) for name, (before, after) in there.items()} | {"price_span": span}


def best(rates: DataFrame) -> DataFrame:
    """The line of each method, hyper-parameter and seed with the lowest forget PS; of two alike the lower rate."""
    order = rates.sort_values(["forget_ps", "lr"], kind="stable")
    return order.drop_duplicates(KEYS).sort_index()


def over_seeds(ends: DataFrame, fewest: int = 1) -> DataFrame:
    """Means and standard deviations over the seeds of what was otherwise the same, where there are `fewest` seeds or more.

    Args:
        ends: a table of `stopped`.

    Returns:
        Columns method, hyper, lr, epochs, seeds, and each of `ENDS` with its standard deviation (of n - 1) as NAME_sd.
    """
    groups = ends.groupby(["method", "hyper", "lr", "epochs"], dropna=False)
    table = groups.size().rename("seeds").to_frame()
    for name in ENDS:
        table[name], table[f"{name}_sd"] = groups[name].mean(), groups[name].std()
    return table[table["seeds"] >= fewest].reset_index()
