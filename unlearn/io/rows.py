"""JSON, JSON lines and CSV: read with the place of what is wrong, written whole."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unlearn.io.files import write_whole


def write_json(file: Path, value: Any) -> None:
    write_whole(file, json.dumps(value, indent=2) + "\n")


def write_csv(file: Path, rows: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(file, text.getvalue())


def read_json(file: Path) -> Any:
    """A JSON file's value. Raises ValueError where it holds none."""
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error})") from error


def read_object(file: Path) -> dict[str, Any]:
    """A JSON file's object. Raises ValueError where it holds none."""
    found = read_json(file)
    if not isinstance(found, dict):
        raise ValueError(f"{file}: not a JSON object ({found!r:.40})")
    return found


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, or of one array. Raises ValueError where one is none, or where there are none."""
    text = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
    found = _items(path, text) if text.lstrip().startswith(b"[") else _lines(path, text)
    for place, row in found:
        if not isinstance(row, dict):
            raise ValueError(f"{path}, {place}: not a JSON object ({row!r:.40})")
    if not found:
        raise ValueError(f"{path}: no rows; needs lines of JSON with the texts 'question' and 'answer'")
    return [row for _, row in found]


def texts_in(row: Mapping[str, Any], column: str) -> list[str]:
    """The texts of a column that has one or a list of them; none where the row lacks it."""
    found = row.get(column) or []
    return [found] if isinstance(found, str) else list(found)


def _lines(path: str | Path, text: bytes) -> list[tuple[str, Any]]:
    """Each line's value, with its place."""
    found = []
    for number, line in enumerate(text.split(b"\n"), start=1):  # str.splitlines would cut a text at U+2028 or U+0085, too
        if line.strip():
            try:
                found.append((f"line {number}", json.loads(line.decode())))
            except ValueError as error:  # also text that is not UTF-8
                what = f"{path}, line {number}: not JSON ({error}); one object a line is wanted, or one array of them"
                raise ValueError(what) from error
    return found


def _items(path: str | Path, text: bytes) -> list[tuple[str, Any]]:
    """Each item of an array, with its place."""
    try:
        return [(f"item {number}", item) for number, item in enumerate(json.loads(text.decode()), start=1)]
    except ValueError as error:
        raise ValueError(f"{path}: begins as one array, and is not JSON ({error})") from error
