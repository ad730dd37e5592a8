"""The forms of a data set's rows: question and answer, multiple choice, plain text; as files have them, and as they are used.

Used are the texts `question` and `answer`, or `text` alone. Of a multiple choice `answer` is the right choice's text and
`perturbed_answer` the others'; `choices` and `correct`, the right one's number, stay beside. (A text and how it goes on,
`prompt` and `gt`, is what a benchmark's own scores may read.)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from unlearn.io.rows import read_jsonl

SUFFIXES = (".json", ".jsonl", ".txt")  # of a set's file


def find_file(folder: Path, name: str) -> Path:
    """The file of a set; that of the first suffix where there is none."""
    files = [folder / f"{name}{suffix}" for suffix in SUFFIXES]
    return next((file for file in files if file.exists()), files[0])


def read_rows(file: Path) -> list[dict[str, Any]]:
    """A file's rows as they stand there; the texts of an array of texts, and a text file's paragraphs, which empty lines
    separate, as `text`.

    Raises:
        ValueError: it is neither lines of JSON nor one array, nor UTF-8 text; or it has no rows.
    """
    if file.suffix != ".txt":
        return _texts(file) or read_jsonl(file)
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # str.splitlines would cut at U+2028, too
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text ({error})") from error
    texts = ["\n".join(block) for filled, block in groupby(lines, key=lambda line: bool(line.strip())) if filled]
    if not texts:
        raise ValueError(f"{file}: no text")
    return [{"text": text} for text in texts]


def _texts(file: Path) -> list[dict[str, Any]]:
    """The rows of one array of texts; none where the file is something else."""
    with file.open("rb") as stream:
        if not stream.read(1024).lstrip().startswith(b"["):
            return []
    try:
        found = json.loads(file.read_bytes())
    except ValueError:
        return []
    return [{"text": text} for text in found] if found and all(isinstance(text, str) for text in found) else []


def pieces(text: str, size: int) -> list[str]:
    """The text in pieces of at most `size` characters, cut at the last white space that does not halve a piece."""
    found = []
    while len(text) > size:
        at = next((i for i in range(size, size // 2, -1) if text[i].isspace()), size)
        found.append(text[:at])
        text = text[at:].lstrip()
    return [*found, text] if text or not found else found


def in_form(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row with the names that are used here, and as question and answers where it is a multiple choice.

    Args:
        columns: what the row calls `question`, `answer`, `text` or `choices`, by these.

    Raises:
        ValueError: its choices are no list of texts, or its answer is none of them.
    """
    ours = {theirs: name for name, theirs in columns.items()}
    found = {ours.get(key, key): value for key, value in row.items() if key in ours or key not in columns}
    return found if found.get("choices") is None else found | _chosen(found["choices"], found.get("answer"))


def _chosen(choices: Any, answer: Any) -> dict[str, Any]:
    texts = isinstance(choices, list) and len(choices) > 1 and all(isinstance(choice, str) for choice in choices)
    if not texts:
        raise ValueError(f"'choices' is a list of two texts or more, and not {choices!r:.60}")
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise ValueError(f"'answer' is one of 'choices', or its number from 0 to {len(choices) - 1}, and not {answer!r:.60}")
    others = [choice for i, choice in enumerate(choices) if i != answer]
    return {"answer": choices[answer], "perturbed_answer": others, "correct": answer}
