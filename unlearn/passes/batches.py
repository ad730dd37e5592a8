"""Whole sets of rows in batches, split over the processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from unlearn.models.sharding import is_sharded
from unlearn.objectives.rows import Row, counts, forget_batch, seconds
from unlearn.passes.sizes import Budget, Kind, Size, cut

Batch = dict[str, Any]
T = TypeVar("T")


NO_WEIGHT = dict.fromkeys(("forget_counts", "retain_counts"), (math.inf, math.inf))  # a share of endless rows is 0


def set_batches(
    forget: Sequence[Row],
    retain: Sequence[Row],
    batch_size: int | None,
    pad: int,
    equally_many: bool = False,
    tokens_per_batch: int | None = None,
) -> list[Batch]:
    """This process's batches of a whole set, each of forget or of retain rows, of like length.

    Which rows a process has does not depend on how they are cut, so each may cut its own in another way. A batch is what
    `Loss` takes, with the counts of the whole set, and `index` (B,), which rows it holds; the retain rows' numbers go on from
    the forget rows'. `equally_many`: each process has as many as any other, of both kinds, some perhaps without weight: those
    of a sharded model run together.

    Args:
        batch_size: rows of a batch at most.
        tokens_per_batch: tokens of a batch at most, its padding counted; a row that is too long for it stands alone.
    """
    state, size = PartialState(), Size(batch_size, tokens_per_batch)
    n = state.num_processes
    whole: dict[str, Any] = {"forget_counts": counts(forget), "retain_counts": counts(retain)}
    batches = []
    for rows, first, to_forget in ((forget, 0, True), (retain, len(forget), False)):
        widths = widths_of(rows)
        order = sorted(range(len(rows)), key=lambda i: -widths[i])
        chunks = [cut(order[process::n], widths, size) for process in range(n)]
        mine = [(chunk, whole) for chunk in chunks[state.process_index]]
        if equally_many and rows:
            mine += [(chunks[0][0], NO_WEIGHT)] * (max(map(len, chunks)) - len(mine))
        for chunk, numbers in mine:
            of = [rows[i] for i in chunk]
            batch: Batch = forget_batch(of, [], pad) if to_forget else forget_batch([], of, pad)
            others = [first + i for i in chunk for _ in seconds(rows[i])]
            batch["index"] = torch.tensor([*(first + i for i in chunk), *others])
            batches.append(batch | numbers)
    return batches


def widths_of(rows: Sequence[Row]) -> list[int]:
    """Tokens that each row takes of a batch: of the longest of its answers, for each of them where there are second ones."""
    answers = 1 + max((len(seconds(row)) for row in rows), default=0)
    return [answers * max(len(one["input_ids"]) for one in (row, *seconds(row))) for row in rows]


def anew(
    budget: Budget,
    kind: Kind,
    what: str,
    rows: tuple[Sequence[Row], Sequence[Row]],
    pad: int,
    run: Callable[[Iterator[Batch]], T],
) -> T:
    """`run` on the batches of rows to forget and rows to retain; where one does not fit, all of it again on smaller ones.

    For what adds up as it goes, so that no part is counted twice: `run` begins with its sums at 0.

    Raises:
        torch.OutOfMemoryError: one row alone does not fit, or it was not a batch that did not.
    """
    widest = max(width for of in rows for width in widths_of(of))
    while True:
        size = budget.size(kind, widest)
        batches = set_batches(*rows, size.rows, pad, is_sharded(budget.model), size.tokens)
        at: list[Batch] = []  # the batch that is run
        try:
            return run(_noted(batches, what, budget.model.device, at))
        except torch.OutOfMemoryError:
            if not at or not budget.can_halve(n_rows(at[0])):
                raise
        # past the `except`, which keeps what the pass had made
        n = n_rows(at[0])
        budget.halve(kind, what, size, n, at[0]["input_ids"].numel() // n)


def _noted(batches: Sequence[Batch], what: str, device: torch.device, at: list[Batch]) -> Iterator[Batch]:
    """The batches on the device; `at` holds the one that is run, and none when all are done."""
    for batch, there in zip(batches, progress(batches, what, device), strict=True):
        at[:] = [batch]
        yield there
    at.clear()


def n_rows(batch: Batch) -> int:
    """How many rows a batch is of; a second answer is none of its own."""
    return len(batch["index"].unique())


def on(batch: Batch, device: torch.device) -> Batch:
    return {key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value for key, value in batch.items()}


def bar(of: Sequence[T], what: str) -> Iterable[T]:
    """Under a progress bar on standard error."""
    return tqdm(of, desc=what, leave=False, **others_quiet())


def others_quiet() -> dict[str, bool]:
    """Settings of tqdm: none in the main process, where so TQDM_DISABLE=1 is heeded; the others have no bar."""
    return {} if PartialState().is_main_process else {"disable": True}


def progress(batches: Sequence[Batch], what: str, device: torch.device) -> Iterator[Batch]:
    """The batches, on the device, under a progress bar on standard error."""
    for batch in bar(batches, what):
        yield on(batch, device)


def over_processes(tensors: Iterable[Tensor]) -> None:
    """Sum each tensor over the processes, in place; gradients in shards are their mean already."""
    n = PartialState().num_processes
    for tensor in tensors if n > 1 else ():
        if isinstance(tensor, DTensor):
            tensor.mul_(n)
        else:
            tensor.copy_(reduce(tensor, "sum"))
