"""The one training path of fine-tuning and unlearning: transformers' `Trainer` on batches that know their step's counts."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from unlearn.loss import Loss

WHOLE = "whole"  # a file written into a resume checkpoint last of all: without it the checkpoint is torn


@dataclass(frozen=True)
class Settings:
    """How to train. `steps` optimiser steps; the learning rate warms up over `warmup_steps`, then falls linearly to 0."""

    steps: int
    warmup_steps: int
    lr: float
    gradient_accumulation_steps: int
    seed: int
    bf16: bool
    save_steps: int
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0
    optim: str = "adamw_torch_fused"
    gradient_checkpointing: bool = False


class StepTrainer(Trainer):
    """A `Trainer` whose dataset items are micro-batches, in order, each with the counts of its whole step.

    A micro-batch's loss is its share of the step's, so shares are summed over micro-batches and processes where
    `Trainer` would average. Item i belongs to process i mod (number of processes).
    """

    def __init__(self, loss: Loss, **kwargs: Any) -> None:
        # A compute_loss_func tells Trainer that the loss needs no division by the accumulation steps.
        super().__init__(data_collator=lambda items: items[0], compute_loss_func=loss, **kwargs)
        self.loss = loss
        self.batches = kwargs["train_dataset"]
        self._parts: dict[str, Tensor] = {}
        if loss.reference is not None:
            self.accelerator.prepare_model(loss.reference, evaluation_mode=True)  # device and autocast, no DDP

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int]:
        return SequentialSampler(self.batches)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], None]:
        return [next(epoch_iterator) for _ in range(num_batches)], None  # the batches carry their counts

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> Tensor:
        parts = self.loss(model, inputs)
        for name, part in parts.items():
            self._parts[name] = self._parts.get(name, 0) + part.detach()
        return sum(parts.values()) * self.accelerator.num_processes

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the loss's parts to the step's line. Raises FloatingPointError where loss or gradient is not finite."""
        if "loss" in logs:
            parts = self.accelerator.reduce(self._parts, reduction="sum")
            logs |= {name: part.item() for name, part in parts.items()}
            self._parts = {}
        super().log(logs, *args, **kwargs)
        for name in ("loss", "grad_norm"):  # logged before the step is saved
            if not math.isfinite(logs.get(name, 0.0)):
                step = self.state.global_step
                raise FloatingPointError(f"step {step}: {name} is {logs[name]}; stopped, the checkpoints before it are kept")


class Progress(ProgressCallback):
    """A progress bar with the loss beside it, in place of a printed line a step."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}")


class StepLog(TrainerCallback):
    """Writes each step's numbers as a line of JSON; a resumed run first drops the lines of steps it will repeat."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = self.path.read_text().splitlines() if self.path.exists() else []
            kept = [line for line in lines if json.loads(line)["step"] <= state.global_step]
            self.path.write_text("".join(line + "\n" for line in kept))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if state.is_world_process_zero and "loss" in logs:
            with self.path.open("a") as file:
                numbers = {
                    name: value for name, value in logs.items() if name != "epoch"
                }  # Trainer's: the run is its one epoch
                file.write(json.dumps({"step": state.global_step} | numbers) + "\n")


class Publish(TrainerCallback):
    """After each save: `publish(model, step)` for what others read, then the mark that the resume checkpoint is whole."""

    def __init__(self, publish: Callable[[PreTrainedModel, int], None] | None, resume: Path) -> None:
        self.publish, self.resume = publish, resume

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()  # each process writes its own random state
        if state.is_world_process_zero:
            if self.publish is not None:
                self.publish(kwargs["model"], state.global_step)
            newest = self.resume / f"checkpoint-{state.global_step}"
            (newest / WHOLE).touch()
            for older in set(self.resume.glob("checkpoint-*")) - {newest}:
                shutil.rmtree(older)


def last_whole(resume: Path) -> Path | None:
    """The newest resume checkpoint that was written to its end."""
    whole = [mark.parent for mark in resume.glob(f"checkpoint-*/{WHOLE}")]
    return max(whole, key=lambda folder: int(folder.name.split("-")[1]), default=None)


def train(
    model: PreTrainedModel,
    loss: Loss,
    batches: Dataset[Any],
    settings: Settings,
    run: Path,
    publish: Callable[[PreTrainedModel, int], None] | None = None,
) -> None:
    """Train `model` in place on `batches` (see `StepTrainer`), going on from `run/resume` if a killed run left one.

    `run/resume` stays until `end(run)`.

    Args:
        publish: called on the main process with the model and the step, every `save_steps` steps and after the last.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    resume = run / "resume"
    if settings.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    if loss.layer is not None:
        freeze_unreached(model, loss, batches[0])
    trainer = StepTrainer(
        loss=loss,
        model=model,
        args=_arguments(settings, resume),
        train_dataset=batches,
        callbacks=[StepLog(run / "logs" / "train.jsonl"), Publish(publish, resume)],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Progress)
    start = last_whole(resume)
    trainer.train(resume_from_checkpoint=None if start is None else str(start))
    trainer.accelerator.wait_for_everyone()


def end(run: Path) -> None:
    """Drop what a killed run would have gone on from: call it when all that the run writes is written."""
    if PartialState().is_main_process:
        shutil.rmtree(run / "resume", ignore_errors=True)


def _arguments(s: Settings, resume: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(resume),
        max_steps=s.steps,
        warmup_steps=s.warmup_steps,
        lr_scheduler_type="linear",
        learning_rate=s.lr,
        weight_decay=s.weight_decay,
        max_grad_norm=s.max_grad_norm,
        optim=s.optim,
        per_device_train_batch_size=1,  # one item of the dataset, which is one micro-batch
        gradient_accumulation_steps=s.gradient_accumulation_steps,
        seed=s.seed,
        bf16=s.bf16,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=s.save_steps,
        report_to=[],
        remove_unused_columns=False,
        average_tokens_across_devices=False,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Recompute activations in the backward pass (transformers renamed the call between 5.17 and 5.23)."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()


def freeze_unreached(model: PreTrainedModel, loss: Loss, batch: dict[str, Any]) -> None:
    """Freeze the parameters that the loss does not depend on (those above RMU's layer): DDP would wait for them."""
    device = model.device
    on_device = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    sum(loss(model, on_device).values()).backward()  # type: ignore[union-attr]
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.grad is not None)
    model.zero_grad()
