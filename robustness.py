"""What an unlearned model gives back: trained again, with quantised weights, sampled, asked inside templates or in other words.

    python robustness.py model_path=RUN/checkpoint-12 retain_path=RETAIN
    python robustness.py model_path=RUN attacks=[relearn,quantize,sample,prefix,paraphrase]

A line a checkpoint, attack and setting goes to robustness.csv, the rows of each attack beside it; the model trained on the
retain split alone undergoes the same.
"""

from __future__ import annotations

from pathlib import Path

from app import attacking, door, evaluating, planning
from app.attack_settings import Robustness
from app.attack_weights import relearned_rows
from app.attack_work import Work, check, read_rows
from app.families import Family
from app.filling import of_checkpoint
from app.runs import alone


def prepare(settings: Robustness) -> tuple[Robustness, Family]:
    """The settings with what the run and the family decide; refuses what cannot work before anything is loaded."""
    check(settings)
    settings, family = evaluating.prepare(settings)
    if "relearn" in settings.attacks:
        relearned_rows(settings)
    return settings, family


def run(settings: Robustness) -> Path | None:
    if settings.plan:
        planning.tell(of_checkpoint(settings) if settings.model_path else settings)
        return None
    settings, family = prepare(settings)
    work = Work(settings, family, evaluating.Models(settings, family), read_rows(settings))
    targets = [target for target in evaluating.targets(settings) if target.step != 0]  # the original has nothing to give back
    for target in targets:
        with alone(target.folder):
            attacking.attack(work, target)
    return targets[-1].folder


if __name__ == "__main__":
    door.cli(run, Robustness)
