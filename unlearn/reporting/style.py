"""How figures look: colours, scales that fit the numbers, legends, and how they are written."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from io import BytesIO
from math import ceil, floor, log10
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, ScalarFormatter
from pandas import DataFrame

from unlearn.io.files import written_beside

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


RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

logging.getLogger("fontTools").setLevel(logging.ERROR)  # a warning of the font's dates for each PDF, where others set up logs


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
    "ps.fonttype": 42,  # matplotlib asks it for PDFs, too: with 3 they have a font twice, for letters from 256 on
    "text.hinting": "no_hinting",  # letters as wide in the PNG as in the PDF
}


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write the figure as stem.pdf and stem.png, each whole or absent; the same figure gives the same bytes.

    It is laid out here, once for both, and stays as it is then.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    lay_out(figure)
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


def lay_out(figure: Figure) -> None:
    """Give everything its place, at the PNG's resolution: matplotlib would do it for each file, and draw twice for it."""
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        if type(axis.get_major_formatter()) is ScalarFormatter:
            axis.set_major_formatter(NumberText())
    if (engine := figure.get_layout_engine()) is None:
        return
    figure.set_dpi(DPI)
    with warnings.catch_warnings(), mpl.rc_context({"figure.autolayout": False, "figure.constrained_layout.use": False}):
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        engine.execute(figure)
        figure.set_layout_engine(None)


class NumberText(ScalarFormatter):
    """Numbers beside an axis as matplotlib writes them, but for being text: mathematics is ten times as long in drawing."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        """The number at `x`."""
        return super().__call__(x, pos).removeprefix(r"$\mathdefault{").removesuffix("}$")


def evenly(steps: Sequence[int], most: int) -> list[int]:
    """The first, the last, and evenly between, `most` at most."""
    ordered = sorted(steps)
    places = np.linspace(0, len(ordered) - 1, min(most, len(ordered))).round().astype(int)
    return [ordered[place] for place in places]


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


def power_text(value: float, _: int | None = None) -> str:
    """0, 1 or a signed power of ten, in text: see `NumberText`."""
    if value == 0:
        return "0"
    power = round(log10(abs(value)))
    size = "10" + str(power).translate(RAISED) if power else "1"
    return "\N{MINUS SIGN}" + size if value < 0 else size


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
