"""TOFU's scores of a model: its log, set by set, then what the log scores, written and told."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app import evaluating
from app.data import ALL_TEXTS, Rows, asked_sets, data_of, hash_rows, unlearning_data
from app.families import load_family
from app.settings import Aggregate, EvalTofu
from unlearn.io.rows import read_object, write_csv, write_json
from unlearn.io.weights import is_of, weights_of
from utils import is_main_process, say

WORDS = {"ascii": "words of a-z and 0-9", "unicode": "words of any script"}


def read_sets(settings: EvalTofu) -> dict[str, Rows]:
    """The rows of each set that is asked, `ds_size` at most."""
    data = data_of(settings)

    def rows(of: str) -> Rows:
        if of == "held_out":
            return unlearning_data(data, settings.split, settings.retain_holdout).held_out
        return data.rows(of)

    found = {name: rows(of)[: settings.ds_size] for name, of in asked_sets(data, settings.split).items()}
    for name, of_set in found.items():
        if any("question" not in row for row in of_set):
            raise ValueError(
                f"benchmark={data.benchmark.name}: its {name} rows have no question (evaluation_everything.py scores texts)"
            )
    return found


def set_names(settings: EvalTofu) -> dict[str, str]:
    """The sets that the rows are of."""
    first = settings.benchmark.unlearn[settings.split].retain
    return {name: first[0] if of == "held_out" else of for name, of in asked_sets(data_of(settings), settings.split).items()}


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


def check_questions(settings: EvalTofu, rows: list[dict[str, Any]]) -> None:
    """Raises ValueError where the retain log does not answer the questions that will be asked."""
    texts = read_log("retain_result", str(settings.retain_result))["eval_log_forget.json"]["generated_text"]
    there = [texts[row][-1].strip() for row in sorted(texts, key=int)]
    if there != [row["answer"].strip() for row in rows]:
        raise ValueError(
            f"retain_result={settings.retain_result}: answers other questions: {len(there)} forget rows,"
            f" and split={settings.split} with ds_size={settings.ds_size} has {len(rows)}, or other ones"
        )


def measure_set(
    settings: EvalTofu,
    models: evaluating.Models,
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
        max_length=settings.generation.max_length,
        max_new_tokens=settings.generation.max_new_tokens,
        what=name,
        rouge_tokenizer=settings.rouge_tokenizer,
        paraphrased=settings.paraphrased and answers,
    )


def retain_log(
    settings: EvalTofu, target: evaluating.Target, measure: Callable[..., dict[str, Any]], data: str
) -> dict[str, Any] | None:
    """The retain model's log, of the forget rows at least; None where there is no such model.

    One that was measured stays in the results' folder: those rows are not measured anew to be scored otherwise.
    """
    if settings.retain_result is not None:
        return read_log("retain_result", str(settings.retain_result))
    if settings.retain_path is None:
        return None
    file = target.folder / "retain_model.json"
    found = read_object(file) if file.exists() else {}
    if "log" not in found or found.get("data", data) != data or not is_of(settings.retain_path, found.get("weights")):
        log = {"eval_log_forget.json": measure(settings.retain_path, "forget", answers=False)}
        found = {"model": settings.retain_path, "weights": weights_of(settings.retain_path), "data": data, "log": log}
        if is_main_process():
            write_json(file, found)
    return dict(found["log"])


def evaluate(
    settings: EvalTofu,
    target: evaluating.Target,
    sets: dict[str, list[dict[str, Any]]],
    measure: Callable[..., dict[str, Any]],
) -> None:
    from unlearn.scores import tofu

    names_of_sets = set_names(settings)
    data = {names_of_sets[name]: hash_rows(rows, ALL_TEXTS) for name, rows in sets.items()}
    progress = evaluating.Progress(settings, target, "tofu_evaluation", [target.path], data)
    log_file = target.folder / "eval_log_aggregated.json"
    if progress.finished and log_file.exists():
        log = read_object(log_file)
        if lacking := [file for name in sets if (file := tofu.task_of(name)[0]) not in log]:
            raise ValueError(f"{log_file}: lacks {', '.join(lacking)}; remove it to have it measured again")
    else:
        names = sorted(sets, key=[*tofu.TASKS, *sets].index)
        log = {tofu.task_of(name)[0]: progress.part(name, functools.partial(measure, target.path, name)) for name in names}
        if is_main_process():
            write_json(log_file, log)
    found = tofu.aggregate(log, settings.truth_ratio, settings.epsilon) | {"rouge_rows": tofu.without_words(log)}
    other = None
    if "truth_ratio" in found["forget"]:
        other = retain_log(settings, target, measure, data[names_of_sets["forget"]])
    found["forget_quality"] = quality(settings, found, log, other)
    if is_main_process():
        write(settings, target, progress, found)
    progress.close()
    report(found, settings.rouge_tokenizer)
    say(f"{target.path}: the log and the scores are in {target.folder}")


def quality(settings: EvalTofu | Aggregate, found: dict[str, Any], log: dict[str, Any], retain: dict[str, Any] | None) -> Any:
    """Forget Quality against the retain model's log, or why there is none, and what would give it."""
    if retain is not None:
        from unlearn.scores import tofu

        return tofu.forget_quality(log, retain, settings.truth_ratio, settings.epsilon)
    if "truth_ratio" not in found["forget"]:
        where = "the log"
        if isinstance(settings, EvalTofu):
            own = settings.forget_data
            where = f"forget_data={own}" if own else f"benchmark={settings.benchmark.name}"
        return f"not available: rows of {where} lack perturbed_answer, a list of wrong answers"
    published, name = None, "the retain split"
    if isinstance(settings, EvalTofu):
        published = load_family(settings.model_family).retain_model_path
        name = settings.benchmark.unlearn[settings.split].retain[0]
    like = f", such as {published.format(split=name)}" if published else ""
    return f"not available: no retain model; give retain_result=LOG or retain_path=a model trained on {name} only{like}"


def write(settings: EvalTofu, target: evaluating.Target, progress: evaluating.Progress, found: dict[str, Any]) -> None:
    from unlearn.scores.tofu import sets_of

    method = settings.method_name or (target.run.name if target.run else Path(target.path).name)
    write_statistics(target.folder / "aggregate_stat.csv", found, method, settings.submitted_by)
    sections = {"tofu": found, "definitions": definitions(settings), "from": {"tofu_evaluation": progress.record}}
    evaluating.write_scores(target, sections)
    columns = {f"{name}_{key}": value for name in sets_of(found) for key, value in found[name].items() if key != "rows"}
    quality = found["forget_quality"] if isinstance(found["forget_quality"], dict) else {}
    columns |= {"model_utility": found["model_utility"]}
    columns |= {"forget_quality": quality.get("p"), "forget_quality_D": quality.get("D")}
    evaluating.add_row(target, {"split": settings.split, "ds_size": settings.ds_size} | columns)


def write_statistics(file: Path, found: dict[str, Any], method: str, submitted_by: str | None) -> None:
    """One line in TOFU's aggregate_stat.csv format."""
    from unlearn.scores.tofu import columns

    quality = found["forget_quality"]
    quality = quality["p"] if isinstance(quality, dict) else "not available"
    row = columns(found) | {"Forget Quality": quality, "Method": method, "Submitted By": submitted_by or ""}
    write_csv(file, [row])


def definitions(settings: EvalTofu | Aggregate) -> dict[str, Any]:
    tag = "the answer tag counted, too" if getattr(settings, "loss_on_answer_tag", False) else "the answer tag not counted"
    tokenizer = getattr(settings, "rouge_tokenizer", None)
    words = f"rouge_tokenizer={tokenizer} ({WORDS[tokenizer]})" if tokenizer else "as the log has it"
    return {
        "probability": f"exp(-mean loss of the answer's tokens, end-of-sequence counted, {tag})",
        "truth_ratio": f"{settings.truth_ratio}, epsilon {settings.epsilon}",
        "rouge": f"ROUGE-L recall of the greedy answer, with stemming, {words}; an answer without words has none",
        "paraphrased": "probability and ROUGE of the answer itself after the paraphrased question (paraphrased=true),"
        " a row's mean where it has several",
        "accuracy": "of multiple choices: how often the right one has the largest probability, end-of-sequence not counted;"
        " accuracy_norm: the largest log-probability over its characters; choice_probability: among the choices",
        "model_utility": "harmonic mean of the nine scores of retain, real_authors and real_world",
        "forget_quality": "p-value and D of the two-sample Kolmogorov-Smirnov test on the forget truth ratios; n rows of each",
    }


def report(found: dict[str, Any], rouge_tokenizer: str | None = None) -> None:
    """The scores as a small table on standard error."""
    from unlearn.scores.tofu import KINDS, MORE_KINDS, sets_of, task_of

    remedy = " (rouge_tokenizer=unicode counts words of any script)" if rouge_tokenizer == "ascii" else ""
    for name in sets_of(found):
        kinds = KINDS | {key: kind for key, kind in MORE_KINDS.items() if key in found[name]}
        values = "  ".join(f"{kind} {evaluating.told(found[name].get(key))}" for key, kind in kinds.items())
        say(f"{task_of(name)[1]:13} {values}  ({found[name]['rows']} rows)")
    for name, rows in found["rouge_rows"].items():
        if rows["without_rouge"]:
            say(f"{task_of(name)[1]:13} {rows['without_rouge']} rows have no ROUGE, for their answers have no word{remedy}")
        if rows["letters_dropped"] and rouge_tokenizer == "ascii":
            say(f"{task_of(name)[1]:13} {rows['letters_dropped']} answers have letters that ROUGE's words leave out{remedy}")
    say(f"Model Utility {evaluating.told(found['model_utility'])}")
    quality = found["forget_quality"]
    text = quality if isinstance(quality, str) else f"p = {quality['p']:.3g}, D = {quality['D']:.3f}, n = {quality['n']}"
    say(f"Forget Quality {text}")
