"""Which of the rows to forget hurt what is to be kept, and what they have in common."""

from __future__ import annotations

from pandas import DataFrame

from unlearn.study.prediction import related

BESIDE = {"loss": ("loss", 1), "tokens": ("tokens", 1), "-e_u": ("e_u", -1), "-e_r at the start": ("start", -1)}
PARTS = (0.1, 0.2, 0.5)  # of the rows, those that hurt most


def of_rows(tokens: DataFrame) -> DataFrame:
    """The rows of tokens at each step.

    Args:
        tokens: columns step, row, loss (nats), e_u, e_r, a line a token, whose e add up to the row's.

    Returns:
        Columns step, row, tokens (their number), loss (nats a token), e_u, e_r, start (e_r at the first step), share (of the
        sum of e_r below 0 at the step; 0 for a row that does not hurt); of each step the rows that hurt most first.
    """
    of = tokens.groupby(["step", "row"], as_index=False)
    table = of.agg(tokens=("loss", "size"), loss=("loss", "mean"), e_u=("e_u", "sum"), e_r=("e_r", "sum"))
    first = table[table["step"] == table["step"].min()].set_index("row")["e_r"]
    harm = -table["e_r"].clip(upper=0)
    share = (harm / harm.groupby(table["step"]).transform("sum")).fillna(0)
    return table.assign(start=table["row"].map(first), share=share).sort_values(["step", "e_r"], ignore_index=True)


def shares(rows: DataFrame) -> DataFrame:
    """How unevenly the rows hurt: columns step, rows, hurt (how many have e_r below 0), and share_0.1, share_0.2, share_0.5,
    what that part of the rows that hurts most has of the sum of e_r below 0. Of a table of `of_rows`."""
    found = []
    for step, at in rows.groupby("step"):
        most = at["share"].sort_values(ascending=False).cumsum()
        parts = {f"share_{part:g}": most.iloc[n_of(part, len(at)) - 1] for part in PARTS}
        found.append({"step": step, "rows": len(at), "hurt": int((at["e_r"] < 0).sum())} | parts)
    return DataFrame(found)


def n_of(part: float, rows: int) -> int:
    """How many rows a part of them is."""
    return max(1, round(part * rows))


def alike(rows: DataFrame) -> DataFrame:
    """What the rows that hurt have in common, at each step.

    Args:
        rows: a table of `of_rows`.

    Returns:
        Columns step, beside (one of `BESIDE`), rows, rho (Spearman's, of it with -e_r: above 0 where rows with more of it
        hurt more), low, high (as `prediction.correlations`, over rows). Left out: what is the same for all rows, and the
        start beside itself.
    """
    found = []
    for step, at in rows.groupby("step"):
        known = at.assign(harm=-at["e_r"], **{name: sign * at[of] for name, (of, sign) in BESIDE.items()})
        for name, (of, _) in BESIDE.items():
            told = None if of == "start" and step == rows["step"].min() else related(known, name, "harm")
            if told is not None:
                found.append({"step": step, "beside": name, "rows": told.pop("runs")} | told)
    return DataFrame(found)
