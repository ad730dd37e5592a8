"""What an objective reads of `Tokens` beside losses and rows: it says so itself, and nothing else does."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from unlearn.objectives.statistics import STATISTICS, statistics
from unlearn.objectives.tokens import Counts, Tokens

Objective = Callable[[Tokens, Counts], Tensor]
OF_REFERENCE = ("ref_logits", "ref_hidden")  # formed by the reference model while the loss is, not once before
NEEDS = ("logits", "hidden", "ref_nll", *OF_REFERENCE, "second", "noise", "refusal", *STATISTICS)  # of `Tokens`


def needs(*names: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Mark what an objective reads of `Tokens` beside `nll`, `row` and `label`; nothing else says so.

    Raises:
        ValueError: one is not of `NEEDS`.
    """
    if strange := set(names) - set(NEEDS):
        raise ValueError(f"needs {', '.join(sorted(strange))}: an objective may need {', '.join(NEEDS)}")

    def mark(objective: Callable[..., Tensor]) -> Callable[..., Tensor]:
        objective.needs = frozenset(names)  # type: ignore[attr-defined]
        return objective

    return mark


def read_by(objective: Callable[..., Any] | None) -> frozenset[str]:
    """What an objective, perhaps with hyper-parameters given, says that it reads; nothing where it says nothing."""
    while isinstance(objective, partial):
        objective = objective.func
    return getattr(objective, "needs", frozenset())


def needs_of(objective: Callable[..., Any] | None) -> frozenset[str]:
    """What an objective reads, and what the statistics among that are made of."""
    read = read_by(objective)
    return read | {of for name in read if (of := STATISTICS.get(name)) is not None}


def needs_reference(*objectives: Callable[..., Any] | None) -> bool:
    """Whether one of them compares with outputs that only the reference model itself can give, batch by batch."""
    return any(needs_of(objective) & set(OF_REFERENCE) for objective in objectives)


def looks_at_layers(objective: Callable[..., Any] | None) -> bool:
    """Whether it reads outputs of layers, the model's own or the reference's."""
    return bool(needs_of(objective) & {"hidden", "ref_hidden"})


def needed(tokens: Tokens, name: str) -> Any:
    """That field of `tokens`, which an objective says it needs; a statistic that is not there is formed.

    Raises:
        AssertionError: it is not there, for the objective does not say so, or the library's call was not given it.
    """
    value = getattr(tokens, name)
    if value is None and name in STATISTICS:
        for made_of in filter(None, ("logits", STATISTICS[name])):
            needed(tokens, made_of)
        return statistics(tokens, [name])[name]
    how = {"noise": "`noise`", "refusal": "`refusal`", "second": "rows with `second`", "hidden": "`layer`"}
    given = how.get(name, "`reference`")
    assert value is not None, f'this objective reads {name}: it says so by `@needs("{name}")`, its Loss or call has {given}'
    return value
