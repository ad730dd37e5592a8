"""One table of a run's scores: a row a step, whoever measured them; and what measures the cheap ones while training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from unlearn.io.files import write_whole
from unlearn.objectives.rows import Row
from unlearn.passes.forcing import Pass, teacher_force
from unlearn.scores.extraction import knowledge, means


def add_row(file: Path, step: int, values: Mapping[str, Any]) -> None:
    """Put the scores into the step's row of the CSV; those that it has already and are not given stay.

    Raises:
        ValueError: the file is there, and not such a table.
    """
    try:
        table = pd.read_csv(file, float_precision="round_trip").set_index("step") if file.exists() else pd.DataFrame()
        rows = {int(at): dict(row) for at, row in table.astype(object).iterrows()}
    except (ValueError, KeyError) as error:
        raise ValueError(f"{file}: not a table of scores by step ({error})") from error
    rows[step] = rows.get(step, {}) | dict(values)
    table = pd.DataFrame.from_dict(dict(sorted(rows.items())), orient="index").rename_axis("step")
    write_whole(file, table.to_csv(lineterminator="\n"))


class ScoreCallback(TrainerCallback):
    """Scores by teacher forcing inside any `Trainer`: before every `every`-th step, from step 0 on, and after the last.

    Training is not touched: its results are the same bits as without. A row a step goes to the CSV `file`, with the columns
    <name>_loss, <name>_ps_exact, ... (see `extraction.knowledge`) of each set of rows by name.
    """

    def __init__(self, how: Pass, rows: Mapping[str, Sequence[Row]], every: int, file: Path) -> None:
        self.how, self.rows, self.every, self.file = how, rows, every, file

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step % self.every == 0:
            self.measure(state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == state.max_steps:
            self.measure(state.global_step)

    def measure(self, step: int) -> None:
        """Add the step's row."""
        values: dict[str, float] = {}
        for name, rows in self.rows.items():
            found = [knowledge(forced) for forced in teacher_force(self.how, rows, what=f"{name} scores")]
            values |= {f"{name}_{key}": value for key, value in means(found).items()}
        if PartialState().is_main_process:
            add_row(self.file, step, values)
