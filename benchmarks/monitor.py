"""How stale V may be: at every step of one training the monitor's values along V of that step, and of every 5, 10, 20.

    python benchmarks/monitor.py results/monitor-npo.csv model_family=smollm2-135m split=forget05 method=npo lr=1e-5 \\
        num_epochs=3 retain_holdout=100 data_path=../shared/tofu_1000 model_path=FULL save_dir=RUN save_steps=1000

Takes the file to write and what forget.py takes (a fresh save_dir). Trains once, and writes each step's lines as it is made:
step, every (1: the step's own V), age, risk, gradient, update. Prints, for each `every`, the correlation with the values along
the step's own V and the share of equal signs, over the steps whose V is old; `python benchmarks/monitor.py FILE` those of a
file that is there.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
import torch
from pages import table
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import forget
from app.compose import given
from app.door import quote
from unlearn.geffect.meter import Meter
from unlearn.geffect.monitor import Monitor, products
from unlearn.geffect.parts import RISKS

EVERY = (1, 5, 10, 20)
HEAD = "| every | risk | steps | correlation, gradient | equal signs | correlation, update | equal signs |"


class Ages(TrainerCallback):
    """Measures V before every step, keeps those of every 5, 10 and 20 steps, and writes the inner products with each."""

    def __init__(self, meter: Meter, *_: Any, file: Path) -> None:
        self.meter, self.file = meter, file
        self.measuring = Monitor(meter, file)
        self.old: dict[int, tuple[int, dict[str, Tensor]]] = {}
        file.write_text("step,every,age,risk,gradient,update\n")

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        step = state.global_step
        self.measuring.measure(step)
        due = [every for every in EVERY[1:] if step % every == 0]
        kept = {name: v.clone() for name, v in self.meter.directions.items()} if due else {}
        self.old |= dict.fromkeys(due, (step, kept)) | {1: (step, self.meter.directions)}

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        gradients = {name: p.grad for name, p in self.meter.parameters.items() if p.grad is not None}
        self.gradient, self.before = self._along(gradients), self._along(self.meter.parameters)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        after = self._along(self.meter.parameters)
        step = state.global_step - 1
        with self.file.open("a") as file:
            for every in EVERY:
                update = after[every] - self.before[every]
                for risk, e, moved in zip(RISKS, self.gradient[every].tolist(), update.tolist(), strict=True):
                    file.write(f"{step},{every},{step - self.old[every][0]},{risk},{e!r},{moved!r}\n")

    def _along(self, vectors: Any) -> dict[int, Tensor]:
        """For each `every` the inner products (D,) with its V."""
        found = {every: torch.zeros(len(RISKS), dtype=torch.float64) for every in EVERY}
        for name, x in vectors.items():
            for every, (_, v) in self.old.items():
                found[every] += products([x], v[name])[: len(RISKS)].cpu()
        return found


def agreement(lines: pd.DataFrame) -> list[list[str]]:
    """For each `every` and risk, over the steps whose V is old: correlations, and shares of equal signs, with the fresh V's."""
    fresh = lines[lines["every"] == 1]
    both = lines[lines["age"] > 0].merge(fresh, on=["step", "risk"], suffixes=("", "_fresh"))
    rows = []
    for (every, risk), group in both.groupby(["every", "risk"], sort=True):
        numbers = []
        for value in ("gradient", "update"):
            a, b = group[value], group[f"{value}_fresh"]
            numbers += [f"{a.corr(b):.3f}", f"{((a > 0) == (b > 0)).mean():.0%}"]
        rows.append([str(every), str(risk), str(len(group)), *numbers])
    return rows


def main(file: Path, words: list[str]) -> None:
    if words:
        settings, family = forget.prepare(given("forget", [*map(quote, words), "geffect.every=1"]))
        with patch("unlearn.geffect.GEffectCallback", partial(Ages, file=file)), patch("unlearn.reporting.figures.draw"):
            forget.unlearn(settings, family, Path(str(settings.save_dir)))
    print(*table(HEAD, agreement(pd.read_csv(file))), sep="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
