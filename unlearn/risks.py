"""Gradients over whole sets of rows: of a risk, and of an objective.

Letters: P parameters by name, D directions (the risks).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from unlearn import sharding
from unlearn.evaluating import evaluating
from unlearn.loss import Loss
from unlearn.rows import Row, collate, counts
from unlearn.sharding import local

Batch = dict[str, Any]
Vectors = dict[str, Tensor]  # one tensor for each parameter, like it
Directions = dict[str, Tensor]  # (D, *shape) for each parameter

NO_WEIGHT = dict.fromkeys(("forget_counts", "retain_counts"), (math.inf, math.inf))  # a share of endless rows is 0
CHUNK = 1 << 18  # numbers that are widened to float64 at once: few enough to stay in a cache


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
            batch: Batch = collate([rows[i] for i in chunk], pad)
            if "ref_nll" in rows[chunk[0]]:
                batch["ref_nll"] = torch.cat([rows[i]["ref_nll"] for i in chunk])
            batch["index"] = torch.tensor([first + i for i in chunk])
            batches.append(batch | numbers | {"n_forget": len(chunk) if to_forget else 0})
    return batches


def on(batch: Batch, device: torch.device) -> Batch:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def progress(batches: Sequence[Batch], what: str, device: torch.device) -> Iterator[Batch]:
    """The batches, on the device, under a progress bar on standard error."""
    for batch in tqdm(batches, desc=what, disable=not PartialState().is_main_process, leave=False):
        yield on(batch, device)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained (an adapter's alone, where there is one), tied ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums over many batches are kept in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def zeros(parameters: Mapping[str, Tensor], n: int | None = None) -> Vectors:
    """A zero vector, or `n` of them stacked, wide enough to accumulate in."""
    stack = () if n is None else (n,)
    return {name: sharding.zeros(p, stack, wide(p.dtype)) for name, p in parameters.items()}


@contextmanager
def each_gradient(parameters: Mapping[str, nn.Parameter], take: Callable[[str, Tensor], Any]) -> Iterator[None]:
    """While entered, `take(name, gradient)` gets what a backward pass leaves in `.grad`; `.grad` is as it was after."""
    before = {name: p.grad for name, p in parameters.items()}

    def taker(name: str) -> Callable[[Tensor], None]:
        def taken(p: Tensor) -> None:
            assert p.grad is not None
            take(name, p.grad)
            p.grad = None

        return taken

    for p in parameters.values():
        p.grad = None
    handles = [p.register_post_accumulate_grad_hook(taker(name)) for name, p in parameters.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, p in parameters.items():
            p.grad = before[name]


def gradients_into(sums: Vectors, parameters: Mapping[str, nn.Parameter]) -> AbstractContextManager[None]:
    """While entered, gradients are added to `sums`.

    Those of half-precision weights are so summed over batches in float32: in bfloat16 a sum of 4000 is off by a third.
    """
    return each_gradient(parameters, lambda name, gradient: sums[name].add_(gradient))


def add_gradient(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    loss: Loss,
    batches: Iterable[Batch],
    bf16: bool,
    sums: Vectors,
) -> dict[str, float]:
    """Add the gradient of a loss over its whole set to `sums`; returns the loss's parts."""
    device = next(iter(parameters.values())).device
    parts = Parts()
    with evaluating(model), gradients_into(sums, parameters):
        for batch in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                found = loss(model, batch)
            sum(found.values()).backward()  # type: ignore[union-attr]
            parts.add(found)
    over_processes(sums.values())
    return parts.total(device)


class Parts:
    """Sums a loss's parts over batches and processes."""

    def __init__(self) -> None:
        self.sums = dict.fromkeys(("objective", "retain"), 0.0)

    def add(self, parts: Mapping[str, Tensor]) -> None:
        for name, value in parts.items():
            self.sums[name] += value.item()

    def total(self, device: torch.device) -> dict[str, float]:
        values = torch.tensor(list(self.sums.values()), dtype=torch.float64, device=device)
        over_processes([values])
        return dict(zip(self.sums, values.tolist(), strict=True))


def over_processes(tensors: Iterable[Tensor]) -> None:
    """Sum each tensor over the processes, in place; gradients in shards are their mean already."""
    n = PartialState().num_processes
    for tensor in tensors if n > 1 else ():
        if isinstance(tensor, DTensor):
            tensor.mul_(n)
        else:
            tensor.copy_(reduce(tensor, "sum"))


def dot(a: Tensor, b: Tensor) -> float:
    """The inner product of two tensors of one shape (of their shards here), the products formed and summed in float64."""
    a, b = (local(x.detach()).flatten().split(CHUNK) for x in (a, b))
    pieces = zip(a, b, strict=True)
    return float(sum(x.double() @ y.to(x.device).double() for x, y in pieces))
