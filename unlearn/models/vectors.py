"""Vectors over a model's parameters, one tensor for each by its name, and their inner products in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from unlearn.models.sharding import local

Vectors = dict[str, Tensor]  # one tensor for each parameter, like it

CHUNK = 1 << 18  # numbers that are widened to float64 at once on a CPU: few enough to stay in a cache
CHUNK_OF_A_GPU = 1 << 24  # many enough that launches do not count


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained (an adapter's alone, where there is one), tied ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of two tensors of one shape (of their shards here), formed and summed in float64; () on a's device."""
    x, y = (local(z.detach()).flatten() for z in (a, b))
    size = CHUNK if x.device.type == "cpu" else CHUNK_OF_A_GPU
    pieces = zip(x.split(size), y.split(size), strict=True)
    return sum((m.double() @ n.to(x.device).double() for m, n in pieces), torch.zeros((), dtype=torch.float64, device=x.device))


def read_all(numbers: Sequence[Tensor]) -> list[float]:
    """Their values, by one synchronisation with their device."""
    return torch.stack(list(numbers)).tolist() if numbers else []


def inner(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, float]:
    """For each tensor of `a` its inner product with that of `b`, whole: over all shards, where they are in shards."""
    numbers = torch.stack([dot(x, b[name]) for name, x in a.items()])
    if any(isinstance(x, DTensor) for x in a.values()):
        torch.distributed.all_reduce(numbers)
    return dict(zip(a, numbers.tolist(), strict=True))
