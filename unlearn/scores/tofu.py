"""TOFU's evaluation (arXiv 2401.06121): its logs, and their scores. Imports no torch.

A log is {task: {key: {row: value}}}, `row` a number as text. Losses are in nats; `avg_` and `average_` ones are means over a
text's label tokens, end-of-sequence counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from unlearn.scores import definitions as scores

TASKS = {  # by set: the log's name for it, and the score tables'
    "retain": ("eval_log.json", "Retain"),
    "real_authors": ("eval_real_author_wo_options.json", "Real Authors"),
    "real_world": ("eval_real_world_wo_options.json", "Real World"),
    "forget": ("eval_log_forget.json", "Forget"),
}
REAL = ("real_authors", "real_world")
KINDS = {"rouge": "ROUGE", "probability": "Prob.", "truth_ratio": "Truth Ratio"}
CHOICE_KINDS = {"accuracy": "Accuracy", "accuracy_norm": "Accuracy by Length", "choice_probability": "Choice Prob."}
PARAPHRASED_KINDS = {"paraphrased_probability": "Paraphrased Prob.", "paraphrased_rouge": "Paraphrased ROUGE"}
MORE_KINDS = PARAPHRASED_KINDS | CHOICE_KINDS  # beside TOFU's, where they were measured
NEEDED = ("avg_gt_loss", "rougeL_recall", "average_perturb_loss", "avg_paraphrased_loss")

Log = dict[str, dict[str, Any]]


def task_of(name: str) -> tuple[str, str]:
    """A set's names as in `TASKS`; those of a set that is none of TOFU's are made of its own."""
    return TASKS.get(name, (f"eval_log_{name}.json", name.replace("_", " ").title()))


def tasks_of(log: Log) -> dict[str, str]:
    """What the log calls its sets, by set: TOFU's in their order, then further ones."""
    known = {name: file for name, (file, _) in TASKS.items() if file in log}
    others = [file for file, task in log.items() if file not in known.values() and _is_further(file, task)]
    return known | {file.removeprefix("eval_log_").removesuffix(".json"): file for file in others}


def _is_further(file: str, task: Any) -> bool:
    return file.startswith("eval_log_") and isinstance(task, dict) and {"avg_gt_loss", "rougeL_recall"} <= task.keys()


def sets_of(found: Mapping[str, Any]) -> list[str]:
    """The sets that were scored (see `aggregate`)."""
    return [name for name, of in found.items() if isinstance(of, dict) and "rows" in of]


def truth_ratios(task: Mapping[str, Any], definition: str, epsilon: float = 0.0) -> list[float]:
    """One a row, in the order of the rows' numbers."""
    return [
        scores.truth_ratio(task["avg_paraphrased_loss"][row], task["average_perturb_loss"][row], definition, epsilon)
        for row in row_names(task)
    ]


def row_names(task: Mapping[str, Any]) -> list[str]:
    return sorted(task["avg_gt_loss"], key=int)


def aggregate(log: Log, definition: str = "geometric", epsilon: float = 0.0) -> dict[str, Any]:
    """The scores of the log's sets, `{set: {rouge, probability, truth_ratio, rows}}`, and `model_utility`.

    What a set's log lacks the losses for is left out; the Model Utility is nan where one of its scores is not there.

    Args:
        definition: of the truth ratio, `geometric` or `arithmetic` (see `scores.truth_ratio`).
        epsilon: added to denominators; 0 as in TOFU, `scores.OPEN_UNLEARNING` as there.
    """
    found: dict[str, Any] = {}
    for name, file in tasks_of(log).items():
        task, rows = log[file], row_names(log[file])
        losses = [task["avg_gt_loss"][row] for row in rows]
        found[name] = {"rouge": _mean_recall(task, rows, "rougeL_recall")}
        if "average_perturb_loss" in task:
            ratios = truth_ratios(task, definition, epsilon)
            if name in REAL:
                wrong = [task["average_perturb_loss"][row] for row in rows]
                among = [scores.probability_among(x, others, epsilon) for x, others in zip(losses, wrong, strict=True)]
                found[name]["probability"] = scores.mean(among)
            kept = scores.truth_ratio_forget(ratios, epsilon) if name == "forget" else scores.truth_ratio_keep(ratios)
            found[name]["truth_ratio"] = kept
        if name not in REAL:
            found[name]["probability"] = scores.mean(scores.probability(losses))
        if "avg_paraphrased_question_loss" in task:
            again = [scores.mean(scores.probability([task["avg_paraphrased_question_loss"][row]])) for row in rows]
            found[name]["paraphrased_probability"] = scores.mean(again)
            found[name]["paraphrased_rouge"] = _mean_recall(task, rows, "paraphrased_question_rougeL_recall")
        if "choice_loss" in task:
            found[name] |= _of_choices(task, rows)
        found[name]["rows"] = len(rows)
    parts = [found.get(name, {}).get(kind, float("nan")) for name in ("retain", *REAL) for kind in KINDS]
    found["model_utility"] = scores.model_utility(parts)
    return found


def _mean_recall(task: Mapping[str, Any], rows: list[str], key: str) -> float:
    """The mean over the rows whose answer has a word, of a row with a list of recalls of their mean."""
    return scores.mean([scores.mean([task[key][row]]) for row in rows])


def _of_choices(task: Mapping[str, Any], rows: list[str]) -> dict[str, float]:
    """Accuracy, that by the choices' lengths, and the right choice's probability among them (see `scores.best_choice`)."""
    found: dict[str, list[float]] = {name: [] for name in CHOICE_KINDS}
    for row in rows:
        losses, correct = task["choice_loss"][row], task["correct"][row]
        lengths = [len(choice) for choice in task["choices"][row]]
        found["accuracy"].append(scores.best_choice(losses) == correct)
        found["accuracy_norm"].append(scores.best_choice(losses, lengths) == correct)
        found["choice_probability"].append(scores.choice_probability(losses, correct))
    return {name: scores.mean(values) for name, values in found.items()}


def without_words(log: Log) -> dict[str, dict[str, int]]:
    """By set: rows without ROUGE, whose answers have no word, and answers of which rouge-score's tokenizer drops letters."""
    found = {}
    for name, file in tasks_of(log).items():
        task, rows = log[file], row_names(log[file])
        none = [row for row in rows if task["rougeL_recall"][row] is None]
        lossy = [row for row in rows if scores.loses_letters(task["generated_text"][row][-1])]
        found[name] = {"without_rouge": len(none), "letters_dropped": len(lossy)}
    return found


def forget_quality(log: Log, retain: Log, definition: str = "geometric", epsilon: float = 0.0) -> dict[str, Any]:
    """`p`, `D` and `n` (rows of both) of the test of the model's forget truth ratios against the retain model's.

    Raises:
        ValueError: the two logs do not answer the same questions, or count an answer's tokens differently, or a truth
            ratio is no number.
    """
    check_same_questions(log, retain)
    both = [truth_ratios(one[TASKS["forget"][0]], definition, epsilon) for one in (log, retain)]
    if any(np.isnan(of).any() for of in both):
        raise ValueError("Forget Quality: a row's truth ratio is no number; are the model's weights finite?")
    p, d = scores.forget_quality(*both)
    return {"p": p, "D": d, "n": [len(of) for of in both]}


def check_same_questions(log: Log, retain: Log) -> None:
    """Raises ValueError where the forget rows of the two logs are not the same questions and answers, token for token."""
    one, other = (given[TASKS["forget"][0]] for given in (log, retain))
    rows, others = row_names(one), row_names(other)
    if len(rows) != len(others):
        raise ValueError(f"the two logs do not answer the same questions: {len(rows)} forget rows and {len(others)}")
    for row, same in zip(rows, others, strict=True):
        (question, *_, truth), (question_, *_, truth_) = one["generated_text"][row], other["generated_text"][same]
        asked_the_same = question.strip() in question_ or question_.strip() in question  # with and without tags
        if not asked_the_same or truth.strip() != truth_.strip():
            raise ValueError(
                f"the two logs do not answer the same questions: forget row {row} is {question.strip()!r:.80} here,"
                f" {question_.strip()!r:.80} there"
            )
        tokens = one.get("num_token_gt", {}).get(row), other.get("num_token_gt", {}).get(same)
        if None not in tokens and tokens[0] != tokens[1]:
            raise ValueError(
                f"the two logs count an answer's tokens differently ({tokens[0]} and {tokens[1]} in forget row {row}):"
                " another tokenizer, or loss_on_answer_tag in one of them"
            )


def check_log(log: Any, name: str) -> None:
    """Raises ValueError where `log` is no log of all four tasks, each row with what the scores need."""
    if not isinstance(log, dict):
        raise ValueError(
            f"{name}: no log of TOFU's evaluation, which is an object of {', '.join(f for f, _ in TASKS.values())}"
        )
    for file, _ in TASKS.values():
        task = log.get(file)
        if not isinstance(task, dict):
            raise ValueError(f"{name}: lacks {file}; it has {', '.join(map(str, log)) or 'nothing'}")
        if lacking := [key for key in (*NEEDED, "generated_text") if not isinstance(task.get(key), dict)]:
            raise ValueError(f"{name}: {file} lacks {', '.join(lacking)}")
        rows = set(task["avg_gt_loss"])
        if not rows or not all(str(row).isdecimal() for row in rows):
            raise ValueError(f"{name}: {file} needs rows named by numbers, and has {sorted(rows)[:3]}")
        for key in (*NEEDED, "generated_text"):
            if set(task[key]) != rows:
                raise ValueError(f"{name}: {file} has {len(rows)} rows in avg_gt_loss, and others in {key}")
            if bad := [row for row, value in task[key].items() if not _fits(key, value)]:
                raise ValueError(f"{name}: {file}, row {bad[0]}: {key} is {task[key][bad[0]]!r:.60}")


def _fits(key: str, value: Any) -> bool:
    if key == "generated_text":
        return isinstance(value, list) and len(value) >= 2 and all(isinstance(text, str) for text in value)
    if key == "average_perturb_loss":
        return isinstance(value, list) and bool(value) and all(isinstance(x, int | float) for x in value)
    if key == "rougeL_recall" and value is None:  # of an answer without a word
        return True
    return isinstance(value, int | float) and not isinstance(value, bool)


def columns(found: Mapping[str, Any]) -> dict[str, Any]:
    """The scores as the columns of TOFU's aggregate_stat.csv, "not available" in place of what has no value."""
    values = {
        f"{kind} {task_of(name)[1]}": found[name][key]
        for name in sets_of(found)
        for key, kind in (KINDS | MORE_KINDS).items()
        if key in found[name]
    } | {"Model Utility": found["model_utility"]}
    return {key: "not available" if np.isnan(value) else value for key, value in values.items()}
