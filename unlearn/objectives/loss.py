"""The loss of a batch: an objective on its forget rows and, if there is one, a retain term on its retain rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from unlearn.models.adapters import adapters_off
from unlearn.models.evaluating import in_eval_mode
from unlearn.objectives.dual import Dual
from unlearn.objectives.needs import OF_REFERENCE, Objective, looks_at_layers, needs_of
from unlearn.objectives.tokens import Counts, Layer, Tokens, label_positions, outputs_at, token_outputs

PARTS = ("objective", "retain")  # on the forget rows, on the retain rows
Reference = Mapping[str, Mapping[str, Tensor]]  # of a part's rows, by its name: `OF_REFERENCE`, those that are needed


@dataclass(frozen=True)
class Loss:
    """What training minimises, L = objective(forget rows) + weight * retain(retain rows), and what it needs.

    Attributes:
        objective: function of (Tokens, Counts), as in `unlearn.objectives.functions`.
        retain: the same for the retain rows, or None.
        weight: of the retain term.
        dual: the weight as a variable of the run, with the bound that the retain term is held below; in place of `weight`.
        layer: the layer whose output the two look at, or several, or None.
        noise: (d,) fixed random vector of the run, given to both beside the layer's output.
        reference: the reference model, held only where one of the two needs its distributions or layers: a frozen one, or the
            trained model itself where it has adapters, which are switched off.
        refusal: (k,) token ids of the run's refusal, for an objective that needs them.
    """

    objective: Objective
    retain: Objective | None = None
    weight: float = 1.0
    layer: Layer = None
    noise: Tensor | None = None
    reference: nn.Module | None = None
    refusal: Tensor | None = None
    dual: Dual | None = None

    def __post_init__(self) -> None:
        """Raises ValueError where the objective or the retain term looks at a layer and none is given, or dual has no term."""
        for name in PARTS:
            if self.layer is None and looks_at_layers(getattr(self, name)):
                raise ValueError(f"the {name.replace('retain', 'retain term')} looks at a layer's output: give layer=N")
        if self.dual is not None and self.retain is None:
            raise ValueError("the dual variable is a retain term's weight: give a retain term")

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The batch's share of the step's loss, in parts that add up to it.

        `batch` holds the forget rows first, then the retain rows, then the `n_second` second answers to the forget rows'
        questions, then the `n_retain_second` ones to the retain rows', if there are any: `input_ids`, `attention_mask`,
        `labels` (B, T); `n_forget`; the step's `forget_counts` and `retain_counts`; where needed `ref_nll` (M,) of the forget
        rows, and likewise `second_ref_nll`, `retain_ref_nll`, `retain_second_ref_nll`; and where rows have other than one
        second answer each, `second_of` and `retain_second_of`, which row (of their kind) each is of, in order.
        It may know its label tokens: `at`, and `n_tokens` of forget rows, retain rows and the former's second answers.
        """
        return self.of_tokens(token_outputs(model, batch, self.layer), batch)

    def of_tokens(self, tokens: Tokens, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The same from the batch's label tokens. A part without rows is left out."""
        n_forget, n_retain, n_second, _ = row_counts(batch)
        of_forget, of_retain, of_second = batch.get("n_tokens", (None, None, None))
        forget, others = tokens.split(n_forget, of_forget)
        retain, others = others.split(n_retain, of_retain)
        second, beside = others.split(n_second, of_second)
        known = batch["reference"] if "reference" in batch else self.reference_outputs(batch)
        parts = {}
        if n_forget:
            forget = self._given(forget, batch.get("ref_nll"), known.get("objective", {}))
            second = replace(second, ref_nll=batch.get("second_ref_nll"))
            counts = Counts(*batch["forget_counts"])
            parts["objective"] = over_pairs(self.objective, forget, second, counts, batch.get("second_of"))
        if self.retain is not None and n_retain:
            retain = self._given(retain, batch.get("retain_ref_nll"), known.get("retain", {}))
            beside = replace(beside, ref_nll=batch.get("retain_second_ref_nll"))
            counts = Counts(*batch["retain_counts"])
            share = over_pairs(self.retain, retain, beside, counts, batch.get("retain_second_of"))
            weighed = self.weight * share if self.dual is None else self.dual.weigh(share, n_retain / counts.rows)
            parts["retain"] = weighed
        return parts

    def _given(self, tokens: Tokens, ref_nll: Tensor | None, reference: Mapping[str, Any]) -> Tokens:
        return replace(tokens, ref_nll=ref_nll, noise=self.noise, refusal=self.refusal, **reference)

    def needs_of_reference(self, part: str) -> frozenset[str]:
        """What the objective, or the retain term, needs of the reference model's own outputs."""
        return needs_of(getattr(self, part)) & set(OF_REFERENCE)

    def reference_outputs(self, batch: Mapping[str, Any]) -> Reference:
        """What the parts need of the reference model, in one pass over the rows of those that need some."""
        wanted = {part: self.needs_of_reference(part) for part in PARTS}
        return {} if self.reference is None else reference_outputs(self.reference, batch, wanted, self.layer)


def row_counts(batch: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """How many rows of a batch are to forget, to retain, second answers to the first, and to the others."""
    n_forget, n_second, n_beside = batch["n_forget"], batch.get("n_second", 0), batch.get("n_retain_second", 0)
    return n_forget, len(batch["labels"]) - n_forget - n_second - n_beside, n_second, n_beside


@torch.no_grad()
def reference_outputs(
    reference: nn.Module, batch: Mapping[str, Any], wanted: Mapping[str, frozenset[str]], layer: Layer
) -> Reference:
    """Of the label tokens of each part's rows what is `wanted`: `ref_logits` (M, V), `ref_hidden` (M, d) or (M, L, d)."""
    n_forget, n_retain, *_ = row_counts(batch)
    rows = dict(zip(PARTS, (slice(0, n_forget), slice(n_forget, n_forget + n_retain)), strict=True))
    here = [part for part in PARTS if wanted.get(part) and rows[part].stop > rows[part].start]
    if not here:
        return {}
    passed = slice(rows[here[0]].start, rows[here[-1]].stop)
    of_rows = {key: batch[key][passed] for key in ("input_ids", "attention_mask", "labels")}
    at = label_positions(of_rows["labels"])
    needed = frozenset[str]().union(*(wanted[part] for part in here))
    with in_eval_mode(reference), adapters_off(reference):
        head, layers = "ref_logits" in needed, layer if "ref_hidden" in needed else None
        found = dict(zip(OF_REFERENCE, outputs_at(reference, of_rows, at, layers, head), strict=True))
    row = passed.start + at // of_rows["labels"].shape[1]
    ends = {part: [int((row < end).sum()) for end in (rows[part].start, rows[part].stop)] for part in here}
    return {part: {name: found[name][slice(*ends[part])] for name in wanted[part]} for part in here}  # type: ignore[index]


def over_pairs(objective: Objective, first: Tokens, second: Tokens, counts: Counts, of: Tensor | None) -> Tensor:
    """The objective on rows with their second answers: the mean over a row's pairs where it has several.

    An objective sees one second answer beside each row. Rows of like many are taken together, each as often as it has some.

    Args:
        of: (second answers,) which row each is of, in order; None: one each, or none.
    """
    if not second.n_rows:
        return objective(first, counts)
    if of is None:
        return objective(replace(first, second=second), counts)
    many = torch.bincount(of, minlength=first.n_rows)  # of each row
    shares = []
    for k in many.unique().tolist():
        rows = (many == k).nonzero().squeeze(1).repeat_interleave(k)
        pairs = replace(first.take(rows), second=second.take((many[of] == k).nonzero().squeeze(1)))
        shares.append(objective(pairs, counts) / k)
    return torch.stack(shares).sum()
