"""Whether two ways to one G-effect agree, as far as rounding allows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
import torch
from transformers import PreTrainedModel

WITHOUT = {"positions": "positions=false", "tokens": "tokens=false", "forward-mode pass": "a measurement without a sweep"}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative to the product of the norms; else 5e-2
IN_PARTS = 1e-5  # where only parts of a float64 model are in float32


class Agreement:
    """Refuses a measurement whose ways do not agree.

    Attributes:
        bound: how far, relative to the product of the norms, rounding alone can take them apart.
    """

    def __init__(self, model: PreTrainedModel, precision: torch.dtype) -> None:
        """`precision`: the least that a gradient passes."""
        self.name = type(model).__name__
        mixed = (model.dtype, precision) == (torch.float64, torch.float32)
        self.bound = IN_PARTS if mixed else TOLERANCE.get(precision, 5e-2)

    def tap(self, totals: Sequence[float], plain_totals: Sequence[float], scale: Sequence[float]) -> None:
        """The gradient itself, where it is there, must give the same totals: else some weight is used past its module.

        Args:
            scale: the product of the norms.

        Raises:
            ValueError: it does not.
        """
        for tapped, plain, norms in zip(totals, plain_totals, scale, strict=True):
            if abs(tapped - plain) > self.bound * norms:
                raise ValueError(
                    f"{self.name}: the tapped pass gives {tapped:.6g}, the whole gradient {plain:.6g}: a weight is used other"
                    " than by calling its module (instances=false does without the tap)"
                )

    def parts(self, name: str, parts: pd.DataFrame, steps: pd.DataFrame) -> None:
        """Parts add up to the totals: else a path through the model was dropped, or counted twice.

        Raises:
            ValueError: they do not.
        """
        for total in steps.itertuples():
            values = parts.loc[parts["risk"] == total.risk, "geffect"]
            norms = total.objective_norm * total.risk_norm
            scale = values.abs().sum() if math.isnan(norms) else norms
            if not abs(values.sum() - total.geffect) <= self.bound * scale:
                raise ValueError(
                    f"{self.name}: the G-effects on the {total.risk} risk by {name} add up to {values.sum():.6g}, and the total"
                    f" is {total.geffect:.6g}: an operation of the model can't be taken apart so"
                    f" ({WITHOUT.get(name, 'instances=false')} does without)"
                )
