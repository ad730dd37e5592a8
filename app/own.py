"""A benchmark's own scores: those that its YAML names under `own`, measured, compared with the retain model's, and written."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from functools import partial
from typing import Any

from hydra.utils import instantiate

from app import evaluating
from app.data import PLACE, Rows, data_of, hash_text
from app.extraction_tables import write_table
from app.settings import EvalTofu
from utils import is_main_process, say

Sets = dict[str, dict[str, Rows]]  # by score, by what its function calls them


def check_own(settings: EvalTofu) -> None:
    """Raises ValueError where a set that a score is of is not there, or wrong."""
    data = data_of(settings)
    for name in dict.fromkeys(name for own in settings.benchmark.own.values() for name in own.sets.values()):
        data.check(name, continued=True)
    for score, own in settings.benchmark.own.items():
        _check_function(f"benchmark={settings.benchmark.name}: own.{score}.score", own.score, None, **own.sets)
        if own.against:
            _check_function(
                f"benchmark={settings.benchmark.name}: own.{score}.against", own.against, found=None, of_retrained=None
            )


def _check_function(key: str, config: dict[str, Any], *args: Any, **named: Any) -> None:
    """Raises ValueError where a function is not there, or does not take what it will be given."""
    target = config.get("_target_")
    try:
        inspect.signature(instantiate(config)).bind(*args, **named)
    except TypeError as error:
        raise ValueError(f"{key}: {target}: {error}; its sets are {', '.join(named)}") from error
    except Exception as error:  # whatever importing a module can raise
        raise ValueError(f"{key}: {target}: no function that can be imported") from error


def read_own(settings: EvalTofu) -> Sets:
    """The rows that each score is of, `ds_size` of a set at most."""
    data = data_of(settings)
    names = dict.fromkeys(name for own in settings.benchmark.own.values() for name in own.sets.values())
    rows = {name: data.rows(name)[: settings.ds_size] for name in names}
    return {score: {key: rows[name] for key, name in own.sets.items()} for score, own in settings.benchmark.own.items()}


def measure_own(settings: EvalTofu, models: evaluating.Models, sets: Sets, path: str, score: str) -> dict[str, Any]:
    """One score of a model: its `totals` and `rows`."""
    from unlearn.scores.asking import Asked

    how = models.at(path)
    found = instantiate(settings.benchmark.own[score].score)(Asked(how, models.tokenizer), **sets[score])
    return {"totals": found.totals, "rows": found.rows}


def evaluate_own(
    settings: EvalTofu, target: evaluating.Target, sets: Sets, measure: Callable[[str, str], dict[str, Any]]
) -> None:
    own = settings.benchmark.own
    hashes = {own[score].sets[key]: hash_all(rows) for score, of in sets.items() for key, rows in of.items()}
    retain = settings.retain_path if any(one.against for one in own.values()) else None
    progress = evaluating.Progress(settings, target, "own_scores", [target.path, *([retain] if retain else [])], hashes)
    if progress.finished and progress.same:
        return say(f"{target.path} has its own scores already: {target.folder}")
    measured = {score: progress.part(score, partial(measure, target.path, score)) for score in own}
    totals = {score: dict(found["totals"]) for score, found in measured.items()}
    for score, one in own.items():
        if one.against is None:
            continue
        if retain is None:
            totals[score][""] = f"not available: no retain model; give retain_path=MODEL{such_as(settings)}"
            continue
        other = progress.part(f"{score}_retain_model", partial(measure, retain, score))["totals"]
        totals[score] |= {f"retain_model_{key}": value for key, value in other.items()}
        totals[score] |= instantiate(one.against)(found=measured[score]["totals"], of_retrained=other)
    if is_main_process():
        write(settings, target, progress, measured, totals)
    progress.close()
    report(totals, sets)
    say(f"{target.path}: rows and scores are in {target.folder}")


def such_as(settings: EvalTofu) -> str:
    published = settings.benchmark.retain_models.get(settings.model_family)
    return f", such as {published}" if published else ""


def hash_all(rows: Rows) -> str:
    """A hash of all that the rows have."""
    return hash_text(json.dumps([{key: value for key, value in row.items() if key != PLACE} for row in rows]))


def write(
    settings: EvalTofu,
    target: evaluating.Target,
    progress: evaluating.Progress,
    measured: dict[str, dict[str, Any]],
    totals: dict[str, dict[str, Any]],
) -> None:
    for score, found in measured.items():
        write_table(target.folder / f"{score}_rows.csv", found["rows"])
    flat = {f"{score}_{key}".rstrip("_"): value for score, of in totals.items() for key, value in of.items()}
    said = {score: what(one.score) for score, one in settings.benchmark.own.items()}
    said |= {f"{score}, beside": what(one.against) for score, one in settings.benchmark.own.items() if one.against}
    sections = {"own": flat, "definitions": said, "from": {"own_scores": progress.record}}
    evaluating.write_scores(target, sections)
    numbers = {key: None if isinstance(value, str) else value for key, value in flat.items()}  # not why there is none
    evaluating.add_row(target, {"split": settings.split, "ds_size": settings.ds_size} | numbers)


def what(function: dict[str, Any]) -> str:
    """What a function says of itself, before its arguments."""
    found = instantiate(function)
    text = inspect.getdoc(getattr(found, "func", found)) or ""
    return " ".join(text.partition("\nArgs:")[0].split())


def report(totals: dict[str, dict[str, Any]], sets: Sets) -> None:
    """The scores as a small table on standard error."""
    for score, of in totals.items():
        more = "  ".join(f"{key} {evaluating.told(value)}" for key, value in of.items() if key)
        rows = len(next(iter(sets[score].values())))
        say(f"{score:9} {evaluating.told(of.get('', float('nan')))}  {more}  ({rows} rows)")
