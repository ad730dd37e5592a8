"""What is fastest on this machine: batches of so many rows, or of so many tokens, for the passes that are not training's.

    python benchmarks/batches.py --rows=32 model_family=smollm2-135m model_path=FOLDER data_path=FOLDER split=forget05

Takes, behind its options, what compute_geffect.py takes. Each round in turn the gradients of both risks, over the first rows to
forget and to keep, by batches of 4 to 64 rows, and of 256 to 4096 tokens, padding counted. Seconds are the process's CPU time,
which on one thread other processes lengthen little (on a GPU they are the clock's); the warm-up, which checks that all give the
same risks, is not timed.
"""

from __future__ import annotations

from typing import Any

from geffect_all import asked, clock
from pages import page, publish, ratio, span, spread, surroundings, table, times
from tqdm import tqdm

from unlearn.geffect.meter import Meter
from unlearn.passes.batches import set_batches
from unlearn.passes.sizes import Size

USUAL = Size(16, None)
SIZES = [*(Size(rows, None) for rows in (4, 8, 16, 32, 64)), *(Size(None, tokens) for tokens in (256, 512, 1024, 2048, 4096))]


def measured(meter: Meter, size: Size) -> dict[str, float]:
    """Both risks' values, their gradients formed in such batches."""
    meter.budget.asked = size
    return meter.risk_gradients()


def race(meter: Meter, rounds: int) -> dict[Size, list[float]]:
    """The seconds of each size by round. Raises AssertionError where they do not give the same risks."""
    usual = measured(meter, USUAL)
    for size in SIZES:
        found = measured(meter, size)
        assert all(abs(found[risk] - value) <= 1e-2 * abs(value) for risk, value in usual.items()), (size, found, usual)
    seconds: dict[Size, list[float]] = {size: [] for size in SIZES}
    for _ in tqdm(range(rounds), unit="round"):
        for size, of in seconds.items():
            began = clock()
            measured(meter, size)
            of.append(clock() - began)
    return seconds


def cut(meter: Meter, size: Size) -> tuple[int, float]:
    """How many batches there are, and which share of their tokens is padding."""
    sets = meter.risks.values()
    batches = [b for rows in sets for b in set_batches(rows, [], size.rows, meter.pad, tokens_per_batch=size.tokens)]
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    return len(batches), 1 - sum(len(row["input_ids"]) for rows in sets for row in rows) / tokens


def report(results: dict[str, Any]) -> str:
    head = "| at most | batches | padding | seconds | beside 16 rows |"
    rows = [
        [name, str(case["batches"]), f"{case['padding']:.0%}", span(case["seconds"]), times(case["beside"])]
        for name, case in results["cases"].items()
    ]
    return page("Batches", results, [f"V of {results['rows']} rows to forget and as many to keep."], table(head, rows))


def main() -> None:
    args, settings, _, meter = asked(__doc__, 32)
    meter.risks = {risk: rows[: args.rows] for risk, rows in meter.risks.items()}
    with meter.trained(True):
        seconds = race(meter, args.rounds)
    cases = {}
    for size, of in seconds.items():
        batches, padding = cut(meter, size)
        beside = ratio(of, seconds[USUAL])
        cases[str(size)] = {"batches": batches, "padding": padding, "seconds": spread(of), "beside": beside}
    results = {
        "surroundings": surroundings(settings.seed),
        "attention": {"V": meter.model.config._attn_implementation},
        "dtype": "bfloat16" if meter.bf16 else "float32",
        "rows": args.rows,
        "cases": cases,
    }
    publish(report(results), results, args.out)


if __name__ == "__main__":
    main()
