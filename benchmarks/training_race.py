"""The loops that training.py compares, and how they take turns; its words say what each is."""

from __future__ import annotations

import argparse
import copy
import math
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from measuring import flop_counter, matrix_speed, now, padded, reset_peak, row_nlls
from torch import Tensor, nn
from torch.profiler import DeviceType, ProfilerActivity, profile
from tqdm import tqdm
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers import trainer as transformers_trainer

import dataloader
import utils
from unlearn.training.logs import peak_memory

LOOPS = {"a": "this code", "b": "plain, padded to {pad_to}", "c": "plain, padded to the longest"}
SLOW_STEPS = 1  # of b in a round

# Where time goes: the first group whose pattern a PyTorch operator's name has.
GROUPS = {
    "matrix products": r"^aten::(mm|addmm|matmul|linear|mkldnn_linear\w*)$",
    "attention": r"scaled_dot_product|flash_att|efficient_attention|cudnn_att|^aten::(bmm|baddbmm|_softmax(_backward_data)?)$",
    "loss": r"^aten::\w*(log_softmax|nll_loss|cross_entropy|log_sigmoid|logsigmoid)",
    "optimiser": r"[Aa]dam|^Optimizer",
    "casts and copies": r"^aten::(copy_|_to_copy|to|clone|contiguous|cat|index|index_select|index_copy_|gather)$",
    "fills and allocation": r"^aten::(fill_|zero_|(new_)?(zeros|ones|full|empty)(_like|_strided)?)$",
    "elementwise, sums, embedding": r"^aten::(add|sub|rsub|mul|div|neg|pow|sqrt|rsqrt|exp|log|sin|cos|silu|gelu|sigmoid|tanh"
    r"|relu|silu_backward|gelu_backward|threshold_backward|sum|mean|cumsum|where|masked_fill|nonzero|eq|ne|lt|le|gt|ge|bitwise_\w+"
    r"|logical_\w+|isnan|isinf|index_add|index_put|_index_put_impl|scatter|embedding|embedding_dense_backward|embedding_backward"
    r"|linalg_vector_norm|norm|native_layer_norm\w*|_foreach_\w+|arange|native_dropout\w*)_?$",
}
REST = "Python and the rest"


# ---- the plain loops ----


@dataclass(frozen=True)
class Plain:
    """What the plain loops train with; `reference` is a second model, for npo, and None for ga."""

    model: nn.Module
    reference: nn.Module | None
    optimizer: torch.optim.Optimizer
    batch_size: int
    pad: int
    beta: float
    bf16: bool

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def plain_step(plain: Plain, rows: list[dataloader.Row], pad_to: int | None) -> float:
    """An optimiser's step on `rows` as a careful user writes it; returns the step's loss."""
    loss = plain_gradient(plain, rows, pad_to)
    plain.update()
    return loss.item()


def plain_gradient(plain: Plain, rows: list[dataloader.Row], pad_to: int | None) -> Tensor:
    """Accumulate the gradient of a step's loss over micro-batches: ga's -(1/M) sum l_t, or npo's where there is a reference."""
    assert all(parameter.grad is None for parameter in plain.model.parameters())
    label_tokens, n_rows = dataloader.counts(rows)
    total = torch.zeros((), device=utils.device())
    for start in range(0, len(rows), plain.batch_size):
        batch = padded(rows[start : start + plain.batch_size], pad_to, plain.pad)
        if plain.reference is None:
            loss = -row_nlls(plain.model, batch, plain.bf16).sum() / label_tokens
        else:
            with torch.no_grad():
                reference = row_nlls(plain.reference, batch, plain.bf16)  # (B,) nats
            margin = row_nlls(plain.model, batch, plain.bf16) - reference
            loss = -(2 / plain.beta) * F.logsigmoid(plain.beta * margin).sum() / n_rows
        loss.backward()
        total += loss.detach()
    return total


def shared_copy(model: PreTrainedModel, attention: str) -> PreTrainedModel:
    """The same parameters in modules of their own, for `Trainer` changes the forward function of the model it is given."""
    shared = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    shared.set_attn_implementation(attention)
    return shared


# ---- what is measured ----


@dataclass
class Record:
    """What is measured of one loop: the warm-up step's loss, gradient norm and FLOPs; seconds of the timed steps by round."""

    loss: float = math.nan
    gradient_norm: float = math.nan
    flops: int = 0
    peak_memory: int = 0  # bytes
    seconds: list[list[float]] = field(default_factory=list)


def nbytes(tensors: Iterable[Any]) -> int:
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


def state_bytes(optimizer: Any) -> int:
    return nbytes(value for state in optimizer.state.values() for value in state.values())


def time_shares(profiled: profile, wall: float) -> dict[str, float]:
    """Each group's share of `wall` seconds: operators' own time on the GPU where there is one, else on the CPU."""
    seconds = dict.fromkeys(GROUPS, 0.0)
    for event in profiled.key_averages():
        if event.device_type == DeviceType.CPU:  # a GPU's kernels again under their own names are not counted twice
            own = event.self_device_time_total if torch.cuda.is_available() else event.self_cpu_time_total
            group = next((name for name, pattern in GROUPS.items() if re.search(pattern, event.key)), None)
            if group is not None:
                seconds[group] += own / 1e6
    shares = {group: value / wall for group, value in seconds.items()}
    return shares | {REST: 1 - sum(shares.values())}


# ---- the race ----


class Race(TrainerCallback):
    """Rides along in `train`: times this code's steps, and between its rounds lets the plain loops train the same rows.

    Step 0 is the warm-up, steps 1 to rounds x steps are timed, the last is profiled. The clock of a step starts where this
    callback lets go of the step before, so that fetching batches and logging are in it; saving is switched off.
    """

    def __init__(self, plain: Plain, rows: list[list[dataloader.Row]], pad_to: int, args: argparse.Namespace, progress: tqdm):
        self.plain, self.rows, self.pad_to = plain, rows, {"b": pad_to, "c": None}
        self.rounds, self.steps, self.matrix = args.rounds, args.steps, args.matrix
        self.progress = progress
        self.records = {name: Record() for name in LOOPS}
        self.matrix_speeds: list[float] = []
        self.shares: dict[str, float] = {}
        self.counter = flop_counter()
        self.profiler = profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        )

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.plain.model.train()
        for name in ("b", "c"):
            self.warm_up(name)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == 0:
            self.began = now()
            self.counter.__enter__()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        seconds = now() - self.began
        done, last = state.global_step - 1, self.rounds * self.steps
        if done == 0:
            self.counter.__exit__(None, None, None)
            self.records["a"].flops = self.counter.get_total_flops()
        elif done <= last:
            self.take("a", (done - 1) // self.steps, seconds, others=state_bytes(self.plain.optimizer) + self.reference_bytes())
            if done % self.steps == 0:
                self.plain_round(done - self.steps + 1, state_bytes(kwargs["optimizer"]))
        else:
            self.profiler.stop()
            self.shares = time_shares(self.profiler, seconds)
        self.progress.update()
        control.should_save = False
        if done == last:
            self.progress.set_description("profiling a")
            self.profiler.start()
        reset_peak()
        self.began = now()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == 1 and "objective" in kwargs["logs"]:
            self.records["a"].loss = kwargs["logs"]["objective"]
            self.records["a"].gradient_norm = float(kwargs["logs"]["grad_norm"])
            check_agreement(self.records, self.plain.bf16)
            self.began = now()

    def warm_up(self, name: str) -> None:
        """The loop's first step: not timed; its loss, gradient norm and FLOPs are kept."""
        self.progress.set_description(f"warming up {name}")
        record = self.records[name]
        with flop_counter() as counter:
            record.loss = plain_gradient(self.plain, self.rows[0], self.pad_to[name]).item()
        record.flops = counter.get_total_flops()
        gradients = [parameter.grad for parameter in self.plain.model.parameters() if parameter.grad is not None]
        record.gradient_norm = nn.utils.get_total_norm(gradients).item()
        del gradients
        self.plain.update()
        self.progress.update()

    def plain_round(self, first: int, others: int) -> None:
        """The steps of the round that begins with step `first`: as many of c as of a, and `SLOW_STEPS` of b."""
        index = (first - 1) // self.steps
        for name, n in (("c", self.steps), ("b", SLOW_STEPS)):
            self.progress.set_description(f"round {index + 1} of {self.rounds}, {name}")
            for rows in self.rows[first : first + n]:
                reset_peak()
                began = now()
                plain_step(self.plain, rows, self.pad_to[name])
                self.take(name, index, now() - began, others)
                self.progress.update()
        self.matrix_speeds.append(matrix_speed(self.matrix, self.plain.bf16))
        self.progress.set_description(f"round {min(index + 2, self.rounds)} of {self.rounds}, a")

    def take(self, name: str, index: int, seconds: float, others: int) -> None:
        """Keep a timed step's seconds, and the process's peak memory in it without the bytes that are the other loops'."""
        record = self.records[name]
        record.peak_memory = max(record.peak_memory, peak_memory() - others)
        record.seconds += [[]] * (index + 1 - len(record.seconds))
        record.seconds[index] = [*record.seconds[index], seconds]

    def reference_bytes(self) -> int:
        return 0 if self.plain.reference is None else nbytes(self.plain.reference.parameters())


def check_agreement(records: dict[str, Record], bf16: bool) -> None:
    """Raises AssertionError where the loops' first losses or gradients are not the same: they would not do the same work."""
    for what, tolerance in (("loss", 1e-2 if bf16 else 1e-4), ("gradient_norm", 5e-2 if bf16 else 1e-3)):
        values = {name: getattr(record, what) for name, record in records.items()}
        text = ", ".join(f"{name} {value:.7g}" for name, value in values.items())
        tqdm.write(f"{what.replace('_', ' ')} of the first step: {text}", file=sys.stderr)
        assert all(math.isclose(value, values["c"], rel_tol=tolerance) for value in values.values()), (
            f"the loops do not compute the same: {what} {text}; a relative {tolerance:g} is allowed"
        )


@contextmanager
def riding_along(callback: TrainerCallback) -> Iterator[None]:
    """Within, every `Trainer` has this callback: `train` takes none, and is to be timed as it is."""
    transformers_trainer.DEFAULT_CALLBACKS.append(callback)  # type: ignore[arg-type]
    try:
        yield
    finally:
        transformers_trainer.DEFAULT_CALLBACKS.remove(callback)  # type: ignore[arg-type]
