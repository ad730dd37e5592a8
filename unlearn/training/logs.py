"""What a training run tells of each step: a progress bar, a line of JSON, a logger's files."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from unlearn.io.files import write_whole


def peak_memory() -> int:
    """In bytes: of the GPU what tensors took at most, without one what the process did."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # Linux; `ru_maxrss` would be at least that of the process that started this one
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Progress(ProgressCallback):
    """A progress bar with the loss beside it, and the monitor's G-effects, in place of a printed line a step."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        if self.training_bar is not None and "loss" in logs:
            effects = {name: f"{logs[name]:.2g}" for name in ("e_u", "e_r") if name in logs}
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}", **effects)

    def close(self) -> None:
        """End the bar's line, if the run has stopped before its end."""
        if self.training_bar is not None:
            self.training_bar.close()


class StepLog(TrainerCallback):
    """Writes each step's numbers as a line of JSON; a resumed run first drops the lines of steps it will repeat."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
            whole = (line for line in lines if line.endswith("\n"))  # a killed run's last one may not be
            try:
                kept = [line for line in whole if json.loads(line)["step"] <= state.global_step]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.path}: a line of it is no step's ({error})") from error
            write_whole(self.path, "".join(kept))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if state.is_world_process_zero and "loss" in logs:
            numbers = {name: value if math.isfinite(value) else None for name, value in logs.items() if name != "epoch"}
            try:
                with self.path.open("a") as file:
                    file.write(json.dumps({"step": state.global_step} | numbers) + "\n")
            except OSError as error:
                step = f"step {state.global_step} could not be logged, what was saved before it is kept"
                raise OSError(f"{step}: {error}") from error


@contextmanager
def logger_into(folder: Path, logger: str | None) -> Iterator[None]:
    """Have the logger write into the run's folder, and end its run with ours (a sweep's next one is another)."""
    places = {"tensorboard": "TENSORBOARD_LOGGING_DIR", "wandb": "WANDB_DIR", "trackio": "TRACKIO_DIR"}
    if logger is not None:
        os.environ[places[logger]] = str(folder)
    try:
        yield
    finally:
        if logger == "wandb":
            import wandb

            wandb.finish()
