"""The edges of a process: configurations, model families, run folders, files read and written whole. No mathematics.

Nothing here imports torch before it must: a mistyped command is answered at once.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from app.families import PROMPT, Family, load_family
from app.places import CONFIG, IDK, find_path
from unlearn.io.files import locked, remove_whole, write_whole
from unlearn.io.rows import read_jsonl
from unlearn.io.signals import PATIENCE
from unlearn.io.weights import (
    TOKENIZER,
    fingerprint,
    hash_file,
    is_checkpoint,
    lacks_tokenizer,
    weights_of,
)

if TYPE_CHECKING:
    import torch

    from unlearn.training.trainer import Settings


FORGET_SPLITS = ("forget01", "forget05", "forget10")
RETAIN_OF = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}
TRAIN_SPLITS = ("full", *RETAIN_OF.values())

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


def say(message: str) -> None:
    """Tell the user, once whatever the number of processes."""
    if is_main_process():
        print(message, file=sys.stderr)


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
