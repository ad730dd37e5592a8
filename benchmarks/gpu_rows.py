"""The rows of gpu.py's table: what each runs, by the library's own calls, and the numbers that come of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from measuring import now, reset_peak
from pages import spread
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

import dataloader
from app.building import build_loss, cut_as_run, how_to_train, step_batches, with_reference
from app.checks import shapes
from app.compose import given
from app.data import UnlearningData
from app.families import Family
from app.filling import of_run, with_family
from app.measuring import parse_sweep
from app.planning import work_of
from app.settings import Common
from unlearn.geffect.meter import Meter
from unlearn.geffect.parts import RISKS
from unlearn.geffect.target import Target, Wanted
from unlearn.models import plan
from unlearn.models.checkpoints import attention, pad_id
from unlearn.models.evaluating import enable_gradient_checkpointing
from unlearn.objectives.rows import counts
from unlearn.passes.forcing import Pass
from unlearn.training.logs import peak_memory
from unlearn.training.trainer import train

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from unlearn.objectives.rows import Row as Tokenized

Numbers = dict[str, Any]

FAMILIES = {"7B": "llama2-7b", "1B": "llama-3.2-1b"}
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512}
SMALL |= {"num_key_value_heads": 2, "head_dim": 8}
OF_THE_CARD = 0.6  # of its speed with large matrices, that all operations could reach
V, SWEPT = 6, 10  # FLOP a weight and token: of a gradient; of a forward pass with two directions' tangents


@dataclass
class Bench:
    """What the rows share: texts and a tokenizer whose ids fit all models, how often and until when to measure.

    Attributes:
        forget, held_out: rows to forget, and to keep, of a G-effect measurement.
        rounds, steps: measurements after the first, and training steps after the first, that are timed.
        batch_size: rows of a batch of what is measured; None: the library's own default on the device.
        ends: by `time.monotonic()`; a row takes no more rounds after it than one.
    """

    device: torch.device
    tokenizer: PreTrainedTokenizerBase
    data: UnlearningData
    data_path: str
    forget: int
    held_out: int
    rounds: int
    steps: int
    small: bool
    checkpointing: bool
    batch_size: int | None
    seed: int
    ends: float

    def measured_in_batches(self) -> dict[str, Any]:
        """For a `Meter` or a `Pass`: nothing where the library's default applies."""
        return {} if self.batch_size is None else {"batch_size": self.batch_size}

    def rounds_of(self) -> Iterator[int]:
        """The first, and those after it; no third or later one once the time is over."""
        for i in range(1 + self.rounds):
            if i > 1 and time.monotonic() > self.ends:
                return
            yield i


@dataclass(frozen=True)
class Row:
    """A row of the table: the model's size, what is run of it, the command's settings and groups, what was to be
    reached on an H200."""

    text: str
    size: str
    run: Callable[[Bench, Row], Numbers]
    settings: dict[str, Any]
    words: tuple[str, ...] = ("method=npo",)
    goal: str = ""


# ---- what the rows are made of ----


@dataclass
class Made:
    """A row's settings, its model of random weights, and its rows as tokens."""

    settings: Any
    family: Family
    model: PreTrainedModel
    how: Pass
    forget: list[Tokenized] = field(default_factory=list)
    others: list[Tokenized] = field(default_factory=list)


def make(bench: Bench, row: Row, command: str, others: Sequence[dict[str, Any]], n: int) -> Made:
    """What a row needs: `n` of the `others` beside the rows to forget, which compare with the model as it is here."""
    chosen = {"model_family": FAMILIES[row.size], "data_path": bench.data_path, "split": "forget05", "dtype": "bfloat16"}
    settings, family = with_family(
        composed(command, *row.words).model_copy(update=chosen | {"seed": bench.seed} | row.settings)
    )
    model = random_model(bench, family, command, getattr(torch, settings.weights))
    if command != "forget" and bench.checkpointing:
        enable_gradient_checkpointing(model)
    how = Pass(model, pad_id(bench.tokenizer), bench.tokenizer.eos_token_id, True, **bench.measured_in_batches())
    made = Made(settings, family, model, how)
    texts = ((bench.data.forget, bench.forget), (others, n))
    found = (dataloader.tokenize(cycled(rows, k), bench.tokenizer, family, settings.max_length) for rows, k in texts)
    forget, made.others = found
    made.forget = with_reference(forget, settings.method, how)
    return made


@cache
def composed(command: str, *words: str) -> Any:
    """A command's settings with what it has by itself where no run says otherwise, composed once for all rows."""
    asked = given(command, list(words))
    return asked if command == "forget" else of_run(asked, None)


def random_model(bench: Bench, family: Family, command: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model of the family's shape (with `--small` a toy's of the same kind), its weights drawn on the device."""
    known = shapes()[family.name]
    config = AutoConfig.for_model(**({"tie_word_embeddings": False} | known | (SMALL if bench.small else {})))
    flash = command == "forget" and family.flash_attention2
    torch.manual_seed(bench.seed)
    with bench.device:
        made = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention(bench.device, flash))
    return made.eval()


def cycled(rows: Sequence[dict[str, Any]], n: int) -> list[dict[str, Any]]:
    """The first `n`, from the beginning again where there are less."""
    return [rows[i % len(rows)] for i in range(n)]


def size_of(rows: Sequence[Tokenized]) -> tuple[int, int]:
    """Tokens, without padding, and labels."""
    return sum(len(row["input_ids"]) for row in rows), counts(list(rows))[0]


def operations(shape: plan.Shape, each: float, tokens: int, labels: int) -> float:
    """FLOP of `each` a weight and token; the head sees the labels' positions only. Attention's own are left out."""
    return each * (tokens * sum(a * b for a, b in shape.linear.values()) + labels * shape.vocabulary * shape.hidden)


def planned(made: Made, settings: Common, checkpointing: bool | None = None) -> tuple[plan.Shape, plan.Work]:
    """What the plan is told of a row: as the command with these settings would tell it."""
    work = work_of(settings, made.family)
    work = work if checkpointing is None else replace(work, checkpointing=checkpointing)
    return plan.shape_of(made.model.config), work


# ---- G-effects ----


class Timed(Meter):
    """A meter that notes how long V takes."""

    def risk_gradients(self) -> dict[str, float]:
        began = now()
        values = super().risk_gradients()
        self.of_v = [*getattr(self, "of_v", []), now() - began]
        return values


def meter(bench: Bench, made: Made) -> Timed:
    """Of the row's settings, as compute_geffect.py makes it."""
    settings = made.settings
    target = Target(build_loss(settings.method, settings.retain, bench.seed, made.model, None, bench.tokenizer), made.forget)
    risks = dict(zip(RISKS, (made.forget, made.others), strict=True))
    wanted = Wanted(settings.instances, settings.norms)
    sweep = {
        name: Target(build_loss(method, retain, bench.seed, made.model, None, bench.tokenizer), made.forget)
        for name, (method, retain) in parse_sweep(settings).items()
    }
    return Timed(made.model, target, risks, made.how.pad, wanted, sweep, bf16=True, **bench.measured_in_batches())


def checkpoints(bench: Bench, row: Row) -> Numbers:
    """Seconds of whole measurements: of the first, and of those after it."""
    made = make(bench, row, "forget_ge", bench.data.held_out, bench.held_out)
    one = meter(bench, made)
    reset_peak()
    seconds = [seconds_of(one.measure) for _ in bench.rounds_of()]
    tapped = 8 + 2 * made.settings.norms
    return measured(bench, made, one, seconds, tapped if made.settings.instances else V)


def sweep(bench: Bench, row: Row) -> Numbers:
    """V and the forward-mode pass that all the sweep's objectives share, as a measurement with a sweep runs them."""
    made = make(bench, row, "forget_ge", bench.data.held_out, bench.held_out)
    one = meter(bench, made)
    reset_peak()
    with one.trained(True):
        seconds = [seconds_of(one.risk_gradients) + seconds_of(one.swept) for _ in bench.rounds_of()]
    return measured(bench, made, one, seconds, SWEPT) | {"objectives": len(one.sweep) + 1}


def dots(bench: Bench, row: Row) -> Numbers:
    """One set of inner products: of a vector as large as the model with the V of both risks; V of few rows does."""
    few = replace(bench, forget=2, held_out=2)
    made = make(few, row, "forget_ge", bench.data.held_out, few.held_out)
    one = meter(few, made)
    reset_peak()
    with one.trained(True):
        one.risk_gradients()
    seconds = [seconds_of(one.start_update) for _ in bench.rounds_of()]
    vectors = (1 + len(RISKS)) * sum(p.nbytes for p in one.parameters.values())
    return {"seconds": spread(seconds[1:]), "bytes": vectors, "gb_per_second": vectors / median(seconds[1:]) / 1e9} | ends(made)


def measured(bench: Bench, made: Made, one: Timed, seconds: list[float], each: float) -> Numbers:
    """The numbers of measurements that took so many seconds; `each`: FLOP a weight and token of L's rows."""
    shape, work = planned(made, made.settings, bench.checkpointing)
    sizes = {"forget": size_of(made.forget), "held_out": size_of(made.others)}
    flops = operations(shape, V + each, *sizes["forget"]) + operations(shape, V, *sizes["held_out"])
    later = spread(seconds[1:])
    numbers: Numbers = {
        "seconds": later,
        "seconds_of_v": median(one.of_v[1:]),
        "first_beyond": seconds[0] - later["median"],
        "tokens": {name: tokens for name, (tokens, _) in sizes.items()},
        "flops": flops,
        "flops_per_second": flops / later["median"],
        "planned_memory": plan.measuring(shape, work, optimizer=False).peak,
    }
    return numbers | ends(made)


def ends(made: Made) -> Numbers:
    """What is told at the end of any row."""
    return {"peak_memory": peak_memory(), "attention": made.model.config._attn_implementation}


def seconds_of(call: Callable[[], Any]) -> float:
    began = now()
    call()
    return now() - began


# ---- training ----


class Steps(TrainerCallback):
    """Times training's steps, each from where the one before has ended, and leaves nothing saved."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not self.seconds:
            self.began = now()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        ended = now()
        self.seconds.append(ended - self.began)
        self.began, control.should_save = ended, False


def training(bench: Bench, row: Row) -> Numbers:
    """Tokens a second of forget.py's training, cut into micro-batches as it is there; the learning rate is 0."""
    made = make(bench, row, "forget", bench.data.retain, bench.held_out)
    settings, family, model = made.settings, made.family, made.model
    loss = build_loss(settings.method, settings.retain, settings.seed, model, None, bench.tokenizer)
    as_run = cut_as_run(settings, family, model)
    steps = 1 + bench.steps
    batches = step_batches(as_run, made.forget, made.others if settings.retain.term else [], steps, bench.tokenizer)
    how = replace(how_to_train(as_run, family, steps, steps), lr=0.0, warmup_steps=0, save_steps=steps + 1)
    clock = Steps()
    reset_peak()
    with TemporaryDirectory() as folder:
        train(model, loss, batches, how, Path(folder), callbacks=[clock])
    shape, work = planned(made, as_run)
    timed = [step_size(batches, k) for k in range(1, steps)]
    flops = sum(operations(shape, V, *size) for size in timed)
    speeds = [tokens / seconds for (tokens, _), seconds in zip(timed, clock.seconds[1:], strict=True)]
    numbers: Numbers = {
        "tokens_per_second": spread(speeds),
        "flops_per_second": flops / sum(clock.seconds[1:]),
        "seconds": spread(clock.seconds[1:]),
        "first_beyond": clock.seconds[0] - median(clock.seconds[1:]),
        "micro_batches": batches.batches_per_step,
        "rows_of_a_micro_batch": batches.batch_size,
        "planned_memory": plan.training(shape, work).peak,
    }
    return numbers | ends(made)


def step_size(batches: dataloader.StepBatches, step: int) -> tuple[int, int]:
    """Tokens of a step, without padding, and labels."""
    of = [*batches.forget_order[step]], [*batches.retain_order[step]]
    return size_of([rows[i] for rows, order in zip((batches.forget, batches.retain), of, strict=True) for i in order])


# ---- the rows ----

HALF, FULL = {"weights": "bfloat16"}, {"weights": "float32"}
SWEEP = {"instances": False, "sweep": ["ga", "wga:2", "npo:0.05", "npo:0.5"]}


def cut(batch_size: int, accumulated: int) -> dict[str, Any]:
    return {"batch_size": batch_size, "gradient_accumulation_steps": accumulated}


ROWS = {
    "norms_7b": Row("7B, bfloat16 weights, layers x instances with norms", "7B", checkpoints, HALF, goal="<= 6 s, 70 GiB"),
    "tap_7b": Row("7B, the same without norms", "7B", checkpoints, HALF | {"norms": False}, goal="<= 5.5 s, 70 GiB"),
    "plain_7b": Row("7B, totals by the plain way", "7B", checkpoints, HALF | {"instances": False}, goal="<= 5 s, 70 GiB"),
    "norms_1b": Row("1B, float32 under autocast, with norms", "1B", checkpoints, FULL, goal="<= 1.5 s"),
    "sweep_1b": Row("1B, the same: V and a forward-mode sweep", "1B", sweep, FULL | SWEEP),
    "dots_7b": Row("7B, one set of inner products", "7B", dots, HALF, goal="<= 0.1 s"),
    "train_7b": Row(
        "7B, bfloat16 weights, training npo + gd, 2 x 8 + 8 rows",
        "7B",
        training,
        HALF | cut(8, 2),
        ("method=npo", "retain=gd"),
        ">= 8,000 tokens/s",
    ),
    "train_1b": Row(
        "1B, float32 under autocast, training npo, 4 x 4 rows", "1B", training, FULL | cut(4, 4), goal=">= 12,000 tokens/s"
    ),
    "train_1b_apart": Row("1B, the same with merge=false", "1B", training, FULL | cut(4, 4) | {"merge": False}),
    "train_1b_whole": Row("1B, the same as 16 x 1 rows", "1B", training, FULL | cut(16, 1), goal=">= 12,000 tokens/s"),
}
