"""The figure of a layers.csv: by layer the G-effects, where they were measured, the linear CKA and the cosine.

Orange is of the forget rows, blue of the held-out retain rows; full lines compare the unlearned model with the original one,
dashed ones the retain model with that, dotted ones the unlearned model with the retain model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from pandas import DataFrame, Series
from scipy.stats import spearmanr

from unlearn.reporting import style
from unlearn.reporting.tables import RISKS, layer_grid, layer_order, read

VALUES = {"cka": "linear CKA", "cosine": "mean cosine"}
DATA = {"forget": "unlearn", "retain": "retain"}  # whose risk's colour
PAIRS: dict[tuple[str, str], tuple[str, Any]] = {
    ("unlearned", "original"): ("unlearned and original", "-"),
    ("retain", "original"): ("retain model and original", "--"),
    ("unlearned", "retain"): ("unlearned and retain model", ":"),
}


def draw(folder: Path, geffect: Path | None = None, step: int | None = None) -> list[Path]:
    """Draw `<folder>/layers.csv` of one checkpoint into `<folder>/figures/layers`; returns the files.

    Args:
        geffect: the folder of its run's G-effects, from whose layers.csv the step's are drawn above, if it has them.

    Raises:
        ValueError: a table is not readable.
    """
    file = folder / "layers.csv"
    try:
        table = pd.read_csv(file, dtype={"layer": str})
        assert {"model", "beside", "data", "layer", *VALUES} <= set(table), "it lacks columns"
    except (ValueError, AssertionError, OSError) as error:
        raise ValueError(f"{file}: not a table to draw from ({' '.join(str(error).split())})") from error
    effects = effects_at(geffect, step)
    with mpl.rc_context(style.STYLE):
        return style.save(layers_figure(table, effects), folder / "figures" / "layers")


def effects_at(geffect: Path | None, step: int | None) -> DataFrame:
    """(layers, risks) the G-effects of a step, each layer's sum; empty where they were not measured."""
    if geffect is None or step is None or not (geffect / "layers.csv").exists():
        return DataFrame()
    table = read(geffect / "layers.csv")
    table = table[table["step"] == step]
    grids = {risk: layer_grid(table, "geffect", risk) for risk in RISKS if (table["risk"] == risk).any()}
    return DataFrame({risk: grid[step] for risk, grid in grids.items()})


def agreement(table: DataFrame, effects: DataFrame) -> float:
    """Spearman's rank correlation, over blocks, of |e_u| and 1 - CKA of the unlearned and the original model on forget rows.

    Near 1 the layers with a large e_u are those that change most. Nan where there is nothing to compare.
    """
    lines = table[(table["model"] == "unlearned") & (table["beside"] == "original") & (table["data"] == "forget")]
    changed = 1 - lines.set_index("layer")["cka"]
    blocks = [layer for layer in changed.index if layer.isdecimal() and layer in effects.index]
    if "unlearn" not in effects or len(blocks) < 3:
        return float("nan")
    return float(spearmanr(effects.loc[blocks, "unlearn"].abs(), changed[blocks]).statistic)


def layers_figure(table: DataFrame, effects: DataFrame) -> Figure:
    """The panels below each other, the layers on one axis."""
    order = layer_order(table["layer"])
    panels = [*(["geffect"] if len(effects) else []), *VALUES]
    figure = style.new_figure(0.5 + 1.7 * len(panels), style.WIDE * 0.75)
    grid = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    if len(effects):
        for risk in effects:
            grid[0].plot(along(effects[risk], order), **style.LINES[str(risk)] | {"linestyle": "-"})
        style.zero_line(grid[0])
        style.fit_scale(grid[0].yaxis, effects.reindex(order))
        grid[0].set_ylabel(f"G-effect\n{style.UNIT}")
        rho = agreement(table, effects)
        grid[0].set_title("" if rho != rho else rf"rank correlation of |$e_u$| and 1 $-$ CKA on forget rows: {rho:.2f}")
    for axes, value in zip(grid[-len(VALUES) :], VALUES, strict=True):
        for pair, (_, line) in PAIRS.items():
            for data, risk in DATA.items():
                lines = table[(table["model"] == pair[0]) & (table["beside"] == pair[1]) & (table["data"] == data)]
                if len(lines):
                    look = style.LINES[risk] | {"linestyle": line, "marker": "o" if line == "-" else ""}
                    axes.plot(along(lines.set_index("layer")[value], order), **look)
        axes.set_ylabel(VALUES[value])
    every = max(1, len(order) // 16)
    shown = [i for i, layer in enumerate(order) if not layer.isdecimal() or int(layer) % every == 0]
    grid[-1].set_xticks(shown, [order[i] for i in shown])
    grid[-1].set_xlabel("layer")
    figure.legend(handles=_handles(table), loc="outside upper center", ncols=3)
    return figure


def along(values: Series, order: list[str]) -> Series:
    """The values in the order of the layers, by their place."""
    return values.reindex(order).set_axis(np.arange(len(order)))


def _handles(table: DataFrame) -> list[Line2D]:
    names = {"forget": "forget rows", "retain": "held-out retain rows"}
    found = [Line2D([], [], color=style.COLOURS[risk], label=names[data]) for data, risk in DATA.items()]
    there = set(zip(table["model"], table["beside"], strict=True))
    pairs = [look for pair, look in PAIRS.items() if pair in there]
    return found + [Line2D([], [], color="0.3", linestyle=line, label=label) for label, line in pairs]
