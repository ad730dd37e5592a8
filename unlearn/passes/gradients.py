"""The gradient of each row's own loss: what a row alone would change. One backward pass a row, as long as all others."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from unlearn.models.evaluating import evaluating, unwrap
from unlearn.objectives.rows import Row, collate
from unlearn.objectives.tokens import IGNORE, token_outputs
from unlearn.passes.forcing import Pass, check_labels, over_batches
from unlearn.passes.sizes import Size


def gradient_norms(how: Pass, rows: Sequence[Row], what: str = "gradients") -> list[float]:
    """For each row the mean, over all parameter tensors (a tied one once), of the L2 norm of the gradient of the mean of l over
    its answer's T tokens, end-of-sequence not counted; nan without an answer.

    In time a training step of one row each, in memory a gradient of the whole model. A row that is given twice is run twice.

    Raises:
        ValueError: a row has no label token, or its first token has a label.
    """
    check_labels(rows, what)
    model = unwrap(how.model)
    frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    answers = [_without_end(row, how.eos) for row in rows]

    def measure(batch: list[int]) -> list[float]:
        return [_norm(how, answers[i]) for i in batch]

    autocast = torch.autocast(how.model.device.type, torch.bfloat16, enabled=how.bf16)
    widths, order = [len(row["input_ids"]) for row in rows], [[i] for i in range(len(rows))]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with evaluating(how.model), torch.enable_grad(), autocast:
            found = over_batches(how, "gradients", order, widths, _one_by_one, measure, what)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    return [found[i] for i in range(len(rows))]


def _one_by_one(numbers: list[int], _: Size) -> list[list[int]]:
    return [[i] for i in numbers]


def _without_end(row: Row, eos: int) -> Row:
    ids, labels = row["input_ids"], row["labels"]
    last = int((labels != IGNORE).nonzero()[-1])
    size = last if labels[last] == eos else last + 1
    return {"input_ids": ids[:size], "labels": labels[:size]}


def _norm(how: Pass, row: Row) -> float:
    if (row["labels"] == IGNORE).all():
        return float("nan")
    batch = {key: value.to(how.model.device) for key, value in collate([row], how.pad).items()}
    trained = [p for p in unwrap(how.model).parameters() if p.requires_grad]
    gradients = torch.autograd.grad(token_outputs(how.model, batch).nll.mean(), trained, allow_unused=True)
    norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients if g is not None]
    return float(torch.stack(norms).mean())
