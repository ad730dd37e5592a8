"""Which of the rows to forget hurt what is to be kept, and what they have in common."""

from __future__ import annotations

import pandas as pd
from pandas import DataFrame

from unlearn.study.prediction import related

BESIDE = ("loss", "e_u", "tokens", "start")
PARTS = (0.1, 0.2, 0.5)  # of the rows, those with the largest |e_r|


def of_rows(tokens: DataFrame) -> DataFrame:
    """The rows of tokens at each step.

    Args:
        tokens: columns step, row, loss (nats), e_u, e_r, a line a token, whose e add up to the row's.

    Returns:
        Columns step, row, tokens (their number), loss (nats a token), e_u, e_r, start (e_r at the first step), share (of the
        sum of the step's |e_r|); of each step the rows that hurt most first.
    """
    of = tokens.groupby(["step", "row"], as_index=False)
    table = of.agg(tokens=("loss", "size"), loss=("loss", "mean"), e_u=("e_u", "sum"), e_r=("e_r", "sum"))
    first = table[table["step"] == table["step"].min()].set_index("row")["e_r"]
    sizes = table["e_r"].abs()
    table = table.assign(start=table["row"].map(first), share=sizes / sizes.groupby(table["step"]).transform("sum"))
    return table.sort_values(["step", "e_r"], kind="stable", ignore_index=True)


def alike(rows: DataFrame) -> DataFrame:
    """What goes with a row's e_r, and how unevenly the rows share it, at each step.

    Args:
        rows: a table of `of_rows`.

    Returns:
        Columns step, beside (one of `BESIDE`), rows, rho (Spearman's, of it with e_r), low, high (as
        `prediction.correlations`, over rows), and share_0.1, share_0.2, share_0.5: what part of the step's |e_r| that part of
        the rows has which has most. Left out: what is the same for all rows, and e_r beside itself at the first step.
    """
    found = []
    for step, at in rows.groupby("step"):
        largest = at["share"].sort_values(ascending=False).cumsum()
        shares = {f"share_{part:g}": largest.iloc[max(1, round(part * len(at))) - 1] for part in PARTS}
        for name in BESIDE:
            told = None if name == "start" and step == rows["step"].min() else related(at, name, "e_r")
            if told is not None:
                found.append({"step": step, "beside": name, "rows": told.pop("runs")} | told | shares)
    return pd.DataFrame(found)
