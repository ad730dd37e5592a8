"""What one GPU does: G-effects, training and inner products of Llamas of random weights, in one command of minutes.

    python benchmarks/gpu.py --data=FOLDER --out=gpu.jsonl
    python benchmarks/gpu.py --only=norms_7b,train_1b --out=gpu.jsonl
    python benchmarks/gpu.py --small

Prints a table in Markdown: a line for each of --only (all). Each row makes its model on the device, runs it by the library's
own calls (`unlearn.geffect.meter.Meter`, `unlearn.training.trainer.train`, cut and batched as the commands' defaults are
here), and gives back all its memory. One that has not enough says so, and the others go on. Its numbers go to --out as it
ends, a line of JSON each: a run that is killed keeps what it has. After --minutes no row is begun that has not begun.

Seconds are medians of --rounds whole measurements, or of --steps training steps, after one that is not in them; "first beyond"
is what that one took longer (finding the modules to tap; kernels that are loaded). The objective is npo, its reference pass not
in the seconds. G-effects are of --forget rows and as many held-out ones as --held_out says, taken again from the first where
the data have less. Training's learning rate is 0: the optimiser does all its work, and the weights stay.

The operations are arithmetic: 6 FLOP a weight and token for a gradient; 6, 8 or 10 for L's by the plain way, tapped, or tapped
with norms; 10 for a forward pass with two directions' tangents; the head's at label positions only; no padding, no attention,
and nothing that checkpointing computes again. The card's speed is that of multiplying two large bfloat16 matrices, measured
before each row. Peak memory is all that tensors took (without a GPU: the process's resident memory), the plan's what `plan=1`
says; the last column is what was to be reached on an H200.

The tokenizer is trained on the data's texts, with at most 32,000 tokens; `--small` has toy models, rows and matrices, for any
device: it is for trying the command, not for its numbers.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from gpu_rows import FAMILIES, OF_THE_CARD, ROWS, SMALL, Bench, Numbers, Row, composed
from measuring import matrix_speed, positive, refused
from pages import gib, page, surroundings, table

import utils
from app.checks import shapes
from app.data import check_unlearning_data, data_of, unlearning_data
from app.filling import with_family
from unlearn.models.checkpoints import new_tokenizer

VOCABULARY = 32000  # tokens at most
TOY = {"forget": 4, "held_out": 4, "rounds": 1, "steps": 1, "matrix": 256}  # in place of what is not given
USUAL = {"forget": 200, "held_out": 400, "rounds": 2, "steps": 5, "matrix": 8192}
HEAD = "| | s | of it V | first beyond | s at 60% of the card | tokens/s | TFLOP/s | of the card | peak GiB | plan GiB | goal |"


# ---- one row after another ----


def run_all(bench: Bench, rows: Mapping[str, Row], matrix: int) -> Iterator[tuple[str, Numbers]]:
    """Each row's numbers, as it ends."""
    for name, row in rows.items():
        utils.say(f"{name}: {row.text}")
        if time.monotonic() > bench.ends:
            yield name, {"failed": "not begun: the time was over"}
            continue
        began = time.monotonic()
        speed = matrix_speed(matrix, bf16=True)
        numbers = attempt(bench, row) | {"matrix_flops_per_second": speed}
        free()
        yield name, numbers | {"wall_seconds": time.monotonic() - began}


def attempt(bench: Bench, row: Row) -> Numbers:
    """The row's numbers, or why there are none; nothing of an error is kept that would keep the row's tensors."""
    try:
        return row.run(bench, row)
    except torch.OutOfMemoryError as error:
        return {"failed": "out of memory", "why": str(error).splitlines()[0]}
    except Exception as error:
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0], "broken": True}


def free() -> None:
    """Give back what a row has left: models and trainers are in cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---- the table ----


def report(results: dict[str, Any], rows: Mapping[str, Row], found: Mapping[str, Numbers], goals: bool) -> str:
    speeds = [numbers["matrix_flops_per_second"] / 1e12 for numbers in found.values() if "matrix_flops_per_second" in numbers]
    used = sorted({numbers["attention"] for numbers in found.values() if "attention" in numbers})
    about = [f"Large bfloat16 matrices: {min(speeds):.3g} to {max(speeds):.3g} TFLOP/s."] if speeds else []
    if results["memory"] is not None:
        about.append(f"The card has {gib(results['memory'])} GiB.")
    kinds = {"dtype": "products in bfloat16", "attention": {"of all rows": " or ".join(used) or "none"}}
    lines = (cells(rows[name], numbers, goals) for name, numbers in found.items())
    return page("On one GPU", results | kinds, about, table(HEAD, lines), notes(found))


def cells(row: Row, numbers: Numbers, goals: bool) -> list[str]:
    goal = row.goal if goals else ""
    if "failed" in numbers:
        return [row.text, numbers["failed"], *[""] * 8, goal]
    speed = numbers["matrix_flops_per_second"]
    flops, rate = numbers.get("flops"), numbers.get("flops_per_second")
    return [
        row.text,
        f"{numbers['seconds']['median']:.3g}",
        told(numbers.get("seconds_of_v")),
        told(numbers.get("first_beyond")),
        told(flops and flops / (OF_THE_CARD * speed)),
        f"{numbers['tokens_per_second']['median']:,.0f}" if "tokens_per_second" in numbers else "",
        told(rate and rate / 1e12),
        f"{rate / speed:.1%}" if rate else "",
        gib(numbers["peak_memory"]),
        gib(numbers.get("planned_memory")),
        goal,
    ]


def told(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def notes(found: Mapping[str, Numbers]) -> Iterator[str]:
    """What each row was of, in words."""
    sizes = [numbers["tokens"] for numbers in found.values() if "tokens" in numbers]
    if sizes:
        yield f"G-effects of {sizes[0]['forget']:,} tokens to forget and {sizes[0]['held_out']:,} held out; s: a checkpoint."
    for name, numbers in found.items():
        if "micro_batches" in numbers:
            cut = f"{numbers['micro_batches']} x {numbers['rows_of_a_micro_batch']} rows to forget"
            yield f"{name}: a step ran as {cut}; s: a step."
        if "objectives" in numbers:
            yield f"{name}: {numbers['objectives']} objectives from one pass."
        if "gb_per_second" in numbers:
            yield f"{name}: {numbers['bytes'] / 2**30:.3g} GiB read at {numbers['gb_per_second']:.3g} GB/s."


# ---- the command ----


def build(args: argparse.Namespace) -> Bench:
    """Raises ValueError where the data are not there."""
    chosen = {"model_family": FAMILIES["7B"], "data_path": args.data, "split": "forget05"}
    settings, _ = with_family(composed("forget", "method=npo").model_copy(update=chosen))
    check_unlearning_data(data_of(settings), settings.split, settings.retain_holdout)
    data = unlearning_data(data_of(settings), settings.split, settings.retain_holdout)
    known = shapes()
    size = SMALL["vocab_size"] if args.small else min(VOCABULARY, *(known[name]["vocab_size"] for name in FAMILIES.values()))
    texts = [f"{row['question']} {row['answer']}" for row in [*data.forget, *data.retain, *data.held_out]]
    return Bench(
        device=utils.device(),
        tokenizer=new_tokenizer(texts, size),
        data=data,
        data_path=str(settings.data_path),
        forget=args.forget,
        held_out=args.held_out,
        rounds=args.rounds,
        steps=args.steps,
        small=args.small,
        checkpointing=args.checkpointing,
        batch_size=args.batch_size,
        seed=args.seed,
        ends=time.monotonic() + 60 * args.minutes,
    )


def chosen(text: str) -> dict[str, Row]:
    names = text.split(",")
    if unknown := [name for name in names if name not in ROWS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: no such row; there are {', '.join(ROWS)}")
    return {name: ROWS[name] for name in ROWS if name in names}


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", default="data/sample", metavar="FOLDER", help="data of TOFU's layout (%(default)s)")
    add("--only", type=chosen, default=ROWS, metavar="NAME,...", help=f"of {', '.join(ROWS)} (all)")
    add("--out", type=Path, metavar="FILE.jsonl", help="where each row's numbers go as it ends")
    add("--small", action="store_true", help="toy models and rows, on whatever device there is")
    add("--minutes", type=float, default=4.0, help="no row is begun after so many (%(default)g)")
    whats = {"forget": "rows to forget", "held_out": "held-out rows", "rounds": "measurements after the first"}
    whats |= {"steps": "training steps after the first", "matrix": "rows of the large matrices"}
    for name, what in whats.items():
        add(f"--{name}", type=positive, metavar="N", help=f"{what} ({USUAL[name]}; with --small {TOY[name]})")
    add("--batch_size", type=positive, metavar="N", help="rows of a batch of what is measured (the library's default)")
    add("--checkpointing", action="store_true", help="recompute activations where G-effects are measured, too")
    add("--seed", type=int, default=42, help="of the weights and of the rows' order (%(default)s)")
    return parser


def write_line(out: Path | None, line: Mapping[str, Any], first: bool = False) -> None:
    if out is not None:
        with out.open("w" if first else "a") as file:
            file.write(json.dumps(line) + "\n")


def main() -> None:
    parser = options()
    args = parser.parse_args()
    for name, usual in (TOY if args.small else USUAL).items():
        setattr(args, name, getattr(args, name) or usual)
    with refused(parser):
        bench = build(args)
    memory = torch.cuda.get_device_properties(bench.device).total_memory if bench.device.type == "cuda" else None
    results = {"surroundings": surroundings(args.seed), "memory": memory}
    write_line(args.out, results, first=True)
    found: dict[str, Numbers] = {}
    for name, numbers in run_all(bench, args.only, args.matrix):
        found[name] = numbers
        write_line(args.out, {"row": name, **numbers})
    print(report(results, args.only, found, goals=not args.small), end="")
    if any("broken" in numbers for numbers in found.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
