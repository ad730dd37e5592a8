"""The figure of a robustness.csv: forget and retain scores against the steps of relearning, and against bits.

Orange is of the forget rows, blue of the held-out retain rows, as in the other figures; full lines are of the unlearned model,
dashed ones of the retain model, which never saw the forget rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from pandas import DataFrame

from unlearn.reporting import style

SCORES = {"rouge": "ROUGE-L recall", "probability": "probability", "ps_exact": "PS"}
DATA = {"forget": ("forget rows", style.COLOURS["unlearn"]), "retain": ("held-out retain rows", style.COLOURS["retain"])}
MODELS: dict[str, tuple[str, Any, str]] = {"unlearned": ("unlearned model", "-", "o"), "retain": ("retain model", "--", "s")}
ATTACKS = {"relearn": "steps of relearning", "quantize": "bits of the linear weights"}


def draw(folder: Path) -> list[Path]:
    """Draw `<folder>/robustness.csv` into `<folder>/figures/`; returns the files, none where it has no such attack.

    Raises:
        ValueError: the table is not readable, or is of several checkpoints.
    """
    file = folder / "robustness.csv"
    try:
        table = pd.read_csv(file)
        there = table[table["attack"].isin(ATTACKS)]
        if there["step"].nunique() > 1:
            raise ValueError("it is of several checkpoints; each has its own")
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(f"{file}: not a table to draw from ({' '.join(str(error).split())})") from error
    with mpl.rc_context(style.STYLE):
        figure = robustness_figure(there)
        return [] if figure is None else style.save(figure, folder / "figures" / "robustness")


def robustness_figure(table: DataFrame) -> Figure | None:
    """A column an attack, a row a score; None where the table has no attack on weights."""
    attacks = [name for name in ATTACKS if (table["attack"] == name).any()]
    scores = [
        name for name in SCORES if any(f"{data}_{name}" in table and table[f"{data}_{name}"].notna().any() for data in DATA)
    ]
    if not attacks or not scores:
        return None
    figure = style.new_figure(0.5 + 1.9 * len(scores), style.WIDE if len(attacks) > 1 else style.NARROW)
    grid = figure.subplots(len(scores), len(attacks), squeeze=False, sharey="row")
    for column, attack in zip(grid.T, attacks, strict=True):
        for axes, score in zip(column, scores, strict=True):
            _panel(axes, table[table["attack"] == attack], attack, score)
            axes.set_xlabel(ATTACKS[attack] if axes is column[-1] else "")
    for axes, score in zip(grid[:, 0], scores, strict=True):
        axes.set_ylabel(SCORES[score])
    handles = [Line2D([], [], color=colour, label=name) for name, colour in DATA.values()]
    models = [MODELS[model] for model in MODELS if (table["model"] == model).any()]
    handles += [
        Line2D([], [], color="0.3", linestyle=line, marker=marker, markerfacecolor="none", label=name)
        for name, line, marker in models
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=4 if len(attacks) > 1 else 2)
    return figure


def places(attack: str, settings: Iterable[str]) -> dict[str, int]:
    """Where each setting is on the axis: trained again at its steps; as it is, then ever fewer bits, evenly apart."""
    several = dict.fromkeys(settings)
    if attack == "relearn":
        return {name: int(name.split()[1]) for name in several}
    bits = sorted((name for name in several if name != "as it is"), key=lambda name: -int(name.split()[0]))
    return {name: place for place, name in enumerate(["as it is", *bits])}


def _panel(axes: Axes, table: DataFrame, attack: str, score: str) -> None:
    """One score of both sets and both models; bits are drawn evenly apart, from all to few."""
    at = places(attack, table["setting"])
    for model, (_, line, marker) in MODELS.items():
        for data, (_, colour) in DATA.items():
            rows = table[table["model"] == model]
            if f"{data}_{score}" in rows and rows[f"{data}_{score}"].notna().any():
                look: dict[str, Any] = {"color": colour, "linestyle": line, "marker": marker}
                fill = colour if model == "unlearned" else "none"
                axes.plot([at[setting] for setting in rows["setting"]], rows[f"{data}_{score}"], **look, markerfacecolor=fill)
    if attack == "relearn":
        style.step_axis(axes)
    else:
        axes.set_xticks(list(at.values()), [setting.removesuffix(" bits").replace("as it is", "all") for setting in at])
    axes.set_ylim(-0.03, 1.03)
