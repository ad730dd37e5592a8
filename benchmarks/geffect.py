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
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from geffect_page import report
from geffect_ways import CASES, EXACT, OBJECTIVE, SWEEP, Bench, engine
from measuring import flop_counter, matrix_speed, now, options, parsed, positive, prepare, refused, reset_peak
from pages import publish, ratio, reached, spread, surroundings
from tqdm import tqdm

import dataloader
import utils
from app.compose import given
from app.data import data_of, unlearning_data
from app.families import Family
from app.settings import Forget
from unlearn.geffect.meter import Meter
from unlearn.geffect.parts import RISKS
from unlearn.geffect.sites import find_sites
from unlearn.geffect.target import Target
from unlearn.models.checkpoints import load, pad_id
from unlearn.objectives.loss import Loss
from unlearn.objectives.rows import Row, counts
from unlearn.passes.batches import on, set_batches
from unlearn.passes.forcing import Pass, token_nlls
from unlearn.training.logs import peak_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NOISE = 0.02  # of each tensor's standard deviation
# What is to be reached: seconds of the first over those of the second, at least or at most so much.
TARGETS = [
    *((other, a, ">=", bound) for other, bound in (("e_padded", 10), ("e", 1.3)) for a in ("a", "a_norms")),
    ("a", "c", "<=", 1.15),
    ("a_norms", "c", "<=", 1.25),
    ("c20", "b", ">=", 15),
    ("c20_shared", "b", ">=", 4.5),
]


# ---- the cases ----


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
            speeds.append(matrix_speed(args.matrix, bench.bf16))
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


def build(cfg: Forget, family: Family, args: argparse.Namespace) -> Bench:
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


def first_rows(cfg: Forget, args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """The first rows to forget and the first held-out rows to keep. Raises ValueError where there are not so many."""
    data = unlearning_data(data_of(cfg), cfg.split, cfg.retain_holdout)
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


def configuration(args: argparse.Namespace) -> Forget:
    """forget.py's, of which the data and the model are used."""
    chosen = {"model_family": args.family, "split": args.split, "seed": args.seed}
    asked: Forget = given("forget", ["method=wga"]).model_copy(
        update=chosen | {"model_path": args.model, "data_path": args.data}
    )
    return asked


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


# ---- the command ----


def main() -> None:
    plain, seeded = ("--published_attention", "e"), "the noise and of e's order of rows"
    parser = options(__doc__, ["float32", "bfloat16"], plain, seeded=seeded)
    add = parser.add_argument
    add("--forget", type=positive, default=16, metavar="N", help="rows to forget (%(default)s)")
    add("--retain", type=positive, default=16, metavar="N", help="held-out rows to keep (%(default)s)")
    add("--padded_rows", type=positive, default=8, metavar="N", help="rows that e_padded runs on (%(default)s)")
    add("--cases", nargs="+", default=list(CASES), choices=list(CASES), help="which to run, c always (all)")
    add("--batch-size", "--batch_size", type=positive, default=16, help="rows of a batch of a to c (%(default)s)")
    add("--no_memory", action="store_true", help="leave out peak memory, which takes a process for each case")
    add("--peak", choices=list(CASES), help="only print the bytes that this case takes at most")
    args = parsed(parser)
    cfg = configuration(args)
    with refused(parser):
        cfg, family = prepare(cfg)
        list(first_rows(cfg, args))
    if args.peak is not None:
        return print(peak_of(build(cfg, family, args), args.peak))
    names = [name for name in CASES if name == "c" or name in args.cases]
    peaks = peaks_alone(names, args)  # first, for a process inherits the peak of the one that starts it
    bench = build(cfg, family, args)
    find_seconds = seconds_to_find_sites(bench) if {"a", "a_norms"} & set(names) else None
    records, speeds = race(bench, peaks, args)
    results = {"surroundings": surroundings(args.seed)} | summary(bench, records, speeds, find_seconds)
    publish(report(results), results, args.out)


if __name__ == "__main__":
    main()
