"""Every objective of a sweep as a point: what a step along it does to what should go, against what should stay.

Of a table `sweep`: columns step, risk, method, hyper_param (not a number: the method's default), geffect and, where the
gradients' norms were asked for, cosine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from pandas import DataFrame, Series

from unlearn.reporting.style import PALETTE, SHAPES, SYMBOLS, UNIT, WIDE, fit_scale, left_out, new_figure, step_axis, zero_line
from unlearn.reporting.tables import RISKS, at_step, risks_of

NAMES = 4.4  # inches that the names of forty objectives take, one below the other
AREA: dict[str, Any] = {"facecolor": "#009E73", "alpha": 0.08, "linewidth": 0, "zorder": 0}


def draw_objectives(table: DataFrame, step: int | None, value: str = "geffect") -> Figure | None:
    """e_r against e_u at one step, a point an objective, its name beside; those of one method are joined.

    In the green quarter a step raises the unlearn risk and does not raise the retain risk.
    """
    if value == "cosine":
        table = table.dropna(subset=["cosine"]) if "cosine" in table else DataFrame()
    points = plane(at_step(table, step), value) if risks_of(table) == list(RISKS) else DataFrame()
    if len(points) < 2:
        return None
    figure = new_figure(max(3.6, NAMES * min(len(points), 60) / 40))
    axes = figure.subplots()
    for i, (_, of_method) in enumerate(points.groupby("method", sort=False)):
        of_method = of_method.sort_values("hyper_param")
        axes.plot(of_method["unlearn"], of_method["retain"], **_mark(i), linewidth=0.6)
    _scale(axes, points)
    axes.set_xlabel(f"{_of('unlearn', value)}\n(left of 0: a step raises the unlearn risk)")
    axes.set_ylabel(f"{_of('retain', value)}\n(above 0: it lowers the retain risk)")
    axes.set_title(f"step {at_step(table, step)['step'].iloc[0]}{left_out(points[['unlearn', 'retain']])}")
    marks = {method: _mark(i)["color"] for i, method in enumerate(points["method"].unique())}
    _name(axes, points["name"], points["unlearn"], points["retain"], [marks[method] for method in points["method"]])
    return figure


def draw_objectives_over_steps(table: DataFrame, value: str = "geffect") -> Figure | None:
    """e_u and e_r of every objective over the steps, a line each, its name at the end."""
    if risks_of(table) != list(RISKS) or table["step"].nunique() < 2:
        return None
    figure = new_figure(max(3.6, NAMES * min(len(plane(at_step(table, None), value)), 60) / 40), 1.5 * WIDE)
    for axes, risk in zip(figure.subplots(1, len(RISKS)), RISKS, strict=True):
        of_risk = table[table["risk"] == risk]
        last = []
        for i, (_, line) in enumerate(of_risk.groupby(["method", "hyper_param"], sort=False, dropna=False)):
            line = line.sort_values("step")
            axes.plot(line["step"], line[value], **_mark(i), linewidth=0.8)
            last.append(line.iloc[-1])
        ends = DataFrame(last)
        zero_line(axes)
        fit_scale(axes.yaxis, of_risk[value])
        step_axis(axes)
        axes.set_ylabel(_of(risk, value))
        axes.set_title(f"{RISKS[risk]}{left_out(of_risk[[value]])}")
        _name(axes, _names(ends), ends["step"], ends[value], [_mark(i)["color"] for i in range(len(ends))])
    return figure


def plane(lines: DataFrame, value: str) -> DataFrame:
    """A step's lines as a row an objective: method, hyper_param, name, and its value on each risk."""
    keys = ["method", "hyper_param"]
    of_risk = {risk: lines.loc[lines["risk"] == risk, [*keys, value]].rename(columns={value: risk}) for risk in RISKS}
    found = of_risk["unlearn"].merge(of_risk["retain"], on=keys)
    return found.assign(name=_names(found))


def _names(lines: DataFrame) -> Series:
    numbers = lines["hyper_param"].map(lambda number: "" if np.isnan(number) else f" {number:g}")
    return lines["method"] + numbers


def _of(risk: str, value: str) -> str:
    return f"{SYMBOLS[risk]}, G-effect {UNIT}" if value == "geffect" else f"cosine with the {risk} risk's gradient"


def _mark(i: int) -> dict[str, Any]:
    return {"color": PALETTE[i % len(PALETTE)], "marker": SHAPES[i % len(SHAPES)]}


def _scale(axes: Axes, points: DataFrame) -> None:
    zero_line(axes, both=True)
    fit_scale(axes.xaxis, points["unlearn"])
    fit_scale(axes.yaxis, points["retain"])
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    left, high = min(left, 0.0), max(high, 0.0)
    axes.add_patch(Rectangle((left, 0), -left, high, **AREA))
    axes.set(xlim=(left, right), ylim=(low, high))


def _name(axes: Axes, names: Series, x: Series, y: Series, colours: Sequence[str]) -> None:
    """Names in a column on the right, in the order of the points' heights, each joined to its point."""
    finite = np.isfinite(x.to_numpy(dtype=float)) & np.isfinite(y.to_numpy(dtype=float))
    order = np.argsort(y.to_numpy(dtype=float)[finite], kind="stable")
    heights = (np.arange(len(order)) + 0.5) / max(1, len(order))
    for height, i in zip(heights, order, strict=True):
        point = x.to_numpy()[finite][i], y.to_numpy()[finite][i]
        axes.annotate(
            names.to_numpy()[finite][i],
            point,
            (1.04, height),
            textcoords="axes fraction",
            fontsize=6,
            color=np.asarray(colours)[finite][i],
            va="center",
            arrowprops={"arrowstyle": "-", "color": "0.75", "linewidth": 0.4, "shrinkA": 1, "shrinkB": 2, "relpos": (0, 0.5)},
            annotation_clip=False,
        )
