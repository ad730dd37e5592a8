"""The scores' speed: this code beside plainer ways, in one run, on the same rows, dtype and threads.

    python benchmarks/scores.py --model=FOLDER --family=smollm2-135m --rounds=3 --output=scores.md

FOLDER is a model that has learnt about half of its answers; the rows are the first of <split>_perturbed and of
retain_perturbed, half and half. In turn, each round:

    one_pass   PS exact by this code: one teacher-forced pass, no decoding;
    bisection  PS exact as published: a search for the shortest prefix of the answer that suffices; in each of its log2(T)
               rounds `generate` continues the rows that are still open, --batch at a time, 200 new tokens at most;
    ours       TOFU's scores by this code, `scores.asking.measure_task`: losses in passes that share prompts, then greedy
               answers from where they leave the true ones, sorted and cached;
    padded     the same scores the plain way, every text and every prompt padded to 200 tokens;
    longest    the plain way, padded to the longest of each batch.

The plain way takes the rows as they come: answers and paraphrases --batch at a time, the wrong answers of a quarter as many
rows at a time, each text whole, with logits at all positions; then every answer from its prompt by `generate`.
`padded_texts` is computed, not run: the losses of padded and the rest of longest, which is how TOFU's own code pads.

A run of each on two rows comes first, not timed. To be reached: bisection takes at least 10 times the seconds of one_pass,
padded 4 times and longest 1.5 times those of ours. Where the ways differ is reported and does not stop the run. Bisection takes
most of the time: SmolLM2-135M on two CPU cores needs minutes a round for it.

Who is favoured by what:
- the plain ways: their limit of 200 tokens counts a batch's padding, as published, so that they stop a little earlier; a row
  whose search is over leaves bisection; no truth ratios in their seconds (ROUGE is in both).
- padded: it decodes as many new tokens as longest, where prompts padded to 200 would leave published code no room.
- ours: it takes the attention that is fastest for short rows on the device; the plain ways have transformers' default, SDPA
  (--plain_attention). The decoding depends on how many rows follow the true answer, which is reported.
- Peak memory is the largest over the rounds, above what the process took before the case (without a GPU resident memory, in
  which is what the allocator has not given back).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import median
from typing import Any

from measuring import options, parsed, positive, prepare, refused, reset_peak
from pages import gib, page, publish, ratio, reached, spread, surroundings, table, target_table
from scores_ways import CASES, CASES_OF, DERIVED, Bench, Found, Watch
from tqdm import tqdm

import dataloader
import utils
from app.compose import given
from app.data import data_of
from app.families import Family
from app.places import find_path
from app.settings import Forget
from unlearn.models.checkpoints import load, pad_id
from unlearn.objectives.tokens import IGNORE
from unlearn.passes.decoding import MAX_LENGTH
from unlearn.passes.forcing import Pass, prompt_length, teacher_force
from unlearn.scores import definitions as scores
from unlearn.training.logs import peak_memory

TARGETS = [("bisection", "one_pass", 10.0), ("padded", "ours", 4.0), ("longest", "ours", 1.5)]
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}  # of losses, relative to them or, where they are smaller, to SMALL nats
SMALL = 0.01


@dataclass
class Record:
    """What a case found, and by round what `Watch` says of its parts and the bytes that it took beside what was there."""

    found: Found = field(default_factory=dict)
    parts: list[dict[str, dict[str, float]]] = field(default_factory=list)
    peak_memory: list[int] = field(default_factory=list)

    def sums(self, part: str, what: str = "seconds") -> list[float]:
        """By round, of one part or of all (`total`)."""
        return [sum(at[what] for name, at in parts.items() if part in (name, "total")) for parts in self.parts]

    def run(self, bench: Bench, name: str) -> None:
        reset_peak()
        before, watch = peak_memory(), Watch()
        hook = bench.how.model.register_forward_pre_hook(watch.count, with_kwargs=True)
        self.found = CASES[name][1](bench, watch)
        hook.remove()
        self.parts.append(watch.parts)
        self.peak_memory.append(peak_memory() - before)


def race(bench: Bench, names: Sequence[str], rounds: int) -> dict[str, Record]:
    """A warm-up of each case on two rows, then all cases in turn, each round."""
    records = {name: Record() for name in names}
    with tqdm(total=len(names) * (1 + rounds), unit="run") as bar:
        for index in range(1 + rounds):
            for name in names:
                bar.set_description(f"{name}, {f'round {index} of {rounds}' if index else 'warm-up'}")
                if index:
                    records[name].run(bench, name)
                else:
                    Record().run(bench.only([0, len(bench.rows) - 1]), name)
                bar.update()
    return records


# ---- the model and the rows ----


def configuration(args: argparse.Namespace) -> Forget:
    """forget.py's, of which the data and the model are used."""
    chosen = {"model_family": args.family, "split": args.split, "max_length": MAX_LENGTH, "model_path": args.model}
    asked: Forget = given("forget", ["method=ga"]).model_copy(update=chosen | {"data_path": find_path(args.data)})
    return asked


def first_rows(cfg: Forget, n: int) -> list[dict[str, Any]]:
    """Half of them to forget, half to keep. Raises ValueError where there are not so many."""
    found: list[dict[str, Any]] = []
    for split, wanted in ((f"{cfg.split}_perturbed", n - n // 2), ("retain_perturbed", n // 2)):
        data = data_of(cfg)
        data.check(split)
        rows = data.rows(split)
        if wanted > len(rows):
            raise ValueError(f"--rows={n}: {split} has {len(rows)} rows, and {wanted} are wanted")
        found += rows[:wanted]
    return found


def build(cfg: Forget, family: Family, args: argparse.Namespace) -> Bench:
    bf16 = args.dtype == "bfloat16"
    tokenizer, model = load(cfg.model_path, family.hf_key, utils.device(), family.flash_attention2 and bf16)
    tokenize = partial(dataloader.tokenize, tokenizer=tokenizer, family=family, max_length=MAX_LENGTH)
    texts = first_rows(cfg, args.rows)
    how = Pass(model, pad_id(tokenizer), tokenizer.eos_token_id, bf16, args.batch)
    return Bench(how, tokenizer, tokenize, texts, tokenize(texts), args.plain_attention)


# ---- what it comes to ----


def summary(bench: Bench, records: dict[str, Record], args: argparse.Namespace) -> dict[str, Any]:
    own = {name: names[0] for names in CASES_OF.values() for name in names} | dict.fromkeys(DERIVED, "ours")
    agreement = {name: agree(record.found, records[own[name]].found) for name, record in records.items() if own[name] != name}
    if "padded" in records:
        pairs = zip(records["longest"].parts, records["padded"].parts, strict=True)
        records = records | {"padded_texts": Record(parts=[parts | {"losses": other["losses"]} for parts, other in pairs])}
    totals = {name: record.sums("total") for name, record in records.items()}
    return {
        "cases": {name: numbers(record, records[own[name]]) for name, record in records.items()},
        "targets": [reached(totals, above, below, ">=", bound) for above, below, bound in TARGETS if above in totals],
        "agreement": agreement,
        "rows": row_numbers(bench),
        "batch": args.batch,
        "dtype": args.dtype,
        "attention": {"this code": bench.how.model.config._attn_implementation, "plain": bench.plain_attention},
    }


def numbers(record: Record, own: Record) -> dict[str, Any]:
    """A case's, and by part how many times as long it takes as this code's."""
    first = record.parts[0]
    parts = ["total", *(part for part in first if part != "rest")]
    shared = [part for part in parts if part == "total" or part in own.parts[0]]
    return asdict(record) | {
        "seconds": {part: spread(record.sums(part)) for part in parts},
        "times": {part: ratio(record.sums(part), own.sums(part)) for part in shared},
        "cpu": spread(record.sums("total", "cpu")),
        "positions": round(record.sums("total", "positions")[0]),
        "decoded": round(record.sums("decoding", "rows")[0]),
    }


def agree(found: Found, own: Found) -> dict[str, Any]:
    """Where a plain way differs from this code: rows of another PS; the worst loss, and rows of another text.

    A text that the plain way has not ended needs to be the beginning of this code's.
    """
    if "ps" in found:
        pairs = enumerate(zip(own["ps"], found["ps"], strict=True))
        return {"rows": len(own["ps"]), "differ": {i: [a, b] for i, (a, b) in pairs if abs(a - b) > 1e-9}}
    losses = [abs(a - b) / max(a, SMALL) for a, b in zip(own["losses"], found["losses"], strict=True)]
    texts = list(zip(own["texts"], found["texts"], found["ended"], strict=True))
    differ = [i for i, (a, b, ended) in enumerate(texts) if not (a == b if ended else a.startswith(b))]
    cut = sum(a != b for i, (a, b, _) in enumerate(texts) if i not in differ)
    return {"rows": len(texts), "losses": len(losses), "worst_loss": max(losses), "differ": differ, "cut": cut}


def row_numbers(bench: Bench) -> dict[str, Any]:
    """How many rows there are, how far greedy decoding follows their answers, and what PS is."""
    forced = teacher_force(bench.how, bench.rows)
    return {
        "n": len(forced),
        "prompt_tokens": median(map(prompt_length, bench.rows)),
        "answer_tokens": median(int((row["labels"] != IGNORE).sum()) for row in bench.rows),
        "to_the_end": scores.mean([one.followed == len(one.labels) for one in forced]),
        "followed": scores.mean([one.followed / len(one.labels) for one in forced]),
        "ps": scores.mean([scores.ps_exact(one.right) for one in forced]),
    }


# ---- the page ----


def report(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows = results["rows"]
    about = (
        f"{rows['n']} rows in batches of {results['batch']}; medians: {rows['prompt_tokens']:g} tokens of prompt and"
        f" {rows['answer_tokens']:g} of answer. {rows['to_the_end']:.0%} of the rows follow the true answer to the end; the"
        f" mean share of it that is followed is {rows['followed']:.0%}, and the mean PS is {rows['ps']:.3f}."
    )
    head = "| case | what | losses, s | decoding, s | total, s | CPU, s | token positions | tokens decoded | peak GiB |"
    notes = [
        "Medians over the rounds (times as long as this code, the median of the rounds' ratios). Total: with ROUGE.",
        "CPU: of the total, summed over threads; seconds far above it were spent waiting for something else.",
        "Token positions: all that the model is run on, padding and ended rows too; so are tokens decoded.",
        "padded_texts is computed from the seconds of padded and longest, not run.",
    ]
    return page(
        "The speed of scores",
        results,
        [about],
        table(head, [case_cells(name, case) for name, case in results["cases"].items()]),
        notes,
        [agreement_line(name, found, results["dtype"]) for name, found in results["agreement"].items()],
        target_table(results["targets"]),
    )


def case_cells(name: str, case: dict[str, Any]) -> list[str]:
    cells = [name, CASES[name][0] if name in CASES else DERIVED[name]]
    for part in ("losses", "decoding", "total"):
        seconds, beside = case["seconds"].get(part), case["times"].get(part)
        cells.append(f"{seconds['median']:.3g}" + (f" ({beside['median']:.3g}x)" if beside else "") if seconds else "")
    peak = gib(max(case["peak_memory"], default=None))
    return [*cells, f"{case['cpu']['median']:.3g}", str(case["positions"]), str(case["decoded"]), peak]


def agreement_line(name: str, found: dict[str, Any], dtype: str) -> str:
    n, differ = found["rows"], found["differ"]
    which = f" They differ in {', '.join(map(str, differ))}." if differ else ""
    if name == "bisection":
        pairs = "; ".join(f"row {i}: {a:.4f} and {b:.4f}" for i, (a, b) in differ.items())
        return f"- bisection: {n - len(differ)} of {n} rows have the same PS as by one pass. {pairs}".rstrip()
    worst, bound = found["worst_loss"], TOLERANCE[dtype]
    return (
        f"- {name}: {found['losses']} losses are within {worst:.1e} of this code's, and {bound:g} is"
        f" {'allowed' if worst <= bound else 'EXCEEDED'}; {n - len(differ)} of {n} texts are the same"
        f" ({found['cut']} as far as the plain way goes, whose limit counts padding).{which}"
    )


# ---- the command ----


def main() -> None:
    parser = options(__doc__, list(TOLERANCE), ("--plain_attention", "the plain ways"), data="../shared/tofu_1000")
    add = parser.add_argument
    add("--rows", type=positive, default=40, metavar="N", help="half to forget, half to keep (%(default)s)")
    add("--parts", default="ps,tofu", help="ps, tofu or both (%(default)s)")
    add("--batch", type=positive, default=16, help="rows of a batch (%(default)s)")
    args = parsed(parser)
    cfg = configuration(args)
    with refused(parser):
        cfg, family = prepare(cfg)
        first_rows(cfg, args.rows)
        if unknown := set(args.parts.split(",")) - set(CASES_OF):
            raise ValueError(f"--parts={args.parts}: {', '.join(sorted(unknown))} is none of {', '.join(CASES_OF)}")
    names = [name for part, names in CASES_OF.items() if part in args.parts.split(",") for name in names]
    bench = build(cfg, family, args)
    results = {"surroundings": surroundings(cfg.seed)} | summary(bench, race(bench, names, args.rounds), args)
    publish(report(results), results, args.out)


if __name__ == "__main__":
    main()
