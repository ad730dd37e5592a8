"""The package lm-eval's tasks on the models of an evaluation: `lm_eval=[mmlu,wmdp_bio]`."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app import evaluating
from app.places import find_path
from app.runs import record_of
from app.settings import EvalEverything
from unlearn.io.rows import read_object, write_json
from utils import device, is_main_process, say

if TYPE_CHECKING:
    from unlearn.scores.harness import Asked

FILE = "lm_eval.json"
Known = dict[str, Any]  # the library's results, by what they are of
OTHERS = ("lm_eval_tasks", "lm_eval_fewshot", "lm_eval_limit")
OURS = ("forget", "retain", "real_authors", "real_world", "control", "auc")  # how other scores' columns begin


def check(settings: EvalEverything) -> None:
    """Raises ValueError where the tasks can't be asked, as far as that is told without them."""
    if settings.lm_eval is None:
        for key in OTHERS:
            if (value := getattr(settings, key)) is not None:
                raise ValueError(f"{key}={value}: of which tasks? give lm_eval=[TASK,...]")
        return
    names = f"lm_eval=[{','.join(settings.lm_eval)}]"
    if settings.parallel == "fsdp":
        raise ValueError(f"{names}: the library runs whole models, each process on questions of its own; parallel=ddp")
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(f"{names}: of the package lm-eval, which is not installed; pip install lm-eval")
    if settings.lm_eval_tasks is not None and not any(Path(find_path(settings.lm_eval_tasks)).rglob("*.yaml")):
        raise ValueError(f"lm_eval_tasks={settings.lm_eval_tasks}: no folder with tasks, a YAML file each")


def ask(settings: EvalEverything) -> dict[str, Asked]:
    """The tasks by their names, with their data; none where none are wanted.

    Raises:
        ValueError: there is no such task, its data can't be had, or it is of a kind that is not run here.
    """
    if settings.lm_eval is None:
        return {}
    from unlearn.scores import harness

    device()
    folder = None if settings.lm_eval_tasks is None else find_path(settings.lm_eval_tasks)
    names = list(dict.fromkeys(settings.lm_eval))
    manager = harness.index(names, folder)
    for name in names:
        if name not in manager.all_tasks:
            raise ValueError(f"lm_eval=[{name}]: no such task{_there(name, manager, folder)}")
    found = {}
    for name in names:
        try:
            found[name] = harness.load(name, manager, settings.lm_eval_fewshot)
        except Exception as error:  # whatever a YAML, its functions, the hub and the disk can raise
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"lm_eval=[{name}]: it can't be loaded ({why:.300})") from error
        _check_kind(found[name], settings)
    return found


def _there(name: str, manager: Any, folder: str | None) -> str:
    """Which names are like it, and which the folder has."""
    close = get_close_matches(name, manager.all_tasks, n=5, cutoff=0.7)
    told = f"; like it are {', '.join(close)}" if close else ""
    if folder is None:
        return told or "; lm_eval_tasks=FOLDER has tasks of one's own, and `lm-eval ls tasks` lists the library's"
    of_folder = [one for one, entry in manager.task_index.items() if Path(folder) in Path(entry.yaml_path or "").parents]
    return f"{told}; {folder} has {', '.join(sorted(of_folder)) or 'none that is read'}"


def _check_kind(asked: Asked, settings: EvalEverything) -> None:
    for task in asked.tasks:
        of = f"lm_eval=[{asked.name}]: its task {task.task_name}"
        if getattr(task, "UNSAFE_CODE", False):
            raise ValueError(f"{of} runs code that the model writes, which is not done here")
        if getattr(task, "MULTIMODAL", False):
            raise ValueError(f"{of} is not of texts alone")
        if task.task_name in (*OURS, *settings.benchmark.also):
            raise ValueError(f"{of} has the name that columns of other scores begin with; give it another")


def known(targets: Iterable[evaluating.Target]) -> Known:
    """What earlier starts have left in the folders, whichever model it is of."""
    found: Known = {}
    for file in (target.folder / FILE for target in targets):
        for of_model in read_object(file).get("results", {}).values() if file.exists() else ():
            found |= {json.dumps(one["of"]): {k: v for k, v in one.items() if k != "of"} for one in of_model.values()}
    evaluating.together()  # all have read before one writes
    return found


def evaluate(
    settings: EvalEverything, target: evaluating.Target, models: evaluating.Models, asked: dict[str, Asked], known: Known
) -> None:
    """One checkpoint's tasks, and those of the original and of the retain model beside it; `known` is added to."""
    paths = {"unlearned": target.path, "original": settings.original_path}
    paths |= {"retain": settings.retain_path} if settings.retain_path else {}
    made_of = evaluating.made_of(settings, list(paths.values()))
    weights = {model: made_of["weights"][path] for model, path in paths.items()}
    record = record_of(settings, made_of)
    found: dict[str, dict[str, Any]] = {model: {} for model in paths}
    measured = False
    for model, path in paths.items():
        for name, one in asked.items():
            of = {"weights": weights[model], "tokenizer": made_of["tokenizer"], "task": one.digest}
            of |= {"fewshot": settings.lm_eval_fewshot, "limit": settings.lm_eval_limit, "dtype": settings.dtype}
            key = json.dumps(of)
            if new := key not in known:
                known[key] = _measure(settings, models, path, one)
            found[model][name] = {"of": of} | (known[key] or {})
            measured |= new
            if new and is_main_process():
                _keep(target.folder / FILE, found, weights, record)
    if is_main_process():
        _write(target, settings, _keep(target.folder / FILE, found, weights, record), record)
    say(f"{target.path}: lm-eval's results are in {target.folder / FILE}" + ("" if measured else ", all of them already"))


def _measure(settings: EvalEverything, models: evaluating.Models, path: str, asked: Asked) -> dict[str, Any] | None:
    from unlearn.scores import harness

    how = models.at(path)
    say(f"lm-eval, {asked.name}, {Path(path).name}")
    found = harness.evaluate(how, models.tokenizer, asked, settings.lm_eval_fewshot, settings.lm_eval_limit)
    return None if found is None else dict(evaluating.no_nan(found))


def _keep(
    file: Path, found: dict[str, dict[str, Any]], weights: dict[str, str], record: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Put results into the file; what it has of these models' other tasks stays. Gives all that it has then."""
    from importlib.metadata import version

    before = read_object(file).get("results", {}) if file.exists() else {}
    results = {}
    for model, of_model in found.items():
        stay = {name: one for name, one in before.get(model, {}).items() if one["of"]["weights"] == weights[model]}
        results[model] = stay | of_model
    versions = record["versions"] | {"lm_eval": version("lm_eval")}
    write_json(file, {"results": results, "from": record | {"versions": versions}})
    return results


def _write(
    target: evaluating.Target, settings: EvalEverything, found: dict[str, dict[str, Any]], record: dict[str, Any]
) -> None:
    """Into scores.json, and into the run's table: the original model's at step 0, the retain model's beside each step's."""
    from unlearn.scores.harness import totals

    of = {
        model: {key: value for name, one in results.items() for key, value in totals(name, one).items()}
        for model, results in found.items()
    }
    for model, values in of.items():
        say(f"{model:9} " + "  ".join(f"{key} {evaluating.told(value)}" for key, value in values.items()))
    said = {"lm_eval": f"<task>_<metric> as the package lm-eval defines it; standard errors and settings: {FILE}"}
    evaluating.write_scores(target, {"lm_eval": of, "definitions": said, "from": {"lm_eval": record}})
    retain = {f"retain_model_{key}": value for key, value in of.get("retain", {}).items()}
    evaluating.add_row(target, {"split": settings.split} | of["unlearned"] | retain)
    if target.run is not None:
        original = evaluating.Target(settings.original_path, target.folder, 0, target.run, target.table)
        evaluating.add_row(original, of["original"])
