"""What is measured: a loss on its rows, which numbers of it, and the forward-mode passes that several share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from unlearn.objectives.loss import Loss
from unlearn.objectives.rows import Row


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
    """

    instances: bool = True
    norms: bool = True
    positions: bool = False
    tokens: bool = False


def passes_of(targets: Sequence[Target]) -> list[tuple[Sequence[Row], Sequence[Row], int | None, list[int]]]:
    """The passes that the targets need: rows to forget or rows to retain, the layer to record, and for which targets."""
    layers: dict[int, list[int]] = {}
    for target in targets:
        layers.setdefault(id(target.forget), []).extend([target.loss.layer] if target.loss.layer is not None else [])
    groups: dict[tuple[int, int | None], tuple[Sequence[Row], Sequence[Row], int | None, list[int]]] = {}
    for i, target in enumerate(targets):
        layer = target.loss.layer if target.loss.layer is not None else next(iter(layers[id(target.forget)]), None)
        groups.setdefault((id(target.forget), layer), (target.forget, [], layer, []))[3].append(i)
        if target.loss.retain is not None:
            groups.setdefault((id(target.retain), None), ([], target.retain, None, []))[3].append(i)
    return list(groups.values())
