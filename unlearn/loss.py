"""The loss of a batch: an objective on its forget rows and, if there is one, a retain term on its retain rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from unlearn.objectives import Objective
from unlearn.tokens import Counts, token_outputs


@dataclass(frozen=True)
class Loss:
    """What training minimises, L = objective(forget rows) + weight * retain(retain rows), and what it needs.

    Attributes:
        objective: function of (Tokens, Counts), as in `unlearn.objectives`.
        retain: the same for the retain rows, or None.
        weight: of the retain term.
        layer: the layer whose output the objective looks at, or None.
        noise: (d,) fixed random vector of the run, given to the objective beside the layer's output.
        reference: the frozen reference model, held only for a retain term that compares whole distributions.
    """

    objective: Objective
    retain: Objective | None = None
    weight: float = 1.0
    layer: int | None = None
    noise: Tensor | None = None
    reference: nn.Module | None = None

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The batch's share of the step's loss, in parts that add up to it.

        `batch` holds the forget rows first, then the retain rows: `input_ids`, `attention_mask`, `labels` (B, T);
        `n_forget`; the step's `forget_counts` and `retain_counts`; and `ref_nll` (M,) of the forget rows where needed.
        """
        n = batch["n_forget"]
        forget, retain = token_outputs(model, batch, self.layer).split(n)
        forget = replace(forget, ref_nll=batch.get("ref_nll"), noise=self.noise)
        parts = {"objective": self.objective(forget, Counts(*batch["forget_counts"]))}
        if self.retain is not None:
            retain = replace(retain, ref_logits=self._reference_logits(batch, n))
            parts["retain"] = self.weight * self.retain(retain, Counts(*batch["retain_counts"]))
        return parts

    @torch.no_grad()
    def _reference_logits(self, batch: Mapping[str, Any], n: int) -> Tensor | None:
        if self.reference is None:
            return None
        rows = {key: batch[key][n:] for key in ("input_ids", "attention_mask", "labels")}
        return token_outputs(self.reference, rows).logits
