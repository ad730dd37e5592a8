"""What a report shows of a run's training and of its G-effects: figures of its tables, each with how it is read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from pandas import DataFrame

from unlearn.reporting import report_tables as tables
from unlearn.reporting.objectives_figure import plane
from unlearn.reporting.report_panels import (
    Figure,
    Panel,
    colour_bar,
    diagonal,
    heat_map,
    lines,
    not_finite,
    not_finite_each,
    not_measured,
    points,
    quantity,
    tip,
)
from unlearn.reporting.report_tables import Run
from unlearn.reporting.style import UNIT, largest, linear_range
from unlearn.reporting.tables import RISKS, layer_order, risks_of

OF_RISK = {"unlearn": "forget rows", "retain": "held-out retain rows"}
SYMBOLS = {"unlearn": "e_u", "retain": "e_r"}


def training(runs: Sequence[Run], names: list[str]) -> list[Figure]:
    whole = tables.logs(runs)
    if whole is None:
        return []
    labels = {
        "loss": ("Loss", "what training minimises"),
        "objective": ("Objective", "the objective's part of the loss"),
        "retain": ("Retain term", "(nats/token)"),
        "grad_norm": ("Gradient norm", "of each step"),
        "learning_rate": ("Learning rate", "of each step"),
        "e_u": ("e_u, measured meanwhile", UNIT),
        "e_r": ("e_r, measured meanwhile", UNIT),
    }
    there = [name for name in labels if name in whole and whole[name].notna().any()]
    table, notes = tables.fewer_steps(whole)
    for name in there:
        notes += not_finite(whole[whole[name].notna()], [name], f"values of {labels[name][0]}")
    shown = [name for name in there if np.isfinite(table[name]).any()]
    if "objective" in shown and (table["objective"] - table["loss"]).abs().max() == 0:
        shown.remove("objective")  # no retain term: the same line twice
    panels = [
        Panel(*labels[name], "log", lines(("step", "step"), quantity(name, table[name]), names, [(name, labels[name][0])]))
        for name in shown
    ]
    reading = (
        "Each step's loss, of the rows of that step. Losses of different objectives are different things and do not compare;"
        " the table above has the cross-entropy of whole sets, before and after, which does."
    )
    return [Figure("log", "The training log", reading, table[["run", "step", *shown]], panels, notes=notes)]


def steps(runs: Sequence[Run], names: list[str]) -> list[Figure]:
    table = tables.geffects(runs, "steps.csv")
    if table is None:
        return []
    rows = [
        ("geffect", "{}, G-effect {}", 0),
        ("rule_geffect", "{}, G-effect of the gradient rule's step {}", 0),
        ("risk_value", "risk (nats/token)", None),
        ("cosine", "cosine of the gradients", 0),
    ]
    rows = [row for row in rows if row[0] in table and table[row[0]].notna().any()]
    panels = []
    for value, label, across in rows:
        for risk in [risk for risk in RISKS if (table["risk"] == risk).any()]:
            y = quantity(value, table[value], across=across)
            spec = lines(("step", "step"), y, names, [(value, value.replace("_", " "))], across)
            label_of = label.format(SYMBOLS[risk], UNIT)
            panels.append(Panel(OF_RISK[risk].capitalize(), label_of, "steps", spec, {"risk": risk}))
    reading = (
        "e = ⟨grad L, grad R⟩: a step along −grad L changes the risk R by about −learning rate × e. Below 0 the objective"
        " raises that risk. Good is e_u deep below 0 with e_r near 0 or above. Where both fall together, what is done to"
        " the forget rows is done to all rows. e does not compare across objectives, cosines do. An e that returns to 0 is"
        " not recovery: look at the risks."
    )
    notes = not_finite(table, ["geffect"]) + not_finite_each(table, {value: value for value, *_ in rows if value != "geffect"})
    return [Figure("steps", "The objective against the two risks", reading, table, panels, notes=notes)]


def prediction(runs: Sequence[Run], names: list[str]) -> list[Figure]:
    table = tables.geffects(runs, "prediction.csv")
    if table is None:
        return []
    told = [("step", "step "), ("run", "run "), ("update_effect", "update effect"), ("risk_change", "measured change")]
    panels = []
    for risk in [risk for risk in RISKS if (table["risk"] == risk).any()]:
        of = table[table["risk"] == risk]
        both = of[["update_effect", "risk_change"]]  # on equal scales
        x = quantity("update_effect", both, "update effect (nats/token)", 2, 0)
        spec = points(x, quantity("risk_change", both, across=0), names, tip(*told))
        spec["layer"].insert(0, diagonal(x["scale"]["domain"]))
        panels.append(
            Panel(OF_RISK[risk].capitalize(), "measured change of risk (nats/token)", "prediction", spec, {"risk": risk})
        )
    reading = (
        "What a step should do to the risk to first order, ⟨θ′ − θ, grad R⟩, against what it did: a step of the optimiser"
        " where it was measured meanwhile, else the way from one measured checkpoint to the next."
        " Points with the same sign on both axes are steps whose direction was foretold; on the diagonal also the size."
    )
    notes = [*agreement(table), *not_finite(table, ["update_effect", "risk_change"])]
    return [Figure("prediction", "Foretold and measured", reading, table, panels, notes=notes)]


def agreement(table: DataFrame) -> list[str]:
    """How often the sign was foretold, of the steps that moved, and how often the risk rose, in words."""
    known = table[["risk", "update_effect", "risk_change"]].dropna()
    moved = known[known["update_effect"] != 0]
    said = []
    for risk in risks_of(moved):
        of = moved[moved["risk"] == risk]
        same, rose = np.sign(of["update_effect"]) == np.sign(of["risk_change"]), of["risk_change"] > 0
        name = OF_RISK[risk].capitalize()
        said.append(f"{name}: the sign agrees in {same.sum()} of {len(of)} cases; in {rose.sum()} of them the risk rose.")
    if said:
        said.append("A guess that it always rises would be right as often as it rose.")
    still = len(known) - len(moved)
    return said + ([f"{still} of {len(known)} cases are left out: there nothing moved."] if still else [])


def monitor(runs: Sequence[Run], names: list[str]) -> list[Figure]:
    whole = tables.geffects(runs, "monitor.csv")
    if whole is None:
        return []
    table, notes = tables.fewer_steps(whole)
    notes += not_finite(whole, ["gradient", "update"])
    labels = {"gradient": f"⟨g, V⟩ {UNIT}", "update": "⟨θ′ − θ, V⟩ (nats/token)"}
    panels = [
        Panel(
            OF_RISK[risk].capitalize(),
            label,
            "monitor",
            lines(("step", "step"), quantity(value, table[value], across=0), names, [(value, value)], 0),
            {"risk": risk},
        )
        for value, label in labels.items()
        for risk in RISKS
        if (table["risk"] == risk).any()
    ]
    reading = (
        "At every step, the step's own gradient g and its update along the risk's gradient V that was measured last. The"
        " first is a noisy e (of the step's rows, in train mode), the second what the step did to the risk, to first"
        " order."
    )
    return [Figure("monitor", "Between measurements", reading, table, panels, notes=notes)]


def layers(runs: Sequence[Run]) -> list[Figure]:
    table = tables.layers(runs)
    if table is None:
        return []
    high, linear = largest(table["geffect"]) or 1.0, linear_range(table["geffect"])
    panels = []
    for name in table["run"].unique():
        for risk in RISKS:
            of = table[(table["run"] == name) & (table["risk"] == risk)]
            if len(of):
                spec = heat_map(layer_order(of["layer"]), high, linear)
                panels.append(
                    Panel(f"{name}, {OF_RISK[risk]}", f"{SYMBOLS[risk]} by layer", "layers", spec, {"run": name, "risk": risk})
                )
    reading = (
        "Each layer's part of the G-effect; the parts of a step add up to the total. Red, below 0: the objective's"
        " gradient raises the risk through that layer. One scale for all maps. The embedding is at the bottom."
    )
    bar = colour_bar(f"G-effect {UNIT}", high, linear)
    notes = [f"{note} Their cells are grey." for note in not_finite(table, ["geffect"])]
    return [Figure("layers", "The G-effect by layer and step", reading, table, panels, bar, notes=notes)]


def instances(runs: Sequence[Run], names: list[str]) -> list[Figure]:
    table, said = tables.instances(runs)
    if table is None:
        return []
    steps = sorted(int(step) for step in table["step"].unique())
    x = quantity("unlearn", table["unlearn"], f"e_u, on the unlearn risk {UNIT}", 2, 0)
    told = [("row", "row "), ("unlearn", "e_u"), ("retain", "e_r"), ("question", "question "), ("answer", "answer ")]
    panels = []
    for name in table["run"].unique():
        spec = points(x, quantity("retain", table["retain"], across=0), names, tip(*told), 240)
        spec["layer"][2]["transform"] = [{"filter": "datum.step == step"}]
        measured = sorted(int(step) for step in table.loc[table["run"] == name, "step"].unique())
        spec["layer"].append(not_measured(measured, "not measured, or left out," if said else "not measured"))
        spec["params"] = [{"name": "step", "value": steps[-1]}]
        panels.append(Panel(str(name), f"e_r, on the retain risk {UNIT}", "instances", spec, {"run": name}, "instances"))
    reading = (
        "A point a forget row: what that row's part of the objective does to the two risks. Left of 0 and at the height of 0 it"
        " removes what should go and leaves the rest. The scales are the same for all runs and"
        " steps. What a retain term adds is of no row, and not here. Hover tells the row."
    )
    notes = [said] if said else []
    notes += [f"{run.name}: texts not shown, {run.no_texts}." for run in runs if run.no_texts and run.name in set(table["run"])]
    notes += not_finite(table, ["unlearn", "retain"])
    return [Figure("instances", "The G-effect of each forget row", reading, table, panels, steps=steps, notes=notes)]


def tokens(runs: Sequence[Run]) -> list[Figure]:
    table, said = tables.tokens(runs)
    if table is None:
        return []
    reading = (
        "The answer of a forget row, each token coloured by its share of the G-effect: the strength is the square root of"
        " its share of the largest in the row. Red, below 0: what the objective does at that token raises the risk; blue:"
        " it lowers it. Hover tells the numbers."
    )
    steps = sorted(int(step) for step in table["step"].unique())
    notes = [said] if said else []
    shares = [name for name in (*RISKS, "loss") if table[name].notna().any()]
    notes += [f"{note} Their tokens are grey, and in no sum." for note in not_finite(table, shares)]
    return [Figure("tokens", "The G-effect of each token", reading, table, steps=steps, notes=notes, kind="tokens")]


def objectives(runs: Sequence[Run], names: list[str]) -> list[Figure]:
    table = tables.geffects(runs, "sweep.csv")
    if table is None:
        return []
    found, panels, notes = [], [], []
    for name, last in tables.last(table).groupby("run", sort=False):
        if risks_of(last) == list(RISKS):
            found.append(plane(last, "geffect").assign(step=last["step"].iloc[0], run=name))
        else:
            notes.append(f"{name}: has not both risks at its last step, and no points.")
    if not found:
        return []
    wide = pd.concat(found, ignore_index=True)[["run", "step", "method", "hyper_param", "name", "unlearn", "retain"]]
    told = tip(("name", "objective "), ("step", "step "), ("unlearn", "e_u"), ("retain", "e_r"))
    for name in wide["run"].unique():
        of = wide[wide["run"] == name]
        x = quantity("unlearn", of["unlearn"], f"e_u, on the unlearn risk {UNIT}", 2, 0)
        spec = points(x, quantity("retain", of["retain"], across=0), names, told, 240)
        label = f"e_r, on the retain risk {UNIT}, at step {of['step'].iloc[0]}"
        panels.append(Panel(str(name), label, "objectives", spec, {"run": name}))
    reading = (
        "A point an objective: what a step along it would do at the run's last measured checkpoint. In the upper left it raises"
        " the unlearn risk and not the retain risk. Hover tells which it is."
    )
    notes += [*tables.shown_at(wide, table), *not_finite(wide, list(RISKS))]
    return [Figure("objectives", "Every objective of the sweep", reading, wide, panels, notes=notes)]
