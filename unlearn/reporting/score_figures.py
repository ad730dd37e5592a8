"""The figures of the scores, drawn from their tables and from nothing else.

    python -m unlearn.reporting.score_figures FOLDER...

draws them again, into FOLDER/figures, each as a PDF (vectors) and a PNG, where the folder has their table:

    scores     scores.csv: a run's scores over the unlearning steps; a score or a panel without numbers is left out
    control    control.csv: PS against the weight of the unlearned model in its mixture with the original one; the bar and
               the chosen weight are `control.bar` and `control.weight` of the scores.json beside it, where they are there
    lm_eval    scores.csv: accuracies and perplexities of lm-eval's tasks over the unlearning steps

Orange is of the forget rows, blue of the held-out retain rows. A line goes through the steps at which its score was
measured. Values that are not finite are left out and counted.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator
from pandas import Series

from unlearn.reporting import style

DATA = {  # how a column's name begins: what the rows are called, and their colour
    "forget": ("forget rows", style.COLOURS["unlearn"]),
    "retain": ("held-out retain rows", style.COLOURS["retain"]),
    "real_authors": ("real authors", "#009E73"),
    "real_world": ("real world", "#CC79A7"),
}
SHAPES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"), ((0, (4, 1, 1, 1, 1, 1)), "v"))  # a panel's scores in order
OTHERS = ("#000000", "#56B4E9", "#E69F00", "0.55", "#8C510A")  # scores of no data set: none of the colours above
GREY: dict[str, Any] = {"color": "0.4", "linewidth": 0.8, "zorder": 0}


class Panel(NamedTuple):
    """A panel of scores, by how a column's name ends after the data set's (or by all of it), each with what it is called."""

    label: str
    scores: dict[str, str]
    axis: str = "share"  # 0 to 1; or `log`; or `fit`: linear or symlog, as the numbers are
    across: tuple[float, str] | None = None  # a line across, and what it says


ATTACKS = {"auc_loss": "loss", "auc_zlib": "zlib", "auc_min_k": "min-k", "auc_min_k_plus_plus": "min-k++"}
PANELS = (
    Panel("score", {"model_utility": "model utility", "rouge": "ROUGE-L recall"}),
    Panel("score", {"probability": "probability", "truth_ratio": "truth ratio"}),
    Panel("p-value", {"quality": "forget quality"}, "log", (0.05, "0.05")),
    Panel("share of the answer", {"ps_exact": "PS", "ps_perturb": "PS perturbed", "exact_memorization": "memorised"}),
    Panel("AUC of membership", ATTACKS | {"auc_reference": "reference"}, across=(0.5, "chance")),
    Panel("ROUGE-L F1", {"verbmem": "VerbMem", "knowmem": "KnowMem", "utility": "utility"}),
    Panel("accuracy", {"accuracy": "accuracy", "accuracy_norm": "by length"}),
    Panel("loss (nats/token)", {"loss": "loss"}, "fit"),
)
REPORTED = (  # in the report
    *PANELS,
    Panel("share of the answer", {"extraction_strength": "extraction strength", "ps_similar": "PS similar"}),
    Panel("AUC of membership", {"auc_gradnorm": "gradient norm"}, across=(0.5, "chance")),
    Panel("PrivLeak", {"privleak": "PrivLeak", "rows_privleak": "PrivLeak of rows"}, "fit", (0, "as the retain model")),
)
HARNESS = (  # lm-eval's scores: label, axis, how their columns end
    ("accuracy", "share", "_(acc|acc_norm|acc_bytes|acc_mutual_info|(exact_match|em|f1|mcc)(_[^_,]+)?)"),
    ("perplexity, bits", "fit", "_(word_perplexity|byte_perplexity|perplexity|bits_per_byte)"),
)
CONTROL = {"forget_ps": ("forget PS", "unlearn"), "retain_ps": ("retain PS", "retain")}


class Curve(NamedTuple):
    """One score of one data set (or of none, ""): its values by step, the panel's score it is, and how it looks."""

    values: Series
    data: str
    score: str
    style: dict[str, Any]


def draw_scores(run: Path) -> list[Path]:
    """Draw `<run>/scores.csv` into `<run>/figures/`, lm-eval's apart; returns the files, none where it has no score.

    Raises:
        ValueError: the table is not readable, lacks the steps, or has one twice.
    """
    ours = [end for panel in PANELS for end in panel.scores]
    table = read(run / "scores.csv", "step", [*ours, *(end for _, _, end in HARNESS)])
    return written(run, "scores", scores_figure, table) + written(run, "lm_eval", harness_figure, table)


def draw_control(folder: Path, bar: float | None, weight: float | None) -> list[Path]:
    """Draw `<folder>/control.csv` into `<folder>/figures/`; returns the files, none where the table has no PS.

    Args:
        bar: the retain PS to keep; None: not known.
        weight: the chosen one, the largest that keeps it; None: none does, or it is not known.

    Raises:
        ValueError: the table is not readable, lacks the weights, has one twice, or one that is not from 0 to 1.
    """
    return written(folder, "control", control_figure, read(folder / "control.csv", "weight", CONTROL), bar, weight)


def written(folder: Path, name: str, make: Callable[..., Figure | None], *what: Any) -> list[Path]:
    """Make the figure in the house's style and write it, if there is one."""
    with mpl.rc_context(style.STYLE):
        figure = make(*what)
        return style.save(figure, folder / "figures" / name) if figure is not None else []


def read(file: Path, key: str, ends: Iterable[str]) -> dict[str, Series]:
    """The columns of `columns_of` that have a finite value. Raises ValueError as it does."""
    return {name: values for name, values in columns_of(file, key, ends).items() if values.notna().any()}


def columns_of(file: Path, key: str, ends: Iterable[str]) -> dict[str, Series]:
    """The columns whose names end so, each by `key` in order, without its empty fields; NaN where a value is not finite.

    `ends` are regular expressions. Raises ValueError as `draw_scores` and `draw_control` do.
    """
    try:
        table = pd.read_csv(file, dtype=str, keep_default_na=False).fillna("")
        if key not in table:
            raise ValueError(f"it lacks the column {key}")
        keys = pd.to_numeric(table[key]).astype(float)
        if not (keys % 1 == 0 if key == "step" else keys.between(0, 1)).all():
            raise ValueError(f"a {key} in it is {'no whole number' if key == 'step' else 'not from 0 to 1'}")
        if keys.duplicated().any():
            raise ValueError(f"{key}={keys[keys.duplicated()].iloc[0]:.12g} is in it twice")
        table = table.set_index(keys).sort_index()
        wanted = [name for name in table if re.search(f"({'|'.join(ends)})$", name)]
        columns = {name: pd.to_numeric(table.loc[table[name] != "", name]).astype(float) for name in wanted}
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"{file}: not a table to draw from ({' '.join(str(error).split())})") from error
    return {name: values.where(np.isfinite(values)) for name, values in columns.items()}


def curves(table: dict[str, Series], panel: Panel) -> list[Curve]:
    """What the panel shows of the table: colour by data set, line and marker by score; only forget rows' markers are full."""
    found = []
    for (end, score), (line, marker), other in zip(panel.scores.items(), SHAPES, OTHERS, strict=False):
        for data in ("", *DATA):
            if (values := table.get(f"{data}_{end}".lstrip("_"))) is not None:
                colour = DATA[data][1] if data else other
                fill = colour if data == "forget" else "none"
                style = {"color": colour, "linestyle": line, "marker": marker, "markerfacecolor": fill}
                found.append(Curve(values, data, score, style))
    return found


def scores_figure(table: dict[str, Series]) -> Figure | None:
    """The panels that the table has numbers for; the colours are told above the figure, a panel's scores above it."""
    panels = [(panel, found) for panel in PANELS if (found := curves(table, panel))]
    if not panels:
        return None
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    lines = ceil(len(panels) / columns)
    figure = style.new_figure(0.4 + 2.2 * lines, style.WIDE if columns > 1 else style.NARROW)
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes, (panel, found) in zip(grid.flat, panels, strict=False):
        draw_panel(axes, panel, found)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    there = {curve.data for _, found in panels for curve in found}
    handles = [Line2D([], [], color=colour, label=name) for data, (name, colour) in DATA.items() if data in there]
    if handles:
        figure.legend(handles=handles, loc="outside upper center", ncols=4 if columns > 1 else 2)
    return figure


def draw_panel(axes: Axes, panel: Panel, found: list[Curve]) -> None:
    """The curves over the steps, on the panel's scale."""
    handles: dict[str, Any] = {}
    for curve in found:
        axes.plot(curve.values, **curve.style, markevery=ceil(len(curve.values) / 12))
        grey = {"color": "0.3", "markerfacecolor": "none"} if curve.data else {}
        handles[curve.score] = Line2D([], [], **curve.style | grey, label=curve.score)
    if panel.across:
        handles["across"] = axes.axhline(panel.across[0], **GREY, label=panel.across[1])
    if len(panel.scores) > 1 or panel.across:
        place: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1.02, 1), "ncols": 3 if len(handles) > 4 else 2}
        axes.legend(handles=list(handles.values()), **place, fontsize=7, handlelength=2.1, columnspacing=1, borderpad=0.1)
    style.step_axis(axes)
    axes.set_ylabel(panel.label)
    values = pd.concat([curve.values for curve in found])
    said = [f"{values.isna().sum()} not finite"] if values.isna().any() else []
    if panel.axis == "fit":
        style.fit_scale(axes.yaxis, values)
    elif panel.axis == "log":
        axes.set_yscale("log")
        axes.set_ylim(min(1e-2, values[values > 0].min()) / 3 if (values > 0).any() else 1e-3, 3)
        axes.yaxis.set_minor_locator(NullLocator())
        said += [f"{(values == 0).sum()} at 0, not shown"] if (values == 0).any() else []
    else:
        axes.set_ylim(min(0, values.min()) - 0.03, max(1, values.max()) + 0.03)
    axes.set_xlabel("step" + (f" ({', '.join(said)})" if said else ""))


def harness_figure(table: dict[str, Series]) -> Figure | None:
    """The scores of lm-eval's tasks, but for the retain model's: each with a look of its own, the same in both panels."""
    ends = [(label, axis, re.compile(f"{end}$")) for label, axis, end in HARNESS]
    names = [[name for name in table if end.search(name) and not name.startswith("retain_model_")] for *_, end in ends]
    panels = [(Panel(label, {}, axis), found) for (label, axis, _), found in zip(ends, names, strict=True) if found]
    if not panels:
        return None
    looks = [(colour, *shape) for shape in SHAPES for colour in OTHERS]
    shown = [name for _, found in panels for name in found]
    styles = {
        name: dict(zip(("color", "linestyle", "marker"), looks[i % len(looks)], strict=True)) for i, name in enumerate(shown)
    }
    figure = style.new_figure(2.2 + 0.17 * ceil(len(shown) / 2), style.WIDE if len(panels) > 1 else style.NARROW)
    grid = figure.subplots(1, len(panels), squeeze=False)
    for axes, (panel, found) in zip(grid.flat, panels, strict=True):
        draw_panel(axes, panel, [Curve(table[name], "", name, styles[name] | {"markerfacecolor": "none"}) for name in found])
    handles = [Line2D([], [], **styles[name], markerfacecolor="none", label=name) for name in shown]
    figure.legend(handles=handles, loc="outside upper center", ncols=2, fontsize=7, columnspacing=1)
    return figure


def control_figure(table: dict[str, Series], bar: float | None, weight: float | None) -> Figure | None:
    """Forget PS and retain PS against the weight, with the bar and the chosen weight."""
    if not table:
        return None
    figure = style.new_figure(2.8, style.NARROW)
    axes = figure.subplots()
    for name in [name for name in CONTROL if name in table]:
        axes.plot(table[name], **style.LINES[CONTROL[name][1]], label=CONTROL[name][0])
    if bar is not None:
        axes.axhline(bar, **GREY, linestyle="-.", label=f"bar: {bar:.3g}")
    if weight is not None:
        axes.axvline(weight, **GREY, linestyle=":", label=f"chosen weight: {weight:.3g}")
    elif bar is not None and not (table.get("retain_ps", pd.Series(dtype=float)) >= bar).any():
        axes.set_title("no weight reaches the bar")
    unknown = sum(int(values.isna().sum()) for values in table.values())
    axes.set_xlabel("weight of the unlearned model" + (f" ({unknown} not finite)" if unknown else ""))
    axes.set_ylabel("PS (share of the answer)")
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    style.legend_above(figure, 2)
    return figure


# The command


def control_of(folder: Path) -> tuple[float | None, float | None]:
    """The bar and the chosen weight of the folder's `scores.json`, None where one is not there, or is a text saying why."""
    file = folder / "scores.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["control"] if file.exists() else {}
        values = [found.get(name) for name in ("bar", "weight")]
    except (ValueError, OSError) as error:
        raise ValueError(f"{file}: not readable ({error})") from error
    except (KeyError, AttributeError):  # another command's scores, or a text
        return None, None
    bar, weight = (value if isinstance(value, float | int) else None for value in values)
    return bar, weight


def draw(folder: Path) -> list[Path]:
    """Draw what the folder's tables allow. Raises ValueError where that is nothing."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    there = [name for name in ("scores.csv", "control.csv") if (folder / name).exists()]
    if not there:
        raise ValueError(f"{folder}: neither scores.csv nor control.csv there")
    files = draw_scores(folder) if "scores.csv" in there else []
    files += draw_control(folder, *control_of(folder)) if "control.csv" in there else []
    if not files:
        raise ValueError(f"{folder}: nothing to draw in {' and '.join(there)}")
    return files


def _refuse(message: str) -> NoReturn:
    raise ValueError(f"{message}; usage: python -m unlearn.reporting.score_figures FOLDER...")


def main(argv: list[str]) -> int:
    """Draw the folders' figures and print their files; 2 for what a user got wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m unlearn.reporting.score_figures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = _refuse  # type: ignore[method-assign]
    parser.add_argument("folders", type=Path, metavar="FOLDER", nargs="+", help="has scores.csv, control.csv, or both")
    try:
        for folder in parser.parse_args(argv).folders:
            print(*draw(folder), sep="\n")
    except ValueError as error:
        print(f"unlearn.reporting.score_figures: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
