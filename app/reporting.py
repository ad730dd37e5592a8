"""From runs' folders to what a report shows: settings, the forget rows' texts, and a name for each run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from app.data import FILES, Data, Rows
from app.fields import flatten
from app.filling import benchmark
from app.places import find_path
from app.runs import read_record, saved_settings, texts_of
from unlearn.reporting.report_tables import Run
from unlearn.reporting.tables import TABLES

MEASURED = ("scores.csv", "robustness.csv", "geffect/config.yaml")
HELD = ("config.yaml", "logs/train.jsonl", *MEASURED)  # that make a folder a run's
PARTS = ("geffect", "checkpoint", "logs", "figures")  # of a run, by what stands before a "-"


TOLD = ("model_family", "split", "hyper_param", "lr", "num_epochs", "seed")  # settings that tell runs of a method apart


def find_runs(folders: Sequence[str]) -> list[Run]:
    """The runs in these folders. Raises ValueError where one is none, is given twice, or has a file that is not readable."""
    paths = [check(Path(folder)) for folder in folders]
    if twice := [path for i, path in enumerate(paths) if path.resolve() in {one.resolve() for one in paths[:i]}]:
        raise ValueError(f"{twice[0]}: is given twice")
    records = [record_in(path) for path in paths]
    names = unique(names_of(paths, records))
    return [read_run(name, path, record) for name, path, record in zip(names, paths, records, strict=True)]


def check(folder: Path) -> Path:
    """The folder. Raises ValueError where it is none, or not a run's."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give a run's folder, such as forget.py makes")
    whole = folder.resolve().parent
    if folder.resolve().name.partition("-")[0] in PARTS and "method" in saved_settings(whole):
        raise ValueError(f"{folder}: is a part of a run; give the run's folder, {whole}")
    tables = [f"{place}{name}" for name in TABLES for place in ("", "geffect/")]
    if not any((folder / name).exists() for name in (*HELD, *tables)):
        raise ValueError(f"{folder}: not a run's folder; looked for {', '.join(HELD)}, and tables of the G-effect")
    if "method" not in saved_settings(folder) and not any((folder / name).exists() for name in (*MEASURED, *tables)):
        raise ValueError(
            f"{folder}: no unlearning run (a fine-tuned model?): names no method; give a run's folder, such as forget.py makes"
        )
    return folder


def record_in(folder: Path) -> dict[str, Any]:
    """What is noted of the run: in its config.yaml, or in that of its G-effects."""
    files = [file for file in (folder / "config.yaml", folder / "geffect" / "config.yaml") if file.exists()]
    return read_record(files[0]) if files else {}


def names_of(paths: Sequence[Path], records: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """What each run may be called, the shortest first: its method, that and the settings that differ, its folder."""
    settings = [record.get("settings") or {} for record in records]
    differing = [key for key in TOLD if len({str(one.get(key)) for one in settings}) > 1]
    found = []
    for path, of in zip(paths, settings, strict=True):
        folders = [path.name or str(path.resolve()), str(path)]
        method = method_of(of)
        told = ", ".join(f"{key}={of.get(key)}" for key in differing)
        found.append(folders if method is None else [method, *([f"{method}, {told}"] if told else [method]), *folders])
    return found


def method_of(settings: Mapping[str, Any]) -> str | None:
    """Method and retain term, as a run's folder is called after them."""
    method, retain = settings.get("method") or {}, settings.get("retain") or {}
    if not isinstance(method.get("name"), str):
        return None
    name = str(method.get("run_name") or method["name"])
    own = retain.get("name") in (None, "none") or f"_{retain['name']}" in name or name == retain["name"]
    return name if own else f"{name}_{retain['name']}"


def unique(names: Sequence[Sequence[str]]) -> list[str]:
    """The first of each run's names at the first place at which all are different; else the last ones."""
    for i in range(max(map(len, names))):
        chosen = [of[min(i, len(of) - 1)] for of in names]
        if len(set(chosen)) == len(chosen):
            return chosen
    return [of[-1] for of in names]


def read_run(name: str, folder: Path, record: Mapping[str, Any]) -> Run:
    settings = record.get("settings") or {}
    shown = {**flatten(settings), **flatten({key: value for key, value in record.items() if key != "settings"})}
    texts, why = forget_texts(record)
    return Run(name, folder, shown, texts, why, method_of(settings))


def forget_texts(record: Mapping[str, Any]) -> tuple[list[tuple[str, str]] | None, str]:
    """Question and answer of the rows that a run forgets, in order; else None, and why: never from the hub."""
    settings = record.get("settings") or {}
    if not {"split", "data_path"} <= settings.keys() or not settings["data_path"]:
        return None, "no config.yaml names its data"
    try:
        data = data_in(settings)
        sets = data.benchmark.unlearn[settings["split"]].forget
        found = [data.at_hand(name) for name in sets]
        second = [(settings.get(group) or {}).get("second") for group in ("method", "retain")]
        now, noted = data.hashes(sets, texts_of(*second)), record.get("data") or {}
    except (ValueError, KeyError, OSError) as error:
        return None, f"its data are not readable ({' '.join(str(error).split())})"
    if absent := [name for name, rows in zip(sets, found, strict=True) if rows is None]:
        return None, f"its data are not at hand ({data.file(absent[0])})"
    if changed := [name for name, value in now.items() if noted.get(name, value) != value]:
        return None, f"its data are not what they were ({data.file(changed[0])})"
    return [text_of(row) for rows in found for row in rows or Rows()], ""


def data_in(settings: Mapping[str, Any]) -> Data:
    """The data that a run's settings name. Raises ValueError where its benchmark is none."""
    local = any(settings.get(name) is not None for name in FILES)
    chosen = settings.get("benchmark") or ("local" if local else "tofu")
    files = {name: None if settings.get(name) is None else find_path(settings[name]) for name in FILES}
    columns = {name: value for name, value in (settings.get("columns") or {}).items() if value is not None}
    return Data(benchmark(chosen), find_path(settings["data_path"]), **files, columns=columns)


def text_of(row: Mapping[str, Any]) -> tuple[str, str]:
    """A row's question and answer; of a plain text nothing and all of it."""
    return (str(row["question"]), str(row["answer"])) if "question" in row else ("", str(row.get("text", "")))
