"""TOFU's scores of a model, or of all checkpoints of a run: ROUGE-L, probability, truth ratio, Model Utility, Forget Quality.

    torchrun --nproc_per_node=1 --master_port=18765 tofu_evaluation.py split=forget05 model_family=phi model_path=CKPT
    python tofu_evaluation.py model_path=RUN retain_path=RETAIN
    python tofu_evaluation.py benchmark=muse_news model_family=Llama-2-7b-hf split=forget model_path=CKPT retain_path=RETRAIN
    python tofu_evaluation.py --config-name=aggregate_eval_stat ckpt_result=A retain_result=B save_file=C

Of a benchmark with scores of its own, as MUSE, those. The last scores two logs in TOFU's format, with no model.
"""

from __future__ import annotations

import functools
from pathlib import Path

from app import door, evaluating, planning
from app.checks import check_folder
from app.data import PERTURBED, Rows, asked_sets, data_of
from app.families import Family
from app.filling import of_checkpoint
from app.own import check_own, evaluate_own, measure_own, read_own
from app.runs import alone
from app.settings import Aggregate, EvalTofu
from app.tofu import check_questions, definitions, evaluate, measure_set, quality, read_log, read_sets, report, write_statistics
from unlearn.io.rows import write_json
from utils import say, versions


def prepare(settings: EvalTofu) -> tuple[EvalTofu, Family]:
    """The settings with what the run and the family decide; refuses what cannot work before anything is loaded."""
    settings, family = evaluating.prepare(settings)
    if settings.retain_result is not None and settings.retain_path is not None:
        raise ValueError(f"retain_result={settings.retain_result} and retain_path={settings.retain_path}: give one of the two")
    if settings.generation.max_length is None and settings.generation.max_new_tokens is None:
        raise ValueError("generation.max_length=null: give generation.max_new_tokens=N")
    data = data_of(settings)
    if not settings.benchmark.own and not asked_sets(data, settings.split):
        raise ValueError(f"benchmark={data.benchmark.name}: asks nothing (evaluation_everything.py scores texts)")
    check_own(settings)
    if settings.retain_result is not None and "forget" not in asked_sets(data, settings.split):
        raise ValueError(
            f"retain_result={settings.retain_result}: benchmark={data.benchmark.name} has no such log; give retain_path=MODEL"
        )
    for name, of in asked_sets(data, settings.split).items():
        if of != "held_out":
            also = () if settings.forget_data else PERTURBED if name in ("forget", "retain") else PERTURBED[1:]
            data.check(of, also if of.endswith("_perturbed") else ())
    if settings.retain_result is not None and (rows := rows_at_hand(settings)) is not None:
        check_questions(settings, rows)
    return settings, family


def rows_at_hand(settings: EvalTofu) -> Rows | None:
    """The forget rows that will be asked, None where only `datasets` has them."""
    data = data_of(settings)
    found = data.at_hand(asked_sets(data, settings.split)["forget"])
    return None if found is None else found[: settings.ds_size]


def run(settings: EvalTofu | Aggregate) -> Path | None:
    if isinstance(settings, Aggregate):
        aggregate_logs(settings)
        return None
    if settings.plan:
        planning.tell(of_checkpoint(settings) if settings.model_path else settings)
        return None
    settings, family = prepare(settings)
    sets = read_sets(settings)
    if settings.retain_result is not None:
        check_questions(settings, sets["forget"])
    models, own = evaluating.Models(settings, family), read_own(settings)
    measure = functools.cache(functools.partial(measure_set, settings, models, sets))
    of_own = functools.cache(functools.partial(measure_own, settings, models, own))
    targets = evaluating.targets(settings)
    for target in targets:
        with alone(target.folder):
            if sets:
                evaluate(settings, target, sets, measure)
            if own:
                evaluate_own(settings, target, own, of_own)
    evaluating.draw_run(targets)
    return targets[-1].folder


def aggregate_logs(settings: Aggregate) -> None:
    """TOFU's scores of `ckpt_result`, against `retain_result` where it is given, as the CSV `save_file`."""
    for key in ("ckpt_result", "save_file"):
        if not getattr(settings, key):
            raise ValueError(f"{key} is missing")
    file = Path(settings.save_file)
    check_folder(file.parent, "save_file")
    if file.is_dir() or file.suffix == ".json":
        raise ValueError(f"save_file={file}: needs to be the name of a CSV file")
    details = file.with_suffix(".json")
    logs = {key: path for key in ("ckpt_result", "retain_result") if (path := getattr(settings, key))}
    if details.resolve() in {Path(path).resolve() for path in logs.values()}:
        raise ValueError(f"save_file={file}: the details beside it, {details}, would take the place of a log")
    log, other = (read_log(key, logs[key]) if key in logs else None for key in ("ckpt_result", "retain_result"))
    assert log is not None
    from unlearn.scores import tofu

    found = tofu.aggregate(log, settings.truth_ratio, settings.epsilon) | {"rouge_rows": tofu.without_words(log)}
    found["forget_quality"] = quality(settings, found, log, other)
    write_statistics(file, found, settings.method_name or Path(settings.ckpt_result).stem, settings.submitted_by)
    record = {"settings": settings.model_dump(), "versions": versions()}
    write_json(details, evaluating.no_nan(found | {"definitions": definitions(settings)} | record))
    report(found)
    say(f"{file} has the scores; D, n and the definitions are in {details}")


if __name__ == "__main__":
    door.cli(run, EvalTofu, Aggregate)
