"""The edges of a process: configurations, model families, run folders, files read and written whole. No mathematics.

Nothing here imports torch before it must: a mistyped command is answered at once.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import math
import os
import re
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from unlearn.io.files import (
    TOKENIZER,
    base_of,
    count_parameters,
    fingerprint,
    hash_file,
    is_noted,
    lacks_tokenizer,
    locked,
    remove_whole,
    write_whole,
)
from unlearn.io.signals import PATIENCE

if TYPE_CHECKING:
    import torch

    from unlearn.training.trainer import Settings

ROOT = Path(__file__).resolve().parent
CONFIG = ROOT / "config"

FORGET_SPLITS = ("forget01", "forget05", "forget10")
RETAIN_OF = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}
TRAIN_SPLITS = ("full", *RETAIN_OF.values())

# Files with a model's weights, in whatever format, also those put aside; and what else there is of a model but its config.json.
WEIGHTS = r"\.(bin|safetensors|pt|pth|ckpt|h5|msgpack|gguf|npz|onnx|distcp|index\.json)\b|(^|/)adapter_config\.json$"
OF_A_MODEL = WEIGHTS + r"|(^|/)(tokenizer[^/]*|merges\.txt|vocab\.\w+)$"
HUB_TOFU = "locuslab/TOFU"
IDK = ROOT / "data" / "idontknow.jsonl"
TEXTS = ("question", "answer")  # of a row, that training reads
ALL_TEXTS = (*TEXTS, "paraphrased_question", "paraphrased_answer", "perturbed_answer")  # that an evaluation reads
LEAVE = 10.0  # seconds that a process that has failed waits for the others
MOST_STEPS = 10_000_000  # whose rows are drawn before the first

# Keys whose value leaves the weights alone, or stands in a run folder's name already, or is a path.
UNNAMED = {
    *("model_family", "split", "lr", "num_epochs", "weight_decay", "hyper_param", "method.layer"),
    *("model_path", "hf_key", "data_path", "forget_data", "retain_data", "save_dir", "output_dir"),
    *(
        "gradient_checkpointing",
        "parallel",
        "save_steps",
        "keep_last",
        "save_dtype",
        "logger",
        "debug",
        "plan",
        "plan_for",
        "deterministic",
    ),
    *("method.name", "method.run_name", "retain.name", "geffect.offload", "deterministic"),
    *("eval.every", "geffect.every", "geffect.retain_rows", "geffect.instances", "geffect.norms"),
}
# What may differ when a run is started again.
PLACES = {"save_dir", "output_dir", "debug", "logger", "save_steps", "keep_last", "gradient_checkpointing"}

OmegaConf.register_new_resolver(
    "hyper", lambda default, *, _root_: default if _root_.hyper_param is None else _root_.hyper_param, replace=True
)


# ---- configurations ----


def compose_config(config_name: str, overrides: list[str] | None = None) -> DictConfig:
    """A configuration as Hydra composes it, inside a Hydra job or outside."""
    if GlobalHydra.instance().is_initialized():
        return compose(config_name, overrides)
    with initialize_config_dir(str(CONFIG), version_base=None):
        return compose(config_name, overrides)


def defaults_of(cfg: DictConfig, config_name: str) -> DictConfig:
    """The configuration as it is where nothing but the method, the retain term and the hyper-parameter is given."""
    groups = [f"{group}={cfg[group].name}" for group in ("retain", "method") if group in cfg]
    defaults = compose_config(config_name, [f"model_family={cfg.model_family}", *groups])
    if "hyper_param" in cfg:
        defaults.hyper_param = cfg.hyper_param
    return defaults


def flatten(cfg: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings to {dotted key: value}, interpolations resolved."""
    flat: dict[str, Any] = {}
    for key, value in cfg.items():
        flat |= flatten(value, f"{prefix}{key}.") if hasattr(value, "items") else {f"{prefix}{key}": value}
    return flat


# ---- model families ----


TAGS = ("question_start_tag", "question_end_tag", "answer_tag")
PROMPT = (*TAGS, "chat_template", "system_prompt", "date_string")


@dataclass(frozen=True)
class Family:
    """An entry of model_config.yaml; what each key means stands there."""

    name: str
    hf_key: str
    question_start_tag: str = ""
    question_end_tag: str = ""
    answer_tag: str = ""
    chat_template: bool = False
    system_prompt: str | None = None
    date_string: str | None = None
    flash_attention2: bool = False
    gradient_checkpointing: bool = False
    ft_model_path: str | None = None
    retain_model_path: str | None = None
    finetune_lr: float = 1e-5
    finetune_epochs: float = 5
    unlearn_lr: float = 1e-5
    data_path: str = HUB_TOFU
    dtype: str | None = None
    from_scratch: bool = False
    loss_on_answer_tag: bool = False

    def prompt(self, question: str) -> str:
        """What stands before the answer, of a family without a chat template."""
        return f"{self.question_start_tag}{question}{self.question_end_tag}{self.answer_tag}"


def load_families() -> dict[str, Any]:
    """The entries of model_config.yaml by name: a mapping each, or the name that an alias stands for."""
    entries: Any = OmegaConf.to_container(OmegaConf.load(CONFIG / "model_config.yaml"))
    return entries


def load_family(name: str, **overrides: Any) -> Family:
    """The family of that name or alias.

    Raises:
        ValueError: there is none, or its entry lacks a key, or has a chat template and a setting that it cannot go with.
    """
    entries = load_families()
    entry = entries.get(name)
    if isinstance(entry, str):
        name, entry = entry, entries.get(entry)
    if entry is None:
        raise ValueError(f"model_family={name}: unknown; the families of config/model_config.yaml are {', '.join(entries)}")
    known = {field.name: field for field in fields(Family)}
    values: dict[str, Any] = {key: value for key, value in entry.items() if key in known}
    values |= {key: _as_bool(name, key, value) for key, value in values.items() if known[key].type == "bool"}
    values |= {key: value for key, value in overrides.items() if value is not None}
    chat = values.get("chat_template", False)
    if lacking := [key for key in ("hf_key", *(() if chat else TAGS)) if values.get(key) is None]:
        raise ValueError(f"model_family={name}: its entry in config/model_config.yaml lacks {', '.join(lacking)}")
    if chat and values.get("loss_on_answer_tag"):
        raise ValueError(f"loss_on_answer_tag=true: model_family={name} has a chat template, and so no answer tag")
    if chat and values.get("from_scratch"):
        raise ValueError(f"model_family={name}: from_scratch makes a tokenizer without a chat template")
    values["from_scratch"] = values.get("from_scratch", False) and not is_checkpoint(values["hf_key"])
    return Family(**{"name": name, **values})


def _as_bool(name: str, key: str, value: Any) -> bool:
    if str(value).lower() not in ("true", "false"):
        raise ValueError(f"model_family={name}: its {key}={value} in config/model_config.yaml needs to be true or false")
    return str(value).lower() == "true"


# ---- run folders ----


def learning_rate(cfg: DictConfig, of_family: float) -> float:
    """`lr`, else the family's; ten times that for adapters, as in TOFU's code."""
    if cfg.lr is not None:
        return float(cfg.lr)
    return float(f"{of_family * 10:g}") if cfg.LoRA.r else of_family


def finetuned_folder(family: Family, cfg: DictConfig) -> Path:
    """Where finetune.py, by its configuration, puts a model of the family by itself."""
    lr = learning_rate(cfg, family.finetune_lr)
    epochs = family.finetune_epochs if cfg.num_epochs is None else cfg.num_epochs
    name = f"ft_epoch{epochs:g}_lr{float(lr)}_{family.name}_{split_name(cfg)}_wd{float(cfg.weight_decay)}"
    return Path(cfg.output_dir, name + override_suffix(cfg, "finetune"))


def run_folder(cfg: DictConfig) -> Path:
    """An unlearning run's folder, <output_dir>/<family>/<method>_<lr>_<split>_<epochs>_<weight decay>_<hyper>."""
    names = [cfg.method.get("run_name", cfg.method.name)]
    names += [cfg.retain.name] if cfg.retain.name not in ("none", cfg.method.name) else []
    hyper = "None" if cfg.hyper_param is None else f"{cfg.hyper_param:g}"
    parts = ["_".join(names), float(cfg.lr), split_name(cfg), f"{cfg.num_epochs:g}", float(cfg.weight_decay), hyper]
    return Path(cfg.output_dir, cfg.model_family, "_".join(map(str, parts)))


def override_suffix(cfg: DictConfig, config_name: str) -> str:
    """`_key=value` for every setting that changes the weights, differs from its default and is not in the name already."""
    known = flatten(defaults_of(cfg, config_name))
    changed = {key: value for key, value in flatten(cfg).items() if key not in UNNAMED and value != known[key]}
    copies = {f"method.objective.{key.removeprefix('method.')}" for key in changed}  # of a key that is named itself
    return "".join(f"_{key}={value}" for key, value in sorted(changed.items()) if key not in copies)


# What a run is made of beside its settings, by its kind and name: {"data": {split: hash}, "models": {key: hash}}.
MadeOf = Mapping[str, Mapping[str, str]]


def check_run(
    folder: Path,
    cfg: DictConfig,
    may_differ: set[str] | frozenset[str] = frozenset(),
    name: str = "config.yaml",
    made_of: MadeOf | None = None,
) -> None:
    """Raises ValueError where the folder holds a run of other settings, data or models: which ones.

    What an earlier version did not note is taken to be the same.
    """
    file = folder / name
    if not file.exists():
        return
    record = read_record(file)
    if not isinstance(there := record.get("settings"), dict):
        raise ValueError(f"{file}: holds no run's settings; mend it, or remove what it was written beside")
    before, now = flatten(there), flatten(run_settings(cfg))
    differ = [key for key in now if key not in PLACES | may_differ and before.get(key, now[key]) != now[key]]
    if differ:
        listed = "; ".join(f"{key}={before.get(key)} there, {now[key]} here" for key in differ)
        raise ValueError(f"{folder} holds a run of other settings: {listed}")
    for kind, found in (made_of or {}).items():
        noted = record.get(kind)
        noted = noted if isinstance(noted, dict) else {}
        if changed := [name for name, value in found.items() if noted.get(name, value) != value]:
            listed = ", ".join(place_of(cfg, name) for name in changed)
            raise ValueError(f"{folder} holds a run of other {kind}: {listed}: is not what it was; give save_dir=FOLDER")


def check_trained_on(run: Path | None, cfg: DictConfig) -> None:
    """Raises ValueError where the files that a run was trained on are other ones now, where results go into its folder."""
    if run is None or cfg.save_dir not in (None, str(run)):
        return
    saved, noted = saved_settings(run), read_record(run / "config.yaml").get("data") or {}
    if all(saved.get(key) == cfg[key] for key in ("split", "data_path", "forget_data", "retain_data")):
        now = hash_data(cfg, (cfg.split, RETAIN_OF[cfg.split]))
        if changed := [place_of(cfg, name) for name, value in now.items() if noted.get(name, value) != value]:
            raise ValueError(f"{run} was trained on other data: {', '.join(changed)}: is not what it was; give save_dir=FOLDER")


def open_run(folder: Path, cfg: DictConfig, made_of: MadeOf | None = None) -> None:
    """Make the run's folder with its config.yaml: all settings, their hash, what it is made of, and versions."""
    if is_main_process() and not (folder / "config.yaml").exists():
        write_whole(folder / "config.yaml", yaml.safe_dump(record_of(cfg, made_of), sort_keys=False))


def record_of(cfg: DictConfig, made_of: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a result came from: all settings, their hash, the data's and models' hashes, and the versions of what it ran on."""
    chosen = run_settings(cfg)
    digest = hash_text(json.dumps(chosen, sort_keys=True, default=str))[:12]
    return {"settings": chosen, "hash": digest, **(made_of or {}), "versions": versions()}


def hash_data(cfg: DictConfig, splits: Iterable[str], texts: Sequence[str] = TEXTS) -> dict[str, str]:
    """A hash of the rows of each split, or of the local files in their place; none of what only the hub has.

    Args:
        texts: what of the rows is read.
    """
    found = {}
    for name in [key for key in ("forget_data", "retain_data") if cfg[key] is not None] or splits:
        if (file := file_of(cfg, name)).is_file():
            found[name] = hash_rows(read_jsonl(file), texts)
        elif parts := sorted(Path(cfg.data_path).glob(f"**/{name}*.parquet")):
            found[name] = hash_text("".join(map(hash_file, parts)))
    return found


def hash_rows(rows: Iterable[Mapping[str, Any]], texts: Sequence[str] = TEXTS) -> str:
    return hash_text(json.dumps([[row.get(text) for text in texts] for row in rows]))


def hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def hash_models(cfg: DictConfig, *keys: str) -> dict[str, str]:
    """A hash of each key's model; of the family's tokenizer too, where a model has none of its own."""
    found = {key: weights_of(cfg[key]) for key in keys}
    if any(lacks_tokenizer(cfg[key]) for key in keys) and Path(cfg.hf_key).is_dir():
        found["hf_key"] = fingerprint(Path(cfg.hf_key), TOKENIZER)
    return found


def file_of(cfg: DictConfig, name: str) -> Path:
    """The file of a split, of the key of a local file, or of the sentences of `method=idk`."""
    if name == IDK.stem:
        return IDK
    return Path(cfg[name]) if name in ("forget_data", "retain_data") else Path(cfg.data_path, f"{name}.json")


def place_of(cfg: DictConfig, name: str) -> str:
    """A key of the settings with its value; a split with its file."""
    return f"{name}={cfg[name]}" if name in cfg else f"{name} ({file_of(cfg, name)})"


def saved_settings(folder: Path) -> dict[str, Any]:
    """The settings in a run folder's config.yaml; none where there is none. Raises ValueError where it is not YAML."""
    file = folder / "config.yaml"
    there = read_record(file).get("settings") if file.exists() else None
    return there if isinstance(there, dict) else {}


def read_record(file: Path) -> dict[str, Any]:
    """What `record_of` gave, from a file; nothing where it is of something else. Raises ValueError where it is not YAML."""
    try:
        record = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not YAML ({error})") from error
    return record if isinstance(record, dict) else {}


def run_of(path: str | None) -> Path | None:
    """The folder of the unlearning run that a checkpoint is of, or the folder itself; None where it is of none."""
    folders = [] if path is None else [Path(path), Path(path).parent]
    return next((folder for folder in folders if "method" in saved_settings(folder)), None)


def run_settings(cfg: DictConfig) -> dict[str, Any]:
    """What a run is made of, nested: its settings, the number of processes, and the family's prompt."""
    nested: Any = OmegaConf.to_container(cfg, resolve=True)
    family = load_family(cfg.model_family)
    return nested | {"processes": processes(), "family": {key: getattr(family, key) for key in PROMPT}}


def alone(folder: Path) -> AbstractContextManager[None]:
    """The folder for this run alone, whatever its number of processes. Raises ValueError where another run has it."""
    return locked(folder) if is_main_process() else nullcontext()


def close_run(folder: Path) -> None:
    """Drop what a killed run would have gone on from: all that the run writes is written."""
    if is_main_process():
        remove_whole(folder / "resume")


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "accelerate", "datasets")}


def is_main_process() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def write_json(file: Path, value: Any) -> None:
    write_whole(file, json.dumps(value, indent=2) + "\n")


def say(message: str) -> None:
    """Tell the user, once whatever the number of processes."""
    if is_main_process():
        print(message, file=sys.stderr)


def write_csv(file: Path, rows: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(file, text.getvalue())


def is_checkpoint(folder: str | Path) -> bool:
    """Whether the folder has what `from_pretrained` loads, whole."""
    return why_no_checkpoint(Path(folder)) is None


def why_no_checkpoint(folder: Path) -> str | None:
    """What a folder lacks that `from_pretrained` needs, None where it lacks nothing."""
    if not any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
        return "a folder without a checkpoint"
    if not any(folder.glob("*.safetensors")):
        if not (others := other_weights(folder)):
            return "a folder without a checkpoint"
        call = f"AutoModelForCausalLM.from_pretrained('{folder}').save_pretrained(NEW)"
        how = f": {call} writes them" if any(name.endswith(".bin") for name in others) else ""
        return f"its weights are {', '.join(others[:3])}, and only safetensors are read{how}"
    try:
        if (config := folder / "config.json").exists() and "model_type" not in read_object(config):
            return f"its {config.name} names no model_type"
        base = base_of(folder)
        if base is not None and Path(base).is_absolute() and (why := why_no_checkpoint(Path(base))):
            return f"an adapter, and its model {base} is not there ({why})"
        count_parameters(folder)
    except ValueError as error:
        return str(error)
    return None


def other_weights(folder: Path, names: str = WEIGHTS) -> list[str]:
    """The files of a folder that hold weights, or name them, in whatever format, a few folders deep."""
    found = [file for pattern in ("*", "*/*", "*/*/*") for file in folder.glob(pattern)]
    files = [str(file.relative_to(folder)) for file in found if not file.is_dir()]
    return sorted(file for file in files if re.search(names, file))


def step_of(folder: Path) -> int | None:
    """The N of a folder checkpoint-N."""
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if folder.name.startswith("checkpoint-") and number.isdecimal() else None


def run_checkpoints(run: Path) -> list[tuple[int, Path]]:
    """A run's checkpoints that are whole, in the order of their steps."""
    found = [(step, folder) for folder in run.glob("checkpoint-*") if (step := step_of(folder)) is not None]
    return sorted((step, folder) for step, folder in found if is_checkpoint(folder))


def weights_of(path: str) -> str:
    """What tells a model from others: one of a folder by its files' bytes, one of the hub by its name."""
    return fingerprint(Path(path)) if Path(path).is_dir() else path


def is_of(path: str, noted: Any) -> bool:
    """Whether `weights_of(path)` is what was noted, perhaps by an earlier version, if anything was (not None)."""
    return noted is None or (is_noted(Path(path), str(noted)) if Path(path).is_dir() else path == noted)


def find_path(path: str) -> str:
    """A relative path as it stands, or else below the project's own folder."""
    return str(ROOT / path) if not Path(path).exists() and (ROOT / path).exists() else path


def split_name(cfg: DictConfig) -> str:
    """What a folder's name calls the data: the split, or the local files that stand in its place."""
    files = [cfg.forget_data] if "method" in cfg else [cfg.retain_data, cfg.forget_data if cfg.split == "full" else None]
    return "+".join(Path(file).stem for file in files if file is not None) or str(cfg.split)


def original_model(family: Family, cfg: DictConfig) -> str:
    """The family's model fine-tuned on all the data: what finetune.py put here, else (for TOFU) `ft_model_path`."""
    tuning = compose_config("finetune", [f"model_family={family.name}"])
    tuning.forget_data, tuning.retain_data = cfg.forget_data, cfg.retain_data
    here = finetuned_folder(family, tuning)
    if is_checkpoint(here):
        return str(here)
    like = f"ft_epoch*_{family.name}_{split_name(tuning)}_*"
    others = sorted(str(folder) for folder in here.parent.glob(like) if is_checkpoint(folder))
    if family.ft_model_path is None or cfg.forget_data is not None:
        raise ValueError(
            f"model_family={family.name}: no fine-tuned model, {here} is not there;"
            + (f" there are {', '.join(others)};" if others else f" run finetune.py model_family={family.name} first, or")
            + " give model_path=FOLDER"
        )
    return find_path(family.ft_model_path)


def default_holdout(retain_rows: int) -> int:
    """How many of local retain rows are held out where it is not said: a fifth of them, 400 at most."""
    return min(400, max(1, retain_rows // 5))


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


def _lines(path: str | Path, text: bytes) -> list[tuple[str, Any]]:
    """Each line's value, with its place."""
    found = []
    for number, line in enumerate(text.split(b"\n"), start=1):  # str.splitlines would cut a text at U+2028 or U+0085, too
        if line.strip():
            try:
                found.append((f"line {number}", json.loads(line.decode())))
            except ValueError as error:  # also text that is not UTF-8
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
    return found


def _items(path: str | Path, text: bytes) -> list[tuple[str, Any]]:
    """Each item of an array, with its place."""
    try:
        return [(f"item {number}", item) for number, item in enumerate(json.loads(text.decode()), start=1)]
    except ValueError as error:
        raise ValueError(f"{path}: begins as one array, and is not JSON ({error})") from error


# ---- training ----


def use_bfloat16(dtype: str, family: Family) -> bool:
    """Whether to train under bfloat16 autocast: `auto` is the family's dtype, else what the device has."""
    import torch

    dtype = (family.dtype or "auto") if dtype == "auto" else dtype
    if dtype != "auto":
        return dtype == "bfloat16"
    return torch.cuda.is_bf16_supported() if torch.cuda.is_available() else torch.ops.mkldnn._is_mkldnn_bf16_supported()


def training_settings(cfg: DictConfig, family: Family, steps: int, steps_per_epoch: int) -> Settings:
    """How to train: warm-up over the first epoch; saved once an epoch unless `save_steps` is given."""
    from unlearn.training.trainer import Settings

    return Settings(
        steps=steps,
        warmup_steps=min(steps_per_epoch, steps - 1),  # a run shorter than an epoch reaches its lr too
        save_steps=cfg.save_steps or steps_per_epoch,
        bf16=use_bfloat16(cfg.dtype, family),
        lr=cfg.lr,
        seed=cfg.seed,
        gradient_accumulation_steps=cfg.gradient_accumulation_steps,
        weight_decay=cfg.weight_decay,
        max_grad_norm=cfg.max_grad_norm,
        optim=cfg.optim,
        gradient_checkpointing=cfg.gradient_checkpointing,
        logger=cfg.logger,
    )


def device() -> torch.device:
    """This process's device; the first call starts the process group where torchrun made several."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE).device


def end_processes(failed: bool = False) -> None:
    """Take leave of the other processes, if torchrun made several: NCCL warns of a process that ends without.

    Args:
        failed: the others may wait for something else by now: stay no longer than `LEAVE`.
    """
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return
    if not failed:
        distributed.barrier()  # who ends first closes connections that the others still listen on
    leave = threading.Thread(target=distributed.destroy_process_group, daemon=True)
    leave.start()
    leave.join(LEAVE if failed else None)


def model_device(cfg: DictConfig) -> torch.device:
    """Where a model is loaded to: this process's device, or the CPU where it is to be split over several."""
    import torch

    here = device()
    return torch.device("cpu") if cfg.parallel == "fsdp" and processes() > 1 else here


def processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def count_steps(cfg: DictConfig, rows: int) -> tuple[int, int]:
    """The run's optimiser steps, floor(epochs x rows / rows a step), and those of one epoch, at least 1."""
    size = cfg.batch_size * cfg.gradient_accumulation_steps * processes()
    steps = math.floor(cfg.num_epochs * rows / size)
    if steps > MOST_STEPS:
        raise ValueError(
            f"num_epochs={cfg.num_epochs} of {rows} rows are {steps} steps, and at most {MOST_STEPS} can be planned"
        )
    if steps == 0:
        raise ValueError(
            f"num_epochs={cfg.num_epochs} of {rows} rows are no whole step of {size} rows (batch_size={cfg.batch_size}"
            f" x gradient_accumulation_steps={cfg.gradient_accumulation_steps} x {processes()} processes)"
        )
    return steps, max(1, rows // size)
