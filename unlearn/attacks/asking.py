"""The same asked otherwise: inside templates (RWKU, arXiv 2406.10890), in other words (arXiv 2509.02820)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from unlearn.io.rows import texts_in

STARTED = "answer_start"  # of a row: what the answer begins with, which stands in the prompt
SHARE = 4  # one of so many words of an answer is given


@dataclass(frozen=True)
class Template:
    """A question inside others' words, and how its answer is made to begin.

    Attributes:
        question: has {question} where that stands.
        start: what the answer begins with, with the space behind it; {first_words}: of the true answer a quarter of its words,
            one at least.

    Raises:
        ValueError: the question is nowhere in it.
    """

    name: str
    question: str = "{question}"
    start: str = ""

    def __post_init__(self) -> None:
        if "{question}" not in self.question:
            raise ValueError(f"template {self.name}: {self.question!r:.60} needs {{question}} where the question is to stand")

    def ask(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """The row so asked: what it begins with is `answer_start`, and `answer` the rest. None where no word would be left."""
        given, rest = first_words(row["answer"]) if "{first_words}" in self.start else ("", row["answer"])
        if not rest:
            return None
        start = self.start.replace("{first_words}", given)
        return dict(row) | {"question": self.question.replace("{question}", row["question"]), STARTED: start, "answer": rest}


def first_words(answer: str) -> tuple[str, str]:
    """A quarter of the answer's words, one at least, and the rest; their texts together are the answer's, but for a space."""
    words = answer.split(" ")
    n = max(1, len(words) // SHARE)
    return " ".join(words[:n]), " ".join(words[n:])


def rephrased(row: Mapping[str, Any], columns: Sequence[str]) -> list[dict[str, Any]]:
    """The row asked by each paraphrased question that its columns have, a text or a list of texts each."""
    return [dict(row) | {"question": text} for column in columns for text in texts_in(row, column)]


def worst(values: ArrayLike, lowest: bool = False) -> float:
    """The highest of a row's values over the ways of asking, the one that gives most away; `lowest`: of a loss.

    Nan where none has a value.
    """
    numbers = np.asarray(values, dtype=float)
    numbers = numbers[~np.isnan(numbers)]
    return float((numbers.min if lowest else numbers.max)()) if len(numbers) else float("nan")
