"""What a model gives away of the answers: extraction (PS), memorisation, membership, the control search; measured and told."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app import evaluating
from app.data import ALL_TEXTS, TEXTS, Rows, data_of, hash_rows, set_with_perturbed, unlearning_data
from app.extraction_tables import no_holdout, report, scored, totals, write
from app.settings import EvalEverything
from unlearn.io.rows import texts_in
from utils import is_main_process, say

if TYPE_CHECKING:
    from unlearn.passes.forcing import Forced


def read_rows(settings: EvalEverything) -> dict[str, Rows]:
    """The forget rows, the held-out retain rows, both with their paraphrased questions, rows that nobody trained on, and the
    benchmark's further sets."""
    data = data_of(settings)
    found = unlearning_data(data, settings.split, settings.retain_holdout)
    unseen = data.benchmark.unlearn[settings.split].unseen
    return {
        "forget": set_with_perturbed(data, settings.split, "forget", found.forget),
        "retain": set_with_perturbed(data, settings.split, "retain", found.held_out),
        "holdout": data.rows(unseen) if unseen is not None and no_holdout(settings) is None else [],
    } | {name: data.rows(of) for name, of in data.benchmark.also.items()}


def hash_data(settings: EvalEverything, rows: dict[str, Rows]) -> dict[str, str]:
    """A hash of each set's rows, as far as they are read."""
    of, sets = settings.benchmark, settings.benchmark.unlearn[settings.split]
    own = {"forget": sets.forget[0], "retain": of.held_out.rows or sets.retain[0], "holdout": sets.unseen} | of.also
    perturbed = {name: split.format(split=settings.split) for name, split in of.perturbed.items()}
    if not perturbed:
        return {name: hash_rows(rows[role], ALL_TEXTS) for role, name in own.items() if name is not None}
    found = {name: hash_rows(rows[role]) for role, name in own.items() if name is not None}
    return found | {name: hash_rows(rows[role], ALL_TEXTS[len(TEXTS) :]) for role, name in perturbed.items()}


def evaluate(
    settings: EvalEverything,
    target: evaluating.Target,
    models: evaluating.Models,
    rows: dict[str, Rows],
    of: Callable[[str, bool], dict[str, Rows]],
    similar_of: Callable[[str, str], list[float]],
) -> None:
    """One model's results, `of` and `similar_of` giving what is measured at a path."""
    weights = [target.path, settings.original_path, *([settings.retain_path] if settings.retain_path else [])]
    progress = evaluating.Progress(settings, target, "evaluation_everything", weights, hash_data(settings, rows))
    if progress.finished and progress.same:
        return say(f"{target.path} is evaluated already: {target.folder}")
    measured: dict[str, dict[str, Rows]] = {}
    for name, path in (("original", settings.original_path), ("unlearned", target.path)):
        measured[name] = progress.part(name, partial(of, path, name == "unlearned"))
        for data in scored(settings) if settings.similar else ():
            found = progress.part(f"similar_{name}_{data}", partial(similar_of, path, data))
            for row, value in zip(measured[name][data], found, strict=True):
                row["ps_similar"] = value
    norms_of = partial(measure_gradnorm, models, rows)
    if settings.gradnorm and rows["holdout"]:
        add_gradnorm(measured["unlearned"], progress.part("gradnorm_unlearned", partial(norms_of, target.path)))
    retain = None
    if settings.retain_path is not None:
        retain = progress.part("retain_model", partial(of, settings.retain_path, True))
        if settings.gradnorm and rows["holdout"]:
            add_gradnorm(retain, progress.part("gradnorm_retain_model", partial(norms_of, settings.retain_path)))
        if settings.retain_path not in (settings.original_path, target.path):
            models.drop(settings.retain_path)
        for data in ("forget", "holdout"):
            for row, other in zip(measured["unlearned"][data], retain[data], strict=True):
                row["reference"] = row["loss"] - other["loss"]
    from unlearn.scores.extraction import mean_of

    bar = settings.ps_p * mean_of(measured["original"]["retain"], "ps_exact")
    control = search_control(settings, target, models, rows, progress, bar) if settings.control else None
    found = totals(settings, measured, retain, bar, control)
    if is_main_process():
        write(settings, target, progress, measured, found, control)
    progress.close()
    report(found)
    say(f"{target.path}: rows and scores are in {target.folder}")


def measure(
    settings: EvalEverything, models: evaluating.Models, rows: dict[str, Rows], path: str, privacy: bool
) -> dict[str, Rows]:
    """Each row's scores under teacher forcing, all from one pass; `privacy`: with the membership scores."""
    from unlearn.passes.forcing import teacher_force
    from unlearn.scores import definitions as scores
    from unlearn.scores.extraction import knowledge, membership

    how = models.at(path)
    asked = {name: given for name, given in rows.items() if privacy or name != "holdout"}
    again = [
        row | {"question": text}
        for name in ("forget", "retain")
        for row in rows[name]
        for text in texts_in(row, "paraphrased_question")
    ]
    flat = models.tokenize([row for given in (*asked.values(), again) for row in given])
    forced = iter(teacher_force(how, flat, moments=privacy, what=f"{Path(path).name}"))
    found: dict[str, Rows] = {}
    for name, given in asked.items():
        found[name] = []
        for row in given:
            one: Forced = next(forced)
            more = (
                membership(one, row.get("answer") or row["text"], k=settings.min_k)
                if privacy and name in ("forget", "holdout")
                else {}
            )
            found[name].append(knowledge(one) | more)
    for name in ("forget", "retain"):
        for row, into in zip(rows[name], found[name], strict=True):
            perturbed = [scores.ps_exact(next(forced).right) for _ in texts_in(row, "paraphrased_question")]
            into["ps_perturb"] = scores.mean(perturbed)
    return found


def measure_similar(models: evaluating.Models, rows: dict[str, Rows], path: str, data: str) -> list[float]:
    from unlearn.scores.extraction import ps_similar

    how = models.at(path)
    return ps_similar(how, models.tokenize(rows[data]), what=f"similar, {Path(path).name}")


def measure_gradnorm(models: evaluating.Models, rows: dict[str, Rows], path: str) -> dict[str, list[float]]:
    from unlearn.passes.gradients import gradient_norms

    how = models.at(path)
    names = ("forget", "holdout")
    flat = models.tokenize([row for name in names for row in rows[name]])
    found = gradient_norms(how, flat, f"gradients, {Path(path).name}")
    return {"forget": found[: len(rows["forget"])], "holdout": found[len(rows["forget"]) :]}


def add_gradnorm(measured: dict[str, Rows], norms: dict[str, list[float]]) -> None:
    for name, values in norms.items():
        for row, value in zip(measured[name], values, strict=True):
            row["gradnorm"] = value


def search_control(
    settings: EvalEverything,
    target: evaluating.Target,
    models: evaluating.Models,
    rows: dict[str, Rows],
    progress: evaluating.Progress,
    bar: float,
) -> dict[str, Any]:
    """The largest weight of the unlearned model whose retain PS reaches the bar, and the curve."""
    from unlearn.passes.forcing import teacher_force
    from unlearn.scores.control import mix, search
    from unlearn.scores.definitions import mean, ps_exact

    def at(weight: float) -> list[float]:
        original, unlearned = models.of(settings.original_path), models.of(target.path)
        how = models.mixed(lambda model: mix(model, original, unlearned, weight))
        flat = models.tokenize([*rows["forget"], *rows["retain"]])
        ps = [ps_exact(forced.right) for forced in teacher_force(how, flat, what=f"control, weight {weight:.4g}")]
        n = len(rows["forget"])
        return [mean(ps[:n]), mean(ps[n:])]

    def measured(weight: float) -> tuple[float, float]:
        forget, retain = progress.part(f"control_{weight!r}", partial(at, weight))
        return forget, retain

    weight, curve = search(measured, bar)
    best: dict[str, Any] = {"weight": weight}
    if weight is not None:
        best |= dict(zip(("forget_ps", "retain_ps"), curve[weight], strict=True))
    table = [{"weight": at, "forget_ps": forget, "retain_ps": retain} for at, (forget, retain) in sorted(curve.items())]
    return best | {"bar": bar, "curve": table}
