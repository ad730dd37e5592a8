"""Linear CKA and cosines of each layer's outputs between models, as evaluation_everything.py measures and writes them."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app import evaluating
from app.data import Rows
from app.extraction import hash_data
from app.settings import EvalEverything
from unlearn.io.rows import write_csv
from utils import is_main_process, say

if TYPE_CHECKING:
    from torch import Tensor

FILE = "layers.csv"
Outputs = dict[str, "Tensor"]  # by set


def represent(
    settings: EvalEverything,
    target: evaluating.Target,
    models: evaluating.Models,
    rows: dict[str, Rows],
    kept: dict[str, Outputs],
) -> None:
    """One checkpoint's layers beside the original model's, and the retain model's where it is given.

    Args:
        kept: the outputs of these two, which are the same for every checkpoint.
    """
    paths = [target.path, settings.original_path, *([settings.retain_path] if settings.retain_path else [])]
    progress = evaluating.Progress(settings, target, "representation", paths, hash_data(settings, rows))
    if progress.finished and progress.same and (target.folder / FILE).exists():
        return say(f"{target.path}: the layers are compared already: {target.folder / FILE}")
    lines = progress.part("layers", partial(compare, settings, target.path, models, rows, kept))
    if is_main_process():
        from unlearn.reporting.representation_figure import draw

        write(target, [{"step": target.step} | line for line in lines])
        draw(target.folder, None if target.run is None else target.run / "geffect", target.step)
    progress.close()
    say(f"{target.path}: CKA and cosines by layer are in {target.folder / FILE}")


def compare(
    settings: EvalEverything, path: str, models: evaluating.Models, rows: dict[str, Rows], kept: dict[str, Outputs]
) -> list[dict[str, Any]]:
    """A line a pair of models, set and layer."""
    from unlearn.scores.representation import layer_names, linear_cka, mean_cosine

    def of(path: str) -> Outputs:
        if path not in kept:
            kept[path] = outputs(models, rows, path)
        return kept[path]

    found = {"unlearned": outputs(models, rows, path), "original": of(settings.original_path)}
    if settings.retain_path:
        found["retain"] = of(settings.retain_path)
    pairs = [("unlearned", "original"), ("retain", "original"), ("unlearned", "retain")]
    lines = []
    for model, beside in (pair for pair in pairs if found.keys() >= set(pair)):
        for data in found[model]:
            one, other = (found[name][data] for name in (model, beside))
            for i, layer in enumerate(layer_names(one.shape[1])):
                values = {"cka": linear_cka(one[:, i], other[:, i]), "cosine": mean_cosine(one[:, i], other[:, i])}
                lines.append({"model": model, "beside": beside, "data": data, "layer": layer, **values, "tokens": len(one)})
    return lines


def outputs(models: evaluating.Models, rows: dict[str, Rows], path: str) -> Outputs:
    from unlearn.scores.representation import hidden_states

    how = models.at(path)
    return {
        data: hidden_states(how, models.tokenize(rows[data]), what=f"layers, {Path(path).name}, {data}")
        for data in ("forget", "retain")
    }


def write(target: evaluating.Target, lines: list[dict[str, Any]]) -> None:
    """Into the checkpoint's layers.csv, and in place of the step's lines into the run's."""
    filled = [{key: None if value != value else value for key, value in line.items()} for line in lines]
    write_csv(target.folder / FILE, filled)
    if target.table is not None and target.step is not None and target.table != target.folder:
        file = target.table / FILE
        others: list[dict[str, Any]] = list(csv.DictReader(file.open(newline=""))) if file.exists() else []
        stay = [line for line in others if line["step"] != str(target.step)]
        write_csv(file, sorted([*stay, *filled], key=lambda line: int(line["step"])))
