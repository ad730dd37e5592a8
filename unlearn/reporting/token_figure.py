"""The text of some forget rows, each token coloured by its share of e_r."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import isfinite
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.patches import Rectangle
from pandas import DataFrame

from unlearn.reporting.style import (
    HEAT,
    SYMBOLS,
    UNIT,
    WIDE,
    colour_bar,
    colour_norm,
)
from unlearn.reporting.tables import (
    largest_rows,
    token_lines,
)


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
