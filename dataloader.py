"""Rows of texts to tokens, and to the padded, masked batches of a training run, in order.

Letters: B rows, T tokens of the longest of them.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from torch.utils.data import Dataset

from app.data import PLACE
from app.families import Family
from app.places import IDK
from unlearn.io.rows import read_jsonl
from unlearn.objectives.rows import Row, counts, forget_batch, tokenize_pairs, visited
from unlearn.passes.forcing import check_fit

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")
ANSWER = "\ue000answer\ue000"  # stands where a chat template puts the answer; private-use characters, in no one's text


def prompt_and_answer(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, family: Family) -> tuple[str, str]:
    """All that stands before the answer, and the answer as it stands there: with the family's tags or chat template.

    A row's `answer_start`, where it has one, is what its answer begins with and stands in the prompt.

    Raises:
        ValueError: the tokenizer has no chat template, or one that refuses the messages or changes what they say.
    """
    question, answer, start = row["question"], row["answer"], row.get("answer_start", "")
    if not family.chat_template:
        return family.prompt(question) + start, answer
    prompt, found, after = _render(question, ANSWER, tokenizer, family).partition(ANSWER)
    text = _render(question, answer, tokenizer, family) if answer else prompt + after  # some leave out an empty message
    shown = text[len(prompt) : len(text) - len(after)]
    system = family.system_prompt or ""
    as_given = {
        f"the answer {answer!r:.60}": found and text == prompt + shown + after and shown.strip() == answer.strip(),
        f"the question {question!r:.60}": question.strip() in prompt,
        f"system_prompt={system}": system.strip() in prompt,
    }
    if changed := [what for what, same in as_given.items() if not same]:
        raise ValueError(f"{_template_of(tokenizer, family)} does not show {' and '.join(changed)} as given")
    return prompt + start, shown


def _render(question: str, answer: str, tokenizer: PreTrainedTokenizerBase, family: Family) -> str:
    """The tokenizer's chat template on the two. Raises ValueError where it has none, or one that refuses them."""
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise ValueError(f"model_family={family.name}: the tokenizer {tokenizer.name_or_path} has no chat template")
    texts = {"system": family.system_prompt, "user": question, "assistant": answer}
    messages = [{"role": role, "content": text} for role, text in texts.items() if text is not None]
    date: dict[str, Any] = {} if family.date_string is None else {"date_string": family.date_string}
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **date))
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"{_template_of(tokenizer, family)} refuses the messages {roles} ({error})") from error


def _template_of(tokenizer: PreTrainedTokenizerBase, family: Family) -> str:
    return f"model_family={family.name}: the chat template of {tokenizer.name_or_path}"


def tokenize(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    family: Family,
    max_length: int,
    model: PreTrainedModel | None = None,
) -> list[Row]:
    """Rows to token ids, with labels on the answer's tokens and one end-of-sequence token; of a plain text on all.

    The boundary is a character offset of the one tokenised text: a token that reaches past it is the answer's. A chat
    template writes the beginning-of-sequence token itself, and what it writes after the answer is dropped.

    Args:
        model: checked to have a place for each token.

    Raises:
        ValueError: a row lacks its question or answer or is longer than its prompt leaves room for, or the tokenizer
            has no end-of-sequence token, gives no offsets or does not have the chat template that the family needs.
    """
    places = [row.get(PLACE, f"row {number}") for number, row in enumerate(rows, start=1)]
    plain = bool(rows) and all("text" in row and "question" not in row for row in rows)
    for place, row in zip(places, rows, strict=True):
        if not plain and not (isinstance(row.get("question"), str) and isinstance(row.get("answer"), str)):
            raise ValueError(f"{place}: needs the texts 'question' and 'answer', and has {sorted(row.keys() - {PLACE})}")
    if plain:
        found = tokenize_pairs([("", row["text"]) for row in rows], tokenizer, max_length, places=places)
    else:
        pairs = [prompt_and_answer(row, tokenizer, family) for row in rows]
        tag = len(family.answer_tag) if family.loss_on_answer_tag else 0
        special = False if family.chat_template else None
        found = tokenize_pairs(pairs, tokenizer, max_length, prompt_loss=tag, special_tokens=special, places=places)
    if model is not None:
        check_fit(model, found, places)
    return found


def idk_rows(rows: Sequence[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """The same questions, each answered by one of the "I don't know" sentences, drawn from `seed`."""
    if without := [str(row.get(PLACE, row)) for row in rows if "question" not in row]:
        raise ValueError(f'{without[0]}: has no question that "I don\'t know" could answer')
    sentences = [line["idk"] for line in read_jsonl(IDK)]
    draw = random.Random(f"idk {seed}")
    return [row | {"answer": draw.choice(sentences)} for row in rows]


def second_rows(
    rows: Sequence[dict[str, Any]], source: str, seed: int, key: str = "method.second"
) -> list[list[dict[str, Any]]]:
    """For each row the same question with its second answers: `idk`, or what stands in that column (several in a list).

    Args:
        key: the setting that says so.

    Raises:
        ValueError: a row has nothing in that column, other than texts, or its own answer.
    """
    if source == "idk":
        return [[row] for row in idk_rows(rows, seed)]
    if lacking := [str(row.get(PLACE, row)) for row in rows if not row.get(source)]:
        raise ValueError(f'{key}={source}: {lacking[0]} has nothing in that column; idk stands for "I don\'t know" sentences')
    answers = [row[source] if isinstance(row[source], list) else [row[source]] for row in rows]
    for row, of in zip(rows, answers, strict=True):
        if strange := [answer for answer in of if not (isinstance(answer, str) and answer)]:
            raise ValueError(f"{key}={source}: {row.get(PLACE, row)}: an answer there is a text, and not {strange[0]!r}")
        if row["answer"] in of:
            raise ValueError(f"{key}={source}: {row.get(PLACE, row)}: an answer there is the row's own, and so no second one")
    return [[row | {"answer": answer} for answer in of] for row, of in zip(rows, answers, strict=True)]


def stream(n_rows: int, n: int, seed: int, name: str) -> list[int]:
    """The first `n` of one stream of row indices over epochs, each epoch shuffled anew."""
    draw = random.Random(f"{name} {seed}")
    order: list[int] = []
    while len(order) < n:
        order += draw.sample(range(n_rows), n_rows)
    return order[:n]


class StepBatches(Dataset[dict[str, Any]]):
    """The micro-batches of a training run, in order; item i is for process i mod `processes`.

    A step's rows are drawn from `seed` whatever the number of processes and micro-batches, and sorted by length within
    the step. Beside each forget row stands a retain row, drawn from a stream of its own. An item holds `input_ids`,
    `attention_mask` and `labels` (B, T), forget rows first; `n_forget`; `rows`, their numbers, that of the first of either
    kind being `first`; `forget_counts` and `retain_counts`, the label tokens and rows of the whole step; `ref_nll`
    (label tokens of the forget rows) where the rows have it; and what `forget_batch` says of second answers. Of several
    second answers a row's visits take one each, in turn.
    """

    def __init__(
        self,
        forget: list[Row],
        retain: list[Row],
        steps: int,
        batch_size: int,
        batches_per_step: int,
        seed: int,
        pad: int,
        first: tuple[int, int] = (0, 0),
    ):
        self.first = {"forget": first[0], "retain": first[1]}
        self.forget, self.retain, self.pad = forget, retain, pad
        self.batch_size, self.batches_per_step, self.steps = batch_size, batches_per_step, steps
        self.step_size = batch_size * batches_per_step
        n = steps * self.step_size
        self.forget_drawn = self._by_step(stream(len(forget), n, seed, "forget"), forget)
        self.retain_drawn = self._by_step(stream(len(retain), n, seed, "retain"), retain) if retain else [[]] * steps
        self.forget_order, self.retain_order = (
            [[row for row, _ in step] for step in drawn] for drawn in (self.forget_drawn, self.retain_drawn)
        )
        self.forget_counts = [counts([forget[row] for row in step]) for step in self.forget_order]
        self.retain_counts = [counts([retain[row] for row in step]) for step in self.retain_order]

    def _by_step(self, order: list[int], rows: list[Row]) -> list[list[tuple[int, int]]]:
        """Each step's rows, each with how often it was drawn before."""
        drawn = [(row, i // len(rows)) for i, row in enumerate(order)]
        chunks = (drawn[i : i + self.step_size] for i in range(0, len(drawn), self.step_size))
        return [sorted(chunk, key=lambda one: -len(rows[one[0]]["input_ids"])) for chunk in chunks]

    def __len__(self) -> int:
        return self.steps * self.batches_per_step

    def __getitem__(self, i: int) -> dict[str, Any]:
        step, part = divmod(i, self.batches_per_step)
        here = slice(part * self.batch_size, (part + 1) * self.batch_size)
        forget = [visited(self.forget[row], visit) for row, visit in self.forget_drawn[step][here]]
        retain = [visited(self.retain[row], visit) for row, visit in self.retain_drawn[step][here]]
        batch = forget_batch(forget, retain, self.pad)
        batch |= {"forget_counts": self.forget_counts[step], "retain_counts": self.retain_counts[step]}
        rows = {"forget": self.forget_order[step][here], "retain": self.retain_order[step][here]}
        batch["rows"] = {name: [self.first[name] + row for row in numbers] for name, numbers in rows.items()}
        return batch


def beside_rows(rows: Sequence[T], n: int | None, forget: int, seed: int) -> list[T]:
    """The retain rows of a G-effect's loss: `n` (null: as many as there are to forget) of those trained on, drawn once."""
    n = min(len(rows), forget if n is None else n)
    return [rows[i] for i in random.Random(f"geffect {seed}").sample(range(len(rows)), n)]
