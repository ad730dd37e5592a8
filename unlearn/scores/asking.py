"""A set of questions put to a model: TOFU's log of it, in its own file format (see `unlearn.scores.tofu`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from unlearn.io.rows import texts_in
from unlearn.objectives.rows import Row
from unlearn.passes.decoding import MAX_LENGTH, greedy_answers
from unlearn.passes.forcing import Forced, Pass, prompt_length, teacher_force
from unlearn.scores import definitions as scores

Tokenize = Callable[[Sequence[Mapping[str, Any]]], list[Row]]
PARAPHRASED = "paraphrased_question"  # of a row: a text, or a list of texts


@dataclass(frozen=True)
class Asked:
    """A model that a benchmark's own scores are of: how it is run, and its tokenizer."""

    how: Pass
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class Score:
    """What a benchmark's own score gives.

    Attributes:
        totals: numbers by what is behind the score's name; "" for the score itself.
        rows: a line each, for a table.
    """

    totals: dict[str, float]
    rows: list[dict[str, Any]]


def measure_task(
    how: Pass,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    tokenize: Tokenize,
    real: bool = False,
    answers: bool = True,
    max_length: int | None = MAX_LENGTH,
    max_new_tokens: int | None = None,
    what: str = "",
    rouge_tokenizer: str = "ascii",
    paraphrased: bool = False,
) -> dict[str, Any]:
    """One set's log: {key: {row: value}} as TOFU has it.

    Args:
        rows: each with `question` and `answer`, and where it has them `paraphrased_answer` and `perturbed_answer` (a list);
            all answers are asked for by the same question. Of a multiple choice also `choices` and `correct`, the number of
            `answer` among them, `perturbed_answer` being the others in their order.
        tokenize: rows of question and answer to token ids with labels.
        real: of the real-world sets: the probability among the candidates stands there, too.
        answers: also what the model answers; without, the log has the losses, and empty texts.
        max_length, max_new_tokens: of the greedy answers (see `greedy_answers`).
        rouge_tokenizer: see `scores.rouge_recalls`; a row whose answer has no word for it has the recall None.
        paraphrased: also the answer's loss, and what the model answers, after `paraphrased_question`, where all rows have it;
            of a row with a list of these, lists.
    """
    texts = [
        [row["answer"], row.get("paraphrased_answer") or row["answer"], *(row.get("perturbed_answer") or ())] for row in rows
    ]
    asked = tokenize([dict(row) | {"answer": text} for row, of in zip(rows, texts, strict=True) for text in of])
    forced = iter(teacher_force(how, asked, what=f"{what} losses"))
    of_row = [[next(forced) for _ in of] for of in texts]
    heads = [asked[i] for i in np.cumsum([0, *map(len, texts)])[:-1]]
    drafts = [of[0] for of in of_row]
    said = [""] * len(rows)
    if answers:
        said = greedy_answers(how, heads, tokenizer, drafts, max_length, max_new_tokens, what=f"{what} answers")
    truths = [row["answer"] for row in rows]
    prompts = tokenizer.batch_decode([row["input_ids"][: prompt_length(row)] for row in heads], skip_special_tokens=True)
    log: dict[str, Sequence[Any]] = {
        **_losses("gt", drafts),
        **_losses("paraphrased", [of[1] for of in of_row]),
        "generated_text": [list(three) for three in zip(prompts, said, truths, strict=True)],
    }
    if answers:
        for kind, recalls in scores.rouge_recalls(said, truths, rouge_tokenizer).items():
            log[f"{kind}_recall"] = [None if np.isnan(recall) else recall for recall in recalls]
    if all(len(of) > 2 for of in of_row):
        log |= _perturbed([of[1] for of in of_row], [of[2:] for of in of_row])
        if real:
            among = [scores.probability_among(of[0].loss, [x.loss for x in of[2:]]) for of in of_row]
            log["normalized_gt_loss"] = [-float(np.log(p)) if p else float("inf") for p in among]
    if rows and all("choices" in row for row in rows):
        log |= _choices(rows, [[of[0], *of[2:]] for of in of_row])
    if paraphrased and rows and all(texts_in(row, PARAPHRASED) for row in rows):
        limits = (max_length, max_new_tokens) if answers else None
        log |= _paraphrased(how, tokenizer, rows, tokenize, limits, what, rouge_tokenizer)
    return {key: {str(i): value for i, value in enumerate(values)} for key, values in log.items()}


def _losses(name: str, forced: Sequence[Forced]) -> dict[str, list[Any]]:
    return {
        f"avg_{name}_loss": [one.loss for one in forced],
        f"{name}_loss": [one.loss * len(one.labels) for one in forced],
        f"num_token_{name}": [len(one.labels) for one in forced],
    }


def _paraphrased(
    how: Pass,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    tokenize: Tokenize,
    limits: tuple[int | None, int | None] | None,
    what: str,
    rouge_tokenizer: str,
) -> dict[str, list[Any]]:
    """The answer's loss after the paraphrased question; and what the model answers there, `limits` of tokens at most."""
    asked = [dict(row) | {"question": text} for row in rows for text in texts_in(row, PARAPHRASED)]
    again = tokenize(asked)
    forced = teacher_force(how, again, what=f"{what} losses, paraphrased")
    found: dict[str, list[Any]] = {"avg_paraphrased_question_loss": [one.loss for one in forced]}
    if limits is not None:
        said = greedy_answers(how, again, tokenizer, forced, *limits, what=f"{what} answers, paraphrased")
        recalls = scores.rouge_recalls(said, [row["answer"] for row in asked], rouge_tokenizer)["rougeL"]
        found["paraphrased_question_text"] = said
        found["paraphrased_question_rougeL_recall"] = [None if np.isnan(recall) else recall for recall in recalls]
    return {key: _by_row(values, [row[PARAPHRASED] for row in rows]) for key, values in found.items()}


def _by_row(values: Sequence[Any], asked: Sequence[str | Sequence[str]]) -> list[Any]:
    """Each row's value, or the list of its values where it is asked by a list of questions."""
    of = iter(values)
    return [next(of) if isinstance(texts, str) else [next(of) for _ in texts] for texts in asked]


def _choices(rows: Sequence[Mapping[str, Any]], forced: Sequence[Sequence[Forced]]) -> dict[str, list[Any]]:
    """Each choice's loss, in the order of `choices`; `forced` has the right one first. A choice that is cut is all there is."""
    sums = [[float(one.nll[: one.size].astype(np.float64).sum()) for one in of] for of in forced]
    places = [row["correct"] for row in rows]
    return {
        "choices": [list(row["choices"]) for row in rows],
        "correct": places,
        "choice_loss": [[*of[1 : at + 1], of[0], *of[at + 1 :]] for of, at in zip(sums, places, strict=True)],
    }


def _perturbed(correct: Sequence[Forced], wrong: Sequence[Sequence[Forced]]) -> dict[str, list[Any]]:
    return {
        "average_perturb_loss": [[one.loss for one in of] for of in wrong],
        "perturb_loss": [[one.loss * len(one.labels) for one in of] for of in wrong],
        "num_token_perturb": [[len(one.labels) for one in of] for of in wrong],
        "truth_ratio": [scores.truth_ratio(c.loss, [x.loss for x in of]) for c, of in zip(correct, wrong, strict=True)],
    }
