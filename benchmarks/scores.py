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
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, TypeVar
from unittest.mock import patch

from app.families import Family
from app.places import find_path
from unlearn.io.rows import write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from measuring import (
    attention,
    now,
    padded,
    positive,
    prepare,
    ratio,
    reached,
    reset_peak,
    row_nlls,
    spread,
    surroundings,
    target_line,
    where_lines,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import GenerationConfig

import dataloader
import settings
import utils
from unlearn.io.files import write_whole
from unlearn.models.checkpoints import load, pad_id
from unlearn.objectives.rows import Row, counts
from unlearn.objectives.tokens import IGNORE
from unlearn.passes.decoding import MAX_LENGTH, greedy_answers, stop_tokens
from unlearn.passes.forcing import Pass, prompt_length, teacher_force
from unlearn.scores import asking
from unlearn.scores import definitions as scores
from unlearn.training.logs import peak_memory

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
Found = dict[str, list[Any]]  # what a case says of the rows

TARGETS = [("bisection", "one_pass", 10.0), ("padded", "ours", 4.0), ("longest", "ours", 1.5)]
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}  # of losses, relative to them or, where they are smaller, to SMALL nats
SMALL = 0.01


@dataclass(frozen=True)
class Bench:
    """A model and how to run it, and the rows: texts, and question and answer as tokens."""

    how: Pass
    tokenizer: PreTrainedTokenizerBase
    tokenize: asking.Tokenize
    texts: list[dict[str, Any]]
    rows: list[Row]
    plain_attention: str

    def only(self, indices: Sequence[int]) -> Bench:
        return replace(self, texts=[self.texts[i] for i in indices], rows=[self.rows[i] for i in indices])

    @contextmanager
    def plain(self) -> Iterator[None]:
        with attention(self.how.model, self.plain_attention), self.how.evaluating():
            yield


class Watch:
    """Of each part of a run: seconds, those of the CPU, positions that the model is run on, the sum of its batches' rows.

    In decoding, a row of a pass is a token decoded (one more where this code asks once what kind of cache there is).
    """

    def __init__(self) -> None:
        self.parts: dict[str, dict[str, float]] = {}
        self.start()

    def start(self) -> None:
        self.began, self.cpu, self.positions, self.rows = now(), time.process_time(), 0, 0

    def count(self, _: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        self.positions += inputs["input_ids"].numel()
        self.rows += len(inputs["input_ids"])

    def lap(self, part: str) -> None:
        """What was done since the last lap was this part."""
        seconds, cpu = now() - self.began, time.process_time() - self.cpu
        self.parts[part] = {"seconds": seconds, "cpu": cpu, "positions": self.positions, "rows": self.rows}
        self.start()


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[i : i + size] for i in range(0, len(items), size))


# ---- PS exact ----


def one_pass(bench: Bench, watch: Watch) -> Found:
    found = [scores.ps_exact(forced.right) for forced in teacher_force(bench.how, bench.rows)]
    watch.lap("losses")
    return {"ps": found}


def bisection(bench: Bench, watch: Watch) -> Found:
    """1 - k/T, k the shortest prefix of the answer behind which `generate` gives the rest exactly, by bisection."""
    starts = [prompt_length(row) for row in bench.rows]
    ends = [len(row["input_ids"]) - int(row["labels"][-1] == bench.how.eos) for row in bench.rows]
    low, high = [start - 1 for start in starts], list(ends)  # fails (or was not tried), suffices
    with bench.plain():
        while open_ := [i for i in range(len(ends)) if high[i] - low[i] > 1]:
            for batch in chunks(open_, bench.how.batch_size):
                middle = {i: (low[i] + high[i]) // 2 for i in batch}
                given = generate(bench, [bench.rows[i]["input_ids"][: middle[i]] for i in batch], None, MAX_LENGTH)
                for i, tokens in zip(batch, given, strict=True):
                    rest = bench.rows[i]["input_ids"][middle[i] : ends[i]].tolist()
                    (high if tokens[: len(rest)] == rest else low)[i] = middle[i]
    watch.lap("decoding")
    return {"ps": [(end - k) / (end - start) for start, k, end in zip(starts, high, ends, strict=True)]}


def generate(bench: Bench, prefixes: Sequence[Tensor], width: int | None, new: int) -> list[list[int]]:
    """The tokens that transformers' `generate` puts behind prefixes padded on the left, to `width` or to the longest."""
    missing = 0 if width is None else width - max(map(len, prefixes))
    ids, mask = (
        F.pad(pad_sequence(list(part), batch_first=True, padding_value=value, padding_side="left"), (missing, 0), value=value)
        for part, value in ((prefixes, bench.how.pad), ([torch.ones_like(prefix) for prefix in prefixes], 0))
    )  # (B, T)
    stops = sorted(stop_tokens(bench.how.model, bench.how.eos))
    config = GenerationConfig(max_new_tokens=new, do_sample=False, pad_token_id=bench.how.pad, eos_token_id=stops)
    model: Any = bench.how.model
    out = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config)
    return list(out[:, ids.shape[1] :].tolist())


# ---- TOFU's scores ----


def ours(bench: Bench, watch: Watch) -> Found:
    """`measure_task` as it is, with a look at the clock before and after it decodes."""

    def answers(*args: Any, **options: Any) -> list[str]:
        watch.lap("losses")
        said = greedy_answers(*args, **options)
        watch.lap("decoding")
        return said

    with patch.object(asking, "greedy_answers", answers):
        log = asking.measure_task(bench.how, bench.tokenizer, bench.texts, bench.tokenize)
    watch.lap("rest")
    losses = [*log["avg_gt_loss"].values(), *log["avg_paraphrased_loss"].values()]
    losses += [loss for of in log["average_perturb_loss"].values() for loss in of]
    return {"losses": losses, "texts": [text for _, text, _ in log["generated_text"].values()]}


def plain(bench: Bench, watch: Watch, width: int | None) -> Found:
    """Losses, then answers, then ROUGE, each over the rows as they come."""
    with bench.plain():
        losses = plain_losses(bench, width)
        watch.lap("losses")
        given = [tokens for rows in chunks(bench.rows, bench.how.batch_size) for tokens in plain_answers(bench, rows, width)]
        watch.lap("decoding")
    stops = stop_tokens(bench.how.model, bench.how.eos)
    ends = [next((i for i, token in enumerate(tokens) if token in stops), None) for tokens in given]
    cut = [tokens[:end] for tokens, end in zip(given, ends, strict=True)]
    said = [text.strip() for text in bench.tokenizer.batch_decode(cut, skip_special_tokens=True)]
    scores.rouge_recalls(said, [row["answer"] for row in bench.texts])
    watch.lap("rest")
    return {"losses": losses, "texts": said, "ended": [end is not None for end in ends]}


def plain_losses(bench: Bench, width: int | None) -> list[float]:
    """Of all answers, all paraphrases, all wrong answers: nats a token, from the logits of all positions."""

    def asked(rows: Sequence[Mapping[str, Any]], key: str) -> list[Row]:
        pairs = [(row, text) for row in rows for text in ([row[key]] if isinstance(row[key], str) else row[key])]
        return bench.tokenize([{"question": row["question"], "answer": text} for row, text in pairs])

    size, found = bench.how.batch_size, []
    for key, n in (("answer", size), ("paraphrased_answer", size), ("perturbed_answer", max(1, size // 4))):
        for batch in (asked(rows, key) for rows in chunks(bench.texts, n)):
            nlls = row_nlls(bench.how.model, padded(batch, width, bench.how.pad), bench.how.bf16)  # (B,) nats
            found += [nll / counts([row])[0] for nll, row in zip(nlls.tolist(), batch, strict=True)]
    return found


def plain_answers(bench: Bench, rows: Sequence[Row], width: int | None) -> list[list[int]]:
    prompts = [row["input_ids"][: prompt_length(row)] for row in rows]
    return generate(bench, prompts, width, max(1, MAX_LENGTH - max(map(len, prompts))))


# ---- the cases ----


CASES: dict[str, tuple[str, Callable[[Bench, Watch], Found]]] = {
    "one_pass": ("PS exact, this code", one_pass),
    "bisection": ("PS exact, bisection with `generate`", bisection),
    "ours": ("TOFU's scores, this code", ours),
    "padded": ("plain, all padded to 200", partial(plain, width=MAX_LENGTH)),
    "longest": ("plain, padded to the longest", partial(plain, width=None)),
}
CASES_OF = {"ps": ["one_pass", "bisection"], "tofu": ["ours", "padded", "longest"]}
DERIVED = {"padded_texts": "plain, texts padded to 200, prompts to the longest"}


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


def configuration(args: argparse.Namespace) -> DictConfig:
    """forget.py's, of which the data and the model are used."""
    cfg = utils.compose_config("forget", ["method=ga"])
    cfg.model_family, cfg.split, cfg.max_length = args.family, args.split, MAX_LENGTH
    cfg.model_path, cfg.data_path = args.model, find_path(args.data)
    return cfg


def first_rows(cfg: DictConfig, n: int) -> list[dict[str, Any]]:
    """Half of them to forget, half to keep. Raises ValueError where there are not so many."""
    found: list[dict[str, Any]] = []
    for split, wanted in ((f"{cfg.split}_perturbed", n - n // 2), ("retain_perturbed", n // 2)):
        settings.check_split(cfg.data_path, split)
        rows = dataloader.read_split(cfg.data_path, split)
        if wanted > len(rows):
            raise ValueError(f"--rows={n}: {split} has {len(rows)} rows, and {wanted} are wanted")
        found += rows[:wanted]
    return found


def build(cfg: DictConfig, family: Family, args: argparse.Namespace) -> Bench:
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
    return "\n".join(
        [
            "# The speed of scores",
            "",
            *where_lines(results),
            f"{rows['n']} rows in batches of {results['batch']}; medians: {rows['prompt_tokens']:g} tokens of prompt and"
            f" {rows['answer_tokens']:g} of answer. {rows['to_the_end']:.0%} of the rows follow the true answer to the end; the"
            f" mean share of it that is followed is {rows['followed']:.0%}, and the mean PS is {rows['ps']:.3f}.",
            "",
            f"    {results['surroundings']['command']}",
            "",
            "| case | what | losses, s | decoding, s | total, s | CPU, s | token positions | tokens decoded | peak GiB |",
            "|---|---|---|---|---|---|---|---|---|",
            *(case_line(name, case) for name, case in results["cases"].items()),
            "",
            "Medians over the rounds (times as long as this code, the median of the rounds' ratios). Total: with ROUGE.",
            "CPU: of the total, summed over threads; seconds far above it were spent waiting for something else.",
            "Token positions: all that the model is run on, padding and ended rows too; so are tokens decoded.",
            "padded_texts is computed from the seconds of padded and longest, not run.",
            "",
            *(agreement_line(name, found, results["dtype"]) for name, found in results["agreement"].items()),
            "",
            "| seconds of | over those of | target | measured | |",
            "|---|---|---|---|---|",
            *map(target_line, results["targets"]),
            "",
        ]
    )


def case_line(name: str, case: dict[str, Any]) -> str:
    cells = [name, CASES[name][0] if name in CASES else DERIVED[name]]
    for part in ("losses", "decoding", "total"):
        seconds, beside = case["seconds"].get(part), case["times"].get(part)
        cells.append(f"{seconds['median']:.3g}" + (f" ({beside['median']:.3g}x)" if beside else "") if seconds else "")
    peak = f"{max(case['peak_memory']) / 2**30:.2f}" if case["peak_memory"] else ""
    cells += [f"{case['cpu']['median']:.3g}", str(case["positions"]), str(case["decoded"]), peak]
    return f"| {' | '.join(cells)} |"


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


def parse() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER", help="a fine-tuned model, as from_pretrained loads it")
    add("--data", default="../shared/tofu_1000", metavar="FOLDER", help="data of TOFU's layout (%(default)s)")
    add("--family", default="smollm2-135m", help="an entry of config/model_config.yaml (%(default)s)")
    add("--split", default="forget05", choices=utils.FORGET_SPLITS, help="of the rows to forget (%(default)s)")
    add("--rows", type=positive, default=40, metavar="N", help="half to forget, half to keep (%(default)s)")
    add("--parts", default="ps,tofu", help="ps, tofu or both (%(default)s)")
    add("--dtype", default="float32", choices=list(TOLERANCE), help="bfloat16 is autocast (%(default)s)")
    add("--rounds", type=positive, default=3, help="each of the cases in turn (%(default)s)")
    add("--batch", type=positive, default=16, help="rows of a batch (%(default)s)")
    add("--threads", type=positive, help="left out, as many as torch takes")
    kinds = ["sdpa", "eager", "flash_attention_2"]
    add("--plain_attention", default="sdpa", choices=kinds, help="of the plain ways (%(default)s, transformers' own)")
    add("--output", type=Path, metavar="FILE.md", help="where the page goes, and all numbers, FILE.json; it is printed anyway")
    return parser.parse_args(), parser


def main() -> None:
    args, parser = parse()
    cfg = configuration(args)
    try:
        family = prepare(cfg)
        first_rows(cfg, args.rows)
        if unknown := set(args.parts.split(",")) - set(CASES_OF):
            raise ValueError(f"--parts={args.parts}: {', '.join(sorted(unknown))} is none of {', '.join(CASES_OF)}")
    except ValueError as error:
        parser.error(str(error))
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    names = [name for part, names in CASES_OF.items() if part in args.parts.split(",") for name in names]
    bench = build(cfg, family, args)
    results = {"surroundings": surroundings(cfg.seed)} | summary(bench, race(bench, names, args.rounds), args)
    page = report(results)
    print(page, end="")
    if args.output is not None:
        write_whole(args.output, page)
        write_json(args.output.with_suffix(".json"), results)
        utils.say(f"the page is in {args.output}, all numbers in {args.output.with_suffix('.json')}")


if __name__ == "__main__":
    main()
