"""MUSE's scores (arXiv 2407.06460): what a model goes on with word for word, what it knows, and whether it gives away its rows.

As the benchmark's code has them, but for two things: models are run as they are, not in 8 bits, and a text that is longer than
the model has positions is cut there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from unlearn.objectives.rows import Row
from unlearn.objectives.tokens import IGNORE
from unlearn.passes.decoding import decode, positions_of
from unlearn.passes.forcing import check_fit, teacher_force
from unlearn.scores import definitions as scores
from unlearn.scores.asking import Asked, Score

Rows = Sequence[Mapping[str, Any]]
ENDS = ("\n\n", "\nQuestion", "Question:")  # of an answer


def verbmem(asked: Asked, rows: Rows, max_new_tokens: int = 128) -> Score:
    """Mean ROUGE-L F1, without stemming, of the greedy continuation of each `prompt` and the first tokens of its `gt`.

    Args:
        rows: each with `prompt` and `gt`.
        max_new_tokens: of the continuation, and of `gt` as the tokenizer has it, special tokens counted.
    """
    truths = [_encoded(asked.tokenizer, row["gt"])[:max_new_tokens] for row in rows]
    short = _decoded(asked.tokenizer, truths)
    said = continuations(asked, [row["prompt"] for row in rows], max_new_tokens, "VerbMem")
    return _by_rouge(said, short, [{"gt": truth} for truth in short])


def knowmem(asked: Asked, rows: Rows, shown: Rows = (), max_new_tokens: int = 32) -> Score:
    """Mean ROUGE-L F1, without stemming, of the greedy answer to each question, after a few questions with their answers.

    Args:
        rows: each with `question` and `answer`.
        shown: the questions with their answers, as rows.
        max_new_tokens: of an answer, which is cut at the first of `ENDS`.
    """
    before = "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in shown)
    prompts = [f"{before}Question: {row['question']}\nAnswer: " for row in rows]
    said = [_until(text, ENDS) for text in continuations(asked, prompts, max_new_tokens, "KnowMem")]
    asked_for = [{"question": row["question"], "answer": row["answer"]} for row in rows]
    return _by_rouge(said, [row["answer"] for row in rows], asked_for)


def privleak(asked: Asked, forget: Rows, holdout: Rows, k: float = 0.4) -> Score:
    """The AUCs of min-k of whole texts that PrivLeak is made of.

    `auc` is the benchmark's, P(a holdout text's score < a forget text's), ties half: 0 where the forget texts look like
    members; `auc_members` is 1 less that.

    Args:
        forget, holdout: each with `text`, all of whose tokens count but for the first, special ones before it included.
    """
    lines: list[dict[str, Any]] = [
        {"data": name, "row": i} for name, of in (("forget", forget), ("holdout", holdout)) for i in range(len(of))
    ]
    rows = [_whole(asked, row["text"]) for row in (*forget, *holdout)]
    for line, row in zip(lines, rows, strict=True):
        if len(row["input_ids"]) < 2:
            raise ValueError(
                f"PrivLeak: {line['data']}, row {line['row'] + 1}: a text of one token, which nothing stands before"
            )
    check_fit(asked.how.model, rows, [f"{line['data']}, row {line['row'] + 1}" for line in lines])
    for line, forced in zip(lines, teacher_force(asked.how, rows, what="PrivLeak"), strict=True):
        line["min_k"] = scores.min_k(-forced.nll.astype(np.float64), k)
    members, others = ([line["min_k"] for line in lines if line["data"] == name] for name in ("forget", "holdout"))
    auc = scores.auc(members, others)
    return Score({"auc": 1 - auc, "auc_members": auc}, lines)


def against_retrained(found: Mapping[str, float], of_retrained: Mapping[str, float]) -> dict[str, float]:
    """PrivLeak beside the model that never saw the forget rows, by both conventions in print.

    `""` is that of the benchmark's code and tables, 100 (AUC - AUC_retrain) / AUC_retrain with `auc`: about -100 where the
    forget texts still look like members, above 0 where they look forgotten too thoroughly. `members` is the same formula
    with `auc_members`, as the usual membership AUC has it: above 0 where they still look like members.
    """
    kinds = {"": "auc", "members": "auc_members"}
    return {kind: scores.relative_auc(found[key], of_retrained[key]) for kind, key in kinds.items()}


def continuations(asked: Asked, prompts: Sequence[str], max_new_tokens: int, what: str) -> list[str]:
    """What greedy decoding puts behind each prompt, the tokenizer's special tokens before it.

    Raises:
        ValueError: a prompt leaves no position for an answer.
    """
    eos, most = asked.how.eos, positions_of(asked.how.model)
    prefixes = [torch.tensor(_without_end(_encoded(asked.tokenizer, prompt), eos)) for prompt in prompts]
    for i, ids in enumerate(prefixes):
        if most is not None and len(ids) >= most:
            raise ValueError(f"{what}, row {i + 1}: its prompt has {len(ids)} tokens, and the model positions for {most}")
    limits = [min(max_new_tokens, (most or len(ids) + max_new_tokens) - len(ids)) for ids in prefixes]
    return _decoded(asked.tokenizer, decode(asked.how, prefixes, limits, what))


def _by_rouge(said: Sequence[str], truths: Sequence[str], beside: Sequence[dict[str, Any]]) -> Score:
    found = scores.rouge_f1(said, truths)
    rows = [
        {"row": i, "rougeL": found["rougeL"][i], "rouge1": found["rouge1"][i]} | more | {"response": text}
        for i, (more, text) in enumerate(zip(beside, said, strict=True))
    ]
    return Score({"": scores.mean(found["rougeL"]), "rouge1": scores.mean(found["rouge1"])}, rows)


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=True)["input_ids"])


def _decoded(tokenizer: PreTrainedTokenizerBase, tokens: list[list[int]]) -> list[str]:
    return list(tokenizer.batch_decode(tokens, skip_special_tokens=True))


def _without_end(ids: list[int], eos: int) -> list[int]:
    """Without the end-of-sequence token that some tokenizers add."""
    return ids[:-1] if len(ids) > 1 and ids[-1] == eos else ids


def _whole(asked: Asked, text: str) -> Row:
    """All of a text's tokens, and labels on all that something stands before."""
    ids: Tensor = torch.tensor(_without_end(_encoded(asked.tokenizer, text), asked.how.eos))[: positions_of(asked.how.model)]
    labels = ids.clone()
    labels[0] = IGNORE
    return {"input_ids": ids, "labels": labels}


def _until(text: str, ends: Sequence[str]) -> str:
    return text[: min((at for end in ends if (at := text.find(end)) >= 0), default=len(text))]
