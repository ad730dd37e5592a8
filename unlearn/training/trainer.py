"""The one training path of fine-tuning and unlearning: transformers' `Trainer` on batches that know their step's counts."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from unlearn.io.files import seal
from unlearn.io.signals import PATIENCE, SoftStop, Stopped
from unlearn.models.adapters import has_adapters
from unlearn.models.checkpoints import load_weights, no_bars
from unlearn.models.evaluating import enable_gradient_checkpointing, evaluating
from unlearn.models.sharding import all_finite, few_are_trained, is_sharded, unreduced, whole, whole_state
from unlearn.models.vectors import trainable
from unlearn.objectives.loss import Loss
from unlearn.objectives.rows import parts_of
from unlearn.passes.batches import on
from unlearn.training.ascent import Ascent
from unlearn.training.gradients import TwoGradients
from unlearn.training.logs import Progress, StepLog, logger_into, peak_memory
from unlearn.training.resuming import StopAtStepEnd, checkpoints, last_whole, where_to_start
from unlearn.training.rules import Rule

Publish = Callable[[PreTrainedModel, dict[str, Tensor], int], None]

SHARDED_STATE = "optimizer_and_scheduler.pt"
OWN_STATE = "rule_and_dual.pt"  # a rule's moving average, and the dual variable


@dataclass(frozen=True)
class Settings:
    """How to train. `steps` optimiser steps; the learning rate warms up over `warmup_steps`, then falls linearly to 0.

    `rule` makes the step of the objective's and the retain term's gradients; None: the gradient of their sum, formed at once.
    """

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
    logger: str | None = None
    rule: Rule | None = None


class StepTrainer(Trainer):
    """A `Trainer` whose dataset items are micro-batches, in order, each with the counts of its whole step.

    A micro-batch's loss is its share of the step's, so shares are summed over micro-batches and processes where
    `Trainer` would average. Item i belongs to process i mod (number of processes).
    """

    def __init__(self, loss: Loss, publish: Publish | None, rule: Rule | None = None, **kwargs: Any) -> None:
        # A compute_loss_func tells Trainer that the loss needs no division by the accumulation steps.
        super().__init__(data_collator=lambda items: items[0], compute_loss_func=loss, **kwargs)
        assert self.accelerator.ddp_handler is not None
        self.accelerator.ddp_handler.gradient_as_bucket_view = True  # else DDP's buckets are a second copy of the gradients
        self.loss, self.publish = loss, publish
        self.batches = kwargs["train_dataset"]
        self.two = None if rule is None else TwoGradients(rule, trainable(self.model))  # type: ignore[arg-type]
        self.sharded = isinstance(self.model, nn.Module) and is_sharded(self.model)
        if self.sharded:
            self._run_in_shards()
        if loss.reference is not None and not has_adapters(loss.reference):
            self.accelerator.prepare_model(loss.reference, evaluation_mode=True)  # device and autocast, no DDP

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int]:
        return SequentialSampler(self.batches)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], None]:
        self._sums: dict[str, Any] = {"tokens": 0}
        self._losses: list[tuple[dict[str, list[int]], Tensor]] = []
        self._compared: dict[str, float] = {}
        self._left = num_batches
        return [next(epoch_iterator) for _ in range(num_batches)], None  # the batches carry their counts

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Under a rule the objective's and the retain term's rows pass one after the other, each for its own gradient."""
        if self.two is None:
            return super().training_step(model, inputs, *args, **kwargs)
        losses = []
        for of, part in zip(("forget", "retain"), parts_of(inputs), strict=True):
            with self.accelerator.no_sync(model), self.two.into(of):  # type: ignore[arg-type]
                losses.append(super().training_step(model, part, *args, **kwargs))
        self._left -= 1
        if not self._left:
            self._compared = self.two.step()
        return torch.stack(losses).sum()

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> Tensor:
        if not self._losses:
            self._began = time.perf_counter()  # of the step; what callbacks did before it is not its own
        with nullcontext() if self.loss.dual is None else self.loss.dual.watching():
            parts = self.loss(model, inputs)
        total = sum(parts.values())
        check_reached(total)
        for name, value in (parts | {"tokens": inputs["attention_mask"].sum()}).items():
            self._sums[name] = self._sums.get(name, 0) + value.detach()
        self._losses.append((inputs["rows"], total.detach()))  # type: ignore[union-attr]
        return total * self.accelerator.num_processes

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the loss's parts, speed and memory to the step's line.

        Raises:
            FloatingPointError: loss or gradient is not finite; nothing of the step is saved yet.
        """
        if "loss" in logs:
            reduced = self.accelerator.reduce(self._sums, reduction="sum")
            values = torch.stack([value.double() for value in reduced.values()]).tolist()  # waited for once
            sums = dict(zip(reduced, values, strict=True))
            speed = sums.pop("tokens") / (time.perf_counter() - self._began)
            logs |= sums | self._compared | ({} if self.loss.dual is None else {"dual": self.loss.dual.value})
            logs |= {"tokens_per_second": round(speed, 1), "peak_memory_gib": round(peak_memory() / 2**30, 3)}
        super().log(logs, *args, **kwargs)
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise self._not_finite(f"{name} is {logs[name]}")

    def _not_finite(self, what: str) -> FloatingPointError:
        step = self.state.global_step
        return FloatingPointError(f"step {step}: {what}, on {self._suspects()}; stopped, what was saved before it is kept")

    def _suspects(self) -> str:
        """The rows of the step's micro-batches whose loss is not finite, or else of all of them."""
        mine = [(rows, math.isfinite(loss.item())) for rows, loss in self._losses]
        batches = gather_object(mine)
        bad = [rows for rows, finite in batches if not finite] or [rows for rows, _ in batches]
        names = {name: sorted(row for rows in bad for row in rows[name]) for name in bad[0]}
        return " and ".join(f"{name} rows {', '.join(map(str, rows))}" for name, rows in names.items() if rows)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """What a killed run goes on from, then what others read, then the seal that says that both are whole.

        The newest two are kept: should the machine fail before the newest is on its disk, there is the one before.
        """
        step, resume = self.state.global_step, Path(self._get_output_dir(trial))
        if not all_finite(model.parameters()):
            raise self._not_finite("its update has left weights that are not finite")
        try:
            if self.is_world_process_zero():
                for other in set(checkpoints(resume)) - {last_whole(resume)}:
                    shutil.rmtree(other)
            with no_bars():
                super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # each process writes its own random state
            if self.publish is not None and (step % self.args.save_steps == 0 or step == self.args.max_steps):
                trained = self.accelerator.unwrap_model(model)
                weights = whole_state(trained)
                if self.is_world_process_zero():
                    self.publish(trained, weights, step)
            if self.is_world_process_zero():
                seal(resume / f"checkpoint-{step}")
        except (OSError, RuntimeError, SafetensorError) as error:
            free = shutil.disk_usage(resume.parent).free / 2**30
            why = f"{error}; {free:.2f} GiB are free at {resume.parent}"
            raise OSError(f"step {step} could not be saved, what was saved before it is kept: {why}") from error

    # ---- a model in shards: accelerate's own FSDP is for GPUs only ----

    def _run_in_shards(self) -> None:
        """Have accelerate leave the model as it is, but for autocast, and tell the gradient's norm over all shards."""
        prepare, clip = self.accelerator.prepare_model, self.accelerator.clip_grad_norm_
        self.accelerator.prepare_model = lambda model, **_: prepare(model, device_placement=False, evaluation_mode=True)
        self.accelerator.clip_grad_norm_ = lambda *args, **kwargs: whole(clip(*args, **kwargs))
        if self.two is None and few_are_trained(self.model):  # type: ignore[arg-type]
            self.accelerator.no_sync = lambda model: unreduced(model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As of a model in one piece."""
        if not self.sharded:
            return super().save_model(output_dir, _internal_call)
        weights = whole_state(self.model)  # type: ignore[arg-type]
        if self.args.should_save:
            self._save(output_dir, state_dict=weights)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        average = {} if self.two is None else self.two.state()
        own = {"average": average, "dual": None if self.loss.dual is None else self.loss.dual.value}
        if self.args.should_save and (average or self.loss.dual is not None):
            torch.save(own, Path(output_dir, OWN_STATE))
        if not self.sharded:
            return super()._save_optimizer_and_scheduler(output_dir)
        full = StateDictOptions(full_state_dict=True, cpu_offload=True)
        model, optimizer, scheduler = self._trained()
        state = {"optimizer": get_optimizer_state_dict(model, optimizer, options=full), "scheduler": scheduler.state_dict()}
        if self.args.should_save:
            torch.save(state, Path(output_dir, SHARDED_STATE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and Path(checkpoint, OWN_STATE).exists():
            own = torch.load(Path(checkpoint, OWN_STATE), weights_only=True, map_location="cpu")
            if self.two is not None:
                self.two.load_state(own["average"])
            if self.loss.dual is not None:
                self.loss.dual.value = own["dual"]
        if checkpoint is None or not self.sharded:
            return super()._load_optimizer_and_scheduler(checkpoint)
        state = torch.load(Path(checkpoint, SHARDED_STATE), weights_only=True, map_location="cpu")
        model, optimizer, scheduler = self._trained()
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=StateDictOptions(full_state_dict=True))
        scheduler.load_state_dict(state["scheduler"])

    def _trained(self) -> tuple[Any, Any, Any]:
        """The model, its optimizer without accelerate's wrapping, the scheduler."""
        return self.model, getattr(self.optimizer, "optimizer", self.optimizer), self.lr_scheduler

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """An adapter, or all weights."""
        trained = self.model if model is None else model
        if isinstance(trained, PreTrainedModel) and (has_adapters(trained) or is_sharded(trained)):
            return load_weights(trained, resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Keys that are missing because their weights are tied to others' are no news."""
        if not set(load_result.missing_keys) <= set(getattr(self.model, "all_tied_weights_keys", ())):
            super()._issue_warnings_after_load(load_result)


def train(
    model: PreTrainedModel,
    loss: Loss,
    batches: Dataset[Any],
    settings: Settings,
    run: Path,
    publish: Publish | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> None:
    """Train `model` in place on `batches` (see `StepTrainer`), going on from `run/resume` if an interrupted run left one.

    `run/resume` stays: remove it (`files.remove_whole`) when all that the run writes is written.

    Args:
        publish: called on the main process with the model and the step, every `save_steps` steps and after the last.
        callbacks: the Trainer's, beside its own.

    Raises:
        FloatingPointError: loss, gradient or weights are not finite.
        OSError: a step could not be saved.
        Stopped: a signal came; the step that it came in is saved.
    """
    resume = run / "resume"
    if settings.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    if loss.layer is not None and not is_sharded(model):
        freeze_unreached(model, loss, batches[0], settings.bf16)
    start = where_to_start(resume)
    progress, ascent = Progress(), [] if loss.dual is None else [Ascent(loss.dual)]
    with SoftStop() as soft, logger_into(run / "logs", settings.logger):
        trainer = StepTrainer(
            loss=loss,
            publish=publish,
            model=model,
            args=_arguments(settings, run),
            train_dataset=batches,
            rule=settings.rule,
            callbacks=[StepLog(run / "logs" / "train.jsonl"), *ascent, *callbacks, StopAtStepEnd(soft)],
        )
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(progress)
        try:
            trainer.train(resume_from_checkpoint=None if start is None else str(start))
        finally:
            progress.close()
        trainer.accelerator.wait_for_everyone()
    if soft.signum:
        raise Stopped(soft.signum, f" after step {trainer.state.global_step} of {settings.steps}")


def _arguments(s: Settings, run: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(run / "resume"),
        run_name=str(run),
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
        report_to=[] if s.logger is None else [s.logger],
        remove_unused_columns=False,
        average_tokens_across_devices=False,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        ddp_timeout=round(PATIENCE.total_seconds()),
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def check_reached(total: Any) -> None:
    """Raises ValueError where the loss depends on no trained parameter (it is on the output of a layer below them all)."""
    if not total.requires_grad:
        raise ValueError("the loss depends on none of the trained parameters: they are above the layer that it looks at")


def freeze_unreached(model: PreTrainedModel, loss: Loss, batch: dict[str, Any], bf16: bool = False) -> None:
    """Freeze the parameters that the loss does not depend on (those above RMU's layer): DDP would wait for them.

    Told by one backward pass, run as training's are but without dropout.
    """
    with evaluating(model):
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            total: Any = sum(loss(model, on(batch, model.device)).values())
        check_reached(total)
        total.backward()
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.requires_grad_(False)
    model.zero_grad()
