"""What the steps between measurements did, along the risks' gradients measured last, beside what was measured."""

from __future__ import annotations

from matplotlib.figure import Figure
from pandas import DataFrame, concat

from unlearn.reporting.style import (
    LINES,
    NARROW,
    SYMBOLS,
    UNIT,
    WIDE,
    fit_scale,
    legend_above,
    new_figure,
    step_axis,
    zero_line,
)
from unlearn.reporting.tables import RISKS, risks_of

PANELS = {
    "gradient": ("geffect", f"$\\langle g, V\\rangle$ {UNIT}"),
    "update": ("update_effect", "$\\langle\\theta' - \\theta, V\\rangle$ (nats/token)"),
}


def draw_monitor(monitor: DataFrame, steps: DataFrame, prediction: DataFrame) -> Figure | None:
    """Above: each step's own gradient along V, below its update, as a line a risk; as points the values at measurements.

    None where there is no monitor. The points above are of the whole forget set in eval mode, the line of the step's rows;
    with a gradient rule both are of what it makes.
    """
    risks = risks_of(monitor)
    if not risks:
        return None
    if "rule_geffect" in steps:
        steps = steps.assign(geffect=steps["rule_geffect"].fillna(steps["geffect"]))
    figure = new_figure(4.2, WIDE if len(risks) > 1 else NARROW)
    grid = figure.subplots(2, len(risks), squeeze=False)
    for column, risk in zip(grid.T, risks, strict=True):
        lines = monitor[monitor["risk"] == risk].sort_values("step")
        for axes, table, (value, (measured, label)) in zip(column, (steps, prediction), PANELS.items(), strict=True):
            colour = LINES[risk]["color"]
            axes.plot(lines["step"], lines[value], color=colour, linewidth=0.9, label=f"{SYMBOLS[risk]} of each step")
            shown = [lines[value]]
            if len(table):
                points = table[table["risk"] == risk].sort_values("step")
                style = {"color": "black", "linestyle": "none", "marker": "o", "markerfacecolor": "none"}
                axes.plot(points["step"], points[measured], **style, label="measured, whole sets")
                shown.append(points[measured])
            zero_line(axes)
            fit_scale(axes.yaxis, concat(shown))
            step_axis(axes)
            axes.set_ylabel(label)
        column[0].set_title(RISKS[risk])
    legend_above(figure, 3)
    return figure
