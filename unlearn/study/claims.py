"""The numbers of what arXiv 2502.19301 says of objectives, of runs as they were: seen or not is for who reads them."""

from __future__ import annotations

import numpy as np
import pandas as pd
from pandas import DataFrame

from unlearn.study.prediction import spearman

THIRDS = ("shallow", "middle", "deep")


def together(lines: DataFrame) -> DataFrame:
    """Whether e_r falls with e_u along a run.

    Returns:
        Columns run, method, rho (Spearman's, of e_u and e_r over its steps), ratio_first, ratio_last (e_r / |e_u| at step 0 and
        at the last step measured), keeps (the share of its steps with e_r >= 0).
    """
    found = []
    for run, table in lines.dropna(subset=["e_u", "e_r"]).groupby("run", sort=False):
        table = table.sort_values("step")
        e_u, e_r = table["e_u"].to_numpy(dtype=float), table["e_r"].to_numpy(dtype=float)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = e_r / abs(e_u)
        line = {"run": run, "method": table["method"].iloc[0], "rho": spearman(e_u, e_r)}
        found.append(line | {"ratio_first": ratio[0], "ratio_last": ratio[-1], "keeps": float((e_r >= 0).mean())})
    return DataFrame(found)


def by_depth(layers: DataFrame) -> DataFrame:
    """Which third of the blocks has how much of the sum of |e| over the blocks.

    Args:
        layers: columns run, risk, layer (a block's index, or the name of what is no block), step, geffect.

    Returns:
        Columns run, risk, step, shallow, middle, deep, which add up to 1.
    """
    index = pd.to_numeric(layers["layer"], errors="coerce")
    blocks = layers[index.notna()].assign(depth=index.dropna().astype(int))
    third = (blocks["depth"] * len(THIRDS)) // (blocks.groupby("run")["depth"].transform("max") + 1)
    blocks = blocks.assign(third=third.map(dict(enumerate(THIRDS))), size=blocks["geffect"].abs())
    sums = blocks.pivot_table(index=["run", "risk", "step"], columns="third", values="size", aggfunc="sum", sort=False)
    sums = sums.reindex(columns=list(THIRDS), fill_value=0.0)
    return sums.div(sums.sum(axis=1), axis=0).reset_index().rename_axis(columns=None)


def one_step(foretold: DataFrame) -> DataFrame:
    """How well the effect of a step says what the risk did.

    Args:
        foretold: columns risk, minus_lr_geffect, update_effect, risk_change (nats a token), a line a run and measured step.

    Returns:
        Columns risk, predictor, steps, rose (the share of steps at which the risk rose, whatever was foretold), signs (the
        share at which the prediction's sign is right), rho (Spearman's, with the change) and ratio (the median of change over
        prediction). Left out: steps that changed no weight, and those at which a number is not finite.
    """
    found = []
    moved = foretold[foretold["update_effect"] != 0].dropna(subset=["minus_lr_geffect", "update_effect", "risk_change"])
    for risk, table in moved.groupby("risk", sort=False):
        change = table["risk_change"].to_numpy(dtype=float)
        for name in ("minus_lr_geffect", "update_effect"):
            said = table[name].to_numpy(dtype=float)
            line = {"risk": risk, "predictor": name, "steps": len(table), "rose": float((change > 0).mean())}
            line |= {"signs": float((said * change > 0).mean())}
            found.append(line | {"rho": spearman(said, change), "ratio": float(np.median(change / said))})
    return DataFrame(found)
