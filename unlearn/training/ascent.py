"""The ascent of a loss's dual variable, after each step."""

from __future__ import annotations

from typing import Any

from accelerate.utils import reduce
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from unlearn.objectives.dual import Dual


class Ascent(TrainerCallback):
    """Raises or lowers the variable by the step's retain loss, over all its micro-batches and processes."""

    def __init__(self, dual: Dual) -> None:
        self.dual = dual

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.dual.ascend(reduce(self.dual.taken(), "sum").item(), state.global_step)
