"""A retain term's weight as a dual variable: the objective is minimised while the retain term is held below a bound."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Dual:
    """lambda of L = objective + lambda (L_retain - eps), which rises while L_retain is above eps. arXiv 2506.05314.

    Attributes:
        value: lambda as it is now; part of the run's state.
        eps: what L_retain may be, in its own units.
        eta: the step of its ascent.
        warmup: steps of training without one.
    """

    value: float
    eps: float
    eta: float
    warmup: int = 0
    watched: bool = field(default=False, repr=False)
    noted: list[Tensor] = field(default_factory=list, repr=False)

    def weigh(self, retain: Tensor, share: float) -> Tensor:
        """lambda (L_retain - eps) of a part of the step.

        Args:
            retain: the part's share of L_retain.
            share: that part of the step's retain rows.
        """
        if self.watched:
            self.noted.append(retain.detach())
        return self.value * (retain - self.eps * share)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While entered, shares of L_retain are noted: those of training, and none of measurements."""
        self.watched = True
        try:
            yield
        finally:
            self.watched = False

    def taken(self) -> Tensor:
        """The sum of what was noted since the last call, () float64: this process's share of L_retain."""
        noted, self.noted = self.noted, []
        return torch.stack([x.double() for x in noted]).sum()

    def ascend(self, retain: float, step: int) -> None:
        """lambda <- max(0, lambda + eta (L_retain - eps)) after a step, past the warm-up."""
        if step > self.warmup:
            self.value = max(0.0, self.value + self.eta * (retain - self.eps))
