"""TOFU's scores of a model, or of all checkpoints of a run: ROUGE-L, probability, truth ratio, Model Utility, Forget Quality.

    torchrun --nproc_per_node=1 --master_port=18765 tofu_evaluation.py split=forget05 model_family=phi model_path=CKPT
    python tofu_evaluation.py model_path=RUN retain_path=RETAIN
    python tofu_evaluation.py --config-name=aggregate_eval_stat ckpt_result=A retain_result=B save_file=C

The last scores two logs in TOFU's format, with no model. Every key stands in config/eval_tofu.yaml (or
config/aggregate_eval_stat.yaml) and config/common.yaml.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

import evaluation
import planning
import settings
import utils
from app.families import Family, load_family
from unlearn.io.rows import read_jsonl, read_object, write_csv, write_json
from unlearn.io.weights import is_of, weights_of

# What may differ when an evaluation is started again: it is scored anew, and nothing is measured anew.
MAY_DIFFER = {"retain_result", "retain_path", "original_path", "truth_ratio", "epsilon", "method_name", "submitted_by"}
WORDS = {"ascii": "words of a-z and 0-9", "unicode": "words of any script"}
SETS = {"retain": "retain_perturbed", "real_authors": "real_authors_perturbed", "real_world": "world_facts_perturbed"}


# ---- before anything is loaded ----


def prepare(cfg: DictConfig) -> Family:
    """Fill in what the run and the family decide, and refuse what cannot work before anything is loaded."""
    family = evaluation.prepare(cfg, "eval_tofu")
    if cfg.retain_result is not None and cfg.retain_path is not None:
        raise ValueError(f"retain_result={cfg.retain_result} and retain_path={cfg.retain_path}: give one of the two")
    if cfg.generation.max_length is None and cfg.generation.max_new_tokens is None:
        raise ValueError("generation.max_length=null: give generation.max_new_tokens=N")
    if cfg.forget_data is None:
        for split in splits(cfg).values():
            settings.check_split(cfg.data_path, split)
    if cfg.retain_result is not None and (rows := rows_at_hand(cfg)) is not None:
        check_questions(cfg, rows)
    return family


def rows_at_hand(cfg: DictConfig) -> list[dict[str, Any]] | None:
    """The forget rows that will be asked, None where only `datasets` has them."""
    file = Path(cfg.forget_data or Path(cfg.data_path, f"{cfg.split}_perturbed.json"))
    return read_jsonl(file)[: cfg.ds_size] if file.exists() else None


def read_log(key: str, path: str) -> dict[str, Any]:
    """An eval_log_aggregated.json. Raises ValueError where it is none."""
    if not Path(path).is_file():
        raise ValueError(f"{key}={path}: no such file")
    try:
        log = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{key}={path}: not JSON ({error})") from error
    from unlearn.scores.tofu import check_log

    check_log(log, f"{key}={path}")
    return dict(log)


def check_questions(cfg: DictConfig, rows: list[dict[str, Any]]) -> None:
    """Raises ValueError where the retain log does not answer the questions that will be asked."""
    texts = read_log("retain_result", cfg.retain_result)["eval_log_forget.json"]["generated_text"]
    there = [texts[row][-1].strip() for row in sorted(texts, key=int)]
    if there != [row["answer"].strip() for row in rows]:
        raise ValueError(
            f"retain_result={cfg.retain_result}: answers other questions: {len(there)} forget rows,"
            f" and split={cfg.split} with ds_size={cfg.ds_size} has {len(rows)}, or other ones"
        )


# ---- the work ----


def run(cfg: DictConfig) -> None:
    if cfg.get("plan"):
        if cfg.model_path:
            evaluation.inherit(cfg)
        return planning.tell(cfg, "eval_tofu")
    if "ckpt_result" in cfg:
        return aggregate_logs(cfg)
    family = prepare(cfg)
    sets = read_sets(cfg)
    if cfg.retain_result is not None:
        check_questions(cfg, sets["forget"])
    measure = functools.cache(functools.partial(measure_set, cfg, evaluation.Models(cfg, family), sets))
    targets = evaluation.targets(cfg)
    for target in targets:
        with utils.alone(target.folder):
            evaluate(cfg, target, sets, measure)
    evaluation.draw_run(targets)


def read_sets(cfg: DictConfig) -> dict[str, list[dict[str, Any]]]:
    """The rows of each set, `ds_size` at most."""
    import dataloader

    if cfg.forget_data is not None:
        data = dataloader.unlearning_data(cfg)
        return {"retain": data.held_out[: cfg.ds_size], "forget": data.forget[: cfg.ds_size]}
    return {name: dataloader.read_split(cfg.data_path, split)[: cfg.ds_size] for name, split in splits(cfg).items()}


def splits(cfg: DictConfig) -> dict[str, str]:
    """Each set's split, or the key of the local file in its place."""
    if cfg.forget_data is not None:
        return {"retain": "retain_data", "forget": "forget_data"}
    return SETS | {"forget": f"{cfg.split}_perturbed"}


def measure_set(
    cfg: DictConfig,
    models: evaluation.Models,
    sets: dict[str, list[dict[str, Any]]],
    path: str,
    name: str,
    answers: bool = True,
) -> dict[str, Any]:
    """One set's part of a model's log."""
    from unlearn.scores.asking import measure_task
    from unlearn.scores.tofu import REAL

    how = models.at(path)
    return measure_task(
        how,
        models.tokenizer,
        sets[name],
        models.tokenize,
        real=name in REAL,
        answers=answers,
        max_length=cfg.generation.max_length,
        max_new_tokens=cfg.generation.max_new_tokens,
        what=name,
        rouge_tokenizer=cfg.rouge_tokenizer,
    )


def retain_log(
    cfg: DictConfig, target: evaluation.Target, measure: Callable[..., dict[str, Any]], data: str
) -> dict[str, Any] | None:
    """The retain model's log, of the forget rows at least; None where there is no such model.

    One that was measured stays in the results' folder: those rows are not measured anew to be scored otherwise.
    """
    if cfg.retain_result is not None:
        return read_log("retain_result", cfg.retain_result)
    if cfg.retain_path is None:
        return None
    file = target.folder / "retain_model.json"
    found = read_object(file) if file.exists() else {}
    if "log" not in found or found.get("data", data) != data or not is_of(cfg.retain_path, found.get("weights")):
        log = {"eval_log_forget.json": measure(cfg.retain_path, "forget", answers=False)}
        found = {"model": cfg.retain_path, "weights": weights_of(cfg.retain_path), "data": data, "log": log}
        if utils.is_main_process():
            write_json(file, found)
    return dict(found["log"])


def evaluate(
    cfg: DictConfig,
    target: evaluation.Target,
    sets: dict[str, list[dict[str, Any]]],
    measure: Callable[..., dict[str, Any]],
) -> None:
    from unlearn.scores import tofu

    data = {splits(cfg)[name]: utils.hash_rows(rows, utils.ALL_TEXTS) for name, rows in sets.items()}
    progress = evaluation.Progress(cfg, target, "tofu_evaluation", MAY_DIFFER, [target.path], data)
    log_file = target.folder / "eval_log_aggregated.json"
    if progress.finished and log_file.exists():
        log = read_object(log_file)
        if lacking := [tofu.TASKS[name][0] for name in sets if tofu.TASKS[name][0] not in log]:
            raise ValueError(f"{log_file}: lacks {', '.join(lacking)}; remove it to have it measured again")
    else:
        names = [name for name in tofu.TASKS if name in sets]
        log = {tofu.TASKS[name][0]: progress.part(name, functools.partial(measure, target.path, name)) for name in names}
        if utils.is_main_process():
            write_json(log_file, log)
    found = tofu.aggregate(log, cfg.truth_ratio, cfg.epsilon) | {"rouge_rows": tofu.without_words(log)}
    other = retain_log(cfg, target, measure, data[splits(cfg)["forget"]]) if "truth_ratio" in found["forget"] else None
    found["forget_quality"] = quality(cfg, found, log, other)
    if utils.is_main_process():
        write(cfg, target, progress, found)
    progress.close()
    report(found, cfg.rouge_tokenizer)
    utils.say(f"{target.path}: the log and the scores are in {target.folder}")


def quality(cfg: DictConfig, found: dict[str, Any], log: dict[str, Any], retain: dict[str, Any] | None) -> Any:
    """Forget Quality against the retain model's log, or why there is none, and what would give it."""
    if retain is not None:
        from unlearn.scores import tofu

        return tofu.forget_quality(log, retain, cfg.truth_ratio, cfg.epsilon)
    if "truth_ratio" not in found["forget"]:
        return f"not available: rows of forget_data={cfg.forget_data} lack perturbed_answer, a list of wrong answers"
    published = load_family(cfg.model_family).retain_model_path if "model_family" in cfg else None
    name = utils.RETAIN_OF[cfg.split] if "split" in cfg else "the retain split"
    like = f", such as {published.format(split=name)}" if published else ""
    return f"not available: no retain model; give retain_result=LOG or retain_path=a model trained on {name} only{like}"


def write(cfg: DictConfig, target: evaluation.Target, progress: evaluation.Progress, found: dict[str, Any]) -> None:
    from unlearn.scores.tofu import TASKS

    method = cfg.method_name or (target.run.name if target.run else Path(target.path).name)
    write_statistics(target.folder / "aggregate_stat.csv", found, method, cfg.submitted_by)
    sections = {"tofu": found, "definitions": definitions(cfg), "from": {"tofu_evaluation": progress.record}}
    evaluation.write_scores(target, sections)
    columns = {f"{name}_{key}": value for name in TASKS if name in found for key, value in found[name].items() if key != "rows"}
    quality = found["forget_quality"] if isinstance(found["forget_quality"], dict) else {}
    columns |= {"model_utility": found["model_utility"]}
    columns |= {"forget_quality": quality.get("p"), "forget_quality_D": quality.get("D")}
    evaluation.add_row(target, {"split": cfg.split, "ds_size": cfg.ds_size} | columns)


def write_statistics(file: Path, found: dict[str, Any], method: str, submitted_by: str | None) -> None:
    """One line in TOFU's aggregate_stat.csv format."""
    from unlearn.scores.tofu import columns

    quality = found["forget_quality"]
    quality = quality["p"] if isinstance(quality, dict) else "not available"
    row = columns(found) | {"Forget Quality": quality, "Method": method, "Submitted By": submitted_by or ""}
    write_csv(file, [row])


def definitions(cfg: DictConfig) -> dict[str, Any]:
    tag = "the answer tag counted, too" if cfg.get("loss_on_answer_tag") else "the answer tag not counted"
    tokenizer = cfg.get("rouge_tokenizer")
    words = f"rouge_tokenizer={tokenizer} ({WORDS[tokenizer]})" if tokenizer else "as the log has it"
    return {
        "probability": f"exp(-mean loss of the answer's tokens, end-of-sequence counted, {tag})",
        "truth_ratio": f"{cfg.truth_ratio}, epsilon {cfg.epsilon}",
        "rouge": f"ROUGE-L recall of the greedy answer, with stemming, {words}; an answer without words has none",
        "model_utility": "harmonic mean of the nine scores of retain, real_authors and real_world",
        "forget_quality": "p-value and D of the two-sample Kolmogorov-Smirnov test on the forget truth ratios; n rows of each",
    }


def report(found: dict[str, Any], rouge_tokenizer: str | None = None) -> None:
    """The scores as a small table on standard error."""
    from unlearn.scores.tofu import KINDS, TASKS

    remedy = " (rouge_tokenizer=unicode counts words of any script)" if rouge_tokenizer == "ascii" else ""
    for name, (_, title) in TASKS.items():
        if name in found:
            values = "  ".join(f"{kind} {evaluation.told(found[name].get(key))}" for key, kind in KINDS.items())
            utils.say(f"{title:13} {values}  ({found[name]['rows']} rows)")
    for name, rows in found["rouge_rows"].items():
        if rows["without_rouge"]:
            utils.say(f"{TASKS[name][1]:13} {rows['without_rouge']} rows have no ROUGE, for their answers have no word{remedy}")
        if rows["letters_dropped"] and rouge_tokenizer == "ascii":
            utils.say(
                f"{TASKS[name][1]:13} {rows['letters_dropped']} answers have letters that ROUGE's words leave out{remedy}"
            )
    utils.say(f"Model Utility {evaluation.told(found['model_utility'])}")
    quality = found["forget_quality"]
    text = quality if isinstance(quality, str) else f"p = {quality['p']:.3g}, D = {quality['D']:.3f}, n = {quality['n']}"
    utils.say(f"Forget Quality {text}")


# ---- two logs and no model ----


def aggregate_logs(cfg: DictConfig) -> None:
    """TOFU's scores of `ckpt_result`, against `retain_result` where it is given, as the CSV `save_file`."""
    settings.check_against(cfg, utils.compose_config("aggregate_eval_stat"), "aggregate_eval_stat")
    for key in ("ckpt_result", "save_file"):
        if not cfg[key]:
            raise ValueError(f"{key} is missing")
    settings.check_folder(Path(cfg.save_file).parent, "save_file")
    if Path(cfg.save_file).is_dir() or Path(cfg.save_file).suffix == ".json":
        raise ValueError(f"save_file={cfg.save_file}: needs to be the name of a CSV file")
    details = Path(cfg.save_file).with_suffix(".json")
    if details.resolve() in {Path(given).resolve() for given in (cfg.ckpt_result, cfg.retain_result) if given}:
        raise ValueError(f"save_file={cfg.save_file}: the details beside it, {details}, would take the place of a log")
    log = read_log("ckpt_result", cfg.ckpt_result)
    other = read_log("retain_result", cfg.retain_result) if cfg.retain_result else None
    from unlearn.scores import tofu

    found = tofu.aggregate(log, cfg.truth_ratio, cfg.epsilon) | {"rouge_rows": tofu.without_words(log)}
    found["forget_quality"] = quality(cfg, found, log, other)
    write_statistics(Path(cfg.save_file), found, cfg.method_name or Path(cfg.ckpt_result).stem, cfg.submitted_by)
    record = {"settings": utils.flatten(cfg), "versions": utils.versions()}
    write_json(details, evaluation.no_nan(found | {"definitions": definitions(cfg)} | record))
    report(found)
    utils.say(f"{cfg.save_file} has the scores; D, n and the definitions are in {details}")


if __name__ == "__main__":
    settings.cli(run, "eval_tofu")
