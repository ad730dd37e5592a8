"""What both evaluations share: which model, which rows, where to go on, and where the results go."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from app.checks import check_architecture, check_checkpoint, check_folder
from app.data import check_unlearning_data, data_of
from app.families import Family
from app.fields import marked
from app.filling import of_checkpoint, with_family
from app.places import find_path
from app.runs import check_run, check_trained_on, original_model, read_record, record_of, run_of, saved_settings
from app.settings import Evaluation
from unlearn.io.files import remove_whole, write_whole
from unlearn.io.rows import read_json, read_object, write_json
from unlearn.io.weights import TOKENIZER, fingerprint, is_of, lacks_tokenizer, run_checkpoints, step_of, weights_of
from utils import device, is_main_process, model_device, processes, use_bfloat16

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from unlearn.objectives.rows import Row
    from unlearn.passes.forcing import Pass

Some = TypeVar("Some", bound=Evaluation)


@dataclass(frozen=True)
class Target:
    """A model to evaluate and the folder for its results; `step` and `run` where it is a checkpoint of a run.

    `table` is the folder of the scores.csv that its row goes to: the run's; with `save_dir` that, for a whole run, and none for
    one checkpoint.
    """

    path: str
    folder: Path
    step: int | None = None
    run: Path | None = None
    table: Path | None = None


# ---- what to evaluate ----


def prepare(settings: Some) -> tuple[Some, Family]:
    """The settings with what the run and the family decide; refuses what cannot work before anything is loaded."""
    if not settings.model_path:
        raise ValueError("model_path is missing: the folder (or hub name) of the model to evaluate")
    paths = ("original_path", "retain_path", "retain_result", "model_family", "split")
    given = {key: getattr(settings, key, None) or None for key in paths if key in type(settings).model_fields}
    settings = settings.model_copy(update=given | {"model_path": find_path(settings.model_path)})
    if not run_checkpoints(Path(settings.model_path)):
        check_checkpoint("model_path", settings.model_path)
    settings, family = with_family(of_checkpoint(settings))
    data = data_of(settings)
    check_unlearning_data(data, settings.split, settings.retain_holdout)
    for further in settings.benchmark.also.values():
        data.check(further)
    found = {key: find_path(path) for key in ("original_path", "retain_path") if (path := getattr(settings, key)) is not None}
    for key, path in found.items():
        check_checkpoint(key, path)
        check_architecture(key, path, family)
    settings = settings.model_copy(update=found)
    check_trained_on(run_of(settings.model_path), settings, settings.split)
    for target in targets(settings):
        check_folder(target.folder)
        check_architecture("model_path", target.path, family)
    return settings, family


def targets(settings: Evaluation) -> list[Target]:
    """The checkpoint, or all of a run's folder and the original model as its step 0."""
    name = f"eval_results/ds_size{getattr(settings, 'ds_size', None)}"
    here = Path(settings.model_path)
    if not here.is_dir():  # of the hub: a folder of its name would be taken for the model itself
        here = Path(settings.output_dir, settings.model_path.replace("/", "--"))
    inside = run_checkpoints(here)
    to = None if settings.save_dir is None else Path(settings.save_dir)
    if not inside:
        run = run_of(str(here.parent)) if step_of(here) is not None else None
        return [Target(settings.model_path, to or here / name, step_of(here), run, None if to else run)]
    found = [Target(str(path), path / name, step, here, here) for step, path in inside]
    if (original := original_of(settings)) is not None:
        found.insert(0, Target(original, here / "original" / name, 0, here, here))
    if to is not None:
        return [Target(one.path, to / f"checkpoint-{one.step}", one.step, one.run, to) for one in found]
    return found


def original_of(settings: Evaluation) -> str | None:
    """The model before unlearning: `original_path`, else what the checkpoint's run started from; None where there is none."""
    run = run_of(settings.model_path)
    path = settings.original_path or (run and saved_settings(run)["model_path"])
    return find_path(path) if path else None


# ---- models and rows ----


class Models:
    """One model in memory that takes the weights of each path in turn; none is read twice.

    Weights that are kept are kept on the CPU: on a GPU there is one model, however many are mixed.
    """

    def __init__(self, settings: Evaluation, family: Family, keep: bool = False) -> None:
        self.settings, self.family, self.keep = settings, family, keep
        self.how: Pass | None = None
        self.weights: dict[str, dict[str, Tensor]] = {}
        self.now: str | None = None
        self._check_tokenizers()

    def _check_tokenizers(self) -> None:
        """Raises ValueError where a model that is compared with reads texts as other tokens than the one that is evaluated."""
        from unlearn.models.checkpoints import same_tokens

        *others, own = (target.path for target in targets(self.settings))
        named = [("model_path", other) for other in others]
        named += [(key, getattr(self.settings, key)) for key in ("original_path", "retain_path")]
        for key, path in named:
            if path is not None and not same_tokens((own, self._beside(own)), (path, self._beside(path))):
                raise ValueError(
                    f"{key}={path}: its tokenizer makes other tokens of texts than that of {own}, so that no score compares;"
                    " finetune.py gives the models of a family made from scratch the same one where data_path, or both"
                    " forget_data and retain_data, are the same (split=retain90: on the rows to keep alone)"
                )

    def _beside(self, path: str) -> str:
        """Where the model's tokenizer is if it has none of its own."""
        made_here = lacks_tokenizer(path) and self.family.from_scratch  # then it is with the family's fine-tuned model
        return original_model(self.settings, self.family) if made_here else self.family.hf_key

    def at(self, path: str) -> Pass:
        """The model with the weights at `path`, ready to be run."""
        if self.how is None:
            self.how, self.now = self._load(path), path
            if self.keep:
                self.of(path)
        elif path != self.now:
            from unlearn.scores.control import put

            put(self.how.model, self.of(path))
            self.now = path
        return self.how

    def mixed(self, mix: Callable[[PreTrainedModel], None]) -> Pass:
        """The model with weights of no path: what `mix` puts into it."""
        assert self.how is not None
        mix(self.how.model)
        self.now = None
        return self.how

    def of(self, path: str) -> dict[str, Tensor]:
        """The weights at `path`, kept where `keep` says so."""
        from unlearn.models.checkpoints import read_weights
        from unlearn.scores.control import kept

        how = self.at(path) if self.how is None else self.how
        if path in self.weights:
            return self.weights[path]
        if path == self.now:
            found = {name: kept(parameter) for name, parameter in how.model.named_parameters()}
        else:
            found = read_weights(how.model, path, *([] if how.model.device.type == "cpu" else [kept]))
        if self.keep:
            self.weights[path] = found
        return found

    def drop(self, path: str) -> None:
        """Keep these weights no longer."""
        self.weights.pop(path, None)

    def _load(self, path: str) -> Pass:
        import torch

        from unlearn.models.checkpoints import load, pad_id
        from unlearn.models.sharding import shard
        from unlearn.passes.forcing import Pass

        float64 = self.settings.dtype == "float64"
        bf16 = not float64 and use_bfloat16(self.settings.dtype, self.family.dtype)
        kind = torch.float64 if float64 else torch.float32
        self.tokenizer, model = load(path, self._beside(path), model_device(self.settings.parallel), dtype=kind)
        if self.settings.parallel == "fsdp":
            shard(model, bf16)
        at_once = self.settings.batch_size, self.settings.tokens_per_batch
        return Pass(model, pad_id(self.tokenizer), self.tokenizer.eos_token_id, bf16, *at_once)

    def tokenize(self, rows: Sequence[Mapping[str, Any]]) -> list[Row]:
        """Question-answer rows to tokens, no more than the model has positions for."""
        import dataloader
        from unlearn.passes.decoding import positions_of

        assert self.how is not None
        positions = positions_of(self.how.model) or self.settings.max_length
        return dataloader.tokenize(rows, self.tokenizer, self.family, min(self.settings.max_length, positions), self.how.model)


# ---- going on where it was ----


class Progress:
    """The parts of one evaluation, each kept in the results' folder until the whole is written: a killed one goes on there."""

    def __init__(self, settings: Evaluation, target: Target, name: str, weights: list[str], data: dict[str, str]) -> None:
        """Results of other weights are dropped.

        Args:
            weights: the models whose results these are.
            data: a hash of each set's rows.

        Raises:
            ValueError: the folder holds an evaluation of other settings or data.
        """
        self.target, self.resume = target, target.folder / "resume" / name
        self.record_file = target.folder / f"{name}.yaml"
        check_run(target.folder, settings, {"data": data}, self.record_file.name)
        self.record = record_of(settings, {"data": data} | made_of(settings, weights))
        before = read_record(self.record_file) if self.record_file.exists() else {}
        self.fresh = not _same_models(before, self.record)
        self.finished = not self.fresh and before.get("finished") is True
        self.same = not self.fresh and _same_results(before["settings"], self.record["settings"])
        self.found = {} if self.fresh else {file.stem: read_json(file) for file in self.resume.glob("*.json")}
        together()  # all have read before one writes
        if is_main_process():
            if self.fresh:
                shutil.rmtree(self.resume, ignore_errors=True)
            if not self.finished:
                self._note()

    def part(self, name: str, measure: Callable[[], Any]) -> Any:
        """What `measure` gives, as JSON gives it back; found where an earlier start left it."""
        if name not in self.found:
            value = measure()
            if is_main_process():
                write_whole(self.resume / f"{name}.json", json.dumps(value))
            self.found[name] = json.loads(json.dumps(value))
        return self.found[name]

    def close(self) -> None:
        """All that the evaluation writes is written."""
        if is_main_process():
            self._note(finished=True)
            remove_whole(self.resume)
            if self.resume.parent.exists() and not any(self.resume.parent.iterdir()):
                self.resume.parent.rmdir()

    def _note(self, **more: Any) -> None:
        write_whole(self.record_file, yaml.safe_dump(self.record | more, sort_keys=False))


def made_of(settings: Evaluation, paths: Sequence[str]) -> dict[str, Any]:
    """What tells each model from others; and the family's tokenizer, where one has none of its own."""
    borrowed = Path(str(settings.hf_key)).is_dir() and any(map(lacks_tokenizer, paths))
    return {
        "weights": {path: weights_of(path) for path in paths},
        "tokenizer": fingerprint(Path(str(settings.hf_key)), TOKENIZER) if borrowed else None,
    }


def _same_models(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a record is of these models, as far as what an earlier version noted tells."""
    noted = before.get("weights")
    if not isinstance(noted, dict) or noted.keys() != now["weights"].keys():
        return False
    return before.get("tokenizer", now["tokenizer"]) == now["tokenizer"] and all(map(is_of, noted, noted.values()))


def _same_results(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether results depend on nothing that differs; what an earlier version did not note is taken to be the same."""
    of_no_result = marked(Evaluation, "may_differ") - {"retain_path"} | {"processes"}
    named = {key for key in now if key not in of_no_result and not key.startswith("lm_eval")}  # those say what they are of
    return all(before.get(key, now[key]) == now[key] for key in named)


def together() -> None:
    if processes() > 1:
        from accelerate import PartialState

        device()
        PartialState().wait_for_everyone()


# ---- results ----


def write_scores(target: Target, sections: dict[str, Any]) -> None:
    """Put these sections into the folder's scores.json; what another script wrote there stays."""
    file = target.folder / "scores.json"
    before = read_object(file) if file.exists() else {}
    for shared in ("definitions", "from"):
        sections[shared] = before.get(shared, {}) | sections[shared]
    write_json(file, no_nan(before | sections))


def add_row(target: Target, values: dict[str, Any]) -> None:
    """Add the scores to the table that they go to, a row a step."""
    if target.table is not None and target.step is not None:
        from unlearn.scores.callback import add_row

        add_row(target.table / "scores.csv", target.step, values)


def draw_run(found: list[Target]) -> None:
    """Draw the trajectories of the run that the checkpoints are of, where their table is."""
    table = found[-1].table
    if table is not None and is_main_process():
        from unlearn.reporting.score_figures import draw_scores

        draw_scores(table)


def no_nan(value: Any) -> Any:
    """The same with `not available` in place of what has no value: JSON has no nan, and null would be silent."""
    if isinstance(value, dict):
        return {key: no_nan(one) for key, one in value.items()}
    return "not available" if isinstance(value, float) and value != value else value


def told(value: Any, digits: int = 4) -> str:
    """A score as it is printed."""
    known = isinstance(value, int | float) and value == value
    return f"{value:.{digits}f}" if known else value if isinstance(value, str) else "not available"
