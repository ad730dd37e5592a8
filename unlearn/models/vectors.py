"""Vectors over a model's parameters, one tensor for each by its name, and their inner products in float64."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

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
    return dots(local(a), local(b).unsqueeze(0))[0]


def dots(x: Tensor, v: Tensor) -> Tensor:
    """The inner products of a tensor with the D stacked in v (D, *shape), as `dot`; (D,) float64 on x's device."""
    x, v = local(x.detach()).flatten(), local(v.detach()).flatten(1)
    size = _chunk(x.device)
    return _sum(_against(piece.double(), rows) for piece, rows in zip(x.split(size), v.split(size, 1), strict=True))


def squares(v: Tensor, device: torch.device) -> Tensor:
    """The inner products of the D tensors stacked in v with themselves, formed on the device; (D,) float64 there."""
    pieces = local(v.detach()).flatten(1).split(_chunk(device), 1)
    return _sum(torch.stack([x @ x for x in _widened(rows, device)]) for rows in pieces)


def _sum(parts: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum(0)


def _against(x: Tensor, rows: Tensor) -> Tensor:
    return torch.stack([row @ x for row in _widened(rows, x.device)])


def _chunk(device: torch.device) -> int:
    return CHUNK if device.type == "cpu" else CHUNK_OF_A_GPU


def _widened(rows: Tensor, device: torch.device) -> Iterator[Tensor]:
    """Rows in float64 on the device, one after the other; from memory that is pinned nothing waits for the copy."""
    return (row.to(device, non_blocking=True).double() for row in rows)


def read_all(numbers: Sequence[Tensor], sharded: bool = False) -> list[float]:
    """Their values, one after the other, by one synchronisation with their device.

    Args:
        sharded: they are of this process's shards, and what is read is the sums over all processes.
    """
    if not numbers:
        return []
    found = torch.cat([x.flatten() for x in numbers])
    if sharded:
        torch.distributed.all_reduce(found)
    return found.tolist()


def inner(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, float]:
    """For each tensor of `a` its inner product with that of `b`, whole: over all shards, where they are in shards."""
    return dict(zip(a, read_all([dot(x, b[name]) for name, x in a.items()], in_shards(a)), strict=True))


def in_shards(vectors: Mapping[str, Tensor]) -> bool:
    return any(isinstance(x, DTensor) for x in vectors.values())
