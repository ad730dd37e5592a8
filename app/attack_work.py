"""What the attacks of robustness.py share: checks before anything is loaded, the rows, the model, what was measured of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from app import evaluating
from app.attack_settings import ATTACKS, Robustness
from app.checks import check_optimizer
from app.data import PLACE, Rows, data_of, set_with_perturbed, unlearning_data
from app.families import Family
from app.places import CONFIG

if TYPE_CHECKING:
    from unlearn.attacks.asking import Template
    from unlearn.passes import Pass

TEMPLATES = CONFIG / "attack" / "prefixes.yaml"
ASKING = ("sample", "prefix", "paraphrase")  # attacks by questions


@dataclass(frozen=True)
class Part:
    """The parts of an attack on one of the two models, each measured unless an earlier start has left it."""

    progress: evaluating.Progress
    role: str

    def __call__(self, name: str, measure: Callable[[], Any]) -> Any:
        return self.progress.part(f"{self.role}_{name}", measure)

    def has(self, name: str) -> bool:
        return f"{self.role}_{name}" in self.progress.found

    @property
    def folder(self) -> Path:
        """What a killed training goes on from."""
        return self.progress.resume / self.role


@dataclass
class Work:
    """What all attacks share: the model that takes each path's weights in turn, the rows, what was measured of a path.

    Attributes:
        rows: `forget`, and held-out `retain` rows, with their paraphrased questions where they have some.
    """

    settings: Robustness
    family: Family
    models: evaluating.Models
    rows: dict[str, Rows]
    known: dict[tuple[str, ...], Any] = field(default_factory=dict)

    def once(self, key: tuple[str, ...], measure: Callable[[], Any]) -> Any:
        """What `measure` gives, once in this process: the retain model is the same beside every checkpoint."""
        if key not in self.known:
            self.known[key] = measure()
        return self.known[key]

    def scored(self, how: Pass, rows: Rows, what: str) -> Rows:
        """Each row's scores under teacher forcing and, where it has a question, its greedy answer with its ROUGE-L recall."""
        from unlearn.passes import greedy_answers, teacher_force
        from unlearn.scores.extraction import knowledge

        tokenized = self.models.tokenize(rows)
        forced = teacher_force(how, tokenized, what=f"{what}, losses")
        found: Rows = [knowledge(one) for one in forced]
        if "question" in rows[0]:
            most = self.settings.max_new_tokens
            said = greedy_answers(how, tokenized, self.models.tokenizer, forced, None, most, f"{what}, answers")
            for one, answer, recall in zip(found, said, self.recalls(said, rows), strict=True):
                one |= {"rouge": recall, "answer": answer}
        return found

    def recalls(self, answers: Sequence[str], rows: Rows) -> list[float]:
        from unlearn.scores.definitions import rouge_recalls

        return rouge_recalls(answers, [row["answer"] for row in rows], self.settings.rouge_tokenizer)["rougeL"]

    def both(self, how: Pass, what: str) -> dict[str, Rows]:
        """The forget and the held-out retain rows' scores."""
        return {name: self.scored(how, rows, f"{what}, {name}") for name, rows in self.rows.items()}

    def plain(self, path: str, name: str) -> Rows:
        """The same, of one of the two, of the model as it is."""
        what = f"{Path(path).name}, {name}"
        found: Rows = self.once(("plain", path, name), lambda: self.scored(self.models.at(path), self.rows[name], what))
        return found

    def plain_both(self, path: str) -> dict[str, Rows]:
        return {name: self.plain(path, name) for name in self.rows}


# ---- what is told of scored rows ----


def of_sets(found: Mapping[str, Rows]) -> dict[str, float]:
    """The means over each set's rows, named as of that set."""
    return {f"{data}_{key}": value for data, rows in found.items() for key, value in of_forget(rows, "").items()}


def told_of(found: Mapping[str, Rows], setting: str) -> Rows:
    """The rows as they are told."""
    return [{"setting": setting, "data": data, "row": i} | row for data, of in found.items() for i, row in enumerate(of)]


def of_forget(rows: Rows, name: str = "forget_") -> dict[str, float]:
    """The means over the rows, named as of the forget rows, or of others."""
    from unlearn.scores.extraction import means

    return {f"{name}{key}": value for key, value in means([without_text(row) for row in rows]).items()}


def without_text(row: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in row.items() if key != "answer"}


# ---- before anything is loaded ----


def check(settings: Robustness) -> None:
    """Raises ValueError for what can't be attacked so, as far as can be told before anything is read."""
    if strange := [name for name in settings.attacks if name not in ATTACKS]:
        raise ValueError(f"attacks={strange[0]}: unknown; there are {', '.join(ATTACKS)}")
    if not settings.attacks:
        raise ValueError(f"attacks=[]: give some of {', '.join(ATTACKS)}")
    if (n := settings.sample.n) < max(settings.sample.k or [1]):
        raise ValueError(f"sample.k={settings.sample.k}: of sample.n={n} answers at most {n} can be drawn")
    if strange_bits := [bits for bits in settings.quantize.bits if bits not in (8, 4)]:
        raise ValueError(f"quantize.bits={strange_bits[0]}: is one of 8, 4")
    if "relearn" in settings.attacks:
        check_optimizer(settings.relearn.optim, settings.parallel)
    if "prefix" in settings.attacks:
        templates_of(settings)
    if settings.parallel == "fsdp" and {"relearn", "quantize"} & set(settings.attacks):
        raise ValueError("parallel=fsdp: attacks=relearn and quantize need whole weights; parallel=ddp has them")
    if "quantize" in settings.attacks and settings.quantize.by == "bitsandbytes":
        by_bitsandbytes(settings)


def by_bitsandbytes(settings: Robustness) -> bool:
    """Whether bitsandbytes quantises. Raises ValueError where it is asked to and can't: not installed, or no GPU."""
    from importlib.util import find_spec

    import torch

    there = find_spec("bitsandbytes") is not None
    if settings.quantize.by == "bitsandbytes" and not (there and torch.cuda.is_available()):
        why = "there is no GPU" if there else "not installed; pip install bitsandbytes, on a machine with a GPU"
        raise ValueError(f"quantize.by=bitsandbytes: {why}; quantize.by=round_trip runs anywhere")
    return settings.quantize.by != "round_trip" and there and torch.cuda.is_available()


def read_rows(settings: Robustness) -> dict[str, Rows]:
    """The forget and the held-out retain rows, `ds_size` at most; to be paraphrased with what their perturbed ones have.

    Raises:
        ValueError: an attack needs a question, or a paraphrased one, and no row has it.
    """
    data = data_of(settings)
    found = unlearning_data(data, settings.split, settings.retain_holdout)
    texts = {"forget": found.forget, "retain": found.held_out}
    rows = {name: of[: settings.ds_size] for name, of in texts.items()}
    asking = [name for name in settings.attacks if name in ASKING]
    if asking and any("question" not in row for row in rows["forget"]):
        raise ValueError(
            f"attacks={asking[0]}: the rows of split={settings.split} have no question; there are relearn, quantize"
        )
    return rows | {"forget": with_paraphrases(settings, rows["forget"])} if "paraphrase" in settings.attacks else rows


def with_paraphrases(settings: Robustness, rows: Rows) -> Rows:
    """The forget rows with what their perturbed ones have. Raises ValueError where none has a paraphrased question."""
    data, columns = data_of(settings), settings.paraphrase.columns
    if "forget" in data.benchmark.perturbed:
        data.check(data.benchmark.perturbed["forget"].format(split=settings.split))
    rows = set_with_perturbed(data, settings.split, "forget", rows)
    if not any(row.get(column) for row in rows for column in columns):
        has = ", ".join(sorted({key for row in rows for key in row if not key.startswith("_")}))
        others = ",".join(name for name in ATTACKS if name != "paraphrase")
        raise ValueError(
            f"paraphrase.columns={columns}: no row of split={settings.split} has one; they have {has} (attacks=[{others}] does"
            " without)"
        )
    for column, row in ((column, row) for row in rows for column in columns if row.get(column)):
        if not all(isinstance(text, str) for text in (row[column] if isinstance(row[column], list) else [row[column]])):
            what = f"paraphrase.columns={columns}: {row[PLACE]}"
            raise ValueError(f"{what}: {column!r} is a text or a list of texts, and not {row[column]!r:.60}")
    return rows


def templates_of(settings: Robustness) -> list[Template]:
    """The templates of the attack `prefix`. Raises ValueError where the file has none, or one that is none."""
    from unlearn.attacks.asking import Template

    file = Path(settings.prefix.templates or TEMPLATES)
    what = f"prefix.templates={file}"
    if not file.is_file():
        raise ValueError(f"{what}: no such file")
    try:
        found = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{what}: not YAML ({error})") from error
    if not isinstance(found, list) or not found:
        raise ValueError(f"{what}: needs a list of templates, each of name, question and start")
    for one in found:
        texts = isinstance(one, dict) and all(isinstance(text, str) for text in one.values())
        if not texts or "name" not in one or not one.keys() <= {"name", "question", "start"}:
            raise ValueError(f"{what}: a template has the texts name, question and start, and not {one!r:.60}")
        if not one["name"].replace("-", "_").isidentifier() or one["name"] in ("plain", "mean", "worst"):
            raise ValueError(f"{what}: name={one['name']}: needs to be a word, and not plain, mean or worst")
    names = [one["name"] for one in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{what}: name={twice[0]} is there twice")
    try:
        return [Template(**one) for one in found]
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
