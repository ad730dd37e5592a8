"""The figures of a G-effect folder, drawn from its tables and from nothing else.

    python -m unlearn.reporting.figures FOLDER [--rows 3,17] [--step 10]

draws them again, into FOLDER/figures, each as a PDF (vectors) and a PNG. FOLDER holds the tables, or is a run's folder
with `geffect/` inside. What a figure needs and the tables lack leaves that figure out:

    steps        e and the risks over the steps, and the cosines where they were measured
    layers       e by layer and step; `updates` is the same for the update effect
    instances    e_u against e_r, a point a forget row
    tokens       the text of some forget rows, each token coloured by its share of e_r
    monitor      every step's gradient and update along the risks' gradients, beside the measured ones
    prediction   the change of risk that was measured, beside the update effect and -lr e
    sweep        e_u and e_r of each method at each hyper-parameter; `objectives`, e_r against e_u, a point for each, and
                 `objectives_steps`, both over the steps; `objectives_cosines`, where they were measured

e = <grad L, grad R> is in (nats/token)^2 where the objective L is in nats per token, as the risks R are; weights have
no unit. Values that are not finite are left out and counted, or grey. Tables are data frames as `read` returns them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import NoReturn

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from pandas import DataFrame

from unlearn.reporting.monitor_figure import draw_monitor
from unlearn.reporting.objectives_figure import draw_objectives, draw_objectives_over_steps
from unlearn.reporting.style import (
    COLOURS,
    HEAT,
    LINES,
    NARROW,
    PALETTE,
    SHAPES,
    STYLE,
    SYMBOLS,
    UNIT,
    WIDE,
    colour_bar,
    colour_norm,
    evenly,
    fit_scale,
    left_out,
    legend_above,
    new_figure,
    save,
    step_axis,
    zero_line,
)
from unlearn.reporting.tables import (
    RISKS,
    TABLES,
    at_step,
    by_risk,
    check_choice,
    instance_points,
    layer_grid,
    layer_order,
    read,
    risks_of,
    tables_folder,
)
from unlearn.reporting.token_figure import draw_tokens


def draw(folder: Path, rows: Sequence[int] | None = None, step: int | None = None) -> list[Path]:
    """Draw every figure that the folder's tables allow.

    Args:
        folder: holds the tables, or is a run's folder with them in `geffect/`.
        rows: the forget rows whose tokens are drawn; None: the four with the largest |e_r|.
        step: the step of the tokens and of the sweep; None: each table's last.

    Returns:
        The files written, into `figures/` beside the tables.

    Raises:
        ValueError: there is no table, one is not readable, or the tokens or the sweep lack a wanted row or step.
    """
    folder = tables_folder(folder)
    tables = {name: read(folder / name) for name in TABLES if (folder / name).exists()}
    with mpl.rc_context(STYLE):
        figures = make_figures(tables, rows, step)
        return [file for name, figure in figures.items() for file in save(figure, folder / "figures" / name)]


def make_figures(tables: dict[str, DataFrame], rows: Sequence[int] | None = None, step: int | None = None) -> dict[str, Figure]:
    """The figures that the tables allow, by name. Raises ValueError as `draw` does."""
    check_choice(tables, rows, step)
    none = DataFrame()
    table = {name: tables.get(name, none) for name in TABLES}
    figures = {
        "steps": draw_steps(table["steps.csv"]),
        "layers": draw_layers(table["layers.csv"], "geffect", f"G-effect {UNIT}; below 0: a step raises the risk"),
        "updates": draw_layers(table["updates.csv"], "update_effect", "update effect (nats/token); above 0: the risk rises"),
        "instances": draw_instances(table["instances.csv"]),
        "tokens": draw_tokens(table["tokens.parquet"], rows, step),
        "monitor": draw_monitor(table["monitor.csv"], table["steps.csv"], table["prediction.csv"]),
        "prediction": draw_prediction(table["prediction.csv"]),
        "sweep": draw_sweep(table["sweep.csv"], step),
        "objectives": draw_objectives(table["sweep.csv"], step),
        "objectives_steps": draw_objectives_over_steps(table["sweep.csv"]),
        "objectives_cosines": draw_objectives(table["sweep.csv"], step, "cosine"),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


# Reading


# What is drawn, as numbers


# Axes


# Figures: each is None where its table has nothing to show


def draw_steps(table: DataFrame) -> Figure | None:
    """Panels: e_u and e_r, the two risks, and the two cosines where they were measured, over the steps."""
    if not len(table):
        return None
    panels = {"geffect": f"G-effect {UNIT}", "risk_value": "risk (nats/token)", "cosine": "cosine of the gradients"}
    shown = [value for value in panels if value != "cosine" or table["cosine"].notna().any()]
    figure = new_figure(2.3)
    for axes, value in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        values = by_risk(table, value, "step")
        for risk in values:
            axes.plot(values[risk], **LINES[risk], label=RISKS[risk])
        axes.set_ylabel(panels[value])
        axes.set_title(left_out(values).strip(" ()"))
        step_axis(axes)
        if value != "cosine":
            fit_scale(axes.yaxis, values)
        if value != "risk_value":
            zero_line(axes)
    legend_above(figure, 2)
    return figure


def draw_layers(table: DataFrame, value: str, label: str) -> Figure | None:
    """A heat map layer x step for each risk, the embedding at the bottom, on one colour scale."""
    if not len(table):
        return None
    grids = {risk: layer_grid(table, value, risk) for risk in risks_of(table)}
    order = layer_order(table["layer"])
    norm = colour_norm(np.stack([grid.to_numpy() for grid in grids.values()]))
    figure = new_figure(min(4.2, 1.5 + 0.12 * len(order)), WIDE if len(grids) > 1 else NARROW + 0.6)
    panels = figure.subplots(1, len(grids), sharey=True, squeeze=False)[0]
    for axes, (risk, grid) in zip(panels, grids.items(), strict=True):
        heat_map(axes, grid, norm)
        axes.set_title(RISKS[risk] + (", grey: no finite value" if grid.isna().any(axis=None) else ""))
    panels[0].set_ylabel("layer")
    colour_bar(figure, norm, label.replace("; ", "\n"), ax=list(panels))
    return figure


def heat_map(axes: Axes, grid: DataFrame, norm: Normalize) -> None:
    """Draw (layers, steps) cells; layers that are no block are taller among many blocks, to have room for their names."""
    blocks = sum(layer.isdecimal() for layer in grid.index)
    heights = [1.0 if layer.isdecimal() else max(1.0, blocks / 18) for layer in grid.index]
    edges = np.concatenate([[0.0], np.cumsum(heights)])
    cells = np.ma.masked_invalid(grid.to_numpy(dtype=float))
    axes.pcolormesh(np.arange(grid.shape[1] + 1), edges, cells, norm=norm, cmap=HEAT, edgecolors="face", linewidth=0.2)
    every = next((n for n in (1, 2, 5, 10, 20) if blocks <= 18 * n), 50)
    named = [i for i, layer in enumerate(grid.index) if not layer.isdecimal() or int(layer) % every == 0]
    axes.set_yticks([(edges[i] + edges[i + 1]) / 2 for i in named], [grid.index[i] for i in named])
    counted = range(0, grid.shape[1], ceil(grid.shape[1] / 8))
    axes.set_xticks([i + 0.5 for i in counted], [str(grid.columns[i]) for i in counted])
    axes.tick_params(length=2)
    axes.set_xlabel("step")


def draw_instances(table: DataFrame) -> Figure | None:
    """e_r against e_u, a point a forget row, at six steps at most; both scales are the same in all panels."""
    if risks_of(table) != list(RISKS):
        return None
    panels = {step: instance_points(table, step) for step in evenly(list(table["step"].unique()), 6)}
    panels = {step: points for step, points in panels.items() if list(points) == list(RISKS)}
    if not panels:
        return None
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    lines = ceil(len(panels) / columns)
    figure = new_figure(0.5 + 1.9 * lines, WIDE if columns == 3 else NARROW * columns)
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    together = pd.concat(panels.values())
    for axes, (step, points) in zip(grid.flat, panels.items(), strict=False):
        whole = points.dropna()
        axes.scatter(whole["unlearn"], whole["retain"], s=9, color=PALETTE[0], alpha=0.55, linewidths=0)
        axes.set_title(f"step {step}" + left_out(points))
        zero_line(axes, both=True)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes in grid.flat[max(0, len(panels) - columns) : len(panels)]:
        axes.tick_params(labelbottom=True)  # the lowest of each column, where the last line is not full
    fit_scale(grid[0, 0].xaxis, together["unlearn"], per_side=2)
    fit_scale(grid[0, 0].yaxis, together["retain"])
    figure.supxlabel(f"{SYMBOLS['unlearn']}, G-effect on the unlearn risk {UNIT}", fontsize=8)
    figure.supylabel(f"{SYMBOLS['retain']}, on the retain risk {UNIT}", fontsize=8)
    return figure


def draw_prediction(table: DataFrame) -> Figure | None:
    """Above: the measured change of each risk and its two predictions over the steps; below: one against the other."""
    risks = risks_of(table)
    if not risks:
        return None
    series = {
        "risk_change": ("measured change of risk", "#000000", "-", "o"),
        "update_effect": ("update effect", "#D55E00", "--", "s"),  # hollow: hides no point
        "minus_lr_geffect": (r"$-$learning rate $\times$ G-effect", "#0072B2", ":", "^"),
    }
    figure = new_figure(4.6, WIDE if len(risks) > 1 else NARROW)
    grid = figure.subplots(2, len(risks), squeeze=False)
    for (above, below), risk in zip(grid.T, risks, strict=True):
        lines = table[table["risk"] == risk].sort_values("step")
        for value, (label, colour, dashes, marker) in series.items():
            fill = "none" if value == "update_effect" else colour
            style = {"color": colour, "linestyle": dashes, "marker": marker, "markerfacecolor": fill}
            above.plot(lines["step"], lines[value], **style, label=label)
        zero_line(above)
        fit_scale(above.yaxis, lines[list(series)])
        step_axis(above)
        above.set_title(RISKS[risk])
        above.set_ylabel("change of risk (nats/token)")
        against_measured(below, lines[["update_effect", "risk_change"]], COLOURS[risk])
    legend_above(figure, 3 if len(risks) > 1 else 1)
    return figure


def against_measured(axes: Axes, lines: DataFrame, colour: str) -> None:
    """Scatter the measured change against the update effect on equal scales, with the diagonal where they agree."""
    whole = lines.dropna()
    axes.scatter(whole["update_effect"], whole["risk_change"], s=12, color=colour, zorder=2)
    ends = [whole.min(axis=None), whole.max(axis=None)] if len(whole) else []
    axes.plot(ends, ends, color="0.6", linewidth=0.6, zorder=0)
    zero_line(axes, both=True)
    fit_scale(axes.xaxis, whole, per_side=2)
    fit_scale(axes.yaxis, whole)
    axes.set_title(left_out(lines).strip(" ()"))
    axes.set_xlabel("update effect (nats/token)")
    axes.set_ylabel("measured change (nats/token)")


def draw_sweep(table: DataFrame, step: int | None) -> Figure | None:
    """e_u and e_r of each method against its hyper-parameter; a method without one is a line across."""
    if not len(table):
        return None
    lines = at_step(table, step)
    risks = risks_of(lines)
    methods = list(dict.fromkeys(lines["method"]))
    figure = new_figure(2.5 + 0.16 * ceil(len(methods) / 4), WIDE if len(risks) > 1 else NARROW)
    panels = figure.subplots(1, len(risks), squeeze=False)[0]
    for axes, risk in zip(panels, risks, strict=True):
        there = lines[lines["risk"] == risk]
        for i, method in enumerate(methods):
            sweep_line(axes, there[there["method"] == method], i)
        zero_line(axes)
        fit_scale(axes.yaxis, there["geffect"])
        fit_scale(axes.xaxis, there["hyper_param"])
        axes.set_ylabel(f"{SYMBOLS[risk]}, G-effect {UNIT}")
        axes.set_xlabel("hyper-parameter")
        axes.set_title(f"{RISKS[risk]}, step {lines['step'].iloc[0]}{left_out(there[['geffect']])}")
        if there["hyper_param"].isna().all():
            axes.set_xticks([])
    legend_above(figure, 4 if len(risks) > 1 else 2)
    return figure


def sweep_line(axes: Axes, lines: DataFrame, i: int) -> None:
    """The i-th method's line, and a line across for its value without a hyper-parameter."""
    colour, marker = PALETTE[i % len(PALETTE)], SHAPES[i % len(SHAPES)]
    swept = lines.dropna(subset="hyper_param").sort_values("hyper_param")
    for method in swept["method"].unique():
        axes.plot(swept["hyper_param"], swept["geffect"], color=colour, marker=marker, label=method)
    for line in lines[lines["hyper_param"].isna()].itertuples():
        axes.axhline(line.geffect, color=colour, linestyle=("--", "-.", ":")[i % 3], label=f"{line.method} (default)")


# The command


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises ValueError for what a user got wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m unlearn.reporting.figures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = _refuse  # type: ignore[method-assign]
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="has the tables, or is a run's folder with geffect/ inside")
    parser.add_argument(
        "--rows",
        type=_whole_numbers,
        metavar="N,N",
        help="forget rows whose tokens to draw (default: the four with the largest |e_r|)",
    )
    parser.add_argument("--step", type=int, metavar="N", help="the step of the tokens and of the sweep (default: the last)")
    return parser.parse_args(argv)


def _whole_numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of rows such as 3,17") from error


def _refuse(message: str) -> NoReturn:
    raise ValueError(f"{message}; usage: python -m unlearn.reporting.figures FOLDER [--rows N,N] [--step N]")


def main(argv: list[str]) -> int:
    """Draw a folder's figures and print their files; 2 for what a user got wrong."""
    try:
        args = parse_args(argv)
        files = draw(args.folder, args.rows, args.step)
        if not files:
            raise ValueError(f"{args.folder}: its tables hold nothing to draw")
    except ValueError as error:
        print(f"unlearn.reporting.figures: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"unlearn.reporting.figures: {error}", file=sys.stderr)
        return 1
    print(*files, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
