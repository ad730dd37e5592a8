"""The lines and rows of robustness.py, written and told."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from app.attack_settings import ATTACKS
from app.data import Rows
from app.evaluating import Target, told
from app.runs import read_record
from unlearn.io.files import write_whole
from unlearn.io.rows import write_csv
from utils import say

SCORES = ("rouge", "probability", "ps_exact", "extraction_strength", "exact_memorization")  # higher: more is known
OF_SAMPLES = ("leak", "leak_bound", "best_rouge")
COLUMNS = (
    *("step", "model", "attack", "setting", "rows"),
    *(f"{data}_{score}" for data in ("forget", "retain") for score in (*SCORES, "loss")),
    *(f"{name}_{score}" for name in ("R", "Q", "HM") for score in SCORES),
    *OF_SAMPLES,
)
FILE = "robustness.csv"


class Result(NamedTuple):
    """What an attack in one setting has given: values by their column, what is told of rows, and how many it is of."""

    setting: str
    values: dict[str, float]
    told: Rows
    rows: int


def write(target: Target, name: str, record: Mapping[str, Any], found: Mapping[str, Sequence[Result]]) -> None:
    """Put an attack's lines into the checkpoint's robustness.csv and the run's, in place of those it had; and its rows."""
    lines = [
        {"step": target.step, "model": model, "attack": name, "setting": one.setting, "rows": one.rows} | one.values
        for model, results in found.items()
        for one in results
    ]
    told = [{"model": model} | row for model, results in found.items() for one in results for row in one.told]
    write_whole(target.folder / f"robustness_{name}.jsonl", "".join(json.dumps(without_nan(row)) + "\n" for row in told))
    stay = [
        line for line in read_lines(target.folder / FILE) if line["attack"] != name and is_of(target, line["attack"], record)
    ]
    here = with_means(in_order([*stay, *lines]))
    write_lines(target.folder / FILE, here)
    if target.table is not None and target.step is not None and target.table != target.folder:
        others = [line for line in read_lines(target.table / FILE) if line["step"] != str(target.step)]
        write_lines(target.table / FILE, sorted([*others, *here], key=lambda line: int(line["step"])))


def is_of(target: Target, name: str, record: Mapping[str, Any]) -> bool:
    """Whether another attack's lines in the folder are of the same weights and rows."""
    file = target.folder / f"robustness_{name}.yaml"
    other = read_record(file) if file.exists() else {}
    weights = (of.get("weights") for of in (other, record))
    same = [of.get(target.path) if isinstance(of, dict) else None for of in weights]
    data = {**(other.get("data") or {}), **record["data"]}
    return same[0] == same[1] and {**record["data"], **(other.get("data") or {})} == data  # of what both are of


def with_means(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines, the unlearned model's quantised ones with HM(R, Q), R that of the last relearned step."""
    from unlearn.attacks import harmonic_mean

    def number(line: Mapping[str, Any], key: str) -> float:
        return float("nan") if line.get(key) in (None, "") else float(line[key])

    last: dict[str, Any] = next(
        (line for line in reversed(lines) if (line["attack"], line["model"]) == ("relearn", "unlearned")), {}
    )
    found = []
    for line in lines:
        bits = line["attack"] == "quantize" and line["model"] == "unlearned"
        means = {f"HM_{score}": harmonic_mean(number(last, f"R_{score}"), number(line, f"Q_{score}")) for score in SCORES}
        found.append({key: value for key, value in line.items() if not key.startswith("HM_")} | (means if bits else {}))
    return found


def in_order(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(lines, key=lambda line: ATTACKS.index(line["attack"]))


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a robustness.csv, as texts; none where there is none. Raises ValueError where it is no such table."""
    if not file.exists():
        return []
    with file.open(newline="") as text:
        lines: list[dict[str, Any]] = list(csv.DictReader(text))
    if any(line.get("attack") not in ATTACKS or "step" not in line for line in lines):
        raise ValueError(f"{file}: not a table of attacks; remove it, or give save_dir=FOLDER")
    return lines


def write_lines(file: Path, lines: list[dict[str, Any]]) -> None:
    """A CSV with the columns that a line has a value of, empty where one has none."""
    filled = [{key: value for key, value in line.items() if value == value and value not in (None, "")} for line in lines]
    columns = [column for column in COLUMNS if column in COLUMNS[:5] or any(column in line for line in filled)]
    write_csv(file, [{column: line.get(column) for column in columns} for line in filled])


def without_nan(row: Mapping[str, Any]) -> dict[str, Any]:
    """With null for what has no value."""

    def known(value: Any) -> Any:
        if isinstance(value, list):
            return [known(one) for one in value]
        return None if value != value else value

    return {key: known(value) for key, value in row.items()}


def report(name: str, found: Mapping[str, Sequence[Result]]) -> None:
    """The lines as a small table on standard error."""
    shown = [f"{data}_{score}" for data in ("forget", "retain") for score in SCORES[:2]] + [*OF_SAMPLES]
    for model, results in found.items():
        for one in results:
            keys = [key for key in one.values if key in shown or key[:2] in ("R_", "Q_") and key[2:] in SCORES[:2]]
            say(f"{name:10} {model:9} {one.setting:14} " + "  ".join(f"{key} {told(one.values[key])}" for key in keys))
    if "retain" not in found:
        say(f"{name:10} retain    not available: no retain model; give retain_path=MODEL")
