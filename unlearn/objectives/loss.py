"""The loss of a batch: an objective on its forget rows and, if there is one, a retain term on its retain rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from unlearn.models.adapters import adapters_off
from unlearn.models.evaluating import in_eval_mode
from unlearn.objectives.functions import Objective, needs_of
from unlearn.objectives.tokens import Counts, Tokens, token_outputs


@dataclass(frozen=True)
class Loss:
    """What training minimises, L = objective(forget rows) + weight * retain(retain rows), and what it needs.

    Attributes:
        objective: function of (Tokens, Counts), as in `unlearn.objectives.functions`.
        retain: the same for the retain rows, or None.
        weight: of the retain term.
        layer: the layer whose output the objective looks at, or None.
        noise: (d,) fixed random vector of the run, given to the objective beside the layer's output.
        reference: the reference model, held only for a retain term that compares whole distributions: a frozen one, or the
            trained model itself where it has adapters, which are switched off.
    """

    objective: Objective
    retain: Objective | None = None
    weight: float = 1.0
    layer: int | None = None
    noise: Tensor | None = None
    reference: nn.Module | None = None

    def __post_init__(self) -> None:
        """Raises ValueError where the objective looks at a layer, and none is given."""
        if "hidden" in needs_of(self.objective) and self.layer is None:
            raise ValueError("the objective looks at a layer's output: give layer=N")

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The batch's share of the step's loss, in parts that add up to it.

        `batch` holds the forget rows first, then the retain rows, then the `n_second` second answers to the forget rows'
        questions, if there are any: `input_ids`, `attention_mask`, `labels` (B, T); `n_forget`; the step's `forget_counts`
        and `retain_counts`; and `ref_nll` (M,) of the forget rows, `second_ref_nll` of the second answers, where needed.
        """
        return self.of_tokens(token_outputs(model, batch, self.layer), batch)

    def of_tokens(self, tokens: Tokens, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The same from the batch's label tokens. A part without rows is left out."""
        n = batch["n_forget"]
        forget, others = tokens.split(n)
        retain, second = others.split(others.n_rows - batch.get("n_second", 0))
        parts = {}
        if n:
            second = replace(second, ref_nll=batch.get("second_ref_nll"))
            forget = replace(forget, ref_nll=batch.get("ref_nll"), noise=self.noise, second=second if second.n_rows else None)
            parts["objective"] = self.objective(forget, Counts(*batch["forget_counts"]))
        if self.retain is not None and retain.n_rows:
            logits = batch["ref_logits"] if "ref_logits" in batch else self.reference_logits(batch)
            retain = replace(retain, ref_logits=logits)
            parts["retain"] = self.weight * self.retain(retain, Counts(*batch["retain_counts"]))
        return parts

    @torch.no_grad()
    def reference_logits(self, batch: Mapping[str, Any]) -> Tensor | None:
        """(label tokens of the retain rows, vocabulary), or None without a reference model."""
        if self.reference is None:
            return None
        n = batch["n_forget"]
        end = len(batch["labels"]) - batch.get("n_second", 0)
        rows = {key: batch[key][n:end] for key in ("input_ids", "attention_mask", "labels")}
        with in_eval_mode(self.reference), adapters_off(self.reference):
            return token_outputs(self.reference, rows).logits
