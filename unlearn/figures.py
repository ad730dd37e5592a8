"""The figures of a G-effect folder, drawn from its tables and from nothing else.

    python -m unlearn.figures FOLDER [--rows 3,17] [--step 10]

draws them again, into FOLDER/figures, each as a PDF (vectors) and a PNG. FOLDER holds the tables, or is a run's folder
with `geffect/` inside. What a figure needs and the tables lack leaves that figure out:

    steps        e and the risks over the steps, and the cosines where they were measured
    layers       e by layer and step; `updates` is the same for the update effect
    instances    e_u against e_r, a point a forget row
    tokens       the text of some forget rows, each token coloured by its share of e_r
    prediction   the change of risk that was measured, beside the update effect and -lr e
    sweep        e_u and e_r of each method at each hyper-parameter

e = <grad L, grad R> is in (nats/token)^2 where the objective L is in nats per token, as the risks R are; weights have
no unit. Values that are not finite are left out and counted, or grey. Tables are data frames as `read` returns them.
"""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from io import BytesIO
from math import ceil, floor, inf, isfinite, log10
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PatchCollection
from matplotlib.colors import Normalize, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from pandas import DataFrame

from unlearn.files import written_beside


class Columns(NamedTuple):
    """What a table needs to have: `keys` name a line of it (no two lines share them), `values` are what was measured."""

    keys: tuple[str, ...]
    values: tuple[str, ...]
    texts: tuple[str, ...] = ("risk", "layer", "module", "method", "token")  # the others are numbers


TABLES = {
    "steps.csv": Columns(("step", "risk"), ("geffect", "cosine", "risk_value")),
    "layers.csv": Columns(("step", "risk", "layer", "module"), ("geffect",)),
    "updates.csv": Columns(("step", "risk", "layer", "module"), ("update_effect",)),
    "instances.csv": Columns(("step", "risk", "row"), ("geffect",), ("risk", "row")),
    "tokens.parquet": Columns(("step", "risk", "row", "position"), ("token", "loss", "geffect")),
    "prediction.csv": Columns(("step", "risk"), ("minus_lr_geffect", "update_effect", "risk_change")),
    "sweep.csv": Columns(("step", "risk", "method", "hyper_param"), ("geffect",)),
}
WHOLE = {"step", "row", "position"}  # whole numbers, unless the table has them as text

RISKS = {"unlearn": "unlearn risk (forget rows)", "retain": "retain risk (held-out rows)"}
SYMBOLS = {"unlearn": "$e_u$", "retain": "$e_r$"}
COLOURS = {"unlearn": "#D55E00", "retain": "#0072B2"}  # Okabe and Ito: told apart by the colour-blind, and in grey
LINES: dict[str, dict[str, Any]] = {
    "unlearn": {"color": COLOURS["unlearn"], "linestyle": "-", "marker": "o"},
    "retain": {"color": COLOURS["retain"], "linestyle": "--", "marker": "s", "markerfacecolor": "none"},  # hides no point
}
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#000000")
SHAPES = "osD^v<>PX"
HEAT = mpl.colormaps["RdBu"].with_extremes(bad="0.75")  # red below 0: a step along -grad L raises the risk

UNIT = "(nats/token)²"
WIDE, NARROW = 6.9, 3.3  # inches: both columns of a page, and one
DPI = 200
STYLE: Any = {  # matplotlib's parameters
    "font.family": ["DejaVu Sans"],
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.linewidth": 0.6,
    "axes.formatter.use_mathtext": True,
    "axes.formatter.limits": (-3, 4),
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # TrueType: text stays text, as publishers ask
    "text.hinting": "no_hinting",  # letters as wide in the PNG as in the PDF
}


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
        "prediction": draw_prediction(table["prediction.csv"]),
        "sweep": draw_sweep(table["sweep.csv"], step),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write the figure as stem.pdf and stem.png, each whole or absent; the same figure gives the same bytes."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    files = [stem.with_name(f"{stem.name}.{kind}") for kind in ("pdf", "png")]
    for file in files:
        metadata = {"CreationDate": None} if file.suffix == ".pdf" else None
        drawn = BytesIO()  # on a full disk matplotlib's own writing ends in an error of another kind
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from")  # a method's name may hold anything
            figure.savefig(drawn, format=file.suffix[1:], dpi=DPI, metadata=metadata)
        with written_beside(file) as beside:
            beside.write_bytes(drawn.getvalue())
    return files


# Reading


def tables_folder(folder: Path) -> Path:
    """The folder that holds the tables: this one, or `geffect/` in it. Raises ValueError where neither does."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    for place in (folder, folder / "geffect"):
        if any((place / name).exists() for name in TABLES):
            return place
    raise ValueError(f"{folder}: no table of the G-effect there, nor in its geffect/; looked for {', '.join(TABLES)}")


def read(file: Path) -> DataFrame:
    """A table with its numbers as numbers, NaN where a value is empty or not finite.

    Raises:
        ValueError: it is not readable, lacks a column, or holds what it cannot hold.
    """
    columns = TABLES[file.name]
    wanted = list(dict.fromkeys(columns.keys + columns.values))
    try:
        table = pd.read_parquet(file) if file.suffix == ".parquet" else pd.read_csv(file, dtype=str, keep_default_na=False)
        if lacking := [name for name in wanted if name not in table.columns]:
            raise ValueError(f"it lacks the columns {', '.join(lacking)}")
        if file.name == "tokens.parquet":
            table = table.dropna(subset=["row"])  # what the retain rows add is no text of a forget row
        return checked(table[wanted].copy(), columns)
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"{file}: not a table to draw from ({' '.join(str(error).split())})") from error


def checked(table: DataFrame, columns: Columns) -> DataFrame:
    """The table with its numbers as numbers. Raises ValueError for a value that cannot be, and for a line given twice."""
    for name in table.columns:
        if name in columns.texts:
            table[name] = table[name].fillna("").astype(str)
            continue
        numbers = pd.to_numeric(table[name]).astype(float)
        table[name] = numbers.where(np.isfinite(numbers))
        if name in WHOLE:
            if not (table[name] % 1 == 0).all():
                raise ValueError(f"a {name} in it is no whole number")
            table[name] = table[name].astype(int)
    if strange := sorted(set(table["risk"]) - set(RISKS)):
        raise ValueError(f"risk={strange[0]!r} in it is neither of {', '.join(RISKS)}")
    if "row" in columns.texts and not table["row"].str.fullmatch("retain|[0-9]+").all():
        raise ValueError("a row in it is neither a number nor 'retain'")
    if (twice := table.duplicated(list(columns.keys))).any():
        line = table.loc[twice, list(columns.keys)].iloc[0]
        raise ValueError(f"{', '.join(f'{key}={value}' for key, value in line.items())} is in it twice")
    return table


def check_choice(tables: dict[str, DataFrame], rows: Sequence[int] | None, step: int | None) -> None:
    """Raises ValueError where the tokens or the sweep lack the wanted step, or the tokens lack a wanted row."""
    for name in ("tokens.parquet", "sweep.csv"):
        if step is not None and name in tables and step not in set(tables[name]["step"]):
            raise ValueError(f"step {step} is not in {name}, which has {abbreviated(tables[name]['step'])}")
    if step is not None and not {"tokens.parquet", "sweep.csv"} & set(tables):
        raise ValueError(f"step {step} is wanted, but there is neither tokens.parquet nor sweep.csv to draw it from")
    if rows is None:
        return
    if "tokens.parquet" not in tables:
        raise ValueError(f"the tokens of rows {abbreviated(rows)} are wanted, but there is no tokens.parquet")
    there = token_lines(tables["tokens.parquet"], step)["row"]
    if strange := sorted(set(rows) - set(there)):
        raise ValueError(f"row {strange[0]} is not in tokens.parquet, which has {abbreviated(there)}")


def abbreviated(numbers: Iterable[int]) -> str:
    """The numbers in order, ranges as 0-19, and of many the first and the last ones."""
    ranges: list[list[int]] = []
    for number in sorted(map(int, set(numbers))):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    texts = [f"{first}-{last}" if last > first else f"{first}" for first, last in ranges]
    return ", ".join(texts if len(texts) <= 12 else [*texts[:9], "...", *texts[-2:]]) or "none"


# What is drawn, as numbers


def risks_of(table: DataFrame) -> list[str]:
    """The risks that the table has, the one to forget first."""
    return [risk for risk in RISKS if len(table) and (table["risk"] == risk).any()]


def by_risk(table: DataFrame, value: str, index: str) -> DataFrame:
    """One line for each `index` (in order), one column for each risk; NaN where there is no value."""
    return table.pivot(index=index, columns="risk", values=value).reindex(columns=risks_of(table))


def at_step(table: DataFrame, step: int | None) -> DataFrame:
    """The table's lines of one step, the last where it is None."""
    return table[table["step"] == (table["step"].max() if step is None else step)]


def token_lines(table: DataFrame, step: int | None) -> DataFrame:
    """The tokens' shares of e_r at one step; of e_u where there is no e_r."""
    lines = at_step(table, step)
    return lines[lines["risk"] == (risks_of(lines) or [""])[-1]]


def layer_order(layers: Iterable[str]) -> list[str]:
    """Layers as the model runs them: embed, blocks by number, norm, lm_head; a name unknown here before the last two."""

    def place(layer: str) -> tuple[int, int, str]:
        if layer.isdecimal():
            return 1, int(layer), layer
        return {"embed": 0, "norm": 3, "lm_head": 4}.get(layer, 2), 0, layer

    return sorted(set(layers), key=place)


def layer_grid(table: DataFrame, value: str, risk: str) -> DataFrame:
    """(layers in order, steps) sums over each layer's modules, NaN where one of them is not finite, or there is none."""
    lines = table[table["risk"] == risk].fillna({value: inf})  # a sum would pass over NaN
    grid = lines.groupby(["layer", "step"])[value].sum().unstack("step")
    order = layer_order(table["layer"])
    return grid.reindex(index=order, columns=sorted(table["step"].unique())).replace([inf, -inf], np.nan)


def instance_points(table: DataFrame, step: int) -> DataFrame:
    """(rows, 2) e_u and e_r of each forget row at a step; what the retain term adds is no row."""
    lines = table[(table["step"] == step) & (table["row"] != "retain")]
    points = by_risk(lines, "geffect", "row")
    return points.sort_index(key=lambda rows: rows.astype(int))


def evenly(steps: Sequence[int], most: int) -> list[int]:
    """The first, the last, and evenly between, `most` at most."""
    ordered = sorted(steps)
    places = np.linspace(0, len(ordered) - 1, min(most, len(ordered))).round().astype(int)
    return [ordered[place] for place in places]


def largest_rows(table: DataFrame, most: int) -> list[int]:
    """The rows whose tokens add up to the largest |e|, the largest first; what is not finite counts as nothing."""
    shares = table.groupby("row")["geffect"].sum().abs()
    return [int(row) for row in shares.sort_values(ascending=False, kind="stable").index[:most]]


def linear_range(values: Any) -> float | None:
    """Where a symlog scale turns linear: a power of ten near the low end of |values|; None where a linear scale will do.

    A linear scale will do where the largest |value| is within two decades of the lowest tenth. Six decades are shown at most.
    """
    sizes = np.abs(np.asarray(values, dtype=float).ravel())
    sizes = sizes[np.isfinite(sizes) & (sizes > 0)]
    if not sizes.size:
        return None
    low, high = float(np.quantile(sizes, 0.1, method="lower")), float(sizes.max())
    if high < 100 * low:
        return None
    return float(10.0 ** floor(log10(max(low, high * 1e-6))))


def symlog_ticks(linear: float, high: float, per_side: int) -> list[float]:
    """0 and whole powers of ten on both sides, evenly far from each other on a symlog scale, `per_side` at most."""
    lowest, highest = round(log10(linear)), floor(log10(high) + 1e-9)
    stride = max(1, ceil((highest - lowest + 1) / per_side))
    powers = [10.0**power for power in range(highest, lowest - 2 + ceil(stride / 2), -stride)]
    return [-power for power in powers] + [0.0] + powers[::-1]


def colour_norm(values: Any) -> Normalize:
    """Colours centred on 0 that reach the largest |value|, symlog where values span decades."""
    high = largest(values) or 1.0
    linear = linear_range(values)
    if linear is None:
        return Normalize(-high, high)
    return SymLogNorm(linear, vmin=-high, vmax=high, base=10)


def largest(values: Any) -> float:
    """The largest |value| that is finite, 0 where there is none."""
    sizes = np.abs(np.asarray(values, dtype=float).ravel())
    return float(sizes[np.isfinite(sizes)].max(initial=0.0))


def visible(token: str) -> str:
    """A token's text on one line: one space before it as it is, any other white space and what the font lacks as a sign."""
    font = get_font(findfont("DejaVu Sans Mono"))
    signs = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"}

    def sign(letter: str) -> str:
        if letter in signs:
            return signs[letter]
        if letter.isprintable() and font.get_char_index(ord(letter)):
            return letter
        return letter.encode("unicode_escape").decode()

    head = " " if re.match(r" \S", token) else ""
    return head + "".join(map(sign, token[len(head) :])) or "∅"


class Piece(NamedTuple):
    """A token, or a part of one that is longer than a line, and where it stands."""

    token: int
    line: int
    column: int
    text: str


def wrap(texts: Sequence[str], width: int) -> list[Piece]:
    """Lay texts out one after the other in lines of `width` letters; only a text longer than a line is cut."""
    pieces: list[Piece] = []
    line = column = 0
    for i, text in enumerate(texts):
        for part in (text[start : start + width] for start in range(0, len(text), width)):
            if column and column + len(part) > width:
                line, column = line + 1, 0
            pieces.append(Piece(i, line, column, part))
            column += len(part)
    return pieces


# Axes


def power_text(value: float, _: int | None = None) -> str:
    """0 or a signed power of ten, as mathematics."""
    return "0" if value == 0 else rf"${'-' if value < 0 else ''}10^{{{round(log10(abs(value)))}}}$"


def fit_scale(axis: Axis, values: Any, per_side: int = 3) -> None:
    """Make one axis symlog where its values span decades; else it stays linear. `per_side`: ticks above 0, and below."""
    if not (np.asarray(values, dtype=float) < 0).any():
        per_side *= 2  # all the room is for one side
    linear = linear_range(values)
    if linear is None:
        axis.set_major_locator(MaxNLocator(min(6, 2 * per_side), steps=[1, 2, 5, 10]))
        return
    set_scale = axis.axes.set_xscale if isinstance(axis, XAxis) else axis.axes.set_yscale
    set_scale("symlog", linthresh=linear)
    axis.axes.autoscale_view()  # margins of the new scale
    axis.set_major_locator(FixedLocator(symlog_ticks(linear, largest(values), per_side)))
    axis.set_major_formatter(FuncFormatter(power_text))
    axis.set_minor_locator(NullLocator())


def step_axis(axes: Axes) -> None:
    """The x axis counts optimiser steps."""
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))


def zero_line(axes: Axes, both: bool = False) -> None:
    """A thin line at 0, below the data."""
    axes.axhline(0, color="0.6", linewidth=0.6, zorder=0)
    if both:
        axes.axvline(0, color="0.6", linewidth=0.6, zorder=0)


def left_out(values: DataFrame) -> str:
    """How many lines have a value that is not finite, in words; nothing where none has."""
    count = int((~np.isfinite(values.to_numpy(dtype=float))).any(axis=1).sum())
    return f" ({count} not finite)" if count else ""


def new_figure(height: float, width: float = WIDE) -> Figure:
    """An empty figure, in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def legend_above(figure: Figure, columns: int) -> None:
    """One legend for all panels, outside of them."""
    handles = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(list(handles.values()), list(handles), loc="outside upper center", ncols=columns)


def colour_bar(figure: Figure, norm: Normalize, label: str, across: bool = False, **place: Any) -> None:
    """A colour bar, upright or `across`, beside `ax` or in `cax`."""
    bar = figure.colorbar(ScalarMappable(norm, HEAT), label=label, orientation="horizontal" if across else "vertical", **place)
    if isinstance(norm, SymLogNorm):
        bar.set_ticks(symlog_ticks(norm.linthresh, float(norm.vmax or 0), 3 if across else 4))
        (bar.ax.xaxis if across else bar.ax.yaxis).set_major_formatter(FuncFormatter(power_text))
    bar.minorticks_off()
    bar.outline.set_linewidth(0.6)


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


def draw_tokens(table: DataFrame, rows: Sequence[int] | None, step: int | None) -> Figure | None:
    """The text of some rows, token after token, coloured by their shares of e_r (of e_u where there is no e_r)."""
    if not len(table) or (rows is not None and not rows):
        return None
    lines = token_lines(table, step)
    risk = lines["risk"].iloc[0]
    chosen = largest_rows(lines, 4) if rows is None else list(dict.fromkeys(rows))
    texts = [lines[lines["row"] == row].sort_values("position") for row in chosen]
    letter, leading, margin, below = 8 * 0.602, 13.0, 8.0, 44.0  # points: DejaVu Sans Mono at 8 points, line height, edges
    width = WIDE * 72
    layouts = [wrap([visible(token) for token in text["token"]], int((width - 2 * margin) / letter)) for text in texts]
    counts = [1 + max((piece.line for piece in layout), default=0) for layout in layouts]
    height = below + margin + leading * sum(count + 1.6 for count in counts)
    figure = Figure(figsize=(width / 72, height / 72))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))  # its unit is the point
    axes.set_axis_off()
    norm = colour_norm(pd.concat(texts)["geffect"])
    top = height - margin
    for row, text, layout, count in zip(chosen, texts, layouts, counts, strict=True):
        axes.text(margin, top - 0.7 * leading, row_title(row, risk, text), fontsize=8)
        top -= 1.1 * leading
        text_boxes(axes, layout, HEAT(norm(np.ma.masked_invalid(text["geffect"]))), (margin, top, letter, leading))
        top -= (count + 0.5) * leading
    bar = figure.add_axes((0.25, 33 / height, 0.5, 6 / height))
    label = f"a token's share of {SYMBOLS[risk]}, G-effect on the {risk} risk {UNIT}, at step {lines['step'].iloc[0]}"
    colour_bar(figure, norm, label, across=True, cax=bar)
    return figure


def row_title(row: int, risk: str, text: DataFrame) -> str:
    """What the row's tokens add up to."""
    loss, share = text["loss"].mean(skipna=False), text["geffect"].sum(skipna=False)
    total = f"{SYMBOLS[risk]} = {share:.3g} {UNIT}" if isfinite(share) else f"{SYMBOLS[risk]} not finite (grey)"
    return f"row {row}: {total}" + (f", loss {loss:.3g} nats/token" if isfinite(loss) else "")


def text_boxes(axes: Axes, layout: Sequence[Piece], colours: Any, place: tuple[float, float, float, float]) -> None:
    """Write pieces of text on boxes of their token's colour. `place`: left, top, a letter's width, a line's height."""
    left, top, letter, leading = place
    boxes = []
    for piece in layout:
        x, y = left + piece.column * letter, top - (piece.line + 1) * leading
        boxes.append(Rectangle((x, y), len(piece.text) * letter, leading - 1.5))
        dark = np.dot(colours[piece.token][:3], (0.299, 0.587, 0.114)) < 0.5
        axes.text(
            x, y + 3.2, piece.text, color="white" if dark else "black", family="DejaVu Sans Mono", fontsize=8, parse_math=False
        )
    faces = [colours[piece.token] for piece in layout]
    axes.add_collection(PatchCollection(boxes, facecolors=faces, edgecolors="0.8", linewidths=0.4), autolim=False)


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
        axes.axhline(line.geffect, color=colour, linestyle=("--", "-.", ":")[i % 3], label=f"{line.method} (none)")


# The command


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises ValueError for what a user got wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m unlearn.figures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
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
    raise ValueError(f"{message}; usage: python -m unlearn.figures FOLDER [--rows N,N] [--step N]")


def main(argv: list[str]) -> int:
    """Draw a folder's figures and print their files; 2 for what a user got wrong."""
    try:
        args = parse_args(argv)
        files = draw(args.folder, args.rows, args.step)
        if not files:
            raise ValueError(f"{args.folder}: its tables hold nothing to draw")
    except ValueError as error:
        print(f"unlearn.figures: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"unlearn.figures: {error}", file=sys.stderr)
        return 1
    print(*files, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
