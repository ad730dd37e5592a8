"""Gradient rules: the step's gradient from that of the objective, g_f, and that of the weighted retain term, g_r.

Each is a function of the two, given as trees of one tensor a parameter with the same names, and gives the step tensor by
tensor, so that no third tree is held. <.,.> is over all tensors, and over all shards where they are in shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from unlearn.models.vectors import Vectors, inner

Step = Iterator[tuple[str, Tensor]]


@dataclass(frozen=True)
class Rule:
    """How a step is made.

    Attributes:
        combine: of the functions below.
        average: the weight a of g_r in its moving average m <- a g_r + (1 - a) m, m = g_r at first, which `combine` then gets
            in place of g_r, and whose step is of g_f alone. None: g_r itself.
    """

    combine: Callable[[Vectors, Vectors], Step]
    average: float | None = None


def total(forget: Vectors, retain: Vectors) -> Step:
    """g_f + g_r: the gradient of the loss."""
    for name, f in forget.items():
        yield name, f + retain[name]


def pcgrad(forget: Vectors, retain: Vectors, by_tensor: bool = False) -> Step:
    """g_f without its part along g_r where <g_f, g_r> < 0, + g_r. Of the whole, or each tensor by itself. arXiv 2001.06782."""
    along = _conflicts(forget, retain, by_tensor)
    for name, f in forget.items():
        yield name, torch.add(f, retain[name], alpha=1 - along[name])


def gru(forget: Vectors, average: Vectors) -> Step:
    """g_f without its part along m where <g_f, m> < 0, m the moving average of g_r. arXiv 2503.09117."""
    along = _conflicts(forget, average)
    for name, f in forget.items():
        yield name, torch.sub(f, average[name], alpha=along[name])


def blur(forget: Vectors, retain: Vectors) -> Step:
    """g_f + g_r without its part along g_f, always. arXiv 2506.08164."""
    along = _shares(inner(retain, forget), inner(forget, forget))
    for name, f in forget.items():
        yield name, torch.add(retain[name], f, alpha=1 - along[name])


def sago(forget: Vectors, retain: Vectors, prefer_retain: bool = False) -> Step:
    """Number by number: g_r where the signs differ, else g_f; with `prefer_retain` else g_f + g_r. arXiv 2604.14808.

    0 differs from neither sign, as there.
    """
    for name, f in forget.items():
        r = retain[name]
        yield name, torch.where(f.sign() * r.sign() < 0, r, f + r if prefer_retain else f)


def _shares(products: dict[str, float], squares: dict[str, float], by_tensor: bool = False) -> dict[str, float]:
    """<a, b> / <b, b> for each tensor, 0 where b is 0."""
    if not by_tensor:
        products, squares = (dict.fromkeys(numbers, sum(numbers.values())) for numbers in (products, squares))
    return {name: value / squares[name] if squares[name] else 0.0 for name, value in products.items()}


def _conflicts(forget: Vectors, retain: Vectors, by_tensor: bool = False) -> dict[str, float]:
    """The shares of g_r in g_f that are below 0, and 0 for the others."""
    shares = _shares(inner(forget, retain), inner(retain, retain), by_tensor)
    return {name: value if value < 0 else 0.0 for name, value in shares.items()}
