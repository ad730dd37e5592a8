"""The attacks on a checkpoint, as robustness.py runs them: each goes on where it was, and writes its lines and rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from app import evaluating
from app.attack_questions import paraphrase, prefix, sample
from app.attack_settings import ATTACKS, Robustness
from app.attack_tables import Result, report, write
from app.attack_weights import compared, quantize, relearn, relearned_rows
from app.attack_work import TEMPLATES, Part, Work
from app.data import hash_rows
from unlearn.io.weights import hash_file
from utils import is_main_process, say

BY_NAME: dict[str, Callable[[Work, str, Part], list[Result]]] = {
    "relearn": relearn,
    "quantize": quantize,
    "sample": sample,
    "prefix": prefix,
    "paraphrase": paraphrase,
}


def attack(work: Work, target: evaluating.Target) -> None:
    """All attacks on one checkpoint, each going on where it was; rows, lines and the figure."""
    for name in work.settings.attacks:
        attack_by(work, target, name)
    if is_main_process():
        from unlearn.reporting.robustness_figure import draw

        draw(target.folder)


def attack_by(work: Work, target: evaluating.Target, name: str) -> None:
    settings = of_attack(work.settings, name)
    paths = {"unlearned": target.path} | ({"retain": settings.retain_path} if settings.retain_path else {})
    progress = evaluating.Progress(settings, target, f"robustness_{name}", list(paths.values()), hashes(work, name))
    if progress.finished and progress.same:
        return say(f"{target.path}: {name} is done already: {target.folder}")

    found = {}
    for role, path in paths.items():
        run = partial(BY_NAME[name], work, path, Part(progress, role))
        found[role] = [Result(*one) for one in work.once((name, path), run)] if role == "retain" else run()
    if name == "relearn" and "retain" in found:
        found["unlearned"] = compared(found["unlearned"], found["retain"])
    if is_main_process():
        write(target, name, progress.record, found)
    progress.close()
    report(name, found)


def of_attack(settings: Robustness, name: str) -> Robustness:
    """The settings as far as they are this attack's: what the others' are is no part of its record.

    A file that it reads is noted with a hash.
    """
    others = {other: type(settings).model_fields[other].default for other in ATTACKS if other != name}
    own = settings.model_copy(update=others | {"attacks": [name]})
    if name == "prefix":
        file = Path(settings.prefix.templates or TEMPLATES)
        templates = f"{file.name} ({hash_file(file)[:8]})"
        return own.model_copy(update={"prefix": settings.prefix.model_copy(update={"templates": templates})})
    if name == "relearn":
        data = f"{settings.relearn.data or 'forget rows'} ({hash_rows(relearned_rows(settings))[:8]})"
        return own.model_copy(update={"relearn": settings.relearn.model_copy(update={"data": data})})
    return own


def hashes(work: Work, name: str) -> dict[str, str]:
    """A hash of the rows that the attack is of, by their sets."""
    of, split = work.settings.benchmark, work.settings.split
    sets = {"forget": of.unlearn[split].forget[0], "retain": of.held_out.rows or of.unlearn[split].retain[0]}
    found = {one: hash_rows(work.rows[role]) for role, one in sets.items()}
    if name == "paraphrase":
        perturbed = of.perturbed.get("forget", f"{sets['forget']}, paraphrased").format(split=split)
        found[perturbed] = hash_rows(work.rows["forget"], work.settings.paraphrase.columns)
    return found
