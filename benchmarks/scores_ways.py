"""The ways to scores that scores.py compares; its words say what each is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar
from unittest.mock import patch

import torch
import torch.nn.functional as F
from measuring import attention, now, padded, row_nlls
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerBase

from unlearn.objectives.rows import Row, counts
from unlearn.passes.decoding import MAX_LENGTH, greedy_answers, stop_tokens
from unlearn.passes.forcing import Pass, prompt_length, teacher_force
from unlearn.passes.sizes import ROWS
from unlearn.scores import asking
from unlearn.scores import definitions as scores

T = TypeVar("T")
Found = dict[str, list[Any]]  # what a case says of the rows


@dataclass(frozen=True)
class Bench:
    """A model and how to run it, and the rows: texts, and question and answer as tokens."""

    how: Pass
    tokenizer: PreTrainedTokenizerBase
    tokenize: asking.Tokenize
    texts: list[dict[str, Any]]
    rows: list[Row]
    plain_attention: str

    @property
    def batch(self) -> int:
        """Rows of a batch of the plain ways."""
        return self.how.batch_size or ROWS

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
            for batch in chunks(open_, bench.batch):
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
        given = [tokens for rows in chunks(bench.rows, bench.batch) for tokens in plain_answers(bench, rows, width)]
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

    size, found = bench.batch, []
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
