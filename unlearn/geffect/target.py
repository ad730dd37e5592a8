"""What is measured: a loss on its rows, and which numbers of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from unlearn.objectives.loss import Loss
from unlearn.objectives.rows import Row, counts
from unlearn.objectives.tokens import IGNORE


@dataclass(frozen=True)
class Target:
    """What is minimised: a loss, on these rows to forget (as training has them) and these beside them for its retain term."""

    loss: Loss
    forget: Sequence[Row]
    retain: Sequence[Row] = ()


@dataclass(frozen=True)
class Wanted:
    """Which numbers to measure.

    Attributes:
        instances: by instance, and by use of tied weights (the tapped pass); else totals and layers (the plain one).
        norms: with instances also the norm of L's gradient, and so the cosines: one more copy of the model.
        positions: by the position where the activation sits, prompts included, and layer; needs `instances`.
        tokens: by label token, in one forward-mode pass.
        sweep_norms: with a sweep the norm of each of its objectives' gradients, and so the cosines: a backward pass for each.
    """

    instances: bool = True
    norms: bool = True
    positions: bool = False
    tokens: bool = False
    sweep_norms: bool = False


def check_labels(targets: Sequence[Target], risks: Mapping[str, Sequence[Row]]) -> None:
    """Raises ValueError where rows have no label tokens, or one has its first token for one."""
    given = [("a target", t.forget) for t in targets] + [("a target's retain term", t.retain) for t in targets if t.retain]
    for name, rows in [*given, *((f"the {name} risk", of) for name, of in risks.items())]:
        if not counts(rows)[0]:
            raise ValueError(f"{name}: its {len(rows)} rows have no label tokens")
        if first := [i for i, row in enumerate(rows) if row["labels"][0] != IGNORE]:
            raise ValueError(f"{name}: row {first[0]}: its first token has a label, and nothing before it to tell it")
