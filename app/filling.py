"""Settings with what was not given filled in: by the model family, by the run that is measured, by a command's defaults."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from app.benchmark import Benchmark
from app.compose import given, group
from app.families import Family, load_families, load_family
from app.fields import marked, parse
from app.methods import choices
from app.places import find_path
from app.runs import saved_settings
from app.settings import Columns, Common, Evaluation, GEffects, InheritedAdapters, Method, Retain, Rule, Training
from unlearn.io.weights import OF_A_MODEL, other_weights, why_no_checkpoint
from utils import be_deterministic

Some = TypeVar("Some", bound=Common)
Of = TypeVar("Of", GEffects, Evaluation)


def with_family(settings: Some) -> tuple[Some, Family]:
    """The settings with what the model family decides, and the family.

    Raises:
        ValueError: there is no such family, or what it would be made from scratch of is more than a config.json.
    """
    if not settings.model_family:
        missing = "model_family is missing" if settings.model_family is None else "model_family=: unknown"
        raise ValueError(f"{missing}; the families are {', '.join(load_families())}")
    family = load_family(
        settings.model_family,
        hf_key=settings.hf_key,
        data_path=settings.data_path,
        loss_on_answer_tag=settings.loss_on_answer_tag,
    )
    benchmark = benchmark_of(settings)
    of_family = benchmark.name in ("tofu", "local") or settings.data_path is not None
    hf_key, data_path = find_path(family.hf_key), find_path((None if of_family else benchmark.data_path) or family.data_path)
    if family.from_scratch:
        _check_from_scratch(family.name, hf_key)
    more: dict[str, Any] = {"model_family": family.name, "hf_key": hf_key, "data_path": data_path, "benchmark": benchmark}
    if isinstance(settings, Training | GEffects) and settings.gradient_checkpointing is None:
        more["gradient_checkpointing"] = family.gradient_checkpointing
    be_deterministic(settings.deterministic)
    more["save_dir"] = settings.save_dir or None
    more["max_length"] = settings.max_length or benchmark.max_length
    return settings.model_copy(update=more), replace(family, hf_key=hf_key, data_path=data_path)


def benchmark_of(settings: Common) -> Benchmark:
    """The one that was chosen; `local` where files of one's own are given."""
    files = settings.forget_data is not None or settings.retain_data is not None
    if files and (settings.benchmark is None or settings.benchmark.name == "tofu"):
        return benchmark("local")
    return settings.benchmark or benchmark("tofu")


def benchmark(name: str) -> Benchmark:
    return parse(Benchmark, group("benchmark", name), "benchmark")


def _check_from_scratch(name: str, hf_key: str) -> None:
    if not Path(hf_key, "config.json").exists():
        raise ValueError(f"hf_key={hf_key}: needs to be a folder with a config.json, {name} being made from scratch")
    if others := other_weights(Path(hf_key), OF_A_MODEL):
        below = [other for other in others if "/" in other]
        why = f"a folder without a checkpoint of its own, but for {below[0]}" if below == others else None
        raise ValueError(
            f"hf_key={hf_key}: {why or why_no_checkpoint(Path(hf_key)) or ''}; a new model is made where nothing of one is but"
            f" a config.json, and there is {', '.join(others[:3])}"
        )


# ---- from the run that is measured ----


def _inherited(settings: Of, saved: dict[str, Any]) -> dict[str, Any]:
    """What was not given and the run has."""
    keys = marked(type(settings), "inherited")
    found = {key: saved[key] for key in keys if getattr(settings, key) is None and saved.get(key) is not None}
    if "benchmark" in found:
        found["benchmark"] = benchmark(found["benchmark"])
    given = {name: theirs for name, theirs in settings.columns if theirs is not None}
    found["columns"] = Columns(**saved.get("columns", {}) | given)
    return found


def of_run(settings: GEffects, run: Path | None) -> GEffects:
    """The settings of a measurement with what was not given: as the run has it, else as forget.py has it."""
    saved = {} if run is None else saved_settings(run)
    default = given("forget")
    more = _inherited(settings, saved)
    for key in marked(GEffects, "inherited"):
        if getattr(settings, key) is None and key not in more:
            more[key] = getattr(default, key)
    lora = {key: value for key, value in settings.LoRA if value is not None}
    more["LoRA"] = InheritedAdapters(**default.LoRA.model_dump() | saved.get("LoRA", {}) | lora)
    if settings.method is None:
        if not saved:
            raise ValueError(f"method is missing; there are {', '.join(choices('method'))}")
        more["method"] = Method.model_validate(saved["method"])
        more["retain"] = settings.retain or Retain.model_validate(saved["retain"])
        more["rule"] = settings.rule or (Rule.model_validate(saved["rule"]) if "rule" in saved else default.rule)
        more["hyper_param"] = saved["hyper_param"] if settings.hyper_param is None else settings.hyper_param
    else:
        more["retain"] = settings.retain or default.retain
        more["rule"] = settings.rule or default.rule
    return settings.model_copy(update=more)


EvaluationOf = TypeVar("EvaluationOf", bound=Evaluation)


def of_checkpoint(settings: EvaluationOf) -> EvaluationOf:
    """The settings of an evaluation with what was not given: as the checkpoint's run has it, or the run that fine-tuned it."""
    folders = (Path(settings.model_path), Path(settings.model_path).parent)
    saved = next((found for folder in folders if "model_family" in (found := saved_settings(folder))), {})
    asked = settings.model_family and load_family(settings.model_family).name
    if asked and saved.get("model_family", asked) != asked:
        raise ValueError(
            f"model_family={settings.model_family}: {settings.model_path} is of the family {saved['model_family']}"
        )
    more = _inherited(settings, saved)
    if not (settings.model_family or more.get("model_family")):
        raise ValueError(
            f"model_family is missing, and {settings.model_path} is of no run; the families are {', '.join(load_families())}"
        )
    filled = settings.model_copy(update=more)
    of = benchmark_of(filled)
    split = filled.split
    if settings.split is None and "method" not in saved:  # fine-tuned on a retain split: the rows it has not seen are to forget
        unseen = {name: split for split, sets in of.unlearn.items() for name in sets.retain}
        split = unseen.get(saved.get("split", "")) or (
            next(iter(of.unlearn)) if of.name == "local" or len(of.unlearn) == 1 else None
        )
    if split is None:
        raise ValueError(f"split is missing; to unlearn is one of {', '.join(of.unlearn)}")
    return filled.model_copy(
        update={
            "split": split.removesuffix("_perturbed"),
            "benchmark": of,
            "max_length": filled.max_length or of.max_length,
            "loss_on_answer_tag": bool(filled.loss_on_answer_tag),
        }
    )
