"""A report as one page of HTML that asks for nothing: template, library, numbers and texts are all in it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any

import pandas as pd
from pandas import DataFrame, Series

from unlearn.io.files import write_whole
from unlearn.reporting import report_tables as tables
from unlearn.reporting.report_panels import RUNS, Figure
from unlearn.reporting.report_sections import Section, sections
from unlearn.reporting.report_tables import Run

PAGE = Path(__file__).parent / "page"
MOST = 5_000_000  # bytes of a page
LETTERS = (400, 100, 25, 0)  # of a row's question, and of its answer: fewer where the page would be too large
WITH_TEXTS = ("instances", "tokens")  # the figures that show rows' texts
SHOWN = (  # settings that tell what was run, before all others
    *("model_family", "method.name", "retain.name", "hyper_param", "rule.name", "benchmark", "split", "data_path"),
    *("forget_data", "retain_data", "retain_holdout", "lr", "num_epochs", "batch_size", "gradient_accumulation_steps"),
    *("processes", "seed", "device", "precision", "weights", "trainable", "LoRA.r", "model_path"),
    *("versions.torch", "versions.transformers", "hash"),
)


@dataclass(frozen=True)
class Line:
    """A line of a table of text: what it is, and a cell a run."""

    name: str
    cells: list[str]


def write(runs: Sequence[Run], file: Path) -> int:
    """Write the report of some runs; returns its size in bytes.

    Raises:
        ValueError: a table is not readable, or the page would be too large.
        ModuleNotFoundError: Jinja2 or vl-convert-python is not installed.
    """
    found = sections(runs)
    for letters in LETTERS:
        text = page(runs, found, letters)
        if (size := len(text.encode())) <= MOST:
            write_whole(file, text)
            return size
    raise ValueError(too_large(runs, found, size))


def too_large(runs: Sequence[Run], found: Sequence[Section], size: int) -> str:
    """What to do about a page that even without texts is too large."""
    of = f"the report of {len(runs)} runs" if len(runs) > 1 else "the run's report"
    said = f"{of} has {size / 1e6:.1f} MB without its rows' texts, and {MOST / 1e6:.0f} is the most"
    if len(runs) > 1:
        return f"{said}; give fewer"
    sizes = {name: len(as_json(table)) for name, table in tables_of(found).items()}
    largest = max(sizes, key=lambda name: sizes[name], default=None)
    return said + (
        f"; its largest table is {largest}, of {sizes[largest] / 1e6:.1f} MB: without it, it may fit" if largest else ""
    )


def page(runs: Sequence[Run], found: Sequence[Section], letters: int) -> str:
    """The page's HTML, with so many letters of a row's question, and of its answer."""
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup, escape

    def breakable(text: str) -> Markup:
        """A name or path that may go on in the next line after a _ or a /."""
        return Markup(re.sub("([_/])", r"\1<wbr>", str(escape(text))))

    library = bundle()
    assert "</script" not in library.lower(), "the library would end the element that it stands in"
    environment = Environment(loader=FileSystemLoader(PAGE), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("report.html").render(
        runs=runs,
        sections=found,
        summary=summary(runs),
        settings=settings(runs),
        others=settings(runs, others=True),
        run_colours=len(RUNS),
        numbers=numbers,
        breakable=breakable,
        texts_cut=said_of_texts(runs, found, letters),
        with_texts=WITH_TEXTS,
        data=Markup(as_json(data(runs, found, letters))),
        library=Markup(library),
    )


@cache
def bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script."""
    import vl_convert

    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))


def data(runs: Sequence[Run], found: Sequence[Section], letters: int) -> dict[str, Any]:
    """What the page's script draws from."""
    texts, text_of = texts_shown(runs, found) if letters else ([], {})
    panels = {f"{figure.name}-{i}": panel._asdict() for figure in figures_of(found) for i, panel in enumerate(figure.panels)}
    return {
        "runs": [run.name for run in runs],
        "tables": tables_of(found),
        "texts": [{row: [shortened(text, letters) for text in both] for row, both in of.items()} for of in texts],
        "textOf": text_of,
        "panels": panels,
    }


def figures_of(found: Sequence[Section]) -> list[Figure]:
    return [figure for section in found for figure in section.figures]


def tables_of(found: Sequence[Section]) -> dict[str, Any]:
    """The figures' tables by name."""
    named = {panel.table: figure.table for figure in figures_of(found) for panel in figure.panels}
    others = {figure.name: figure.table for figure in figures_of(found) if figure.name not in named}
    return {name: columns(table) for name, table in (named | others).items()}


def texts_shown(runs: Sequence[Run], found: Sequence[Section]) -> tuple[list[dict[str, tuple[str, str]]], dict[str, int]]:
    """Question and answer by row, of the rows that a figure shows, runs of the same rows together; and which are a run's."""
    shown: dict[str, set[int]] = {}
    for figure in figures_of(found):
        if figure.name in WITH_TEXTS:
            for name, of in figure.table.groupby("run"):
                shown.setdefault(str(name), set()).update(int(row) for row in of["row"].unique())
    sets: list[list[tuple[str, str]]] = []
    rows: list[set[int]] = []
    text_of = {}
    for run in runs:
        if run.texts is not None and run.name in shown:
            if run.texts not in sets:
                sets.append(run.texts)
                rows.append(set())
            text_of[run.name] = sets.index(run.texts)
            rows[text_of[run.name]] |= shown[run.name]
    return [{str(row): of[row] for row in sorted(some) if row < len(of)} for of, some in zip(sets, rows, strict=True)], text_of


def said_of_texts(runs: Sequence[Run], found: Sequence[Section], letters: int) -> str:
    """Whether texts that the page shows are cut, in words; nothing where none is."""
    texts, _ = texts_shown(runs, found)
    if not any(len(text) > letters for of in texts for both in of.values() for text in both):
        return ""
    why = ", to keep the page small" if letters < LETTERS[0] else ""
    return f"Texts are cut to {letters} letters{why}." if letters else f"Texts are left out{why}."


def columns(table: DataFrame) -> dict[str, Any]:
    """A table as {column: values}, numbers to six digits, null for none; texts as {"names": [...], "at": [...]}."""

    def values(column: Series) -> Any:
        if pd.api.types.is_integer_dtype(column):
            return [int(value) for value in column]
        if pd.api.types.is_numeric_dtype(column):
            return [rounded(value) for value in column]
        codes, names = pd.factorize(column.map(lambda value: None if pd.isna(value) else str(value)))
        return {"names": list(names), "at": [int(code) for code in codes]}

    return {str(name): values(table[name]) for name in table}


def rounded(value: float) -> float | int | None:
    if not isfinite(value):
        return None
    return int(value) if value == int(value) and abs(value) < 1e15 else float(f"{value:.6g}")


def shortened(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: letters - 1] + "…"


def as_json(value: Any) -> str:
    """JSON that can stand in an element of HTML, whatever its texts hold."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    signs: dict[str, str | int | None] = {
        "<": "\\u003c",
        ">": "\\u003e",
        "&": "\\u0026",
        "\u2028": "\\u2028",
        "\u2029": "\\u2029",
    }
    return text.translate(str.maketrans(signs))  # signs that JSON has in texts only


# ---- tables of text ----


def summary(runs: Sequence[Run]) -> list[Line]:
    """What each run came to: a few numbers before and after."""
    losses, scores = tables.losses(runs), tables.scores(runs)
    _, chosen = tables.control(runs)
    lines = [
        Line(f"{name}, loss (nats/token)", [before_after(losses.get(run.name, {}).get(data)) for run in runs])
        for data, name in (("forget", "forget rows"), ("retain", "held-out retain rows"))
    ]
    shown = {
        "forget_rouge": "forget rows, ROUGE-L recall",
        "retain_rouge": "held-out retain rows, ROUGE-L recall",
        "forget_ps_exact": "forget rows, PS",
        "retain_ps_exact": "held-out retain rows, PS",
        "model_utility": "model utility",
        "quality": "forget quality (p-value)",
    }
    for column, name in shown.items():
        if scores is not None and column in scores:
            lines.append(Line(name, [of_steps(scores[scores["run"] == run.name], column) for run in runs]))
    if chosen is not None:
        at = chosen.set_index("run")["forget_ps"]
        lines.append(Line("forget PS where the retain PS keeps its bar", [cell(at.get(run.name)) for run in runs]))
    return [line for line in lines if any(one != "–" for one in line.cells)]


def before_after(of: Mapping[str, float] | None) -> str:
    return "–" if not of else " → ".join(cell(of.get(when)) for when in ("start", "end"))


def of_steps(table: DataFrame, column: str) -> str:
    """A score at step 0, where it was measured there, and at the last step that has it, told where others are later."""
    there = table.dropna(subset=[column]).sort_values("step")
    if not len(there):
        return "–"
    first, last = there.iloc[0], there.iloc[-1]
    shown = " → ".join(cell(line[column]) for line in ((first, last) if first["step"] == 0 != last["step"] else (last,)))
    return shown if last["step"] == table["step"].max() else f"{shown} (step {last['step']:.0f})"


def settings(runs: Sequence[Run], others: bool = False) -> list[Line]:
    """What was run and on what, or all `others` of the settings; those that differ among the runs first, then the folders."""
    keys = list(dict.fromkeys(key for run in runs for key in run.record))
    main = [key for key in SHOWN if key in keys]
    chosen = [key for key in keys if key not in main] if others else main
    lines = [Line(key.removeprefix("settings."), [cell(run.record.get(key)) for run in runs]) for key in chosen]
    if not others:
        lines.insert(0, Line("folder", [str(run.folder) for run in runs]))
        lines = [line for line in lines if any(one != "–" for one in line.cells)]
    known = [i for i, run in enumerate(runs) if run.record]
    alike = {line.name for line in lines if len({line.cells[i] for i in known}) < 2}
    return sorted(lines, key=lambda line: 1 if line.name == "folder" else 2 * (line.name in alike))


def numbers(table: DataFrame) -> list[list[str]]:
    return [[cell(value) for value in row] for row in table.itertuples(index=False)]


def cell(value: Any) -> str:
    """A value as a table shows it, `–` for none."""
    if value is None or (isinstance(value, float) and not isfinite(value)) or value == "":
        return "–"
    if isinstance(value, float):
        return f"{value:.3g}" if 1e-4 <= abs(value) < 1e5 or value == 0 else f"{value:.1e}"
    return str(value)
