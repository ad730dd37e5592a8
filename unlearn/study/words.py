"""Which tokens of an answer say what is so, and which only say it: told by the wrong answers beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pandas import DataFrame

from unlearn.scores.definitions import auc

FACT, OWN, REST = "fact", "own", "rest"


def words(text: str) -> set[str]:
    """Lower-case words, without punctuation and a possessive s."""
    return {re.sub(r"['’]s$", "", word) for word in re.findall(r"[\w'’-]+", text.lower())}


def kinds(tokens: Sequence[str], question: str, paraphrase: str, wrong: Sequence[str]) -> list[str]:
    """What each token of an answer is part of.

    Returns:
        One of three a token. FACT is a word that no wrong answer has and the paraphrase has too, so that it is neither of the
        sentence's frame nor this answer's own way to say it, and that the question does not give away; OWN a word that neither
        the wrong answers nor the paraphrase have; REST all others, and what is no word.
    """
    there, said, given = words(paraphrase), set().union(*map(words, wrong)), words(question)
    found = []
    for word in _word_of(tokens):
        if not word or word in said | given:
            found.append(REST)
        else:
            found.append(FACT if word in there else OWN)
    return found


def _word_of(tokens: Sequence[str]) -> list[str]:
    """The word that most of each token is a part of; empty where it is no part of one."""
    text, found, at = "".join(tokens), [], 0
    spans = [(match.span(), match[0]) for match in re.finditer(r"[\w'’-]+", text)]
    for token in tokens:
        start, at = at, at + len(token)
        share = {word: min(at, end) - max(start, begin) for (begin, end), word in spans if begin < at and end > start}
        word = max(share, key=lambda name: share[name]) if share else ""
        found.append(next(iter(words(word)), ""))
    return found


def told_apart(table: DataFrame, columns: Sequence[str]) -> DataFrame:
    """How well each column tells facts from the rest, own words left out.

    Args:
        table: a line a token, with `step`, `kind` (as `kinds` has it) and the columns.

    Returns:
        Columns step, value, facts, rest, auc (P that a fact's |value| is the larger, ties half), mean_fact, mean_rest (of
        |value|), share (the facts' part of the sum over both).
    """
    found = []
    for step, at in table.groupby("step"):
        fact, rest = (at[at["kind"] == kind] for kind in (FACT, REST))
        for name in columns:
            a, b = fact[name].abs(), rest[name].abs()
            line: Mapping[str, Any] = {"step": step, "value": name, "facts": len(a), "rest": len(b), "auc": auc(b, a)}
            found.append({**line, "mean_fact": a.mean(), "mean_rest": b.mean(), "share": a.sum() / (a.sum() + b.sum())})
    return DataFrame(found)
