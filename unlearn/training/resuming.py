"""Where a killed run goes on, and how a signal ends one that can be gone on with."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from unlearn.io.files import what_is_torn
from unlearn.io.signals import SoftStop


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def checkpoints(resume: Path) -> list[Path]:
    """The folders of `resume` that a save has made, whole or torn, the newest first."""
    folders = [folder for folder in resume.glob("checkpoint-*") if folder.is_dir()]
    made = [folder for folder in folders if folder.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(made, key=_step, reverse=True)


class StopAtStepEnd(TrainerCallback):
    """Save and stop when a signal has come to any process."""

    def __init__(self, soft: SoftStop) -> None:
        self.soft = soft

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_save = self._stop(args, control) or control.should_save

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._stop(args, control)  # the signal may have come while saving

    def _stop(self, args: TrainingArguments, control: TrainerControl) -> bool:
        signum = torch.tensor([self.soft.signum], device=args.device)
        self.soft.signum = int(gather(signum).max())
        control.should_training_stop |= self.soft.signum > 0
        return self.soft.signum > 0


def last_whole(resume: Path) -> Path | None:
    """The newest resume checkpoint that was written to its end."""
    return next((folder for folder in checkpoints(resume) if what_is_torn(folder) is None), None)


def where_to_start(resume: Path) -> Path | None:
    """The checkpoint to go on from, None for the beginning; says what is left aside, and what it goes on from."""
    start = last_whole(resume)
    if PartialState().is_main_process:
        for folder in checkpoints(resume):
            if torn := what_is_torn(folder):
                print(f"{folder}: torn, left aside ({torn})", file=sys.stderr)
        if start is not None:
            print(f"going on after step {_step(start)}", file=sys.stderr)
    return start
