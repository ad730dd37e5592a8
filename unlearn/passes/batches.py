"""Whole sets of rows in batches, split over the processes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from unlearn.objectives.rows import Row, counts, forget_batch, seconds

Batch = dict[str, Any]


NO_WEIGHT = dict.fromkeys(("forget_counts", "retain_counts"), (math.inf, math.inf))  # a share of endless rows is 0


def set_batches(
    forget: Sequence[Row], retain: Sequence[Row], batch_size: int, pad: int, equally_many: bool = False
) -> list[Batch]:
    """This process's batches of a whole set, each of forget or of retain rows, of like length.

    A batch is what `Loss` takes, with the counts of the whole set, and `index` (B,), which rows it holds; the retain rows'
    numbers go on from the forget rows'. `equally_many`: each process has as many as any other, of both kinds, some perhaps
    without weight: those of a sharded model run together.
    """
    state = PartialState()
    whole: dict[str, Any] = {"forget_counts": counts(forget), "retain_counts": counts(retain)}
    batches = []
    for rows, first, to_forget in ((forget, 0, True), (retain, len(forget), False)):
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
        chunks = [order[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        mine = [(chunk, whole) for chunk in chunks[state.process_index :: state.num_processes]]
        if equally_many and len(mine) * state.num_processes < len(chunks):
            mine.append((chunks[0], NO_WEIGHT))
        for chunk, numbers in mine:
            of = [rows[i] for i in chunk]
            batch: Batch = forget_batch(of, [], pad) if to_forget else forget_batch([], of, pad)
            others = [first + i for i in chunk for _ in seconds(rows[i])]
            batch["index"] = torch.tensor([*(first + i for i in chunk), *others])
            batches.append(batch | numbers)
    return batches


def on(batch: Batch, device: torch.device) -> Batch:
    return {key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value for key, value in batch.items()}


def progress(batches: Sequence[Batch], what: str, device: torch.device) -> Iterator[Batch]:
    """The batches, on the device, under a progress bar on standard error."""
    for batch in tqdm(batches, desc=what, disable=not PartialState().is_main_process, leave=False):
        yield on(batch, device)


def over_processes(tensors: Iterable[Tensor]) -> None:
    """Sum each tensor over the processes, in place; gradients in shards are their mean already."""
    n = PartialState().num_processes
    for tensor in tensors if n > 1 else ():
        if isinstance(tensor, DTensor):
            tensor.mul_(n)
        else:
            tensor.copy_(reduce(tensor, "sum"))
