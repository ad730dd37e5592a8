"""What both evaluation scripts share: which model, which rows, where to go on, and where the results go."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from omegaconf import DictConfig, OmegaConf, open_dict

import settings
import utils
from app.families import Family, load_families, load_family
from app.places import find_path
from unlearn.io.files import remove_whole, write_whole
from unlearn.io.rows import read_json, read_object, write_json
from unlearn.io.weights import TOKENIZER, fingerprint, is_of, lacks_tokenizer, run_checkpoints, step_of, weights_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from unlearn.objectives.rows import Row
    from unlearn.passes.forcing import Pass

# What is not given is as the checkpoint's run has it.
INHERITED = (
    *("model_family", "hf_key", "split", "data_path", "forget_data", "retain_data"),
    *("retain_holdout", "max_length", "loss_on_answer_tag"),
)
# What may differ when an evaluation is started again.
MAY_DIFFER = {"batch_size", "processes", "parallel", "model_path", "save_dir"}


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


def prepare(cfg: DictConfig, config_name: str) -> Family:
    """Fill in what the run and the family decide, and refuse what cannot work before anything is loaded."""
    for key in ("model_family", "split", "model_path", "original_path", "retain_path", "retain_result"):
        if key in cfg and not OmegaConf.is_missing(cfg, key) and cfg[key] == "":
            cfg[key] = None
    for key in ("model_path", "original_path", "retain_path", "retain_result", "save_dir"):
        if key in cfg and not OmegaConf.is_missing(cfg, key) and not isinstance(cfg[key], str | None):
            raise ValueError(f"{key}={cfg[key]}: needs to be a text")
    if not cfg.model_path:
        raise ValueError("model_path is missing: the folder (or hub name) of the model to evaluate")
    cfg.model_path = find_path(cfg.model_path)
    if not run_checkpoints(Path(cfg.model_path)):
        settings.check_checkpoint("model_path", cfg.model_path)
    inherit(cfg)
    family = settings.prepare(cfg, config_name)
    settings.check_forget_data(cfg)
    for key in ("original_path", "retain_path"):
        if cfg[key] is not None:
            cfg[key] = find_path(cfg[key])
            settings.check_checkpoint(key, cfg[key])
            settings.check_architecture(key, cfg[key], family)
    utils.check_trained_on(utils.run_of(cfg.model_path), cfg)
    for target in targets(cfg):
        settings.check_folder(target.folder)
        settings.check_architecture("model_path", target.path, family)
    return family


def inherit(cfg: DictConfig) -> None:
    """Fill in what is not given: as the checkpoint's run has it, or the run that fine-tuned it."""
    folders = (Path(cfg.model_path), Path(cfg.model_path).parent)
    saved = next((found for folder in folders if "model_family" in (found := utils.saved_settings(folder))), {})
    if "method" not in saved:  # fine-tuned on a retain split: the rows that it has not seen are to forget
        unseen = {retain: forget for forget, retain in utils.RETAIN_OF.items()}
        saved = saved | {"split": unseen.get(saved.get("split", ""))}
    given = None if OmegaConf.is_missing(cfg, "model_family") else cfg.model_family
    family = given and load_family(given).name
    if family and saved.get("model_family", family) != family:
        raise ValueError(f"model_family={given}: {cfg.model_path} is of the family {saved['model_family']}")
    with open_dict(cfg):
        for key in INHERITED:
            if (OmegaConf.is_missing(cfg, key) or cfg[key] is None) and saved.get(key) is not None:
                cfg[key] = saved[key]
    if OmegaConf.is_missing(cfg, "model_family") or cfg.model_family is None:
        raise ValueError(
            f"model_family is missing, and {cfg.model_path} is of no run; the families are {', '.join(load_families())}"
        )
    if cfg.split is None:
        raise ValueError(f"split is missing; to unlearn is one of {', '.join(utils.FORGET_SPLITS)}")
    cfg.split = cfg.split.removesuffix("_perturbed")
    cfg.max_length = 500 if cfg.max_length is None else cfg.max_length
    cfg.loss_on_answer_tag = bool(cfg.loss_on_answer_tag)


def targets(cfg: DictConfig) -> list[Target]:
    """The checkpoint, or all of a run's folder and the original model as its step 0."""
    name = f"eval_results/ds_size{cfg.ds_size}"
    here = Path(cfg.model_path)
    if not here.is_dir():  # of the hub: a folder of its name would be taken for the model itself
        here = Path(cfg.output_dir, cfg.model_path.replace("/", "--"))
    inside = run_checkpoints(here)
    if not inside:
        run = utils.run_of(str(here.parent)) if step_of(here) is not None else None
        folder = Path(cfg.save_dir) if cfg.save_dir else here / name
        return [Target(cfg.model_path, folder, step_of(here), run, None if cfg.save_dir else run)]
    found = [Target(str(path), path / name, step, here, here) for step, path in inside]
    if (original := original_of(cfg)) is not None:
        found.insert(0, Target(original, here / "original" / name, 0, here, here))
    if cfg.save_dir is not None:
        to = Path(cfg.save_dir)
        return [Target(one.path, to / f"checkpoint-{one.step}", one.step, one.run, to) for one in found]
    return found


def original_of(cfg: DictConfig) -> str | None:
    """The model before unlearning: `original_path`, else what the checkpoint's run started from; None where there is none."""
    run = utils.run_of(cfg.model_path)
    path = cfg.original_path or (run and utils.saved_settings(run)["model_path"])
    return find_path(path) if path else None


# ---- models and rows ----


class Models:
    """One model in memory that takes the weights of each path in turn; none is read twice.

    Weights that are kept are kept on the CPU: on a GPU there is one model, however many are mixed.
    """

    def __init__(self, cfg: DictConfig, family: Family, keep: bool = False) -> None:
        self.cfg, self.family, self.keep = cfg, family, keep
        self.how: Pass | None = None
        self.weights: dict[str, dict[str, Tensor]] = {}
        self.now: str | None = None

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

        from unlearn.io.weights import lacks_tokenizer
        from unlearn.models.checkpoints import load, pad_id
        from unlearn.models.sharding import shard
        from unlearn.passes.forcing import Pass

        float64 = self.cfg.dtype == "float64"
        bf16 = not float64 and utils.use_bfloat16(self.cfg.dtype, self.family)
        kind = torch.float64 if float64 else torch.float32
        made_here = lacks_tokenizer(path) and self.family.from_scratch  # then it is with the family's fine-tuned model
        beside = utils.original_model(self.family, self.cfg) if made_here else self.family.hf_key
        self.tokenizer, model = load(path, beside, utils.model_device(self.cfg), dtype=kind)
        if self.cfg.parallel == "fsdp":
            shard(model, bf16)
        return Pass(model, pad_id(self.tokenizer), self.tokenizer.eos_token_id, bf16, self.cfg.batch_size)

    def tokenize(self, rows: Sequence[Mapping[str, Any]]) -> list[Row]:
        """Question-answer rows to tokens, no more than the model has positions for."""
        import dataloader
        from unlearn.passes.decoding import positions_of

        assert self.how is not None
        positions = positions_of(self.how.model) or self.cfg.max_length
        return dataloader.tokenize(rows, self.tokenizer, self.family, min(self.cfg.max_length, positions), self.how.model)


# ---- going on where it was ----


class Progress:
    """The parts of one evaluation, each kept in the results' folder until the whole is written: a killed one goes on there."""

    def __init__(
        self, cfg: DictConfig, target: Target, name: str, may_differ: set[str], weights: list[str], data: dict[str, str]
    ) -> None:
        """Results of other weights are dropped.

        Args:
            weights: the models whose results these are.
            data: a hash of each set's rows.

        Raises:
            ValueError: the folder holds an evaluation of other settings or data.
        """
        self.target, self.resume = target, target.folder / "resume" / name
        self.record_file = target.folder / f"{name}.yaml"
        utils.check_run(target.folder, cfg, MAY_DIFFER | may_differ, self.record_file.name, {"data": data})
        self.record = utils.record_of(cfg, {"data": data} | _models(cfg, weights))
        before = utils.read_record(self.record_file) if self.record_file.exists() else {}
        self.fresh = not _same_models(before, self.record)
        self.finished = not self.fresh and before.get("finished") is True
        self.same = not self.fresh and _what_counts(before["settings"]) == _what_counts(self.record["settings"])
        self.found = {} if self.fresh else {file.stem: read_json(file) for file in self.resume.glob("*.json")}
        _together()  # all have read before one writes
        if utils.is_main_process():
            if self.fresh:
                shutil.rmtree(self.resume, ignore_errors=True)
            if not self.finished:
                self._note()

    def part(self, name: str, measure: Callable[[], Any]) -> Any:
        """What `measure` gives, as JSON gives it back; found where an earlier start left it."""
        if name not in self.found:
            value = measure()
            if utils.is_main_process():
                write_whole(self.resume / f"{name}.json", json.dumps(value))
            self.found[name] = json.loads(json.dumps(value))
        return self.found[name]

    def close(self) -> None:
        """All that the evaluation writes is written."""
        if utils.is_main_process():
            self._note(finished=True)
            remove_whole(self.resume)
            if self.resume.parent.exists() and not any(self.resume.parent.iterdir()):
                self.resume.parent.rmdir()

    def _note(self, **more: Any) -> None:
        write_whole(self.record_file, yaml.safe_dump(self.record | more, sort_keys=False))


def _models(cfg: DictConfig, paths: Sequence[str]) -> dict[str, Any]:
    """What tells each model from others; and the family's tokenizer, where one has none of its own."""
    borrowed = Path(cfg.hf_key).is_dir() and any(map(lacks_tokenizer, paths))
    return {
        "weights": {path: weights_of(path) for path in paths},
        "tokenizer": fingerprint(Path(cfg.hf_key), TOKENIZER) if borrowed else None,
    }


def _same_models(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a record is of these models, as far as what an earlier version noted tells."""
    noted = before.get("weights")
    if not isinstance(noted, dict) or noted.keys() != now["weights"].keys():
        return False
    return before.get("tokenizer", now["tokenizer"]) == now["tokenizer"] and all(map(is_of, noted, noted.values()))


def _what_counts(made_of: dict[str, Any]) -> dict[str, Any]:
    """Of a record's settings those that results depend on."""
    return {key: value for key, value in made_of.items() if key not in MAY_DIFFER | utils.PLACES}


def _together() -> None:
    if utils.processes() > 1:
        from accelerate import PartialState

        utils.device()
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
    if table is not None and utils.is_main_process():
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
