"""The G-effect's speed and memory: this engine beside three plainer ways, in one run, on the same rows, dtype and threads.

    python benchmarks/geffect.py --model=FOLDER --data=FOLDER --family=smollm2-135m --forget=16 --retain=16 --out=geffect.md

The objective is wga with alpha = 1, without a retain term; V are the gradients of the two risks. In turn, each round:

    a         this engine, layers x instances, without norms;
    a_norms   the same with norms (the default of `unlearn.geffect.meter`);
    b         this engine's sweep: V, then 5 objectives at 4 hyper-parameters each from one forward-mode pass, totals only;
    c         the plain way, totals only: a forward and backward pass for each of V_u, V_r and grad L, and a dot per tensor;
    d         the plain way by instance: V, then a backward pass and a dot per tensor for each row to forget;
    e         the published procedure (arXiv 2502.19301's code), but padded only to a batch's longest row;
    e_padded  the published procedure, every row padded to 500 tokens.

The published procedure takes batches of 4 rows to forget, in random order, with as many rows to keep. Of each batch it forms
the gradients of the forget risk, of the objective and of the retain risk, from a forward pass of their own, and makes one more
forward and backward pass, of a loss of 0, for the optimiser. Each gradient goes into a moving average, 0.6 of the old and
0.4 of the new, and the effects are the averages' dots.

`c x 20` is 20 times the seconds of c, not 20 runs; `c x 20, one V` is c's V once and 20 times the rest of c. --padded_rows: so
many rows are enough for e_padded, its seconds and FLOPs are scaled by rows.

A warm-up run of each that is not timed counts FLOPs: of every matrix product and attention kernel that runs, no elementwise
work. There a to d must agree (the run stops where they do not). The share of the machine's speed is that of multiplying two
large matrices in the run's dtype, measured in every round. Peak memory is of each case alone in a fresh process, above what the
process took after loading model and rows (without a GPU resident memory, in which is what the allocator has not given back).

Who is favoured by what:
- c and d: they form logits only at the positions that predict a label, sort rows by length and take this engine's functions of
  tokens and objectives, so that the procedure alone differs. e forms all logits, as published, and has SDPA, transformers'
  default (`--published_attention`).
- e: its averages stay on the device and are updated in place (published: copies on the CPU); no optimiser step, no logging.
- a: finding the modules to tap is once for a model, not once for a measurement: in the warm-up, and its seconds stand apart.
  The tables are part of its time. Memory is that of a first measurement, finding included.
- b: its reference log-probabilities are one pass before all, not in its seconds; its sweep is in float32 whatever the dtype.
- Nobody: the weights are the model's with noise of 2% of each tensor's standard deviation, so that no gradient vanishes; the
  weights without it are the reference.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from app.families import Family
from unlearn.io.rows import write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from measuring import (
    attention,
    flop_counter,
    matrix_speed,
    now,
    padded,
    positive,
    prepare,
    ratio,
    reached,
    reset_peak,
    spread,
    surroundings,
    target_line,
    where_lines,
)
from torch import Tensor
from tqdm import tqdm

import dataloader
import utils
from unlearn.geffect.meter import Meter
from unlearn.geffect.parts import RISKS
from unlearn.geffect.sites import find_sites
from unlearn.geffect.target import Target, Wanted
from unlearn.io.files import write_whole
from unlearn.models.checkpoints import load, pad_id
from unlearn.objectives.functions import Objective, mean_nll, npo, tnpo, wga, wtnpo
from unlearn.objectives.loss import Loss
from unlearn.objectives.rows import Row, counts
from unlearn.objectives.tokens import IGNORE, Counts, Tokens, token_outputs
from unlearn.passes.batches import on, set_batches
from unlearn.passes.forcing import Pass, token_nlls
from unlearn.training.logs import peak_memory

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from transformers import PreTrainedModel

Vectors = dict[str, Tensor]  # one for each parameter

OBJECTIVE = partial(wga, alpha=1.0)
SWEEP: dict[tuple[str, float | None], Objective] = {
    **{("wga", alpha): partial(wga, alpha=alpha) for alpha in (1.0, 2.0, 5.0, 7.0)},
    **{("npo", beta): partial(npo, beta=beta) for beta in (0.05, 0.1, 0.5, 1.0)},
    **{("tnpo", beta): partial(tnpo, beta=beta) for beta in (1.0, 2.0, 4.0, 8.0)},
    **{("wtnpo", beta): partial(wtnpo, beta=beta, alpha=1.5) for beta in (1.0, 2.0, 4.0, 8.0)},
    **{("wtnpo_0.5", beta): partial(wtnpo, beta=beta, alpha=0.5) for beta in (1.0, 2.0, 4.0, 8.0)},
}
NOISE = 0.02  # of each tensor's standard deviation
PUBLISHED_BATCH, PUBLISHED_NEW = 4, 0.4  # rows; the share of the new gradient in a moving average
RATIOS = {"of_c": "x c", "faster_than_e": "faster than e by", "faster_than_e_padded": "than e_padded by"}
EXACT = ("a", "a_norms", "b", "c", "d")
DERIVED = {"c20": f"c x {len(SWEEP)}", "c20_shared": f"c x {len(SWEEP)}, one V"}
# What is to be reached: seconds of the first over those of the second, at least or at most so much.
TARGETS = [
    *((other, a, ">=", bound) for other, bound in (("e_padded", 10), ("e", 1.3)) for a in ("a", "a_norms")),
    ("a", "c", "<=", 1.15),
    ("a_norms", "c", "<=", 1.25),
    ("c20", "b", ">=", 15),
    ("c20_shared", "b", ">=", 4.5),
]


@dataclass
class Bench:
    """A model at the weights that are measured, its rows, and how to run it; `reference` losses are in the rows to forget.

    `drawn` are the rows to forget in the published procedure's order, and those to keep beside them.
    """

    model: PreTrainedModel
    forget: list[Row]
    retain: list[Row]
    drawn: tuple[list[Row], list[Row]]
    meter: Meter
    pad: int
    pad_to: int
    batch_size: int
    bf16: bool
    padded_rows: int
    published_attention: str

    def autocast(self) -> torch.autocast:
        return torch.autocast(utils.device().type, torch.bfloat16, enabled=self.bf16)


@dataclass
class Found:
    """(e_u, e_r), and the seconds of V and of the rest where they come apart."""

    effects: list[float]
    parts: dict[str, float] = field(default_factory=dict)


# ---- this engine ----


def engine(bench: Bench, norms: bool) -> Found:
    """Layers x instances: all of `Meter.measure`."""
    bench.meter.wanted, bench.meter.sweep = Wanted(norms=norms), {}
    return Found(bench.meter.measure()["steps"]["geffect"].tolist())


def sweep(bench: Bench) -> Found:
    """V and the forward-mode pass, which `Meter.measure` runs too, without its pass for one target by instance."""
    meter = bench.meter
    meter.sweep = {name: Target(Loss(objective), bench.forget) for name, objective in SWEEP.items()}
    with meter.trained(True):
        began = now()
        meter.risk_gradients()
        between = now()
        table = meter.swept()
        parts = {"V": between - began, "rest": now() - between}
    entry = table[(table["method"] == "wga") & (table["hyper_param"] == 1.0)]
    return Found(entry.set_index("risk")["geffect"].loc[list(RISKS)].tolist(), parts)


# ---- the plain way ----


def plain(bench: Bench) -> Found:
    """Three passes, each over all its rows, and a dot for each tensor."""
    began = now()
    v = risk_gradients(bench)
    between = now()
    g = gradient(bench, bench.forget, OBJECTIVE)
    return Found(dots(g, v), {"V": between - began, "rest": now() - between})


def plain_by_instance(bench: Bench) -> Found:
    """As `plain`, but grad L row by row: its dots are the row's share of the effects."""
    began = now()
    v = risk_gradients(bench)
    between = now()
    whole = Counts(*counts(bench.forget))
    shares = []
    for row in bench.forget:
        backward(bench, [row], OBJECTIVE, whole)
        shares.append(dots(take_gradient(bench.model), v))
    return Found([sum(share) for share in zip(*shares, strict=True)], {"V": between - began, "rest": now() - between})


def risk_gradients(bench: Bench) -> list[Vectors]:
    return [gradient(bench, rows, mean_nll) for rows in (bench.forget, bench.retain)]


def gradient(bench: Bench, rows: list[Row], objective: Objective) -> Vectors:
    """Of an objective over all the rows, in batches of rows of like length."""
    ordered = sorted(rows, key=lambda row: -len(row["input_ids"]))
    for start in range(0, len(rows), bench.batch_size):
        backward(bench, ordered[start : start + bench.batch_size], objective, Counts(*counts(rows)))
    return take_gradient(bench.model)


def backward(bench: Bench, rows: list[Row], objective: Objective, whole: Counts) -> None:
    """Add the rows' share of an objective's gradient to `.grad`; the logits are those of label positions."""
    with bench.autocast():
        loss = objective(token_outputs(bench.model, padded(rows, None, bench.pad)), whole)
    loss.backward()


def take_gradient(model: PreTrainedModel) -> Vectors:
    """What is in `.grad`, which is empty after."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def dots(g: Vectors, directions: Sequence[Vectors]) -> list[float]:
    return [sum(torch.dot(g[name].flatten(), v[name].flatten()).item() for name in g) for v in directions]


# ---- the published procedure ----


def published(bench: Bench, rows: int, pad_to: int | None) -> Found:
    """Moving averages of the gradients of small batches, over the first `rows` of the drawn ones; see above."""
    averages: dict[str, Vectors] = {"unlearn": {}, "objective": {}, "retain": {}}
    with attention(bench.model, bench.published_attention):
        for start in range(0, rows, PUBLISHED_BATCH):
            parts = (part[start : min(start + PUBLISHED_BATCH, rows)] for part in bench.drawn)
            forget, retain = (padded(part, pad_to, bench.pad) for part in parts)
            steps = (("unlearn", forget, mean_nll), ("objective", forget, OBJECTIVE), ("retain", retain, mean_nll))
            for name, batch, objective in steps:
                batch_loss(bench, batch, objective).backward()
                average(averages[name], take_gradient(bench.model))
            (batch_loss(bench, forget, mean_nll) * 0).backward()
            bench.model.zero_grad(set_to_none=True)
    return Found(dots(averages["objective"], [averages[risk] for risk in RISKS]))


def batch_loss(bench: Bench, batch: dict[str, Tensor], objective: Objective) -> Tensor:
    """An objective as the batch's own mean, from the logits of all positions."""
    with bench.autocast():
        out = bench.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    logits, labels = out.logits[:, :-1].float(), batch["labels"][:, 1:]  # (B, T-1, V), (B, T-1)
    nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none")
    at = labels.flatten() != IGNORE
    row = at.nonzero().squeeze(1) // labels.shape[1]
    tokens = Tokens(nll=nll[at], row=row, n_rows=len(labels), logits=logits.flatten(0, 1)[at])
    return objective(tokens, Counts(len(row), len(labels)))


def average(averages: Vectors, new: Vectors) -> None:
    for name, value in new.items():
        if name in averages:
            averages[name].lerp_(value, PUBLISHED_NEW)
        else:
            averages[name] = value


# ---- the cases ----


@dataclass(frozen=True)
class Case:
    text: str
    run: Callable[[Bench], Found]


CASES = {
    "a": Case("this engine, layers x instances", lambda bench: engine(bench, norms=False)),
    "a_norms": Case("this engine, with norms", lambda bench: engine(bench, norms=True)),
    "b": Case(f"this engine's sweep, {len(SWEEP)} objectives", sweep),
    "c": Case("plain, totals", plain),
    "d": Case("plain, by instance", plain_by_instance),
    "e": Case("published, padded to the longest", lambda bench: published(bench, len(bench.forget), None)),
    "e_padded": Case("published, padded to 500", lambda bench: published(bench, bench.padded_rows, bench.pad_to)),
}


@dataclass
class Record:
    """What is measured of one case: in its warm-up, alone in a process, and the seconds of its parts by round."""

    effects: list[float]
    flops: int
    peak_memory: int | None  # bytes
    parts: list[dict[str, float]] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        return [sum(parts.values()) for parts in self.parts]


def race(bench: Bench, peaks: dict[str, int | None], args: argparse.Namespace) -> tuple[dict[str, Record], list[float]]:
    """The cases' records, and the machine's matrix speed by round: a warm-up of each, then all in turn."""
    records: dict[str, Record] = {}
    speeds = []
    dtype = torch.bfloat16 if bench.bf16 else torch.float32
    with tqdm(total=len(peaks) * (1 + args.rounds), unit="run") as bar:
        for name, peak in peaks.items():
            bar.set_description(f"{name}, warm-up")
            with flop_counter() as counter:
                effects = CASES[name].run(bench).effects
            records[name] = Record(effects, round(counter.get_total_flops() * scale(bench, name)), peak)
            bar.update()
        check_agreement(records, bench.bf16)
        for index in range(args.rounds):
            for name, record in records.items():
                bar.set_description(f"{name}, round {index + 1} of {args.rounds}")
                record.parts.append(timed(bench, name))
                bar.update()
            speeds.append(matrix_speed(args.matrix, dtype))
    return records, speeds


def timed(bench: Bench, name: str) -> dict[str, float]:
    began = now()
    found = CASES[name].run(bench)
    parts = found.parts or {"all": now() - began}
    return {part: seconds * scale(bench, name) for part, seconds in parts.items()}


def scale(bench: Bench, name: str) -> float:
    """What a case's cost is multiplied by, for it did not run on all the rows."""
    return len(bench.forget) / bench.padded_rows if name == "e_padded" else 1.0


def differences(records: dict[str, Record]) -> dict[str, list[float]]:
    """Each case's e_u and e_r relative to the plain way's."""
    exact = records["c"].effects
    return {
        name: [abs(e - true) / abs(true) for e, true in zip(record.effects, exact, strict=True)]
        for name, record in records.items()
    }


def check_agreement(records: dict[str, Record], bf16: bool) -> None:
    """Raises AssertionError where the exact cases differ: they would not do the same work."""
    off = {name: values for name, values in differences(records).items() if name in EXACT}
    tolerance = 0.2 if bf16 else 1e-2
    assert all(value <= tolerance for values in off.values() for value in values), (
        f"the cases do not compute the same: relative to c {off}; {tolerance:g} is allowed"
    )


def peak_of(bench: Bench, name: str) -> int:
    """Bytes that a case takes beside what is there."""
    reset_peak()
    before = peak_memory()
    CASES[name].run(bench)
    return peak_memory() - before


def peaks_alone(names: Sequence[str], args: argparse.Namespace) -> dict[str, int | None]:
    """Each case's peak memory, in a process of its own; None where it is not wanted."""
    if args.no_memory:
        return dict.fromkeys(names)
    found: dict[str, int | None] = {}
    for name in tqdm(names, desc="memory", unit="process"):
        command = [sys.executable, __file__, *sys.argv[1:], "--peak", name]
        found[name] = int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    return found


def seconds_to_find_sites(bench: Bench) -> float:
    """A first measurement, which finds the modules to tap and so warms up; then the seconds of finding alone."""
    engine(bench, norms=False)
    meter = bench.meter
    (batch,) = set_batches(bench.forget[:1], [], 1, bench.pad)
    began = now()
    find_sites(bench.model, meter.parameters, meter.directions, on(batch, bench.model.device))
    return now() - began


# ---- the model and the rows ----


def build(cfg: DictConfig, family: Family, args: argparse.Namespace) -> Bench:
    """Raises ValueError where there are not so many rows."""
    bf16 = args.dtype == "bfloat16"
    tokenizer, model = load(cfg.model_path, family.hf_key, utils.device(), family.flash_attention2 and bf16)
    pad = pad_id(tokenizer)
    forget, retain = (dataloader.tokenize(rows, tokenizer, family, cfg.max_length) for rows in first_rows(cfg, args))
    nlls = token_nlls(Pass(model, pad, tokenizer.eos_token_id, bf16), forget, what="reference log-probabilities")
    forget = [row | {"ref_nll": nll} for row, nll in zip(forget, nlls, strict=True)]
    disturb(model, args.seed)
    target = Target(Loss(OBJECTIVE), forget)
    risks = dict(zip(RISKS, (forget, retain), strict=True))
    drawn = [
        [rows[i] for i in dataloader.stream(len(rows), len(forget), args.seed, name)]
        for rows, name in ((forget, "forget"), (retain, "retain"))
    ]
    return Bench(
        model=model,
        forget=forget,
        retain=retain,
        drawn=(drawn[0], drawn[1]),
        meter=Meter(model, target, risks, pad, bf16=bf16, batch_size=args.batch_size),
        pad=pad,
        pad_to=cfg.max_length,
        batch_size=args.batch_size,
        bf16=bf16,
        padded_rows=min(args.padded_rows, len(forget)),
        published_attention=args.published_attention,
    )


def first_rows(cfg: DictConfig, args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """The first rows to forget and the first held-out rows to keep. Raises ValueError where there are not so many."""
    data = dataloader.unlearning_data(cfg)
    for name, rows, n in (("forget", data.forget, args.forget), ("retain", data.held_out, args.retain)):
        if n > len(rows):
            raise ValueError(f"--{name}={n}: there are {len(rows)} such rows")
        yield rows[:n]


@torch.no_grad()
def disturb(model: PreTrainedModel, seed: int) -> None:
    """Move the weights by a little noise, which is the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        spread_of = parameter.std() if parameter.numel() > 1 else parameter.abs()
        parameter.add_(NOISE * spread_of * torch.randn(parameter.shape, generator=generator).to(parameter))


def configuration(args: argparse.Namespace) -> DictConfig:
    """forget.py's, of which the data and the model are used."""
    cfg = utils.compose_config("forget", ["method=wga"])
    cfg.model_family, cfg.split, cfg.seed = args.family, args.split, args.seed
    cfg.model_path, cfg.data_path = args.model, args.data
    return cfg


# ---- what it comes to ----


def summary(bench: Bench, records: dict[str, Record], speeds: list[float], find_seconds: float | None) -> dict[str, Any]:
    seconds = {name: record.seconds for name, record in records.items()} | derived(records["c"])
    off = differences(records)
    return {
        "cases": {name: numbers(record, seconds[name], speeds) for name, record in records.items()},
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "of_c": {name: ratio(values, seconds["c"]) for name, values in seconds.items()},
        "faster_than_e": {n: ratio(seconds["e"], v) for n, v in seconds.items()} if "e" in seconds else {},
        "faster_than_e_padded": {n: ratio(seconds["e_padded"], v) for n, v in seconds.items()} if "e_padded" in seconds else {},
        "targets": [reached(seconds, *target) for target in TARGETS if {target[0], target[1]} <= set(seconds)],
        "largest_difference": max(max(values) for name, values in off.items() if name in EXACT),
        "differences": off,
        "matrix_flops_per_second": spread(speeds),
        "seconds_to_find_sites": find_seconds,
        "rows": {"forget": len(bench.forget), "retain": len(bench.retain), "padded": bench.padded_rows},
        "tokens": {"forget": tokens(bench, bench.forget), "retain": tokens(bench, bench.retain)},
        "dtype": "bfloat16" if bench.bf16 else "float32",
        "batch_size": bench.batch_size,
        "attention": {"a to d": bench.model.config._attn_implementation, "e": bench.published_attention},
    }


def tokens(bench: Bench, rows: list[Row]) -> dict[str, int]:
    """Of some rows: the tokens, those that a to c compute (padded to a batch's longest), and the labels."""
    batches = set_batches(rows, [], bench.batch_size, bench.pad)
    return {
        "real": sum(len(row["input_ids"]) for row in rows),
        "with_padding": sum(batch["input_ids"].numel() for batch in batches),
        "labels": counts(rows)[0],
    }


def derived(c: Record) -> dict[str, list[float]]:
    """The seconds of as many objectives as the sweep has, the plain way."""
    n = len(SWEEP)
    return {
        "c20": [n * seconds for seconds in c.seconds],
        "c20_shared": [parts["V"] + n * parts["rest"] for parts in c.parts],
    }


def numbers(record: Record, seconds: list[float], speeds: list[float]) -> dict[str, Any]:
    shares = [record.flops / one / speed for one, speed in zip(seconds, speeds, strict=True)]
    v = [parts["V"] for parts in record.parts if "V" in parts]
    return asdict(record) | {"share_of_matrix_speed": spread(shares), "seconds_of_v": median(v) if v else None}


# ---- the page ----


def report(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    matrix = results["matrix_flops_per_second"]
    lines = [
        "# The speed of G-effects",
        "",
        *where_lines(results),
        row_line(results),
        "",
        f"    {results['surroundings']['command']}",
        "",
        f"| case | what | seconds | of it V | {' | '.join(RATIOS.values())} | TFLOPs | of matrix speed | peak GiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(case_line(name, results) for name in CASES if name in results["cases"]),
        *(derived_line(name, results) for name in DERIVED),
        "",
        "Medians over the rounds (smallest..largest). x c: seconds over those of c in the same round, and so on.",
        f"Large matrices: {matrix['median'] / 1e12:.3g} TFLOP/s ({matrix['min'] / 1e12:.3g}..{matrix['max'] / 1e12:.3g}).",
        "Peak memory is beside the loaded model, of the case alone in a process.",
        *padded_note(results),
        f"c x {len(SWEEP)} is computed from the seconds of c, not run.",
        *site_note(results),
        "",
        *agreement_lines(results),
        "",
        "| seconds of | over those of | target | measured | |",
        "|---|---|---|---|---|",
        *(target_line(target, DERIVED) for target in results["targets"]),
    ]
    return "\n".join(lines) + "\n"


def row_line(results: dict[str, Any]) -> str:
    def of(name: str) -> str:
        part = results["tokens"][name]
        padded = f"with padding {part['with_padding']}"
        return f"{results['rows'][name]} ({part['real']} tokens, {part['labels']} of them labels; {padded})"

    batches = f"batches of {results['batch_size']}, published {PUBLISHED_BATCH}"
    return f"Rows to forget: {of('forget')}; to keep: {of('retain')}; {batches}."


def case_line(name: str, results: dict[str, Any]) -> str:
    case = results["cases"][name]
    cells = [
        f"{case['flops'] / 1e12:.3g}",
        f"{case['share_of_matrix_speed']['median']:.0%}",
        "" if case["peak_memory"] is None else f"{case['peak_memory'] / 2**30:.2f}",
    ]
    v = "" if case["seconds_of_v"] is None else f"{case['seconds_of_v']:.3g}"
    return line(name, CASES[name].text, v, results, cells)


def derived_line(name: str, results: dict[str, Any]) -> str:
    return line(DERIVED[name], f"plain, totals of {len(SWEEP)} objectives", "", results, ["", "", ""])


def line(label: str, text: str, v: str, results: dict[str, Any], cells: list[str]) -> str:
    name = next((key for key, value in DERIVED.items() if value == label), label)
    seconds = results["seconds"][name]
    ratios = [results[key][name]["median"] if results[key] else None for key in RATIOS]
    shown = ["" if value is None else f"{value:.3g}" for value in ratios]
    took = f"{seconds['median']:.3g} ({seconds['min']:.3g}..{seconds['max']:.3g})"
    return f"| {' | '.join([label, text, took, v, *shown, *cells])} |"


def padded_note(results: dict[str, Any]) -> list[str]:
    rows = results["rows"]
    if "e_padded" not in results["cases"] or rows["padded"] == rows["forget"]:
        return []
    return [f"e_padded ran on {rows['padded']} + {rows['padded']} rows; seconds and FLOPs are scaled to all rows."]


def site_note(results: dict[str, Any]) -> list[str]:
    seconds = results["seconds_to_find_sites"]
    return [] if seconds is None else [f"Finding the modules to tap, once for a model and not in a's seconds: {seconds:.3g} s."]


def agreement_lines(results: dict[str, Any]) -> list[str]:
    exact = [name for name in EXACT if name in results["cases"]]
    e = results["cases"]["c"]["effects"]
    lines = [
        f"e_u = {e[0]:.6g}, e_r = {e[1]:.6g} (c). {', '.join(exact)} agree:"
        f" the largest relative difference from c is {results['largest_difference']:.1e}."
    ]
    if "e" in results["cases"]:
        off, batches = results["differences"]["e"], math.ceil(results["rows"]["forget"] / PUBLISHED_BATCH)
        lines.append(
            f"The published moving average is off by {off[0]:.1%} (e_u) and {off[1]:.1%} (e_r) on the same rows,"
            f" in {batches} batches (e)."
        )
    return lines


# ---- the command ----


def parse() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER", help="a fine-tuned model, as from_pretrained loads it")
    add("--data", required=True, metavar="FOLDER", help="data of TOFU's layout, such as data/sample")
    add("--family", default="smollm2-135m", help="an entry of config/model_config.yaml (%(default)s)")
    add("--split", default="forget05", choices=utils.FORGET_SPLITS, help="the rows to forget are its first (%(default)s)")
    add("--forget", type=positive, default=16, metavar="N", help="rows to forget (%(default)s)")
    add("--retain", type=positive, default=16, metavar="N", help="held-out rows to keep (%(default)s)")
    add("--padded_rows", type=positive, default=8, metavar="N", help="rows that e_padded runs on (%(default)s)")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="bfloat16 is autocast (%(default)s)")
    add("--cases", nargs="+", default=list(CASES), choices=list(CASES), help="which to run, c always (all)")
    add("--rounds", type=positive, default=3, help="each of the cases in turn (%(default)s)")
    add("--batch-size", "--batch_size", type=positive, default=16, help="rows of a batch of a to c (%(default)s)")
    add("--threads", type=positive, help="left out, as many as torch takes")
    kinds = ["sdpa", "eager", "flash_attention_2"]
    add("--published_attention", default="sdpa", choices=kinds, help="of e (%(default)s, transformers' own)")
    add("--seed", type=int, default=42, help="of the noise and of e's order of rows (%(default)s)")
    size = 8192 if torch.cuda.is_available() else 4096
    add("--matrix", type=positive, default=size, help="rows of the large matrices (%(default)s on this machine)")
    add("--no_memory", action="store_true", help="leave out peak memory, which takes a process for each case")
    add("--peak", choices=list(CASES), help="only print the bytes that this case takes at most")
    add("--out", type=Path, metavar="FILE.md", help="where the page goes, and all numbers, FILE.json; left out, it is printed")
    return parser.parse_args(), parser


def main() -> None:
    args, parser = parse()
    cfg = configuration(args)
    try:
        family = prepare(cfg)
        list(first_rows(cfg, args))
    except ValueError as error:
        parser.error(str(error))
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.peak is not None:
        return print(peak_of(build(cfg, family, args), args.peak))
    names = [name for name in CASES if name == "c" or name in args.cases]
    peaks = peaks_alone(names, args)  # first, for a process inherits the peak of the one that starts it
    bench = build(cfg, family, args)
    find_seconds = seconds_to_find_sites(bench) if {"a", "a_norms"} & set(names) else None
    records, speeds = race(bench, peaks, args)
    results = {"surroundings": surroundings(args.seed)} | summary(bench, records, speeds, find_seconds)
    page = report(results)
    print(page)
    if args.out is not None:
        write_whole(args.out, page)
        write_json(args.out.with_suffix(".json"), results)
        print(f"the page is in {args.out}, all numbers in {args.out.with_suffix('.json')}", file=sys.stderr)


if __name__ == "__main__":
    main()
