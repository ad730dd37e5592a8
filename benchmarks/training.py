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
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from measuring import now, options, parsed, positive, prepare, refused
from pages import gib, matrix_line, page, publish, spread, surroundings, table, times
from tqdm import tqdm
from training_race import GROUPS, LOOPS, REST, SLOW_STEPS, Plain, Race, Record, riding_along, shared_copy

import dataloader
import utils
from app.building import build_loss, how_to_train, needs, step_batches
from app.checks import count_steps
from app.compose import given
from app.data import data_of, unlearning_data
from app.families import Family
from app.settings import Forget
from unlearn.models.checkpoints import load, pad_id
from unlearn.passes.forcing import Pass, token_nlls
from unlearn.training.trainer import train

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# ---- one method ----


def compare(cfg: Forget, family: Family, args: argparse.Namespace) -> dict[str, Any]:
    """The three loops' numbers for the method of the configuration, which is forget.py's."""
    bf16 = utils.use_bfloat16(cfg.dtype, family.dtype)
    tokenizer, model = load(cfg.model_path, family.hf_key, utils.device(), family.flash_attention2 and bf16)
    pad = pad_id(tokenizer)
    rows = dataloader.tokenize(forget_rows(cfg), tokenizer, family, cfg.max_length)

    reference_seconds = 0.0
    compares = "ref_nll" in needs(cfg.method)
    if compares:
        began = now()
        nlls = token_nlls(Pass(model, pad, tokenizer.eos_token_id, bf16), rows, what="reference log-probabilities")
        reference_seconds = now() - began
        rows = [row | {"ref_nll": nll} for row, nll in zip(rows, nlls, strict=True)]
    steps = 2 + args.rounds * args.steps
    batches = step_batches(cfg, rows, [], steps, tokenizer)
    drawn = drawn_rows(batches, cfg.seed)
    plain = plain_loop(cfg, model, pad, bf16, args.plain_attention)

    total = steps + 2 + args.rounds * (args.steps + SLOW_STEPS)
    with tqdm(total=total, desc=f"{cfg.method.name}", unit="step") as progress:
        race = Race(plain, drawn, cfg.max_length, args, progress)
        how = how_to_train(cfg, family, steps, steps)
        how = replace(how, lr=0.0, warmup_steps=0, save_steps=steps + 1)
        with riding_along(race):
            loss = build_loss(cfg.method, cfg.retain, cfg.seed, model, None, tokenizer)
            train(model, loss, batches, how, Path(str(cfg.save_dir)))

    run_steps, _ = count_steps(cfg, len(rows))
    numbers = summary(race, step_tokens(batches, drawn, cfg.max_length, cfg.batch_size), reference_seconds / run_steps)
    once = {"seconds": reference_seconds, "rows": len(rows), "steps_of_a_run": run_steps}
    used = {"this code": model.config._attn_implementation, "plain": args.plain_attention}
    return {
        "dtype": "bfloat16" if bf16 else "float32",
        "attention": used,
        "reference_pass": once if compares else None,
        **numbers,
    }


def plain_loop(cfg: Forget, model: PreTrainedModel, pad: int, bf16: bool, attention: str) -> Plain:
    """The plain loops' model (the same parameters), reference and optimiser."""
    shared = shared_copy(model, attention)
    return Plain(
        model=shared,
        reference=copy.deepcopy(shared).requires_grad_(False).eval() if "ref_nll" in needs(cfg.method) else None,
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
    methods = results["methods"]
    head = "| method | loop | real tokens/s | this code is faster by | padding | TFLOPs a step | of matrix speed | peak GiB |"
    loops = [loop_cells(method, name, numbers, results["pad_to"]) for method, numbers in methods.items() for name in LOOPS]
    shares = [[group, *(f"{numbers['time_shares'][group]:.1%}" for numbers in methods.values())] for group in [*GROUPS, REST]]
    return page(
        "Training speed",
        next(iter(methods.values())) | results,
        [],
        table(head, loops),
        ["Medians over the timed steps, ratios over the rounds (smallest..largest); FLOPs of the warm-up step."],
        *(method_notes(method, numbers) for method, numbers in methods.items()),
        table(f"| where this code's time goes | {' | '.join(methods)} |", shares),
    )


def loop_cells(method: str, name: str, numbers: dict[str, Any], pad_to: int) -> list[str]:
    loop = numbers["loops"][name]
    return [
        method,
        f"{name}: {LOOPS[name].format(pad_to=pad_to)}",
        f"{loop['tokens_per_second']['median']:.4g}",
        "" if name == "a" else times(numbers["ratios"][name]),
        f"{loop['padding']:.1%}",
        f"{loop['flops'] / 1e12:.3g}",
        f"{loop['share_of_matrix_speed']['median']:.1%}",
        gib(loop["peak_memory"]),
    ]


def method_notes(method: str, numbers: dict[str, Any]) -> list[str]:
    loops, once = numbers["loops"], numbers["reference_pass"]
    same = [
        f"{what.replace('_', ' ')} {', '.join(f'{loop[what]:.6g}' for loop in loops.values())}"
        for what in ("loss", "gradient_norm")
    ]
    lines = [
        f"{method}: first step of a, b, c: {'; '.join(same)}.",
        matrix_line(numbers["matrix_flops_per_second"]),
    ]
    if once is not None:
        rated = [f"{times(numbers['ratios_with_reference_pass'][name])} ({name})" for name in ("b", "c")]
        lines.append(
            f"The reference log-probabilities of {once['rows']} rows take {once['seconds']:.3g} s, once a run of"
            f" {once['steps_of_a_run']} steps; with that spread over its steps this code is faster by {', '.join(rated)}."
        )
    return lines


# ---- the command ----


def configuration(args: argparse.Namespace, method: str, folder: str) -> Forget:
    """forget.py's configuration for the method."""
    chosen = {"model_family": args.family, "split": args.split, "dtype": args.dtype, "seed": args.seed}
    chosen |= {"model_path": args.model, "data_path": args.data, "save_dir": f"{folder}/{method}"}
    chosen |= {"batch_size": args.batch_size, "gradient_accumulation_steps": args.gradient_accumulation_steps}
    asked: Forget = given("forget", [f"method={method}"]).model_copy(update=chosen | {"gradient_checkpointing": False})
    return asked


def forget_rows(cfg: Forget) -> list[dict[str, Any]]:
    return unlearning_data(data_of(cfg), cfg.split, cfg.retain_holdout).forget


def main() -> None:
    parser = options(__doc__, ["auto", "float32", "bfloat16"], ("--plain_attention", "b and c"), seeded="the rows' order")
    add = parser.add_argument
    add("--methods", nargs="+", default=["ga", "npo"], choices=["ga", "npo"], help="(ga npo)")
    add("--steps", type=positive, default=2, help="steps of a and of c in a round (%(default)s); b does 1")
    add("--batch_size", type=positive, default=4, help="rows of a micro-batch (%(default)s)")
    add("--gradient_accumulation_steps", type=positive, default=4, help="micro-batches of a step (%(default)s)")
    args = parsed(parser)
    with tempfile.TemporaryDirectory() as folder:
        configs = {method: configuration(args, method, folder) for method in args.methods}
        with refused(parser):
            prepared = {method: prepare(cfg) for method, cfg in configs.items()}
        methods = {method: compare(cfg, family, args) for method, (cfg, family) in prepared.items()}
        pad_to = next(iter(prepared.values()))[0].max_length
    results = {"surroundings": surroundings(args.seed), "pad_to": pad_to, "methods": methods}
    publish(report(results), results, args.out)


if __name__ == "__main__":
    main()
