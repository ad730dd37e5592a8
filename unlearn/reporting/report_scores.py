"""What a report shows of a run's scores and of the attacks on it: figures of its tables, each with how it is read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pandas as pd
from pandas import DataFrame

from unlearn.reporting import report_tables as tables
from unlearn.reporting import score_figures
from unlearn.reporting.report_panels import (
    Figure,
    Panel,
    colours,
    lines,
    not_finite,
    not_finite_each,
    quantity,
    share,
    tip,
)
from unlearn.reporting.report_tables import Run
from unlearn.reporting.tables import layer_order

DATA = {"forget": "forget rows", "retain": "held-out retain rows"}
PRESSED = {  # how the attacks on weights are read
    "relearn": "Scores while the model is fine-tuned on the forget rows again. An unlearned model whose forget scores rise"
    " faster than the retain model's (dashed, which never saw them) had hidden what it seemed to have forgotten.",
    "quantize": "Scores with the linear weights in 8 and in 4 bits. Forget scores that rise show what quantising alone"
    " brings back. Dashed: the retain model.",
}


def over_steps(runs: Sequence[Run], names: list[str]) -> list[Figure]:
    table = tables.scores(runs)
    if table is None:
        return []
    panels = [score_panel(table, *one, names)._replace(first=i == 0) for of in _in_lines(table) for i, one in enumerate(of)]
    reading = (
        "On forget rows lower is more forgotten, on all others higher is more kept (of a loss the other way round). A"
        " score near that of a model that never saw the forget rows is the aim, not 0. Lines across: AUC 0.5 is chance,"
        " p-value 0.05, PrivLeak 0 the retain model."
    )
    zeros = [
        f"{column}: {int((table[column] == 0).sum())} values are 0 and not on its logarithmic axis."
        for column in table
        if column.endswith("quality") and (table[column] == 0).any()
    ]
    notes = [*zeros, *tables.unshown_scores(runs, tables.SCORES)]
    if others := tables.other_scores(runs):
        notes.append(f"Also in scores.csv, and not drawn: {', '.join(others)}.")
    return [Figure("scores", "Scores of each checkpoint", reading, table, panels, notes=notes, small=True)]


def _in_lines(table: DataFrame) -> list[list[tuple[score_figures.Panel, str, str]]]:
    """Lines of panels, each as kind, data and how the column's name ends: a line a score, its data beside each other."""
    found: list[list[tuple[score_figures.Panel, str, str]]] = []
    parts = [parts for column in table if column not in ("run", "step") if column_of(*(parts := parts_of(column))) == column]
    sets = dict.fromkeys(("", *score_figures.DATA, *(data for data, _ in parts)))
    for panel in score_figures.REPORTED:
        of = {end: [data for data in sets if (data, end) in parts] for end in panel.scores}
        own = [(panel, "", end) for end, data in of.items() if data == [""]]  # scores of no data set stand beside each other
        found += [own, *([(panel, one, end) for one in data] for end, data in of.items() if data != [""])]
    return [line for line in found if line]


def column_of(data: str, end: str) -> str:
    return f"{data}_{end}".lstrip("_")


def parts_of(column: str) -> tuple[str, str]:
    """The data set of a score's column ("" for none) and how it ends: `column_of`, the other way round."""
    end = max((end for end in tables.SCORES if column.endswith(end)), key=len)
    return column.removesuffix(end).rstrip("_"), end


def score_panel(table: DataFrame, panel: score_figures.Panel, data: str, end: str, names: list[str]) -> Panel:
    """A score of a data set (or of none) over the steps."""
    column, across = column_of(data, end), panel.across[0] if panel.across else None
    y = share(column, table[column].dropna()) if panel.axis == "share" else quantity(column, table[column], across=across)
    if panel.axis == "log" and (table[column] > 0).any():
        domain = [min(1e-2, float(table.loc[table[column] > 0, column].min())) / 3, 1]
        y = {"field": column, "type": "quantitative", "scale": {"type": "log", "domain": domain}}
        y["axis"] = {"title": None, "tickCount": 4, "format": ".0e"}
    score, spec = panel.scores[end], lines(("step", "step"), y, names, [(column, column)], across) | {"height": 120}
    if not data:
        return Panel(score[:1].upper() + score[1:], panel.label, "scores", spec)
    label = score if panel.label in ("score", "share of the answer") else f"{score} ({panel.label})"
    title = score_figures.DATA[data][0] if data in score_figures.DATA else data.replace("_", " ")
    return Panel(title.capitalize(), panel.label if panel.axis == "fit" else label, "scores", spec)


def harness(runs: Sequence[Run], names: list[str]) -> list[Figure]:
    """lm-eval's scores over the steps."""
    table = tables.harness(runs)
    if table is None:
        return []
    panels = []
    for label, axis, end in score_figures.HARNESS:
        for column in [column for column in table if re.search(f"{end}$", column)]:
            y = share(column, table[column].dropna()) if axis == "share" else quantity(column, table[column])
            spec = by_model(lines(("step", "step"), y, names, []), ("step", "step "), (column, column)) | {"height": 120}
            panels.append(Panel(column, label, "harness", spec))
    reading = (
        "Tasks of the package lm-eval, a panel a score, called as in scores.csv; step 0 is the original model. Dashed: the"
        " retain model. Standard errors are in lm_eval.json of each checkpoint."
    )
    notes = tables.unshown_scores(runs, tables.HARNESS)
    return [Figure("harness", "lm-eval's tasks", reading, table, panels, notes=notes, small=True)]


def by_model(spec: dict[str, Any], *told: tuple[str, str]) -> dict[str, Any]:
    """The lines, dashed where they are of the retain model; hovering tells which model it is, and these fields."""
    dash = {
        "field": "model",
        "type": "nominal",
        "scale": {"domain": ["unlearned", "retain"], "range": [[1, 0], [4, 3]]},
        "legend": None,
    }
    encoding = {"strokeDash": dash, "detail": {"field": "model"}, "tooltip": tip(("run", "run "), ("model", "model "), *told)}
    spec["layer"][-1]["encoding"] |= encoding
    return spec


def fair(runs: Sequence[Run], names: list[str]) -> list[Figure]:
    curves, chosen = tables.control(runs)
    if curves is None or chosen is None:
        return []
    panels = []
    for column in [column for column in score_figures.CONTROL if column in curves]:
        data = column.removesuffix("_ps")
        y = share(column)
        across = float(chosen["bar"].max()) if data == "retain" and chosen["bar"].nunique() == 1 else None
        spec = lines(("weight", "weight of the unlearned model"), y, names, [(column, "PS")], across)
        panels.append(Panel(DATA[data].capitalize(), "PS (share of the answer)", "control", spec))
    reading = (
        "A method that destroys the model forgets, too. So the weights of the original and the unlearned model are mixed; each"
        " method is compared at the largest weight at which the retain PS still reaches the bar (the line across, right):"
        " the lower the forget PS there, the better."
    )
    steps = {run.name: [step for step, _ in run.scored("control.csv")] for run in runs}
    notes = [tables.at_step(name, of) for name, of in steps.items() if of]
    notes += not_finite_each(curves, {name: label for name, (label, _) in score_figures.CONTROL.items() if name in curves})
    if chosen["bar"].nunique() > 1:
        notes.append("The runs' bars differ, so there is no line across: the table below has them.")
    notes += [
        f"{line.run}: no weight reaches the bar, so there is nothing to compare."
        for line in chosen.itertuples()
        if pd.isna(line.weight) and pd.notna(line.bar)
    ]
    reached = "The forget PS of each run where the retain PS still reaches the bar."
    at = Figure("chosen", "At the chosen weight", reached, chosen, kind="numbers")
    return [Figure("control", "Forget and retain PS of mixtures", reading, curves, panels, notes=notes), at]


def attacks(runs: Sequence[Run], names: list[str]) -> list[Figure]:
    whole = tables.attacked(runs)
    if whole is None:
        return []
    table = tables.last(whole, *tables.ATTACKED)
    found = [*_weights(table, names), *_asked(table, names)]
    for figure in found:
        rows = sorted(figure.table["rows"].unique()) if "rows" in figure.table else []
        scored = [f"Scored on {' and '.join(map(str, rows))} rows."] if rows else []
        figure.notes[:0] = [*tables.shown_at(figure.table, whole, *tables.ATTACKED), *scored]
    return found


def _weights(table: DataFrame, names: list[str]) -> list[Figure]:
    """Trained again, and quantised: full lines are of the unlearned model, dashed ones of the retain model."""
    found = []
    for attack, title, x in (("relearn", "Trained again", "steps"), ("quantize", "Quantised", "bits")):
        of = table[table["attack"] == attack].copy()
        if not len(of):
            continue
        if attack == "relearn":
            of["steps"] = of["setting"].str.extract(r"(\d+)")[0].astype(int)
        else:
            of["bits"] = of["setting"].str.removesuffix(" bits").replace("as it is", "all")
        panels, notes = [], []
        for score, label in {"rouge": "ROUGE-L recall", "probability": "probability", "ps_exact": "PS"}.items():
            for data in DATA:
                column = f"{data}_{score}"
                if column in of and of[column].notna().any():
                    spec = _pressed(x, column, names, list(dict.fromkeys(of[x])))
                    panels.append(Panel(DATA[data].capitalize(), label, attack, spec))
                    notes += not_finite_each(of, {column: column})
        found.append(Figure(attack, title, PRESSED[attack], of.dropna(axis=1, how="all"), panels, notes=notes))
    return found


def _pressed(x: str, column: str, names: list[str], order: list[Any]) -> dict[str, Any]:
    titles = {"steps": "steps of training on forget rows", "bits": "bits of the linear weights"}
    along: dict[str, Any] = {
        "field": x,
        "type": "ordinal" if x == "bits" else "quantitative",
        "axis": {"title": titles[x], "labelAngle": 0, "grid": False, "values": order, "labelOverlap": True},
    }
    if x == "bits":
        along["sort"] = order
    else:
        along["axis"]["format"] = "d"
    spec = by_model(lines((x, titles[x]), share(column), names, []), (x, f"{titles[x]} "), (column, column))
    spec["layer"][-1]["encoding"]["x"] = along
    return spec


def _asked(table: DataFrame, names: list[str]) -> list[Figure]:
    """Sampled, and asked otherwise."""
    found = []
    sampled = table[(table["attack"] == "sample") & table["setting"].str.contains(r"\d")].copy()
    columns = {"leak": "leak@k (share of questions)", "best_rouge": "best of k, ROUGE-L recall", "forget_leak": "leak@k"}
    there = [name for name in columns if name in sampled and sampled[name].notna().any()]
    if len(sampled) and there:
        sampled["k"] = sampled["setting"].str.extract(r"(\d+)")[0].astype(int)
        panels = [Panel("Forget rows", columns[name], "sample", _over_k(name, names)) for name in there]
        reading = (
            "Of k sampled answers to a forget question, whether one leaks, and the best one's recall. Dashed: the retain model."
        )
        notes = not_finite_each(sampled, {name: name for name in there})
        found.append(Figure("sample", "Sampled answers", reading, sampled.dropna(axis=1, how="all"), panels, notes=notes))
    ways = table[table["attack"].isin(["prefix", "paraphrase"])].copy()
    if len(ways) and "forget_rouge" in ways:
        ways["way"] = ways["attack"] + ": " + ways["setting"]
        panels = [
            Panel(
                f"{name}",
                "forget ROUGE-L recall, by how it is asked",
                "asked",
                _by_way(ways[ways["run"] == name], names),
                {"run": name},
            )
            for name in ways["run"].unique()
        ]
        reading = (
            "The forget questions inside templates and in other words. A way of asking to the right of ‘plain’ brings back"
            " more; ‘worst’ takes each row's worst. Full points: the unlearned model; hollow: the retain model."
        )
        found.append(
            Figure(
                "asked",
                "Asked otherwise",
                reading,
                ways.drop(columns="way").dropna(axis=1, how="all").assign(way=ways["way"]),
                panels,
                notes=not_finite_each(ways, {"forget_rouge": "forget_rouge"}),
            )
        )
    return found


def _over_k(column: str, names: list[str]) -> dict[str, Any]:
    return by_model(lines(("k", "k, sampled answers"), share(column), names, []), ("k", "k "), (column, column))


def _by_way(table: DataFrame, names: list[str]) -> dict[str, Any]:
    order = list(dict.fromkeys(table["way"]))
    y = {"field": "way", "type": "nominal", "sort": order, "axis": {"title": None, "labelLimit": 170, "offset": 8}}
    x = {
        "field": "forget_rouge",
        "type": "quantitative",
        "scale": {"domain": [0, 1]},
        "axis": {"title": "forget ROUGE-L recall", "tickCount": 5},
    }
    told = tip(("model", "model "), ("way", "asked "), ("forget_rouge", "ROUGE-L recall"))
    full = {"condition": {"test": "datum.model == 'unlearned'", "value": 1}, "value": 0}
    return {
        "height": 17 * len(order),
        "mark": {"type": "point", "size": 50, "strokeWidth": 1.5},
        "encoding": {"y": y, "x": x, "color": colours(names), "fill": colours(names), "fillOpacity": full, "tooltip": told},
    }


def inside(runs: Sequence[Run], names: list[str]) -> list[Figure]:
    whole = tables.representation(runs)
    if whole is None:
        return []
    table = tables.last(whole)
    drawn = (table["model"] == "unlearned") & (table["beside"] == "original")
    of, others = table[drawn], table[~drawn]
    order = layer_order(of["layer"])
    panels = []
    for value, label in (("cka", "linear CKA"), ("cosine", "mean cosine")):
        for data in [data for data in DATA if (of["data"] == data).any()]:
            spec = lines(("layer", "layer"), quantity(value, of[value]), names, [(value, label)])
            spec["layer"][-1]["encoding"]["x"] = {
                "field": "layer",
                "type": "ordinal",
                "sort": order,
                "axis": {"title": "layer", "labelOverlap": True, "labelAngle": 0},
            }
            panels.append(Panel(DATA[data].capitalize(), label, "inside", spec, {"data": data}))
    reading = (
        "How like the original model's the unlearned model's outputs are, layer by layer: 1 is the same (of CKA: but for a"
        " rotation and a scale). Where forget rows fall and retain rows stay, that layer changed for what should go. With"
        " fewer tokens than features CKA is near 1 by itself."
    )
    notes = [*tables.shown_at(of, whole), *not_finite(of, ["cka", "cosine"])]
    if pairs := list(dict.fromkeys(others["model"] + " beside " + others["beside"])):
        notes.append(f"Also in layers.csv, and not drawn: {', '.join(pairs)}.")
    return [Figure("inside", "Outputs beside the original model's", reading, of, panels, notes=notes)]
