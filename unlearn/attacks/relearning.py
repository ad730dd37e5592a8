"""Relearning: a few steps of fine-tuning on what was forgotten, or beside it (arXiv 2406.13356, 2506.12618).

What comes back sooner than a model learns it that never saw it (the retain model) was hidden, not forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def resistance_to_relearning(before: float, after: float, retain_before: float, retain_after: float) -> float:
    """R = min((m_retain_before - m_retain_after) / (m_before - m_after), 1) (arXiv 2506.12618, equation 2).

    m is a score of the rows to forget that is higher the more the model knows of them, such as their probability or ROUGE; so
    both differences are minus what training has brought. Below 1 the unlearned model has gained more than the retain model
    did from the same training; below 0 the retain model has lost.

    Returns:
        At most 1; nan where a score has no value, or the unlearned model has gained nothing (its difference is 0 or above), to
        which a gain could not be compared.
    """
    gained, of_retain = after - before, retain_after - retain_before
    if not gained > 0 or of_retain != of_retain:
        return float("nan")
    return min(of_retain / gained, 1.0)


def harmonic_mean(r: float, q: float) -> float:
    """HM(R, Q) = 2 R Q / (R + Q), 0 where one is; nan where one has no value or is below 0 (arXiv 2506.12618, equation 4)."""
    if not (r >= 0 and q >= 0):
        return float("nan")
    return 2 * r * q / (r + q) if r + q else 0.0


def measured_steps(steps: int, every: int | None) -> list[int]:
    """The steps after which relearning is scored: every so many and the last; None: after each quarter."""
    quarters = {max(1, round(steps * i / 4)) for i in range(1, 5)}
    return sorted(quarters if every is None else {*range(every, steps, every), steps})


class AtSteps(TrainerCallback):
    """Calls `measure(step)` after each of those steps of any `Trainer`."""

    def __init__(self, steps: Sequence[int], measure: Callable[[int], None]) -> None:
        self.steps, self.measure = set(steps), measure

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step in self.steps:
            self.measure(state.global_step)
