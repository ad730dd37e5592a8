"""Training speed: this code beside two plain loops, in one run, on the same rows, model, threads and dtype.

    python benchmarks/training.py --model=FOLDER --data=FOLDER --family=smollm2-135m --split=forget05 --out=speed.json

For each of --methods (ga, npo), the tokens of real text (prompt and answer, no padding) that are trained a second by

    a  this code: `unlearn.training.trainer.train` on the batches and the loss that forget.py makes;
    b  a plain loop that pads every row to 500 tokens, holds a second model for the reference (npo), forms all logits;
    c  the same loop, padded only to the micro-batch's longest row.

All three train the same rows, step by step: one warm-up step that is not timed, in which FLOPs are counted and loss and
gradient norm must agree (the run stops where they do not), then --rounds of --steps of a, as many of c and 1 of b, so that
what else the machine does meets all three. A ratio is that of the seconds on the same rows; its range is over the rounds.

FLOPs are those executed: of every matrix product and attention kernel that runs (attention in full, though a causal
kernel may skip half; no elementwise work), counted in the warm-up step and carried over to the timed ones by padded
tokens. Their rate is given as a share of the rate at which the same threads multiply two large matrices of the same
dtype. Where a's time goes is one more step under torch.profiler: shares of its wall time, the profiler's own cost included.

Who is favoured by what:
- b and c: they have no logging, no progress bar and no gradient norm, which a's `Trainer` computes at each step; their
  reference runs without gradients and without a cache; their rows are made ready before the clock starts.
- a: its reference log-probabilities (npo) are one pass before training, and not in its seconds a step. What that pass
  costs a run, and the ratios with it, stand below the table.
- a: fine-tuning data like TOFU's, short rows of uneven length, are where sorting and selecting positions pays most.
- a: it takes the attention that is fastest for short rows on the device; the plain loops have transformers' default, SDPA
  (`--plain_attention` gives them another).
- Nobody: the learning rate is 0. The optimiser does all its work, the weights stay, and all losses are of the same model.
- The weights are shared by the three, the optimisers' states are not. Peak memory is the process's during the loop's own
  steps, less the states and the reference that only the others need (without a GPU: resident memory, which has in it what
  the allocator has not given back, so it is an upper bound).
"""

from __future__ import annotations

import argparse
import copy
import math
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.families import Family
from unlearn.io.rows import write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from measuring import (
    flop_counter,
    matrix_speed,
    now,
    padded,
    positive,
    prepare,
    reset_peak,
    row_nlls,
    spread,
    surroundings,
    times,
)
from torch import Tensor, nn
from torch.profiler import DeviceType, ProfilerActivity, profile
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers import trainer as transformers_trainer

import dataloader
import forget
import utils
from unlearn.models.checkpoints import load, pad_id
from unlearn.passes.forcing import Pass, token_nlls
from unlearn.training.logs import peak_memory
from unlearn.training.trainer import train

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from transformers import PreTrainedModel

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
        dtype = torch.bfloat16 if self.plain.bf16 else torch.float32
        self.matrix_speeds.append(matrix_speed(self.matrix, dtype))
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


# ---- one method ----


def compare(cfg: DictConfig, family: Family, args: argparse.Namespace) -> dict[str, Any]:
    """The three loops' numbers for the method of the configuration, which is forget.py's."""
    bf16 = utils.use_bfloat16(cfg.dtype, family)
    tokenizer, model = load(cfg.model_path, family.hf_key, utils.device(), family.flash_attention2 and bf16)
    pad = pad_id(tokenizer)
    rows = dataloader.tokenize(dataloader.unlearning_data(cfg).forget, tokenizer, family, cfg.max_length)

    reference_seconds = 0.0
    if cfg.method.reference:
        began = now()
        nlls = token_nlls(Pass(model, pad, tokenizer.eos_token_id, bf16), rows, what="reference log-probabilities")
        reference_seconds = now() - began
        rows = [row | {"ref_nll": nll} for row, nll in zip(rows, nlls, strict=True)]
    steps = 2 + args.rounds * args.steps
    batches = dataloader.step_batches(cfg, rows, [], steps, 1, pad)
    drawn = drawn_rows(batches, cfg.seed)
    plain = plain_loop(cfg, model, pad, bf16, args.plain_attention)

    total = steps + 2 + args.rounds * (args.steps + SLOW_STEPS)
    with tqdm(total=total, desc=f"{cfg.method.name}", unit="step") as progress:
        race = Race(plain, drawn, cfg.max_length, args, progress)
        how = utils.training_settings(cfg, family, steps, steps)
        how = replace(how, lr=0.0, warmup_steps=0, save_steps=steps + 1)
        with riding_along(race):
            train(model, forget.build_loss(cfg, model, None), batches, how, Path(cfg.save_dir))

    run_steps, _ = utils.count_steps(cfg, len(rows))
    numbers = summary(race, step_tokens(batches, drawn, cfg.max_length, cfg.batch_size), reference_seconds / run_steps)
    once = {"seconds": reference_seconds, "rows": len(rows), "steps_of_a_run": run_steps}
    used = {"this code": model.config._attn_implementation, "plain": args.plain_attention}
    return {
        "dtype": "bfloat16" if bf16 else "float32",
        "attention": used,
        "reference_pass": once if cfg.method.reference else None,
        **numbers,
    }


def plain_loop(cfg: DictConfig, model: PreTrainedModel, pad: int, bf16: bool, attention: str) -> Plain:
    """The plain loops' model (the same parameters), reference and optimiser."""
    shared = shared_copy(model, attention)
    return Plain(
        model=shared,
        reference=copy.deepcopy(shared).requires_grad_(False).eval() if cfg.method.reference else None,
        optimizer=torch.optim.AdamW(shared.parameters(), lr=0.0, weight_decay=cfg.weight_decay, fused=True),
        batch_size=cfg.batch_size,
        pad=pad,
        beta=cfg.method.objective.get("beta", math.nan),
        bf16=bf16,
    )


def drawn_rows(batches: dataloader.StepBatches, seed: int) -> list[list[dataloader.Row]]:
    """Each step's forget rows in the order in which they were drawn; `StepBatches` sorts them by length."""
    size = batches.step_size
    order = dataloader.stream(len(batches.forget), batches.steps * size, seed, "forget")
    steps = [order[i : i + size] for i in range(0, len(order), size)]
    assert [sorted(step) for step in steps] == [sorted(step) for step in batches.forget_order]
    return [[batches.forget[row] for row in step] for step in steps]


def step_tokens(
    batches: dataloader.StepBatches, drawn: list[list[dataloader.Row]], pad_to: int, batch_size: int
) -> list[dict[str, int]]:
    """For each step its `real` tokens, and those with padding that each loop computes."""

    def longest(step: list[dataloader.Row]) -> int:
        parts = [[len(row["input_ids"]) for row in step[i : i + batch_size]] for i in range(0, len(step), batch_size)]
        return sum(len(part) * max(part) for part in parts)

    n = batches.batches_per_step
    return [
        {
            "real": sum(len(row["input_ids"]) for row in step),
            "a": sum(batches[i]["input_ids"].numel() for i in range(k * n, (k + 1) * n)),
            "b": pad_to * len(step),
            "c": longest(step),
        }
        for k, step in enumerate(drawn)
    ]


# ---- what it comes to ----


def summary(race: Race, tokens: list[dict[str, int]], reference_seconds_a_step: float) -> dict[str, Any]:
    """Each loop's numbers; this code's ratios to b and c; where its time goes."""
    found = {name: loop_summary(race, name, tokens) for name in LOOPS}
    a = race.records["a"]
    return {
        "loops": found,
        "ratios": {name: ratios(a, race.records[name], 0.0) for name in ("b", "c")},
        "ratios_with_reference_pass": {name: ratios(a, race.records[name], reference_seconds_a_step) for name in ("b", "c")},
        "matrix_flops_per_second": spread(race.matrix_speeds),
        "time_shares": race.shares,
    }


def loop_summary(race: Race, name: str, tokens: list[dict[str, int]]) -> dict[str, Any]:
    """One loop's speed (the median over timed steps), padding, FLOPs, share of the matrix speed and peak memory."""
    record = race.records[name]
    speeds, rates, timed = [], [], []
    for index, (seconds, matrix) in enumerate(zip(record.seconds, race.matrix_speeds, strict=True)):
        for step, second in enumerate(seconds, start=1 + index * race.steps):
            speeds.append(tokens[step]["real"] / second)
            rates.append(record.flops * tokens[step][name] / tokens[0][name] / second / matrix)
            timed.append(tokens[step])
    return asdict(record) | {
        "tokens_per_second": spread(speeds),
        "padding": 1 - sum(step["real"] for step in timed) / sum(step[name] for step in timed),
        "tokens_of_warm_up": {"real": tokens[0]["real"], "with_padding": tokens[0][name]},
        "share_of_matrix_speed": spread(rates),
    }


def ratios(a: Record, other: Record, extra: float) -> dict[str, Any]:
    """How many times faster a is on the rows that both trained in a round, with `extra` seconds a step added to a's."""
    pairs = zip(a.seconds, other.seconds, strict=True)
    return spread([sum(theirs) / sum(mine + extra for mine in ours[: len(theirs)]) for ours, theirs in pairs])


# ---- the table ----


def report(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    where = results["surroundings"]
    methods = results["methods"]
    first = next(iter(methods.values()))
    attention = ", ".join(f"{name} {how}" for name, how in first["attention"].items())
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    lines = [
        "# Training speed",
        "",
        f"{where['gpu'] or where['processor']}; {where['threads']} threads"
        + (f"; preloaded {', '.join(where['preloaded'])}" if where["preloaded"] else ""),
        f"{versions}; commit {where['commit']}; {first['dtype']}; seed {where['seed']}",
        f"Attention: {attention}.",
        "",
        f"    {where['command']}",
        "",
        "| method | loop | real tokens/s | this code is faster by | padding | TFLOPs a step | of matrix speed | peak GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method, numbers in methods.items():
        lines += [loop_line(method, name, numbers, results["pad_to"]) for name in LOOPS]
    lines += ["", "Medians over the timed steps, ratios over the rounds (smallest..largest); FLOPs of the warm-up step."]
    for method, numbers in methods.items():
        lines += ["", *method_notes(method, numbers)]
    lines += ["", f"| where this code's time goes | {' | '.join(methods)} |", f"|---|{'---|' * len(methods)}"]
    for group in [*GROUPS, REST]:
        shares = [f"{numbers['time_shares'][group]:.1%}" for numbers in methods.values()]
        lines.append(f"| {group} | {' | '.join(shares)} |")
    return "\n".join(lines)


def loop_line(method: str, name: str, numbers: dict[str, Any], pad_to: int) -> str:
    loop = numbers["loops"][name]
    cells = [
        method,
        f"{name}: {LOOPS[name].format(pad_to=pad_to)}",
        f"{loop['tokens_per_second']['median']:.4g}",
        "" if name == "a" else times(numbers["ratios"][name]),
        f"{loop['padding']:.1%}",
        f"{loop['flops'] / 1e12:.3g}",
        f"{loop['share_of_matrix_speed']['median']:.1%}",
        f"{loop['peak_memory'] / 2**30:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def method_notes(method: str, numbers: dict[str, Any]) -> list[str]:
    loops, once = numbers["loops"], numbers["reference_pass"]
    same = [
        f"{what.replace('_', ' ')} {', '.join(f'{loop[what]:.6g}' for loop in loops.values())}"
        for what in ("loss", "gradient_norm")
    ]
    matrix = numbers["matrix_flops_per_second"]
    lines = [
        f"{method}: first step of a, b, c: {'; '.join(same)}.",
        f"Large matrices: {matrix['median'] / 1e12:.3g} TFLOP/s ({matrix['min'] / 1e12:.3g}..{matrix['max'] / 1e12:.3g}).",
    ]
    if once is not None:
        rated = [f"{times(numbers['ratios_with_reference_pass'][name])} ({name})" for name in ("b", "c")]
        lines.append(
            f"The reference log-probabilities of {once['rows']} rows take {once['seconds']:.3g} s, once a run of"
            f" {once['steps_of_a_run']} steps; with that spread over its steps this code is faster by {', '.join(rated)}."
        )
    return lines


# ---- the command ----


def parse() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", required=True, metavar="FOLDER", help="the model to unlearn from, as from_pretrained loads it"
    )
    parser.add_argument("--data", required=True, metavar="FOLDER", help="data of TOFU's layout, such as data/sample")
    parser.add_argument("--family", default="smollm2-135m", help="an entry of config/model_config.yaml (%(default)s)")
    parser.add_argument("--split", default="forget05", choices=utils.FORGET_SPLITS, help="the rows (%(default)s)")
    parser.add_argument("--methods", nargs="+", default=["ga", "npo"], choices=["ga", "npo"], help="(ga npo)")
    parser.add_argument("--rounds", type=positive, default=3, help="each of a, c, b in turn (%(default)s)")
    parser.add_argument("--steps", type=positive, default=2, help="steps of a and of c in a round (%(default)s); b does 1")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="as forget.py's (%(default)s)")
    kinds = ["sdpa", "eager", "flash_attention_2"]
    parser.add_argument("--plain_attention", default="sdpa", choices=kinds, help="of b and c (%(default)s, transformers' own)")
    parser.add_argument("--batch_size", type=positive, default=4, help="rows of a micro-batch (%(default)s)")
    parser.add_argument("--gradient_accumulation_steps", type=positive, default=4, help="micro-batches of a step (%(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="of the rows' order (%(default)s)")
    size = 8192 if torch.cuda.is_available() else 4096
    parser.add_argument(
        "--matrix", type=positive, default=size, help="rows of the large matrices (%(default)s on this machine)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE.json", help="where all numbers go; left out, only the table is printed"
    )
    return parser.parse_args(), parser


def configuration(args: argparse.Namespace, method: str, folder: str) -> DictConfig:
    """forget.py's configuration for the method."""
    cfg = utils.compose_config("forget", [f"method={method}"])
    cfg.model_family, cfg.split, cfg.dtype, cfg.seed = args.family, args.split, args.dtype, args.seed
    cfg.model_path, cfg.data_path, cfg.save_dir = args.model, args.data, f"{folder}/{method}"
    cfg.batch_size, cfg.gradient_accumulation_steps = args.batch_size, args.gradient_accumulation_steps
    cfg.gradient_checkpointing = False
    return cfg


def main() -> None:
    args, parser = parse()
    with tempfile.TemporaryDirectory() as folder:
        configs = {method: configuration(args, method, folder) for method in args.methods}
        try:
            families = {method: prepare(cfg) for method, cfg in configs.items()}
        except ValueError as error:
            parser.error(str(error))
        methods = {method: compare(cfg, families[method], args) for method, cfg in configs.items()}
        pad_to = next(iter(configs.values())).max_length
    results = {"surroundings": surroundings(args.seed), "pad_to": pad_to, "methods": methods}
    print(report(results))
    if args.out is not None:
        write_json(args.out, results)
        print(f"all numbers are in {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
