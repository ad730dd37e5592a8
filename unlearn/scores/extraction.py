"""What a model gives away of its answers: extraction (PS), memorisation, membership, each row by row.

PS is the extraction-strength metric of arXiv 2502.19301; `exact` and `perturb` come from teacher forcing, `similar` from real
generation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unlearn.models.checkpoints import pad_id
from unlearn.objectives.rows import Row, tokenize_pairs
from unlearn.objectives.tokens import IGNORE
from unlearn.passes.decoding import decode, greedy_answers, positions_of
from unlearn.passes.forcing import Forced, Pass, check_fit, check_labels, prompt_length, teacher_force
from unlearn.scores import definitions as scores

ATTACKS = ("loss", "zlib", "min_k", "min_k_plus_plus", "reference")
GRADNORM = "gradnorm"  # one more, whose cost is a backward pass a row (`passes.gradients.gradient_norms`)


def knowledge(forced: Forced) -> dict[str, float]:
    """A row's loss and label tokens, probability, PS exact, extraction strength and exact memorisation."""
    return {
        "loss": forced.loss,
        "tokens": len(forced.labels),
        "probability": float(scores.probability(forced.loss)),
        "ps_exact": scores.ps_exact(forced.right),
        "extraction_strength": scores.extraction_strength(forced.right),
        "exact_memorization": scores.exact_memorization(forced.right),
    }


def means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each score over the rows that have a value; of the loss over their tokens, as the risks are."""
    return {key: mean_of(rows, key) for key in (rows[0] if rows else ()) if key != "tokens"}


def mean_of(rows: Sequence[Mapping[str, float]], key: str) -> float:
    """The mean of a score over the rows that have a value, `loss` weighted by their `tokens`."""
    values = [row.get(key, float("nan")) for row in rows]
    if key == "loss":
        return scores.token_mean(values, [row["tokens"] for row in rows])
    return scores.mean(values)


def membership(forced: Forced, text: str, reference_loss: float | None = None, k: float = 0.4) -> dict[str, float]:
    """A row's membership scores, higher for one that looks less like a member of the training set.

    Args:
        forced: with moments.
        text: the answer, for `zlib`.
        reference_loss: the row's loss under the retain model, for `reference`; without it nan.
        k: the share of the tokens that min-k and min-k++ look at.
    """
    log_p, mean, variance = (-forced.nll, forced.mean, forced.variance)
    if mean is None or variance is None:
        raise ValueError("membership scores need teacher_force(..., moments=True)")
    log_p, mean, variance = (values[: forced.size].astype(np.float64) for values in (log_p, mean, variance))
    return {
        "loss": forced.loss,
        "zlib": scores.zlib_score(forced.loss, text),
        "min_k": scores.min_k(log_p, k),
        "min_k_plus_plus": scores.min_k(scores.standardised(log_p, mean, variance), k),
        "reference": float("nan") if reference_loss is None else forced.loss - reference_loss,
    }


def aucs(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The AUC of each membership score over rows with `data` forget or holdout; nan where it has no value.

    Of `gradnorm` only where the rows have it.
    """
    table = pd.DataFrame(list(rows))
    forget, holdout = (table[table["data"] == name] for name in ("forget", "holdout"))
    return {
        name: scores.auc(forget[name].astype(float), holdout[name].astype(float))
        for name in (*ATTACKS, GRADNORM)
        if name in table
    }


def ps_similar(how: Pass, rows: Sequence[Row], what: str = "similar") -> list[float]:
    """1 - k/T, k the shortest prefix of the answer found by bisection after which the greedy text of the rest's length has a
    longest common subsequence with it of at least half the rest's tokens; one value a row, nan without an answer.

    Real generation, about log2(T) rounds. That a prefix suffices need not be monotone; bisection, as published, takes it to be.
    """
    check_labels(rows, what)
    answers = [_answer(row, how.eos) for row in rows]
    low, high = [-1] * len(rows), [len(answer) for answer in answers]  # fails (or was not tried), suffices
    while open_ := [i for i in range(len(rows)) if high[i] - low[i] > 1]:
        middle = {i: (low[i] + high[i]) // 2 for i in open_}
        starts = [torch.cat([rows[i]["input_ids"][: prompt_length(rows[i])], answers[i][: middle[i]]]) for i in open_]
        rest = [answers[i][middle[i] :].tolist() for i in open_]
        given = decode(how, starts, [len(tokens) for tokens in rest], what)
        for i, true, found in zip(open_, rest, given, strict=True):
            enough = 2 * scores.common_subsequence(found, true) >= len(true)
            (high if enough else low)[i] = middle[i]
    return [1 - k / len(answer) if len(answer) else float("nan") for k, answer in zip(high, answers, strict=True)]


def _answer(row: Row, eos: int) -> torch.Tensor:
    """(T,) the answer's tokens, end-of-sequence not counted."""
    labels = row["labels"][row["labels"] != IGNORE]
    return labels[: len(labels) - int(labels[-1] == eos)]


def score_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    reference: PreTrainedModel | None = None,
    batch_size: int | None = None,
    max_length: int = 500,
    max_new_tokens: int = 200,
    rouge_tokenizer: str = "ascii",
    special_tokens: bool | None = None,
    tokens_per_batch: int | None = None,
) -> pd.DataFrame:
    """Every score that has a value for a single row, for (prompt, answer) texts: a data frame, one line a row.

    Columns: loss, tokens (how many it is the mean of), probability, ps_exact, extraction_strength, exact_memorization; zlib,
    min_k, min_k_plus_plus, reference (nan without a `reference`, the retain model); generated_text, rougeL_recall (nan for an
    answer without a word, see `scores.rouge_recalls`). In float64 where the model is.

    Args:
        batch_size, tokens_per_batch: how much is run at once, as of `Pass`.
        special_tokens: whether the tokenizer's own are added; None: to texts that do not begin with them.
    """
    if not pairs:
        raise ValueError("no rows to score")
    rows = tokenize_pairs(pairs, tokenizer, min(max_length, positions_of(model) or max_length), special_tokens=special_tokens)
    check_fit(model, rows, [f"pairs[{i}]" for i in range(len(rows))])
    how = Pass(model, pad_id(tokenizer), tokenizer.eos_token_id, False, batch_size, tokens_per_batch)
    forced = teacher_force(how, rows, moments=True)
    others: list[float | None] = [None] * len(rows)
    if reference is not None:
        others = [one.loss for one in teacher_force(replace(how, model=reference), rows)]
    texts = [answer for _, answer in pairs]
    answers = greedy_answers(how, rows, tokenizer, forced, max_length=None, max_new_tokens=max_new_tokens)
    recalls = scores.rouge_recalls(answers, texts, rouge_tokenizer)["rougeL"]
    return pd.DataFrame(
        knowledge(one) | membership(one, text, loss) | {"generated_text": answer, "rougeL_recall": recall}
        for one, text, loss, answer, recall in zip(forced, texts, others, answers, recalls, strict=True)
    )
