"""The forward-mode passes that targets share: each distinct row passes once and gives all that any of them needs.

Rows are the same where their tokens and labels are. What stands beside one another in a target, an answer and its second
ones, is taken together (a `Unit`); within a unit rows pass in batches of like length, and each target then takes its own.
Of the reference model only those rows pass that a target compares, once.

Letters: M label tokens, D directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from unlearn.geffect.tangents import Dual, contract
from unlearn.geffect.target import Target
from unlearn.objectives.loss import PARTS, reference_outputs
from unlearn.objectives.needs import OF_REFERENCE, looks_at_layers, read_by
from unlearn.objectives.rows import Row, counts, forget_batch, seconds
from unlearn.objectives.statistics import STATISTICS
from unlearn.objectives.tokens import Tokens, layers_of
from unlearn.passes.batches import Batch, bar, on
from unlearn.passes.sizes import Budget, Size, cut, each

OF_MODELS = frozenset({"logits", "hidden", *OF_REFERENCE, *STATISTICS})  # of `Tokens`, what a pass gives beside losses
WHAT = "forward mode"
Use = tuple[int, str]  # a target's number, and which of its rows: of `PARTS`
Piece = tuple[dict[str, Tensor], dict[str, Tensor]]  # of one row by name (m, ...), and the tangents (D, m, ...)
Tangents = Callable[..., Dual]  # of a batch, with the layers, the names that are wanted, and what they are made of


@dataclass
class Unit:
    """Rows that pass together, by number, and the rows of each use among them, by their numbers in the target."""

    rows: list[int] = field(default_factory=list)
    uses: dict[Use, list[int]] = field(default_factory=dict)

    def add(self, other: Unit) -> None:
        self.rows += other.rows
        for use, rows in other.uses.items():
            self.uses.setdefault(use, []).extend(rows)


@dataclass
class Shared:
    """Targets whose statistics are of one reference model and one refusal, and their distinct rows.

    Attributes:
        targets: by their numbers.
        rows: the distinct rows, tokens and labels alone.
        wants: of each, the names of `OF_MODELS` that some target reads there.
        of: for each use and row of it, the distinct rows: its own, then those of its second answers.
    """

    reference: nn.Module | None = None
    refusal: Tensor | None = None
    targets: dict[int, Target] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    wants: list[frozenset[str]] = field(default_factory=list)
    of: dict[Use, list[list[int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.layers: tuple[int, ...] = ()
        self.widths: list[int] = []  # tokens of each row
        self._numbers: dict[Any, int] = {}

    def takes(self, target: Target) -> bool:
        """Whether the target has the same reference and refusal, or none."""
        one, other = self.refusal, target.loss.refusal
        return (None in (self.reference, target.loss.reference) or self.reference is target.loss.reference) and (
            one is None or other is None or torch.equal(one, other)
        )

    def add(self, number: int, target: Target) -> None:
        loss = target.loss
        self.targets[number] = target
        self.reference = loss.reference if self.reference is None else self.reference
        self.refusal = loss.refusal if self.refusal is None else self.refusal
        for part, rows in zip(PARTS, (target.forget, target.retain), strict=True):
            objective = getattr(loss, part)
            wanted = read_by(objective) & OF_MODELS
            answers = [(row, *seconds(row)) for row in (rows if objective is not None else ())]
            self.of[number, part] = [[self._number(row, wanted) for row in several] for several in answers]
            if looks_at_layers(objective):
                self.layers = tuple(sorted({*self.layers, *layers_of(loss.layer)}))

    def _number(self, row: Row, wanted: frozenset[str]) -> int:
        number = self._numbers.setdefault((*row["input_ids"].tolist(), None, *row["labels"].tolist()), len(self.rows))
        if number == len(self.rows):
            self.rows.append({key: row[key] for key in ("input_ids", "labels")})
            self.wants.append(frozenset())
            self.widths.append(len(row["input_ids"]))
        self.wants[number] |= wanted
        return number

    # ---- which rows pass together ----

    def units(self, size: Size) -> list[Unit]:
        """Of as many questions as a batch may have rows, of like length and with the same uses."""
        alike: dict[frozenset[Use], list[Unit]] = {}
        for unit in self._questions():
            alike.setdefault(frozenset(unit.uses), []).append(unit)
        found = []
        for units in alike.values():
            longest = [max(self.widths[n] for n in unit.rows) for unit in units]
            for together in cut(sorted(range(len(units)), key=lambda i: -longest[i]), longest, size):
                found.append(Unit())
                for i in together:
                    found[-1].add(units[i])
        return found

    def _questions(self) -> list[Unit]:
        """The least units: rows that some target has beside one another."""
        leader = list(range(len(self.rows)))

        def lead(n: int) -> int:
            while leader[n] != n:
                leader[n] = n = leader[leader[n]]
            return n

        for first, *others in (several for of in self.of.values() for several in of):
            for other in others:
                leader[lead(other)] = lead(first)
        units: dict[int, Unit] = {}
        for n in range(len(self.rows)):
            units.setdefault(lead(n), Unit()).rows.append(n)
        for use, of in self.of.items():
            for i, (first, *_) in enumerate(of):
                units[lead(first)].uses.setdefault(use, []).append(i)
        return list(units.values())

    def _batches(self, rows: list[int], size: Size) -> list[list[int]]:
        """In one batch those of which the same is wanted, of like length."""
        alike: dict[frozenset[str], list[int]] = {}
        for n in sorted(rows, key=lambda n: -self.widths[n]):
            alike.setdefault(self.wants[n], []).append(n)
        return [batch for of in alike.values() for batch in cut(of, self.widths, size)]

    # ---- the passes ----

    def shares(self, tangents: Tangents, unit: Unit, budget: Budget, pad: int) -> Iterator[Any]:
        """For each use: the target's number, its batch, the tokens' losses (M,), and their shares (D, M)."""
        device = budget.model.device

        def measure(rows: list[int]) -> list[Piece]:
            of = [self.rows[n] for n in rows]
            dual = self._pass(tangents, on(forget_batch(of, [], pad), device), self.wants[rows[0]])
            return apart(dual, [counts([row])[0] for row in of])

        pieces: dict[int, Piece] = {}
        for rows, found in each(budget, "tangents", WHAT, unit.rows, self.widths, self._batches, measure):
            pieces |= zip(rows, found, strict=True)
        duals: dict[tuple[int, ...], Dual] = {}
        for (number, part), of_target in unit.uses.items():
            several = [self.of[number, part][i] for i in of_target]
            order = *(first for first, *_ in several), *(other for _, *others in several for other in others)
            if order not in duals:
                duals[order] = together([pieces[n] for n in order], self.layers)
            batch = on(batch_of(self.targets[number], part, of_target, pad), device)
            yield number, batch, duals[order].tokens.nll, contract(self.targets[number].loss, duals[order], batch)

    def _pass(self, tangents: Tangents, batch: Batch, wanted: frozenset[str]) -> Dual:
        made_of = {of for name in wanted if (of := STATISTICS.get(name)) is not None}
        given: dict[str, Tensor] = {"refusal": self.refusal} if "refusal" in made_of and self.refusal is not None else {}
        compared = (wanted | made_of) & set(OF_REFERENCE)
        if compared and self.reference is not None:
            given |= reference_outputs(self.reference, batch, {PARTS[0]: compared}, self.layers)[PARTS[0]]
        return tangents(batch, self.layers if "hidden" in wanted else None, wanted, given)


def shared(targets: Sequence[Target]) -> list[Shared]:
    """The targets in groups that share what they can: but for several references or refusals, one."""
    groups: list[Shared] = []
    for number, target in enumerate(targets):
        group = next((group for group in groups if group.takes(target)), None)
        if group is None:
            groups.append(group := Shared())
        group.add(number, target)
    return groups


def shares_of(
    targets: Sequence[Target], tangents: Tangents, budget: Budget, pad: int
) -> Iterator[tuple[int, Batch, Tensor, Tensor]]:
    """For each target and batch of it: the target's number, the batch, the tokens' losses (M,), their shares (D, M).

    Args:
        tangents: `token_tangents` of a batch.
        budget: how many rows pass at once; a batch that does not fit passes in parts.
    """
    state = PartialState()
    for group in shared(targets):
        units = group.units(budget.size("tangents", max(group.widths)))
        for unit in bar(units[state.process_index :: state.num_processes], WHAT):
            yield from group.shares(tangents, unit, budget, pad)


def apart(dual: Dual, sizes: list[int]) -> list[Piece]:
    """A batch's outputs and tangents row by row, of so many label tokens each."""
    names = ("nll", "label", *sorted(OF_MODELS))
    values = {name: x.split(sizes) for name in names if (x := getattr(dual.tokens, name)) is not None}
    changes = {name: x.split(sizes, dim=1) for name, x in dual.tangents.items()}
    return [
        ({name: x[i] for name, x in values.items()}, {name: x[i] for name, x in changes.items()}) for i in range(len(sizes))
    ]


def together(pieces: Sequence[Piece], layers: tuple[int, ...]) -> Dual:
    """Rows in that order, with what all of them have."""
    (values, changes), *others = pieces
    values = {n: torch.cat([p[0][n] for p in pieces]) for n in values if all(n in p[0] for p in others)}
    changes = {n: torch.cat([p[1][n] for p in pieces], dim=1) for n in changes if n in values}
    row = torch.cat([torch.full_like(p[0]["label"], i) for i, p in enumerate(pieces)])
    return Dual(Tokens(row=row, n_rows=len(pieces), **{"logits": None} | values), changes, layers)  # type: ignore[arg-type]


def batch_of(target: Target, part: str, of: Sequence[int], pad: int) -> Batch:
    """Those of the target's rows that the part is of, as `set_batches` has them; the reference's outputs are known."""
    rows, first = (target.forget, 0) if part == PARTS[0] else (target.retain, len(target.forget))
    chosen = [rows[i] for i in of]
    batch: Batch = forget_batch(chosen, [], pad) if part == PARTS[0] else forget_batch([], chosen, pad)
    others = [first + i for i, row in zip(of, chosen, strict=True) for _ in seconds(row)]
    batch["index"] = torch.tensor([*(first + i for i in of), *others])
    return batch | {"forget_counts": counts(target.forget), "retain_counts": counts(target.retain), "reference": {}}
