"""What a sweep costs: many objectives beside one, and all beside the plain way for each in turn, in one run.

    python benchmarks/geffect_all.py --rows=16 model_family=smollm2-135m model_path=FOLDER data_path=FOLDER split=forget05

Takes, behind its options, what compute_geffect.py takes. On the first rows to forget and to keep, each round in turn:

    V          the gradients of the two risks
    one        npo in forward mode
    outputs    in forward mode each objective that reads only outputs at the rows to forget, at two hyper-parameters
    all        sweep=all in forward mode: also second answers, retain rows, outputs of layers
    plain      for each of sweep=all a forward and backward pass over its own rows, and a dot product for each tensor

Seconds are the process's CPU time, which on one thread other processes lengthen little (on a GPU they are the clock's). The
warm-up, which compares `all` with `plain`, is not timed. Who is favoured by what: `plain` has this engine's batches and
objectives; its V is counted once for each objective, each being a measurement of its own, and in the last line once for all.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import now, positive
from pages import page, publish, reached, span, spread, surroundings, table, target_table

import compute_geffect
from app.building import build_loss, needs
from app.compose import compose, given
from app.door import quote
from app.families import Family
from app.measuring import build_meter, parse_sweep
from app.settings import GEffects, Method, Retain
from unlearn.geffect.meter import Meter
from unlearn.geffect.risks import put_back
from unlearn.geffect.target import Target, Wanted
from unlearn.models.checkpoints import load_tokenizer
from unlearn.objectives.loss import Loss
from unlearn.objectives.rows import Row

NUMBERS = (1, 2)  # the hyper-parameters
Targets = dict[tuple[str, float | None], Target]


def clock() -> float:
    return now() if torch.cuda.is_available() else time.process_time()


def of_outputs(settings: GEffects, family: Family, meter: Meter, rows: Sequence[Row]) -> Targets:
    """Every method that reads only outputs at the rows to forget, without its retain term, at each of `NUMBERS` that it has."""
    tokenizer = load_tokenizer(settings.model_path, family.hf_key)
    reference: Any = next(target.loss.reference for target in meter.sweep.values() if target.loss.reference is not None)
    found: Targets = {}
    for name in dict.fromkeys(name for name, _ in parse_sweep(settings)):
        for number in NUMBERS:
            config = compose("forget", [f"method={name}", f"hyper_param={number}"])
            method = Method.model_validate(config["method"]).model_copy(update={"dual": None})  # a retain term's weight
            if method.answers == "forget" and not needs(method) & {"second", "hidden", "ref_hidden"}:
                none = Retain(name="none", weight=0, term=None)
                loss = build_loss(method, none, settings.seed, meter.model, reference, tokenizer)
                same = number != NUMBERS[0] and keywords(loss) == keywords(found[name, float(NUMBERS[0])].loss)
                found |= {} if same else {(name, float(number)): Target(loss, rows)}
    return found


def keywords(loss: Loss) -> dict[str, Any]:
    """The objective's hyper-parameters."""
    found: dict[str, Any] = getattr(loss.objective, "keywords", {})
    return found


def first(target: Target, n: int) -> Target:
    return Target(target.loss, target.forget[:n], target.retain[:n])


def forward(meter: Meter, targets: Targets) -> list[list[float]]:
    """(e_u, e_r) of each. The meter's own target, whose effects `swept` forms too, is one of them."""
    meter.sweep, meter.target = targets, next(iter(targets.values()))
    effects = list(meter.swept()["geffect"])
    return [effects[i : i + 2] for i in range(0, len(effects), 2)]


def plain(meter: Meter, targets: Targets) -> list[list[float]]:
    found = []
    for target in targets.values():
        meter.target = target
        found.append(list(meter.plain()["steps"]["geffect"]))
    return found


def timed(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """The seconds of each way by round."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = clock()
            way()
            found[name].append(clock() - began)
    return found


def largest_difference(got: list[list[float]], want: list[list[float]], names: list[Any]) -> float:
    """Of an objective's two effects, relative to the larger. Raises AssertionError where the ways do not agree."""
    pairs = zip(got, want, strict=True)
    off = [max(abs(a - b) for a, b in zip(g, w, strict=True)) / max(map(abs, w)) for g, w in pairs]
    assert max(off) < 1e-2, f"the sweep and the plain way differ: {dict(zip(names, off, strict=True))}"
    return max(off)


def with_sums(seconds: dict[str, list[float]], n: int) -> dict[str, list[float]]:
    """Beside the ways' own seconds those of measurements, which have V in them; `n`: how many objectives are all."""

    def of(v: int, way: str) -> list[float]:
        return [v * a + b for a, b in zip(seconds["V"], seconds[way], strict=True)]

    sums = {f"V + {way}": of(1, way) for way in ("one", "outputs", "all")}
    return seconds | sums | {f"plain x {n}": of(n, "plain"), f"plain x {n}, one V": of(1, "plain")}


def report(results: dict[str, Any]) -> str:
    about = [
        f"{results['rows']} rows to forget and as many to keep; {results['outputs']} objectives in `outputs`,"
        f" {results['all']} in `all`; largest difference of `all` and `plain`: {results['difference']:.1e}."
    ]
    rows = ([name, span(values)] for name, values in results["seconds"].items())
    return page("Sweeps", results, about, table("| | seconds |", rows), target_table(results["targets"]))


def asked(doc: str | None, rows: int, *more: str) -> tuple[argparse.Namespace, GEffects, Family, Meter]:
    """The command's options (`rows`: the default), compute_geffect.py's settings behind them with `more`, and their meter."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=positive, default=rows, help="to forget, and to keep (%(default)s)")
    parser.add_argument("--rounds", type=positive, default=3, help="each in turn (%(default)s)")
    parser.add_argument("--threads", type=positive, default=1, help="(%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="where the page goes, and all numbers, FILE.json")
    parser.add_argument("words", nargs="+", metavar="KEY=VALUE", help="compute_geffect.py's settings")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    words = [*args.words, "save_dir=unused", "method=ga", "retain=none", *more]
    settings, family = compute_geffect.prepare(given("forget_ge", [quote(word) for word in words]))
    return args, settings, family, build_meter(settings, family)


def main() -> None:
    args, settings, family, meter = asked(__doc__, 16, "sweep=all", "dtype=float32")
    everything: Targets = {name: first(target, args.rows) for name, target in meter.sweep.items()}
    compared = everything["npo", None].forget  # with their losses before unlearning
    outputs = of_outputs(settings, family, meter, compared)
    meter.wanted, meter.target, meter.sweep = Wanted(instances=False), everything["ga", None], {}
    meter.risks = {risk: rows[: args.rows] for risk, rows in meter.risks.items()}
    meter.measure()
    ways: dict[str, Callable[[], Any]] = {
        "V": meter.risk_gradients,
        "one": lambda: forward(meter, {("npo", None): everything["npo", None]}),
        "outputs": lambda: forward(meter, outputs),
        "all": lambda: forward(meter, everything),
        "plain": lambda: plain(meter, everything),
    }
    with put_back(meter.model), meter.trained(True):
        ways["outputs"]()
        difference = largest_difference(ways["all"](), ways["plain"](), list(everything))
        n = len(everything)
        seconds = with_sums(timed(ways, args.rounds), n)
    targets = [
        reached(seconds, "V + outputs", "V + one", "<=", 1.3),
        reached(seconds, "outputs", "one", "<=", 1.3),
        reached(seconds, f"plain x {n}", "V + all", ">=", 12),
    ]
    results = {
        "surroundings": surroundings(settings.seed),
        "attention": {"all": meter.model.config._attn_implementation},
        "dtype": "float32",
        "rows": len(compared),
        "outputs": len(outputs),
        "all": n,
        "difference": difference,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "targets": targets,
    }
    publish(report(results), results, args.out)


if __name__ == "__main__":
    main()
