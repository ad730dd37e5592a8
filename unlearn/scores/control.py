"""The fair comparison (arXiv 2406.09179): mix the unlearned model with the original until the retain PS is back at a bar.

Then what the forget PS is at that weight compares methods that destroy more with those that destroy less.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unlearn.models.sharding import local

GRID = 21
WIDTH = 1e-3  # bisection stops below it
Curve = dict[float, tuple[float, float]]  # weight: forget PS, retain PS


@torch.no_grad()
def mix(model: PreTrainedModel, original: Mapping[str, Tensor], unlearned: Mapping[str, Tensor], weight: float) -> None:
    """Give the model (1 - weight) original + weight unlearned; at 0 and 1 exactly the one and the other.

    The weights may be on another device: one parameter's are on the model's at a time.
    """
    for name, parameter in model.named_parameters():
        one, other = (local(weights[name]).to(parameter.device) for weights in (original, unlearned))
        local(parameter).copy_(torch.lerp(one, other, weight))


@torch.no_grad()
def put(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    """Give the model weights that were kept."""
    for name, parameter in model.named_parameters():
        local(parameter).copy_(local(weights[name]))


def kept(weight: Tensor) -> Tensor:
    """A copy on the CPU, of this process's part where it is in shards; in pinned memory where there is a GPU to go back to."""
    here = local(weight.detach())
    return torch.empty(here.shape, dtype=here.dtype, pin_memory=torch.cuda.is_available()).copy_(here)


def search(measure: Callable[[float], tuple[float, float]], bar: float, grid: int = GRID) -> tuple[float | None, Curve]:
    """The largest weight whose retain PS reaches the bar, and all that was measured.

    A grid from 0 to 1, then bisection between the last of it that passes and the next: PS need not be monotone. None where
    none of the grid passes.

    Args:
        measure: forget PS and retain PS of the mixture at a weight.
    """
    curve: Curve = {}

    def passes(weight: float) -> bool:
        curve[weight] = measure(weight)
        return curve[weight][1] >= bar

    weights = [i / (grid - 1) for i in range(grid)]
    passed = [weight for weight in weights if passes(weight)]
    if not passed or passed[-1] == 1:
        return (passed[-1] if passed else None), curve
    low = passed[-1]
    high = weights[weights.index(low) + 1]
    while high - low > WIDTH:
        middle = (low + high) / 2
        low, high = (middle, high) if passes(middle) else (low, middle)
    return low, dict(sorted(curve.items()))
