"""What a report reads of runs' folders: tables of all runs together, cut to what a page can carry.

A table is a data frame with the column `run`, the run's name, before its own; None stands for one that no run has. All
raise ValueError, naming the file, where a table is there and not readable.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pandas import DataFrame, Series

from unlearn.io.rows import read_jsonl, read_object
from unlearn.reporting import score_figures
from unlearn.reporting.style import evenly
from unlearn.reporting.tables import RISKS, abbreviated, instance_points, layer_grid, read, risks_of

POINTS = 60_000  # instances and tokens' values each on a page, of all runs together: about 1 MB each
LOGGED = 400  # steps of a run's log, and of its monitor
SCORES = tuple(end for panel in score_figures.REPORTED for end in panel.scores)
HARNESS = tuple(end for _, _, end in score_figures.HARNESS)
OF_RETAIN = "retain_model_"  # how the columns of lm-eval's scores of the retain model begin
ATTACKED = ("attack", "model")  # what is done at one checkpoint or another by itself


@dataclass(frozen=True)
class Run:
    """A run's folder, and what is known of it beside its tables.

    Args:
        name: as the report calls it; no two runs have the same.
        folder: holds its tables, or has them where the scripts put them.
        record: its settings, versions and hashes by dotted keys, as its config.yaml has them.
        texts: question and answer of the forget rows, in their order; None: not at hand, and `no_texts` says why.
        method: its objective and retain term, as folders are called after them; None: not known.
    """

    name: str
    folder: Path
    record: dict[str, Any] = field(default_factory=dict)
    texts: list[tuple[str, str]] | None = None
    no_texts: str = ""
    method: str | None = None

    def geffect(self, name: str) -> Path | None:
        """A table of its G-effects, in `geffect/` or in the folder itself; None where it has none."""
        places = (
            self.folder / "geffect" / name,
            *([] if name == "layers.csv" and self.represented() else [self.folder / name]),
        )
        return next((place for place in places if place.exists()), None)

    def represented(self) -> bool:
        """Whether the folder's own layers.csv is that of CKA and cosines, which has the same name as that of the G-effects."""
        file = self.folder / "layers.csv"
        return file.exists() and "cka" in file.read_text().partition("\n")[0]

    def scored(self, name: str) -> list[tuple[int, Path]]:
        """The files of that name beside the scores of its checkpoints, with their steps in order; the largest ds_size's."""
        found: dict[int, Path] = {}
        for file in sorted(self.folder.glob(f"checkpoint-*/eval_results/*/{name}"), key=_size):
            found[int(file.parts[-4].split("-")[1])] = file
        return sorted(found.items())


def _size(file: Path) -> int:
    digits = "".join(letter for letter in file.parent.name if letter.isdecimal())
    return int(digits or 0)


def together(tables: Iterable[tuple[str, DataFrame]]) -> DataFrame | None:
    """The runs' tables below each other; None where there is none, or nothing in them."""
    there = [table.assign(run=name)[["run", *table.columns]] for name, table in tables if len(table)]
    return pd.concat(there, ignore_index=True) if there else None


def geffects(runs: Sequence[Run], name: str) -> DataFrame | None:
    """A table of the G-effects as `tables.read` gives it."""
    return together((run.name, read(file)) for run in runs if (file := run.geffect(name)) is not None)


def fewer_steps(table: DataFrame) -> tuple[DataFrame, list[str]]:
    """Of each run `LOGGED` steps at most, evenly apart; and of which there are fewer, in words."""
    found, said = [], []
    for name, of in table.groupby("run", sort=False):
        steps = sorted(of["step"].unique())
        kept = evenly(steps, LOGGED)
        said += _fewer(str(name), kept, steps)
        found.append(of[of["step"].isin(kept)])
    return pd.concat(found, ignore_index=True), said


def _fewer(name: str, kept: Sequence[int], steps: Sequence[int]) -> list[str]:
    few = f"{name}: {len(kept)} of {len(steps)} steps, evenly apart, to keep the page small."
    return [few] if len(kept) < len(steps) else []


def last(table: DataFrame, *keys: str) -> DataFrame:
    """The lines of each run's last step; with keys, of the last step of each of theirs."""
    return table[table["step"] == table.groupby(["run", *keys], sort=False)["step"].transform("max")]


def shown_at(shown: DataFrame, whole: DataFrame, *keys: str) -> list[str]:
    """The step that each run is shown at, by keys where these differ, and the other steps that it has, in words."""
    said = []
    for run, of in shown.groupby("run", sort=False):
        there = whole[whole["run"] == run].merge(of[[*keys, "run"]].drop_duplicates())
        both = there[[*keys, "step"]].drop_duplicates().merge(of[[*keys, "step"]].drop_duplicates(), how="left", indicator=True)
        others = both.loc[both["_merge"] == "left_only", "step"].unique()
        if of["step"].nunique() == 1:
            said.append(at_step(str(run), [*others, of["step"].iloc[0]]))
        else:
            steps = of.groupby(list(keys), sort=False)["step"].max()
            at = "; ".join(f"{', '.join(key)} at step {step}" for key, step in steps.items())
            said.append(f"{run}: {at}{_others(others)}.")
    return said


def at_step(run: str, steps: Sequence[int]) -> str:
    """That a run is shown at the last of these steps, and not at the others, in words."""
    return f"{run} at step {steps[-1]}{_others(steps[:-1])}."


def _others(steps: Sequence[int]) -> str:
    return f" (not shown: step{'s' if len(steps) > 1 else ''} {abbreviated(steps)})" if len(steps) else ""


def layers(runs: Sequence[Run]) -> DataFrame | None:
    """Columns run, risk, layer, step, geffect: the sum over each layer's modules."""
    found = []
    for run in runs:
        if (file := run.geffect("layers.csv")) is not None:
            table = read(file)
            for risk in risks_of(table):
                grid = layer_grid(table, "geffect", risk).rename_axis(index="layer", columns="step")
                lines = grid.reset_index().melt("layer", value_name="geffect").assign(risk=risk)
                lines["step"] = lines["step"].astype(int)
                found.append((run.name, lines[["risk", "layer", "step", "geffect"]]))
    return together(found)


def instances(runs: Sequence[Run]) -> tuple[DataFrame | None, str]:
    """Columns run, step, row, unlearn, retain: e_u and e_r of each forget row; and what was left out, in words."""
    there = {run.name: read(file) for run in runs if (file := run.geffect("instances.csv")) is not None}
    most, said, found = POINTS // max(1, len(there)), [], []
    for name, table in there.items():
        steps = sorted(table["step"].unique())
        rows = max(1, table["row"].nunique())
        kept = evenly(steps, max(2, most // rows))
        said += _fewer(name, kept, steps)
        if risks_of(table) != list(RISKS):
            said.append(f"{name}: has not both risks, and no points.")
        for step in kept:
            points = instance_points(table, step)
            if {"unlearn", "retain"} <= set(points):
                points = points.reset_index().assign(step=step, row=lambda lines: lines["row"].astype(int))
                found.append((name, points[["step", "row", "unlearn", "retain"]]))
    return together(found), " ".join(said)


def tokens(runs: Sequence[Run]) -> tuple[DataFrame | None, str]:
    """Columns run, step, row, position, token, loss, unlearn, retain: each token's share of both G-effects.

    Of many, the rows with the largest |e_r| of a token, the same of all runs, and few steps, the first and the last among
    them; and that, in words.
    """
    wide = {run.name: shares(read(file)) for run in runs if (file := run.geffect("tokens.parquet")) is not None}
    most, said = POINTS // max(1, len(wide)), ""
    steps = {name: sorted(table["step"].unique()) for name, table in wide.items()}
    kept = {name: evenly(steps[name], max(2, most * len(steps[name]) // max(1, len(table)))) for name, table in wide.items()}
    cut = {name: table[table["step"].isin(kept[name])] for name, table in wide.items()}
    largest = ranked(list(cut.values()))
    fits = min((most * table["row"].nunique() // max(1, len(table)) for table in cut.values()), default=0)
    rows = set(largest[: max(1, fits)])
    for name, table in cut.items():
        there, chosen = set(table["row"]), set(table["row"]) & rows
        if len(kept[name]) < len(steps[name]) or len(chosen) < len(there):
            said += (
                f"{name}: {len(chosen)} of {len(there)} rows, those with the largest share of a token, and {len(kept[name])}"
                f" of {len(steps[name])} steps, to keep the page small. "
            )
    return together((name, table[table["row"].isin(rows)]) for name, table in cut.items()), said.strip()


def shares(table: DataFrame) -> DataFrame:
    """A line a step, row and position of tokens.parquet, with both risks' shares beside each other."""
    keys = ["step", "row", "position"]
    of_risks = table.pivot(index=keys, columns="risk", values="geffect").reindex(columns=list(RISKS))
    return table.drop_duplicates(keys)[[*keys, "token", "loss"]].merge(of_risks, on=keys)


def ranked(found: Sequence[DataFrame]) -> list[int]:
    """The rows by the largest |e_r| of their tokens, each run's relative to its own largest, over all runs."""
    sizes = [table.assign(size=table["retain"].fillna(table["unlearn"]).abs()).groupby("row")["size"].max() for table in found]
    together = [size / (size.max() or 1.0) for size in sizes]
    if not together:
        return []
    total = pd.concat(together, axis=1).sum(axis=1)
    return [int(row) for row in total.sort_values(ascending=False, kind="stable").index]


def logs(runs: Sequence[Run]) -> DataFrame | None:
    """The lines of logs/train.jsonl; infinite what is not finite (the log has null), NaN what a line lacks."""
    found = []
    for run in runs:
        if (file := run.folder / "logs" / "train.jsonl").exists():
            lines = [line for line in read_jsonl(file) if isinstance(line.get("step"), int)]
            known = [
                {key: np.inf if value is None or value != value else value for key, value in line.items()} for line in lines
            ]
            found.append((run.name, DataFrame(known).select_dtypes("number")))
    return together(found)


def losses(runs: Sequence[Run]) -> dict[str, dict[str, dict[str, float]]]:
    """logs/losses.json of each run that has one: {run: {"forget": {"start": ..., "end": ...}, "retain": ...}}."""
    found = {}
    for run in runs:
        if (file := run.folder / "logs" / "losses.json").exists():
            found[run.name] = {key: value for key, value in read_object(file).items() if isinstance(value, dict)}
    return found


def scores(runs: Sequence[Run]) -> DataFrame | None:
    """Columns run, step, and every score that scores.csv has a number of."""
    return together((name, _by_step(columns)) for name, columns in _scored(runs, SCORES) if columns)


def harness(runs: Sequence[Run]) -> DataFrame | None:
    """Columns run, step, model (unlearned, at step 0 the original; retain), and every score of lm-eval's in scores.csv."""
    found = []
    for name, columns in _scored(runs, HARNESS):
        for model, prefix in (("retain", OF_RETAIN), ("unlearned", "")):
            of = {key: columns.pop(key) for key in list(columns) if key.startswith(prefix)}
            if of:
                found.append((name, _by_step({key.removeprefix(prefix): values for key, values in of.items()}, model=model)))
    return together(found)


def _scored(runs: Sequence[Run], ends: Iterable[str]) -> list[tuple[str, dict[str, Series]]]:
    files = [(run.name, run.folder / "scores.csv") for run in runs]
    return [(name, score_figures.read(file, "step", ends)) for name, file in files if file.exists()]


def _by_step(columns: dict[str, Series], **more: str) -> DataFrame:
    table = DataFrame(columns).rename_axis("step").reset_index()
    table.insert(0, "step", table.pop("step").astype(int))
    for name, value in more.items():
        table.insert(1, name, value)
    return table


def unshown_scores(runs: Sequence[Run], ends: Sequence[str]) -> list[str]:
    """How many values of these scores are not finite, in words; nothing where none is."""
    said = []
    for run in runs:
        if (file := run.folder / "scores.csv").exists():
            columns = score_figures.columns_of(file, "step", ends)
            count = sum(int(values.isna().sum()) for values in columns.values())
            said += [f"{run.name}: {count} values are not finite, and are not drawn."] if count else []
    return said


def other_scores(runs: Sequence[Run]) -> list[str]:
    """The columns of scores.csv with a number that no figure has."""
    found: dict[str, None] = {}
    for run in runs:
        if (file := run.folder / "scores.csv").exists():
            table = _csv(file, ("step",)).select_dtypes("number")
            found |= dict.fromkeys(name for name in table if table[name].notna().any())
    known = re.compile(f"({'|'.join((*SCORES, *HARNESS))})$|^(step|ds_size|bar|control_.*)$")
    return [name for name in found if not known.search(name)]


def control(runs: Sequence[Run]) -> tuple[DataFrame | None, DataFrame | None]:
    """The curves of the fair comparison at each run's last checkpoint that has one; and what was chosen on them.

    Columns run, step, weight, forget_ps, retain_ps; and those with bar, NaN for what is not known.
    """
    curves, chosen = [], []
    for run in runs:
        if files := run.scored("control.csv"):
            step, file = files[-1]
            columns = score_figures.read(file, "weight", score_figures.CONTROL)
            curve = DataFrame(columns).rename_axis("weight").reset_index().assign(step=step)
            bar, weight = score_figures.control_of(file.parent)
            at = curve.iloc[(curve["weight"] - weight).abs().argmin()] if weight is not None and len(curve) else {}
            point = {name: at.get(name, np.nan) for name in score_figures.CONTROL}
            curves.append((run.name, curve))
            chosen.append({"run": run.name, "step": step, "bar": bar, "weight": weight, **point})
    return together(curves), DataFrame(chosen) if chosen else None


def attacked(runs: Sequence[Run]) -> DataFrame | None:
    """The lines of robustness.csv."""
    files = [(run.name, run.folder / "robustness.csv") for run in runs]
    return together((name, _csv(file, ("step", *ATTACKED, "setting"))) for name, file in files if file.exists())


def attacks(runs: Sequence[Run]) -> DataFrame | None:
    """The lines of robustness.csv of the last checkpoint of each run at which each attack was done, on each model."""
    table = attacked(runs)
    return None if table is None else last(table, *ATTACKED)


def representation(runs: Sequence[Run]) -> DataFrame | None:
    """The lines of each run's layers.csv (CKA and cosine by layer)."""
    found = []
    for run in runs:
        file = run.folder / "layers.csv"
        if file.exists() and run.represented():
            table = _csv(file, ("step", "model", "beside", "data", "layer", "cka", "cosine"))
            found.append((run.name, table.assign(layer=table["layer"].astype(str))))
    return together(found)


def _csv(file: Path, wanted: Sequence[str]) -> DataFrame:
    try:
        table = pd.read_csv(file)
        if lacking := [name for name in wanted if name not in table]:
            raise ValueError(f"it lacks the columns {', '.join(lacking)}")
    except (ValueError, OSError) as error:
        raise ValueError(f"{file}: not a table to draw from ({' '.join(str(error).split())})") from error
    return table
