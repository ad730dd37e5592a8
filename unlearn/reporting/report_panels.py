"""A report's panels as Vega-Lite: a small plot each, whose numbers the page puts in.

Colours are names that the page replaces by those of its theme: @ink, @paper, @grey, @low, @mid and @high of a colour bar, and
@run0, @run1, ... of the runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import log1p, log10
from typing import Any, NamedTuple

import numpy as np
from pandas import DataFrame

from unlearn.reporting.style import PALETTE, largest, linear_range, symlog_ticks

RUNS = PALETTE[:6]  # without black, which a dark page would hide
DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3])  # of the first six runs, the next six, ...
HEIGHT = 170  # pixels
NEAR = 0.17  # of an axis from 0: a tick there would stand on the 0


class Panel(NamedTuple):
    """A plot.

    Args:
        title: stands above it; what is on its y axis, with the unit, below that.
        label: see `title`.
        table: the page's table whose rows it shows, those that have the values of `where`.
        spec: Vega-Lite, without data.
        where: see `table`.
        step: which choice on the page sets its step; None: none does.
        first: it begins a line of panels.
    """

    title: str
    label: str
    table: str
    spec: dict[str, Any]
    where: Mapping[str, Any] = {}
    step: str | None = None
    first: bool = False


class Bar(NamedTuple):
    """A colour bar: its label, and ticks as (how far from left, in %, text)."""

    label: str
    ticks: list[tuple[float, str]]


@dataclass
class Figure:
    """Panels with one table, a sentence or two on how to read them, and what is not in them."""

    name: str
    title: str
    reading: str
    table: DataFrame
    panels: list[Panel] = field(default_factory=list)
    bar: Bar | None = None
    steps: list[int] = field(default_factory=list)  # to choose from
    notes: list[str] = field(default_factory=list)
    small: bool = False  # four panels a line
    kind: str = "plots"  # or "tokens", or "numbers": the table itself


def not_finite(table: DataFrame, values: Sequence[str], what: str = "values") -> list[str]:
    """How many lines have a value that is not finite, in words; nothing where none has."""
    count = int((~np.isfinite(table[list(values)].to_numpy(dtype=float))).any(axis=1).sum())
    return [f"{count} of {len(table)} {what} are not finite, and are not drawn."] if count else []


def not_finite_each(table: DataFrame, labels: Mapping[str, str]) -> list[str]:
    """The same of each of these columns by itself, called so; a run without any number in one did not measure it."""
    said = []
    for name, label in labels.items():
        measured = table.groupby("run")[name].transform(lambda values: np.isfinite(values).any()).astype(bool)
        said += not_finite(table[measured], [name], f"values of {label}")
    return said


def colours(names: Sequence[str]) -> dict[str, Any]:
    """The encoding of runs, the same in every panel."""
    places = [f"@run{i % len(RUNS)}" for i in range(len(names))]
    return {"field": "run", "type": "nominal", "scale": {"domain": list(names), "range": places}, "legend": None}


def dashes(names: Sequence[str]) -> dict[str, Any]:
    found = [DASHES[i // len(RUNS) % len(DASHES)] for i in range(len(names))]
    return {"field": "run", "type": "nominal", "scale": {"domain": list(names), "range": found}, "legend": None}


def power(value: float) -> str:
    """0 or a signed power of ten."""
    up = str(round(log10(abs(value)))).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")) if value else ""
    return f"{'−' if value < 0 else ''}10{up}" if value else "0"


def scaled(values: Any, per_side: int = 3, across: float | None = None) -> dict[str, Any]:
    """Scale and axis of a quantitative channel: symlog where its values span decades, as in the other figures.

    Args:
        values: all that the axis shows, or that should fit on it.
        per_side: ticks above 0, and below, of a symlog scale.
        across: a value that has to be on the axis, too.
    """
    shown = np.asarray(values, dtype=float).ravel()
    shown = np.append(shown[np.isfinite(shown)], [] if across is None else [across])
    linear, high = linear_range(shown), largest(shown)
    if linear is None:
        low, up = ends(shown)
        return {"scale": {"domain": [low, up], "nice": False}, "axis": {"tickCount": 5}}
    places = np.sign(shown) * np.log1p(np.abs(shown) / linear)
    margin = 0.04 * float(np.ptp(places))
    domain = [float(np.sign(at) * linear * np.expm1(abs(at))) for at in (places.min() - margin, places.max() + margin)]
    if not (shown < 0).any():
        per_side, domain[0] = 2 * per_side, max(0.0, domain[0])
    ticks = [tick for tick in symlog_ticks(linear, high, per_side) if not 0 < abs(along(tick, high, linear)) < NEAR]
    ticks = [tick for tick in ticks if domain[0] <= tick <= domain[1]]
    return {"scale": {"type": "symlog", "constant": linear, "domain": domain, "nice": False}, "axis": powers(ticks)}


def ends(shown: Any) -> tuple[float, float]:
    """The ends of a linear axis: a little more than the values, from 0 where they reach near it."""
    low, up = (float(shown.min()), float(shown.max())) if len(shown) else (0.0, 1.0)
    if low == up:
        return low - (abs(low) / 2 or 1), up + (abs(up) / 2 or 1)
    margin = 0.05 * (up - low)
    return 0.0 if 0 <= low < up / 2 else low - margin, 0.0 if low / 2 < up <= 0 else up + margin


def along(value: float, high: float, linear: float) -> float:
    """Where a value is on a symlog scale: 0 at 0, 1 at `high`, -1 at -`high`."""
    return float(np.sign(value)) * log1p(abs(value) / linear) / log1p(high / linear)


def powers(ticks: Sequence[float]) -> dict[str, Any]:
    """An axis with those ticks as powers of ten."""
    texts = [power(tick) for tick in ticks]
    return {"values": list(ticks), "labelExpr": f"{texts}[indexof({list(ticks)}, datum.value)]", "labelOverlap": "greedy"}


def quantity(
    field: str, values: Any, title: str | None = None, per_side: int = 3, across: float | None = None
) -> dict[str, Any]:
    """The encoding of a number on an axis that fits its values; see `scaled`."""
    found = scaled(values, per_side, across)
    found["axis"] = {**found["axis"], "title": title}
    return {"field": field, "type": "quantitative", **found}


def share(field: str, values: Any = (), title: str | None = None) -> dict[str, Any]:
    """The encoding of a number from 0 to 1, on the whole of that."""
    domain = [min(0.0, *map(float, values)), max(1.0, *map(float, values))] if len(values) else [0, 1]
    return {"field": field, "type": "quantitative", "scale": {"domain": domain}, "axis": {"title": title, "tickCount": 5}}


def tip(*fields: tuple[str, str]) -> list[dict[str, Any]]:
    """What hovering tells: (field, title) each; a title that ends in a space is of a text, or of a whole number."""
    return [
        {"field": field, "title": title.strip(), "type": "nominal"}
        if title.endswith(" ")
        else {"field": field, "title": title, "type": "quantitative", "format": ".4~g"}
        for field, title in fields
    ]


def zero(channel: str = "y", at: float = 0) -> dict[str, Any]:
    """A thin line across."""
    return {"data": {"values": [{}]}, "mark": {"type": "rule", "color": "@grey"}, "encoding": {channel: {"datum": at}}}


def not_measured(steps: Sequence[int], words: str) -> dict[str, Any]:
    """Words in place of the points, where the chosen `step` is none of these."""
    above = {axis: {"expr": at} for axis, at in (("x", "width / 2"), ("y", "height / 4"))}
    text = {"expr": f"'{words} at step ' + step"}
    return {
        "data": {"values": [{}]},
        "transform": [{"filter": f"indexof({list(steps)}, step) < 0"}],
        "mark": {"type": "text", "text": text, "color": "@soft", "fontSize": 12, **above},
    }


def diagonal(domain: Sequence[float]) -> dict[str, Any]:
    """A thin line where both axes, of one scale, are equal."""
    along_both = {channel: {"field": "both", "type": "quantitative"} for channel in ("x", "y")}
    values = [{"both": float(value)} for value in domain]
    return {"data": {"values": values}, "mark": {"type": "line", "color": "@grey", "strokeWidth": 1}, "encoding": along_both}


def lines(
    x: tuple[str, str], y: dict[str, Any], names: Sequence[str], told: Sequence[tuple[str, str]], across: float | None = None
) -> dict[str, Any]:
    """A line and its points a run over x, a field and its title."""
    whole = {"tickMinStep": 1} if x[0] in ("step", "steps", "k") else {}
    across_x = {"field": x[0], "type": "quantitative", "scale": {"zero": False}}
    drawn = {
        "mark": {"type": "line", "point": {"size": 26, "filled": True}, "strokeWidth": 1.8, "tooltip": True},
        "encoding": {
            "x": across_x | {"axis": {"title": x[1], "tickCount": 6, "grid": False, "labelOverlap": True, **whole}},
            "y": y,
            "color": colours(names),
            "strokeDash": dashes(names),
            "tooltip": tip(("run", "run "), (x[0], f"{x[1]} "), *told),
        },
    }
    return {"height": HEIGHT, "layer": [*([zero(at=across)] if across is not None else []), drawn]}


def points(
    x: dict[str, Any], y: dict[str, Any], names: Sequence[str], told: Sequence[dict[str, Any]], height: int = HEIGHT
) -> dict[str, Any]:
    """A point a row, with lines at 0."""
    drawn = {
        "mark": {"type": "point", "filled": True, "size": 44, "opacity": 0.8},
        "encoding": {"x": x, "y": y, "color": colours(names), "tooltip": list(told)},
    }
    return {"height": height, "layer": [zero(), zero("x"), drawn]}


def heat_map(order: Sequence[str], high: float, linear: float | None) -> dict[str, Any]:
    """Cells of layer (the first at the bottom) and step, coloured by `geffect` on a scale centred on 0."""
    kind = {"type": "linear"} if linear is None else {"type": "symlog", "constant": linear}
    scale = {**kind, "domain": [-high, 0, high], "range": ["@low", "@mid", "@high"], "interpolate": "rgb"}
    colour = {"field": "geffect", "type": "quantitative", "scale": scale, "legend": None}
    absent = {"condition": {"test": "!isValid(datum.geffect)", "value": "@grey"}}
    return {
        "height": len(order) * max(9, min(18, 320 // max(1, len(order)))),
        "mark": {"type": "rect", "invalid": None},
        "encoding": {
            "x": {"field": "step", "type": "ordinal", "axis": {"title": "step", "labelOverlap": True, "labelAngle": 0}},
            "y": {
                "field": "layer",
                "type": "nominal",
                "sort": list(order)[::-1],
                "axis": {"title": "layer", "labelOverlap": True},
            },
            "color": {**absent, **colour},
            "tooltip": tip(("run", "run "), ("layer", "layer "), ("step", "step "), ("geffect", "G-effect, (nats/token)²")),
        },
    }


def colour_bar(label: str, high: float, linear: float | None) -> Bar:
    if linear is None:
        values = [-high, -high / 2, 0.0, high / 2, high]
        return Bar(label, [(50 + 50 * value / high, f"{value:.2g}".replace("-", "−")) for value in values])
    ticks = symlog_ticks(linear, high, 3)
    return Bar(
        label,
        [(50 + 50 * at, power(tick)) for tick in ticks if not 0 < abs(at := along(tick, high, linear)) < NEAR],
    )
