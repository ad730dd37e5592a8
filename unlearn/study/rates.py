"""At which learning rate, and until which step, each method forgets most while it keeps what it is asked to."""

from __future__ import annotations

from pandas import DataFrame

KEYS = ["method", "hyper", "seed"]


def stopped(lines: DataFrame, share: float = 0.9) -> DataFrame:
    """Each run stopped where its forget PS is lowest among the steps that keep `share` of the original's retain PS.

    Step 0 always keeps it, so that every run has a line: it costs nothing, where arXiv 2406.09179's control search mixes
    weights (`evaluation_everything.py control=true`).

    Args:
        lines: a table of `runs.lines_of`.

    Returns:
        Columns run, method, lr, seed, hyper, epochs, step, forget_ps, retain_ps, forget_ps_end, retain_ps_end, in the order of
        the lines; `share` of the retain PS at the run's first step is the bar.
    """
    found = []
    for run, table in lines.groupby("run", sort=False):
        table = table.sort_values("step")
        first, last = table.iloc[0], table.iloc[-1]
        best = table[table["retain_ps"] >= share * first["retain_ps"]].sort_values("forget_ps", kind="stable").iloc[0]
        line = {"run": run} | {name: best[name] for name in ("method", "lr", "seed", "hyper", "epochs", "step")}
        line |= {name: best[name] for name in ("forget_ps", "retain_ps")}
        found.append(line | {f"{name}_end": last[name] for name in ("forget_ps", "retain_ps")})
    return DataFrame(found)


def best(rates: DataFrame) -> DataFrame:
    """The line of each method, hyper-parameter and seed with the lowest forget PS; of two alike the lower rate."""
    order = rates.sort_values(["forget_ps", "lr"], kind="stable")
    return order.drop_duplicates(KEYS).sort_index()
