"""What a model gives away of the answers: extraction (PS), memorisation, membership; and the fair comparison between methods.

    torchrun --nproc_per_node=1 --master_port=18765 evaluation_everything.py split=forget05 model_family=phi model_path=CKPT
    python evaluation_everything.py model_path=RUN retain_path=RETAIN

PS of the unlearned and of the original model, on the forget and the held-out retain rows; the largest weight at which a
mixture of the two keeps `ps_p` of the original's retain PS, and its forget PS. `lm_eval=[mmlu,wmdp_bio]`: also tasks of the
package lm-eval.
"""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path

from app import door, evaluating, harness, planning
from app.checks import check_architecture, check_checkpoint
from app.data import check_perturbed, data_of
from app.extraction import evaluate, measure, measure_similar, read_rows
from app.families import Family
from app.filling import of_checkpoint
from app.representation import Outputs, represent
from app.runs import alone, original_model
from app.settings import EvalEverything


def prepare(settings: EvalEverything) -> tuple[EvalEverything, Family]:
    """The settings with what the run and the family decide; refuses what cannot work before anything is loaded."""
    if settings.gradnorm and settings.parallel == "fsdp":
        raise ValueError("gradnorm=true: needs whole gradients on every process; parallel=ddp has them, parallel=fsdp has not")
    harness.check(settings)
    settings, family = evaluating.prepare(settings)
    original = evaluating.original_of(settings) or original_model(settings, family, "original_path")
    check_checkpoint("original_path", original)
    check_architecture("original_path", original, family)
    check_perturbed(data_of(settings), settings.split)
    return settings.model_copy(update={"original_path": original}), family


def run(settings: EvalEverything) -> Path | None:
    if settings.plan:
        planning.tell(of_checkpoint(settings) if settings.model_path else settings)
        return None
    settings, family = prepare(settings)
    asked = harness.ask(settings)
    models = evaluating.Models(settings, family, keep=settings.control)
    rows = read_rows(settings)
    of = cache(partial(measure, settings, models, rows))  # the original and the retain model once for all checkpoints
    similar_of = cache(partial(measure_similar, models, rows))
    kept: dict[str, Outputs] = {}
    targets = [target for target in evaluating.targets(settings) if target.step != 0]  # the original is beside every checkpoint
    known = harness.known(targets) if asked else {}
    for target in targets:
        with alone(target.folder):
            evaluate(settings, target, models, rows, of, similar_of)
            if settings.representation:
                represent(settings, target, models, rows, kept)
            if asked:
                harness.evaluate(settings, target, models, asked, known)
        models.drop(target.path)
    evaluating.draw_run(targets)
    return targets[-1].folder


if __name__ == "__main__":
    door.cli(run, EvalEverything)
