"""What is measured: a loss on its rows, which numbers of it, and the forward-mode passes that several share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from unlearn.objectives.loss import Loss, Reference, reference_outputs
from unlearn.objectives.needs import looks_at_layers
from unlearn.objectives.rows import Row, counts
from unlearn.objectives.tokens import IGNORE, layers_of, pick
from unlearn.passes.batches import Batch


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


def check_labels(targets: Sequence[Target], risks: Mapping[str, Sequence[Row]]) -> None:
    """Raises ValueError where rows have no label tokens, or one has its first token for one."""
    given = [("a target", t.forget) for t in targets] + [("a target's retain term", t.retain) for t in targets if t.retain]
    for name, rows in [*given, *((f"the {name} risk", of) for name, of in risks.items())]:
        if not counts(rows)[0]:
            raise ValueError(f"{name}: its {len(rows)} rows have no label tokens")
        if first := [i for i, row in enumerate(rows) if row["labels"][0] != IGNORE]:
            raise ValueError(f"{name}: row {first[0]}: its first token has a label, and nothing before it to tell it")


@dataclass(frozen=True)
class SharedPass:
    """A pass over rows to forget or rows to retain that records the outputs of `layers`, for the targets of these numbers."""

    forget: Sequence[Row]
    retain: Sequence[Row]
    layers: tuple[int, ...]
    targets: list[int]

    @property
    def part(self) -> str:
        return "objective" if self.forget else "retain"


def passes_of(targets: Sequence[Target]) -> list[SharedPass]:
    """The passes that the targets need: one over each set of rows, recording each layer that one of them looks at there."""
    groups: dict[tuple[str, int], list[int]] = {}
    for i, target in enumerate(targets):
        groups.setdefault(("objective", id(target.forget)), []).append(i)
        if target.loss.retain is not None:
            groups.setdefault(("retain", id(target.retain)), []).append(i)
    found = []
    for (part, _), group in groups.items():
        losses = [targets[i].loss for i in group]
        looking = [layers_of(loss.layer) for loss in losses if looks_at_layers(getattr(loss, part))]
        layers = tuple(sorted({layer for one in looking for layer in one}))
        first = targets[group[0]]
        rows = (first.forget, []) if part == "objective" else ([], first.retain)
        found.append(SharedPass(*rows, layers, group))
    return found


def shared_references(losses: Sequence[Loss], part: str, batch: Batch) -> list[Reference]:
    """For each loss what its part needs of its reference model on a batch of that part's rows: one pass for each model."""
    models = {id(loss.reference): loss.reference for loss in losses if loss.reference and loss.needs_of_reference(part)}
    found: dict[int, tuple[Reference, tuple[int, ...]]] = {}
    for key, model in models.items():
        of = [loss for loss in losses if id(loss.reference) == key]
        wanted = frozenset[str]().union(*(loss.needs_of_reference(part) for loss in of))
        looking = [layers_of(loss.layer) for loss in of if "ref_hidden" in loss.needs_of_reference(part)]
        layers = tuple(sorted({layer for one in looking for layer in one}))
        found[key] = reference_outputs(model, batch, {part: wanted}, layers), layers
    return [_of_loss(loss, part, *found.get(id(loss.reference), ({}, ()))) for loss in losses]


def _of_loss(loss: Loss, part: str, outputs: Reference, layers: tuple[int, ...]) -> Reference:
    found = {name: outputs[part][name] for name in loss.needs_of_reference(part) if part in outputs}
    if "ref_hidden" in found:
        found["ref_hidden"] = pick(found["ref_hidden"], layers, loss.layer)
    return {part: found}
