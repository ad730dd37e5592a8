"""A benchmark's sets: looked at before anything is loaded, read, told from others, and put to their use.

A row is a mapping with the texts `question` and `answer`, or with `text`, all of whose tokens carry loss. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.benchmark import Benchmark
from app.forms import SUFFIXES, find_file, in_form, pieces, read_rows
from app.places import IDK
from app.settings import Common
from unlearn.io.weights import hash_file

Rows = list[dict[str, Any]]
PLACE = "_place"  # of a row: in which set or file it is, and where there
TEXTS = ("question", "answer")  # of a row, that training reads
PERTURBED = ("paraphrased_answer", "perturbed_answer")
CONTINUED = ("prompt", "gt")  # of a row that is a text and how it goes on
ALL_TEXTS = (*TEXTS, "paraphrased_question", *PERTURBED)  # that an evaluation reads
ONE, MANY = "a text", "a list of texts"
KINDS = {"perturbed_answer": MANY, "paraphrased_question": f"{ONE} or {MANY}"}  # of a row's texts; of the others ONE
FILES = ("forget_data", "retain_data")  # settings that name a file, and are the names of sets
UNLIKELY = re.compile("[\ud800-\udfff]")  # half a surrogate pair


@dataclass(frozen=True)
class Data:
    """A benchmark's sets, and where they are: in a folder (or hub repository), or in two files."""

    benchmark: Benchmark
    data_path: str
    forget_data: str | None = None
    retain_data: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)  # what its rows call `question`, ...

    def file(self, name: str) -> Path:
        """Of a set, or of the sentences of `method=idk`; it need not exist."""
        if name == IDK.stem:
            return IDK
        return Path(getattr(self, name)) if name in FILES else find_file(Path(self.data_path), name)

    def place(self, name: str) -> str:
        """A key with its value, or a set with its file."""
        return f"{name}={getattr(self, name)}" if name in FILES else f"{name} ({self.file(name)})"

    def rows(self, name: str) -> Rows:
        """The rows of a set, each with its place as the user knows it."""
        where = str(getattr(self, name)) if name in FILES else f"split {name}"
        places = ((f"{where}, row {number}", row) for number, row in enumerate(self._read(name), start=1))
        return [one | {PLACE: place} for place, row in places for one in self.named(row, place)]

    def at_hand(self, name: str) -> Rows | None:
        """The rows of a set that is a file, None of any other."""
        return self.rows(name) if self.file(name).exists() else None

    def _read(self, name: str) -> Rows:
        if self.benchmark.read is not None:
            from hydra.utils import instantiate

            return [dict(row) for row in instantiate(self.benchmark.read)(self.data_path, name)]
        if self.file(name).exists() or name in FILES:
            return read_rows(self.file(name))
        return [row for place in self.benchmark.hub.get(name, [name]) for row in self._of_hub(place)]

    def source(self, name: str) -> str:
        """Where a set is that is no file: in `data_path`, or in the benchmark's own, which has what a folder lacks."""
        own, lacking = self.benchmark.data_path, Path(self.data_path).is_dir() and not self._parquets(name)
        return own if own is not None and self.benchmark.lacking and lacking else self.data_path

    def _parquets(self, name: str) -> list[Path]:
        return sorted(Path(self.data_path).glob(f"**/{name}*.parquet"))

    def _of_hub(self, place: str) -> Rows:
        """The rows of <subset>, its split `train`, of <subset>/<split>, or of the lists in a column of that."""
        from datasets import load_dataset

        subset, split, *column = [*place.split("/"), "train"][: max(2, place.count("/") + 1)]
        found = load_dataset(self.source(subset), subset, split=split).to_list()
        return [row for of in found for row in of[column[0]]] if column else found

    def named(self, row: Mapping[str, Any], place: str) -> Rows:
        """The row as it is used here, a long text in pieces. Raises ValueError where its answer is none of its choices."""
        try:
            found = in_form(row, self.called)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        size, text = self.benchmark.piece, found.get("text")
        if size is None or "question" in found or not isinstance(text, str):
            return [found]
        return [found | {"text": part} for part in pieces(text, size)]

    @property
    def called(self) -> dict[str, str]:
        """What the rows call `question`, `answer`, `text` or `choices`, where that is something else."""
        return {**self.benchmark.columns, **self.columns}

    def has(self, name: str) -> bool:
        """Whether there is such a set; True where only the hub, or reading it, can tell."""
        if self._by_name():
            return name in self.benchmark.sets()
        return self.file(name).is_file() or not Path(self.source(name)).is_dir() or bool(name and self._parquets(name))

    def names(self) -> list[str]:
        """The sets that there are: the files of a folder, else those that the benchmark's YAML names."""
        named = self.benchmark.sets()
        return named if self._by_name() else self._files(*named) or named

    def _by_name(self) -> bool:
        """Whether only the sets of the YAML can be: of files of one's own, and where a function reads them."""
        return self.benchmark.read is not None or set(self.benchmark.sets()) <= set(FILES)

    def _files(self, *like: str) -> list[str]:
        """The sets that are files, as deep in the folder as these names."""
        folder, depths = Path(self.data_path), {name.count("/") for name in like}
        files = [file for depth in depths for file in folder.glob("/".join("*" * (depth + 1))) if file.suffix in SUFFIXES]
        return sorted({file.relative_to(folder).with_suffix("").as_posix() for file in files})

    def check(self, name: str, also: Sequence[str] = (), continued: bool = False) -> int | None:
        """How many rows a set has, None where only reading it can tell. Raises ValueError where it is not there, or wrong."""
        if name in FILES or (self.benchmark.read is None and self.file(name).exists()):
            key = name if name in FILES else "data_path"
            return check_rows(f"{key}={self.file(name)}", self.file(name), also, self, continued)
        if self.benchmark.read is not None:
            return None
        source = self.source(name)
        if Path(source).is_dir() and not self._parquets(name):
            there = ", ".join(self._files(name)) or "no splits"
            raise ValueError(f"split={name}: data_path={self.data_path} has no {name}.json; there are {there}")
        if not Path(source).is_dir() and not on_hub(source, "dataset"):
            copy = f"offline? give a local copy of {self.benchmark.name.upper()}"
            why = f"no such folder, and no data set that the hub gives ({copy})"
            raise ValueError(f"data_path={source}: {why}")
        return None

    def hashes(self, names: Iterable[str], texts: Sequence[str] = TEXTS) -> dict[str, str]:
        """A hash of the rows of each set; none of what only the hub has.

        Args:
            texts: what of the rows is read.
        """
        found = {}
        for name in names:
            if self.benchmark.read is not None or self.file(name).is_file():
                found[name] = hash_rows(self.rows(name), texts)
            elif parts := self._parquets(name):
                found[name] = hash_text("".join(map(hash_file, parts)))
        return found


def data_of(settings: Common) -> Data:
    assert settings.data_path is not None
    given = {name: theirs for name, theirs in settings.columns.model_dump().items() if theirs is not None}
    return Data(settings.benchmark, settings.data_path, settings.forget_data, settings.retain_data, given)


# ---- uses ----


@dataclass(frozen=True)
class UnlearningData:
    """Rows to forget, to keep beside them while unlearning, and the held-out ones to keep."""

    forget: Rows
    retain: Rows
    held_out: Rows


def finetune_sets(data: Data, split: str) -> list[str]:
    """The sets that a split to fine-tune on has, of local files those that are given."""
    return [name for name in data.benchmark.finetune[split] if name not in FILES or getattr(data, name) is not None]


def finetune_rows(data: Data, split: str) -> Rows:
    return [row for name in finetune_sets(data, split) for row in data.rows(name)]


def unlearning_sets(data: Data, split: str) -> list[str]:
    """The sets that a split to forget is read from."""
    held_out = data.benchmark.held_out.rows
    return [*data.benchmark.unlearn[split].forget, *data.benchmark.unlearn[split].retain, *([held_out] if held_out else [])]


def unlearning_data(data: Data, split: str, retain_holdout: int | None) -> UnlearningData:
    """The rows of an unlearning run.

    Raises:
        ValueError: holding out rows leaves no retain row to train on.
    """
    sets, held_out = data.benchmark.unlearn[split], data.benchmark.held_out
    forget, retain = ([row for name in names for row in data.rows(name)] for names in (sets.forget, sets.retain))
    if held_out.rows is not None:
        return UnlearningData(forget, retain, data.rows(held_out.rows)[:retain_holdout])
    first = None if held_out.first_of is None or retain_holdout else len(data.rows(held_out.first_of))
    n = how_many_held_out(data.benchmark, len(retain), retain_holdout, first)
    return UnlearningData(forget, retain[n:], retain[:n])


def how_many_held_out(benchmark: Benchmark, retain: int, given: int | None, first: int | None) -> int:
    """How many of the first rows to keep are held out.

    Args:
        first: how many rows `held_out.first_of` has.

    Raises:
        ValueError: none is left to train on.
    """
    of = benchmark.held_out
    n = given if given is not None else first if first is not None else max(1, int(retain * (of.share or 0)))
    n = min(n, of.most or n) if given is None else n
    if n >= retain:
        raise ValueError(f"retain_holdout={n}: the retain split has {retain} rows, and some must be left to train on")
    return n


def asked_sets(data: Data, split: str) -> dict[str, str]:
    """The sets that tofu_evaluation.py asks, by what its tables call them; `held_out`: the held-out rows to keep."""
    return {name: of.format(split=split) for name, of in (data.benchmark.asked | data.benchmark.also).items()}


def set_with_perturbed(data: Data, split: str, name: str, rows: Rows) -> Rows:
    """The `forget` or `retain` rows with what their perturbed ones, found by question, have beside."""
    if name not in data.benchmark.perturbed:
        return rows
    by_question = {row["question"]: row for row in data.rows(data.benchmark.perturbed[name].format(split=split))}
    return [by_question.get(row["question"], {}) | row for row in rows]


# ---- before anything is loaded ----


def check_split(benchmark: Benchmark, use: str, split: str) -> None:
    """Raises ValueError where the benchmark has no such split to `unlearn`, or to `finetune` on."""
    there = getattr(benchmark, use)
    if use == "finetune" and "full" not in there:
        raise ValueError(f"benchmark={benchmark.name}: config/benchmark/{benchmark.name}.yaml lacks finetune.full: all rows")
    if split not in there:
        what = "to unlearn" if use == "unlearn" else "to fine-tune on"
        raise ValueError(f"split={split}: {what} is one of {', '.join(there)}")


def check_finetune_data(data: Data, split: str) -> int | None:
    """How many rows there are. Raises ValueError where the split is none, or its data are not there or wrong."""
    check_split(data.benchmark, "finetune", split)
    if data.forget_data is not None and data.retain_data is None and split != "full":
        raise ValueError(f"split={split}: forget_data alone has no rows to retain; give retain_data=FILE too, or split=full")
    rows = [data.check(name) for name in finetune_sets(data, split)]
    return None if None in rows else sum(n for n in rows if n is not None)


def check_unlearning_data(data: Data, split: str, retain_holdout: int | None) -> int | None:
    """How many rows there are to forget, None where only reading them can tell.

    Raises:
        ValueError: the split is no forget split, or its data are not there, wrong, or too few.
    """
    check_split(data.benchmark, "unlearn", split)
    for given, missing in (FILES, FILES[::-1]):
        if getattr(data, given) is not None and getattr(data, missing) is None:
            raise ValueError(f"{given}={getattr(data, given)}: local data come in pairs; give {missing}=FILE too")
    sets, held_out = data.benchmark.unlearn[split], data.benchmark.held_out
    forget, retain = ([data.check(name) for name in names] for names in (sets.forget, sets.retain))
    if held_out.rows is not None:
        data.check(held_out.rows)
    elif None not in retain:
        first = None if held_out.first_of is None or retain_holdout else data.check(held_out.first_of)
        if first is not None or retain_holdout is not None or held_out.first_of is None:
            how_many_held_out(data.benchmark, sum(n or 0 for n in retain), retain_holdout, first)
    return None if None in forget else sum(n or 0 for n in forget)


def check_perturbed(data: Data, split: str) -> None:
    """Raises ValueError where a set with paraphrased questions and wrong answers is not there, or lacks them."""
    for name in data.benchmark.perturbed.values():
        data.check(name.format(split=split), also=PERTURBED)


def check_rows(what: str, file: Path, also: Sequence[str] = (), data: Data | None = None, continued: bool = False) -> int:
    """How many rows a file has. Raises ValueError where one is no question and answer, nor a text, or there is none.

    Args:
        what: the setting and the file, for the line.
        also: what its rows need beside.
        data: whose rows they are, which may have other names for their texts.
        continued: a row may be a text and how it goes on, too.
    """
    if not file.is_file():
        raise ValueError(f"{what}: no such file")
    try:
        read = read_rows(file)
    except ValueError as error:
        raise ValueError(f"{what}{str(error).removeprefix(str(file))}") from error
    n = 0
    for number, row in enumerate(read, start=1):
        place = f"{what}, row {number}"
        for one in [row] if data is None else data.named(row, place):
            _check_row(place, row, one, also, {} if data is None else data.called, continued)
            n += 1
    return n


def _check_row(
    place: str,
    as_read: Mapping[str, Any],
    row: Mapping[str, Any],
    also: Sequence[str],
    called: Mapping[str, str],
    continued: bool,
) -> None:
    forms = [("text",), *([CONTINUED] if continued else [])]
    others = () if "question" in row else [form for form in forms if form[-1] in row]
    needed = others[0] if others else (*TEXTS, *also)
    if missing := [called.get(name, name) for name in needed if row.get(name) is None]:
        kinds = {name: type(value).__name__ for name, value in as_read.items()}
        raise ValueError(f"{place}: needs {' and '.join(map(repr, missing))}, and has {kinds}")
    for name in {*needed, *ALL_TEXTS} & row.keys():
        value, kind = row[name], KINDS.get(name, ONE)
        texts = [value] if kind == ONE or (kind != MANY and isinstance(value, str)) else value
        if isinstance(texts, list) and any(isinstance(x, str) and UNLIKELY.search(x) for x in texts):
            raise ValueError(f"{place}: {name!r} holds half a surrogate pair, which is no text")
        right = isinstance(texts, list) and (texts or kind != MANY) and all(isinstance(x, str) for x in texts)
        if value is not None and not right:
            raise ValueError(f"{place}: {name!r} is {kind}, and not {value!r:.60}")


def on_hub(name: str, repo_type: str) -> bool:
    """Whether the hub, or its cache here, has the repository; answered within 2 seconds."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return False
    from huggingface_hub import CacheNotFound, HfApi, scan_cache_dir

    try:
        HfApi().repo_info(name, repo_type=repo_type, timeout=2)
        return True
    except Exception as error:
        if "timed out" in str(error).lower():
            return True  # a slow network: let the real download decide
    try:
        return any(repo.repo_id == name and repo.repo_type == repo_type for repo in scan_cache_dir().repos)
    except CacheNotFound:
        return False


# ---- what tells rows from others ----


def hash_rows(rows: Iterable[Mapping[str, Any]], texts: Sequence[str] = TEXTS) -> str:
    def read(row: Mapping[str, Any]) -> list[Any]:
        return [row["text"]] if "text" in row and "question" not in row else [row.get(text) for text in texts]

    return hash_text(json.dumps([read(row) for row in rows]))


def hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
