"""A step's two gradients, of the objective and of the retain term, kept apart until a rule makes the step of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from unlearn.models.sharding import like, whole
from unlearn.models.vectors import Vectors, dot, in_shards, inner, read_all
from unlearn.training.rules import Rule

Numbers = dict[str, float]


class TwoGradients:
    """Accumulates both gradients of a step, as a backward pass does one, and leaves the rule's step in `.grad`.

    Attributes:
        average: the rule's moving average m, which is part of the run's state; None before the first step, and where the rule
            has none.
    """

    def __init__(self, rule: Rule, parameters: Mapping[str, nn.Parameter]) -> None:
        self.rule, self.parameters = rule, parameters
        self.average: Vectors | None = None
        self.forget: Vectors = {}
        self.retain: Vectors = {}

    @contextmanager
    def into(self, of: Literal["forget", "retain"]) -> Iterator[None]:
        """While entered, backward passes add to this one; `.grad` is None after."""
        sums: Vectors = getattr(self, of)
        for name, p in self.parameters.items():
            p.grad = sums.get(name)
        try:
            yield
        finally:
            sums.update({name: p.grad for name, p in self.parameters.items() if p.grad is not None})
            for p in self.parameters.values():
                p.grad = None

    def step(self) -> Numbers:
        """Leave the rule's step of what was accumulated over micro-batches and processes in `.grad`.

        Returns:
            the columns of the step's log, as in docs/objectives.md.
        """
        (forget, retain), self.forget, self.retain = self._reduced(), {}, {}
        numbers = compared(forget, retain)
        along = self._averaged(retain)
        removed: Vectors = {}
        made: Vectors = {}
        for name, step in self.rule.combine(forget, along):
            plain = forget[name] if self.rule.average is not None else forget[name] + retain[name]
            off = plain.sub_(step) if plain is not forget[name] else plain - step
            removed[name], made[name] = dot(off, off), dot(step, along[name])
            self.parameters[name].grad = forget[name] = step  # its place is free for the next
        sums = [torch.stack(list(of.values())).sum() for of in (removed, made)]
        square, effect = read_all(sums, in_shards(forget))
        return numbers | {"rule_removed": math.sqrt(square), "rule_e_r": effect}

    def _reduced(self) -> tuple[Vectors, Vectors]:
        """Both, of all processes, with zeros where only one has a gradient; those in shards are reduced already."""
        both, several = (self.forget, self.retain), PartialState().num_processes > 1
        names = [name for name in self.parameters if name in self.forget or name in self.retain]
        for mine, other in (both, both[::-1]):
            for name in names:
                if name not in mine:
                    mine[name] = torch.zeros_like(other[name])
                if several and not isinstance(mine[name], DTensor):
                    mine[name] = reduce(mine[name], "mean")
        return ({name: self.forget[name] for name in names}, {name: self.retain[name] for name in names})

    def _averaged(self, retain: Vectors) -> Vectors:
        """What the rule compares with: g_r, or its moving average with this step's."""
        weight = self.rule.average
        if weight is None:
            return retain
        if self.average is None:
            self.average = {name: r.clone() for name, r in retain.items()}
        else:
            for name, m in self.average.items():
                m.mul_(1 - weight).add_(retain[name], alpha=weight)
        return self.average

    def state(self) -> dict[str, Tensor]:
        """The moving average, whole, on the CPU; every process has to call it."""
        return {name: whole(m).cpu() for name, m in (self.average or {}).items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        self.average = {name: like(self.parameters[name], m) for name, m in state.items()} or None


def compared(forget: Vectors, retain: Vectors) -> Numbers:
    """<g_f, g_r>, its cosine, and both norms."""
    product, *squares = (sum(inner(a, b).values()) for a, b in ((forget, retain), (forget, forget), (retain, retain)))
    of_forget, of_retain = map(math.sqrt, squares)
    both = of_forget * of_retain
    found = {"forget_retain": product, "forget_retain_cosine": product / both if both else math.nan}
    return found | {"forget_norm": of_forget, "retain_norm": of_retain}
