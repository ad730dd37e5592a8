"""Gradients over whole sets of rows: of a risk, and of an objective.

Letters: P parameters by name, D directions (the risks).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unlearn.models import sharding
from unlearn.models.evaluating import evaluating
from unlearn.models.vectors import Vectors
from unlearn.objectives.loss import Loss
from unlearn.passes.batches import Batch, over_processes

Directions = dict[str, Tensor]  # (D, *shape) for each parameter


@contextmanager
def put_back(model: nn.Module) -> Iterator[None]:
    """Afterwards the model's parameters are the very ones that they were: `functional_call` may leave shared ones replaced."""
    before = [(module, dict(module._parameters)) for module in model.modules()]
    try:
        yield
    finally:
        for module, parameters in before:
            module._parameters.update(parameters)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums over many batches are kept in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def zeros(parameters: Mapping[str, Tensor]) -> Vectors:
    """A zero vector, wide enough to accumulate in."""
    return {name: sharding.zeros(p, (), wide(p.dtype)) for name, p in parameters.items()}


@contextmanager
def summed(parameters: Mapping[str, Tensor]) -> Iterator[Vectors]:
    """A zero vector to accumulate in, gone when left whoever still has its name: two of a large model do not fit beside it."""
    sums = zeros(parameters)
    try:
        yield sums
    finally:
        sums.clear()


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
            total: Any = sum(found.values())
            if total.requires_grad:  # a loss on a layer's output may depend on nothing that is trained
                total.backward()
            parts.add(found)
    over_processes(sums.values())
    return parts.total(device)


class Parts:
    """Sums a loss's parts over batches and processes."""

    def __init__(self) -> None:
        self.sums: dict[str, Any] = dict.fromkeys(("objective", "retain"), 0.0)

    def add(self, parts: Mapping[str, Tensor]) -> None:
        for name, value in parts.items():
            self.sums[name] = self.sums[name] + value.detach().double()  # where it is: nothing waits for it

    def total(self, device: torch.device) -> dict[str, float]:
        none = torch.zeros((), dtype=torch.float64, device=device)
        values = torch.stack([none + x for x in self.sums.values()])
        over_processes([values])
        return dict(zip(self.sums, values.tolist(), strict=True))
