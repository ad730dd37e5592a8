"""The edges of a process: the command line, model families, checkpoints, run folders, files written whole. No mathematics.

Nothing here imports torch before it must: a mistyped command is answered at once.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

if TYPE_CHECKING:
    import torch

    from unlearn.training import Settings

ROOT = Path(__file__).resolve().parent
CONFIG = ROOT / "config"

FORGET_SPLITS = ("forget01", "forget05", "forget10")
RETAIN_OF = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}
TRAIN_SPLITS = ("full", *RETAIN_OF.values())

HUB_TOFU = "locuslab/TOFU"

# Keys whose value leaves the weights alone, or stands in a run folder's name already, or is a path.
UNNAMED = {
    *("model_family", "split", "lr", "num_epochs", "weight_decay", "hyper_param", "method.layer"),
    *("model_path", "hf_key", "data_path", "forget_data", "retain_data", "save_dir", "output_dir"),
    *("gradient_checkpointing", "save_steps", "save_dtype", "debug", "method.name", "method.run_name", "retain.name"),
}
PLACES = {"save_dir", "output_dir", "debug", "save_steps", "gradient_checkpointing"}  # may differ when a run is started again

OmegaConf.register_new_resolver(
    "hyper", lambda default, *, _root_: default if _root_.hyper_param is None else _root_.hyper_param, replace=True
)


# ---- the command line ----


def cli(run: Callable[[DictConfig], Any], config_name: str) -> None:
    """Let Hydra in, and turn what a user got wrong into one line on standard error and exit code 2."""
    import hydra
    from hydra._internal.utils import get_args_parser

    if "WORLD_SIZE" not in os.environ:  # one process: one device, not torch's DataParallel over all
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors reach us
    try:
        parser = get_args_parser()
        parser.error = _refuse  # type: ignore[method-assign]
        args = parser.parse_args()
        config_name = args.config_name or config_name
        failed: list[Exception] = []
        job = run if args.multirun else _keeping(failed, run)  # Hydra would print a line of its own
        hydra.main(version_base=None, config_path=str(CONFIG), config_name=config_name)(job)()
        if failed:
            raise failed[0]
    except Exception as error:
        if any(word.lower() == "debug=true" for word in sys.argv):
            raise
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            print(f"{Path(sys.argv[0]).name}: {one_line(error, config_name)}", file=sys.stderr)
        sys.exit(2 if isinstance(error, (ValueError, HydraException, OmegaConfBaseException)) else 1)


def _keeping(failed: list[Exception], run: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    @functools.wraps(run)
    def job(cfg: DictConfig) -> Any:
        try:
            return run(cfg)
        except Exception as error:
            failed.append(error)

    return job


def _refuse(message: str) -> NoReturn:
    raise ValueError(f"{message}; settings are key=value, and the flags are Hydra's (--help lists them)")


def one_line(error: Exception, config_name: str) -> str:
    """An error's message in one line; for a key that does not exist, with those that do."""
    if unknown := re.search(r"Could not override '([^']+)'", str(error)):
        key = unknown[1]
        parent = key.rpartition(".")[0]
        keys = OmegaConf.select(compose_config(config_name), parent) if parent else compose_config(config_name)
        names = [str(k) for k in keys if not str(k).startswith("_")] if isinstance(keys, DictConfig) else []
        return f"unknown key '{key}'" + (f"; {parent or 'the configuration'} has {', '.join(names)}" if names else "")
    causes = [str(error)] + ([str(error.__cause__)] if isinstance(error, HydraException) and error.__cause__ else [])
    text = " ".join(line.strip() for cause in causes for line in cause.splitlines() if line.strip())
    return text if isinstance(error, (ValueError, HydraException, FloatingPointError)) else f"{type(error).__name__}: {text}"


def compose_config(config_name: str, overrides: list[str] | None = None) -> DictConfig:
    """A configuration as Hydra composes it, inside a Hydra job or outside."""
    if GlobalHydra.instance().is_initialized():
        return compose(config_name, overrides)
    with initialize_config_dir(str(CONFIG), version_base=None):
        return compose(config_name, overrides)


# ---- what a setting may be ----


def _number(low: float, strict: bool = False, whole: bool = False) -> tuple[Callable[[Any], bool], str]:
    def fits(x: Any) -> bool:
        kind = isinstance(x, int) if whole else isinstance(x, int | float) and math.isfinite(x)
        return kind and not isinstance(x, bool) and (x > low if strict else x >= low)

    return fits, f"a {'whole ' if whole else ''}number {'above' if strict else 'of at least'} {low:g}"


def _one_of(*choices: Any) -> tuple[Callable[[Any], bool], str]:
    return lambda x: any(x is c or (x == c and type(x) is type(c)) for c in choices), f"one of {', '.join(map(str, choices))}"


BOOL = _one_of(True, False)
VALID: dict[str, tuple[Callable[[Any], bool], str]] = {
    "seed": _number(0, whole=True),
    "batch_size": _number(1, whole=True),
    "gradient_accumulation_steps": _number(1, whole=True),
    "lr": _number(0, strict=True),
    "num_epochs": _number(0, strict=True),
    "weight_decay": _number(0),
    "max_grad_norm": _number(0),
    "save_steps": _number(1, whole=True),
    "retain_holdout": _number(0, whole=True),
    "max_length": _number(2, whole=True),
    "hyper_param": _number(-math.inf),
    "retain.weight": _number(0),
    "ds_size": _number(1, whole=True),
    "generation.max_length": _number(2, whole=True),
    "dtype": _one_of("auto", "float32", "bfloat16"),
    "save_dtype": _one_of("float32", "bfloat16"),
    "optim": _one_of("adamw_torch_fused", "adamw_torch", "sgd", "adafactor"),
    "gradient_checkpointing": BOOL,
    "loss_on_answer_tag": BOOL,
    "debug": BOOL,
}
NULLABLE = {"lr", "num_epochs", "save_steps", "retain_holdout", "hyper_param", "gradient_checkpointing", "ds_size"}


def check_values(cfg: DictConfig, config_name: str) -> None:
    """Raises ValueError for a value of the wrong type or range, or a key that the configuration does not have."""
    known = flatten(_defaults(cfg, config_name))
    for key, value in flatten(cfg).items():
        if key not in known:
            raise ValueError(f"unknown key '{key}'; the configuration has {', '.join(k for k in known if k[0] != '_')}")
        fits, what = VALID.get(key) or _like(key, known[key])
        if not fits(value) and not (value is None and (key in NULLABLE or known[key] is None)):
            raise ValueError(f"{key}={value}: needs to be {what}")


def _like(key: str, default: Any) -> tuple[Callable[[Any], bool], str]:
    """A method's own keys: of its default's type."""
    if isinstance(default, bool):
        return BOOL
    if isinstance(default, int | float):
        return _number(-math.inf)
    return lambda x: isinstance(x, str), "a text"


def flatten(cfg: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings to {dotted key: value}, interpolations resolved."""
    flat: dict[str, Any] = {}
    for key, value in cfg.items():
        flat |= flatten(value, f"{prefix}{key}.") if hasattr(value, "items") else {f"{prefix}{key}": value}
    return flat


def _defaults(cfg: DictConfig, config_name: str) -> DictConfig:
    """The configuration as it is where nothing but the method, the retain term and the hyper-parameter is given."""
    groups = [f"{group}={cfg[group].name}" for group in ("retain", "method") if group in cfg]
    defaults = compose_config(config_name, [f"model_family={cfg.model_family}", *groups])
    if "hyper_param" in cfg:
        defaults.hyper_param = cfg.hyper_param
    return defaults


def prepare(cfg: DictConfig, config_name: str) -> Family:
    """Check the settings' values and fill in those that the model family decides; returns the family."""
    if OmegaConf.is_missing(cfg, "model_family"):
        raise ValueError(f"model_family is missing; the families are {', '.join(load_families())}")
    family = load_family(
        cfg.model_family, hf_key=cfg.hf_key, data_path=cfg.data_path, loss_on_answer_tag=cfg.loss_on_answer_tag
    )
    check_values(cfg, config_name)
    cfg.model_family, cfg.hf_key, cfg.data_path = family.name, find_path(family.hf_key), find_path(family.data_path)
    if cfg.get("gradient_checkpointing", True) is None:
        cfg.gradient_checkpointing = family.gradient_checkpointing
    return replace(family, hf_key=cfg.hf_key, data_path=cfg.data_path)


def processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def count_steps(cfg: DictConfig, rows: int) -> tuple[int, int]:
    """The run's optimiser steps, floor(epochs x rows / rows a step), and those of one epoch, at least 1."""
    size = cfg.batch_size * cfg.gradient_accumulation_steps * processes()
    steps = math.floor(cfg.num_epochs * rows / size)
    if steps == 0:
        raise ValueError(
            f"num_epochs={cfg.num_epochs} of {rows} rows are no whole step of {size} rows (batch x accumulation x processes)"
        )
    return steps, max(1, rows // size)


# ---- model families ----


@dataclass(frozen=True)
class Family:
    """An entry of model_config.yaml; what each key means stands there."""

    name: str
    hf_key: str
    question_start_tag: str
    question_end_tag: str
    answer_tag: str
    flash_attention2: bool = False
    gradient_checkpointing: bool = False
    ft_model_path: str | None = None
    finetune_lr: float = 1e-5
    finetune_epochs: float = 5
    unlearn_lr: float = 1e-5
    data_path: str = HUB_TOFU
    dtype: str | None = None
    from_scratch: bool = False
    loss_on_answer_tag: bool = False

    def prompt(self, question: str) -> str:
        return f"{self.question_start_tag}{question}{self.question_end_tag}{self.answer_tag}"


def load_families() -> dict[str, Any]:
    """The entries of model_config.yaml by name: a mapping each, or the name that an alias stands for."""
    entries: Any = OmegaConf.to_container(OmegaConf.load(CONFIG / "model_config.yaml"))
    return entries


def load_family(name: str, **overrides: Any) -> Family:
    """The family of that name or alias. Raises ValueError for an unknown one, or for an entry that lacks a key."""
    entries = load_families()
    entry = entries.get(name)
    if isinstance(entry, str):
        name, entry = entry, entries.get(entry)
    if entry is None:
        raise ValueError(f"model_family={name}: unknown; the families of config/model_config.yaml are {', '.join(entries)}")
    known = {field.name: field for field in fields(Family)}
    values: dict[str, Any] = {k: _as_bool(v) if known[k].type == "bool" else v for k, v in entry.items() if k in known}
    values |= {key: value for key, value in overrides.items() if value is not None}
    try:
        return Family(**{"name": name} | values)
    except TypeError as error:
        raise ValueError(f"model_family={name}: its entry in config/model_config.yaml is incomplete ({error})") from error


def _as_bool(value: Any) -> bool:
    return value if isinstance(value, bool) else str(value).lower() == "true"


# ---- run folders ----


def finetuned_folder(
    family: Family, split: str = "full", lr: float | None = None, epochs: float | None = None, wd: float = 0.0
) -> Path:
    """Where finetune.py puts a model of the family by itself."""
    lr, epochs = family.finetune_lr if lr is None else lr, family.finetune_epochs if epochs is None else epochs
    return Path("data/weight", f"ft_epoch{epochs:g}_lr{float(lr)}_{family.name}_{split}_wd{float(wd)}")


def run_folder(cfg: DictConfig) -> Path:
    """An unlearning run's folder, <output_dir>/<family>/<method>_<lr>_<split>_<epochs>_<weight decay>_<hyper>."""
    names = [cfg.method.get("run_name", cfg.method.name)]
    names += [cfg.retain.name] if cfg.retain.name not in ("none", cfg.method.name) else []
    hyper = "None" if cfg.hyper_param is None else f"{cfg.hyper_param:g}"
    parts = ["_".join(names), float(cfg.lr), cfg.split, f"{cfg.num_epochs:g}", float(cfg.weight_decay), hyper]
    return Path(cfg.output_dir, cfg.model_family, "_".join(map(str, parts)))


def override_suffix(cfg: DictConfig, config_name: str) -> str:
    """`_key=value` for every setting that changes the weights, differs from its default and is not in the name already."""
    known = flatten(_defaults(cfg, config_name))
    changed = {key: value for key, value in flatten(cfg).items() if key not in UNNAMED and value != known[key]}
    changed = {key: value for key, value in changed.items() if not key.startswith("method.objective.")}
    return "".join(f"_{key}={value}" for key, value in sorted(changed.items()))


def open_run(folder: Path, cfg: DictConfig) -> None:
    """Make the run's folder with its config.yaml.

    Raises:
        ValueError: the folder holds a run of other settings; which ones, and both values.
    """
    settings = flatten(cfg) | {"processes": int(os.environ.get("WORLD_SIZE", 1))}
    file = folder / "config.yaml"
    if file.exists():
        before = flatten(yaml.safe_load(file.read_text())["settings"])
        differ = [k for k in settings if k not in PLACES and before.get(k) != settings[k]]
        if differ:
            listed = "; ".join(f"{key}={before.get(key)} there, {settings[key]} here" for key in differ)
            raise ValueError(f"{folder} holds a run of other settings: {listed}")
    elif is_main_process():
        nested = OmegaConf.to_container(cfg, resolve=True)
        assert isinstance(nested, dict)
        record = {"settings": nested | {"processes": settings["processes"]}, "versions": versions()}
        write_whole(file, yaml.safe_dump(record, sort_keys=False))


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "accelerate", "datasets")}


def is_main_process() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def write_whole(file: Path, text: str) -> None:
    """Write a file beside its place, then rename it: it is whole or absent."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(file)


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


# ---- checkpoints and data, before they are loaded ----


def original_model(family: Family) -> str:
    """The family's model fine-tuned on `full`: what finetune.py put here, else `ft_model_path`."""
    here = finetuned_folder(family)
    if is_checkpoint(here):
        return str(here)
    if family.ft_model_path is None:
        raise ValueError(
            f"model_family={family.name}: no fine-tuned model, {here} is not there;"
            f" run finetune.py model_family={family.name} first, or give model_path=FOLDER"
        )
    return find_path(family.ft_model_path)


def check_finetune_data(cfg: DictConfig) -> None:
    """Raises ValueError where the split is none, or its data are not there."""
    if cfg.split not in TRAIN_SPLITS:
        raise ValueError(f"split={cfg.split}: to fine-tune on is one of {', '.join(TRAIN_SPLITS)}")
    if cfg.forget_data is None and cfg.retain_data is None:
        check_split(cfg.data_path, cfg.split)
    elif cfg.split != "full" and cfg.retain_data is None:
        raise ValueError(
            f"split={cfg.split}: forget_data alone has no rows to retain; give retain_data=FILE too, or split=full"
        )
    check_files(cfg)


def check_forget_data(cfg: DictConfig) -> None:
    """Raises ValueError where the split is no forget split, or its data are not there."""
    if cfg.split not in FORGET_SPLITS:
        raise ValueError(f"split={cfg.split}: to unlearn is one of {', '.join(FORGET_SPLITS)}")
    check_files(cfg)
    for given, missing in (("forget_data", "retain_data"), ("retain_data", "forget_data")):
        if cfg[given] is not None and cfg[missing] is None:
            raise ValueError(f"{given}={cfg[given]}: local data come in pairs; give {missing}=FILE too")
    if cfg.forget_data is None:
        for split in (cfg.split, RETAIN_OF[cfg.split], *(["retain_perturbed"] if cfg.retain_holdout is None else [])):
            check_split(cfg.data_path, split)


def check_files(cfg: DictConfig) -> None:
    for key in ("forget_data", "retain_data"):
        if cfg[key] is not None and not Path(cfg[key]).is_file():
            raise ValueError(f"{key}={cfg[key]}: no such file")


def find_path(path: str) -> str:
    """A relative path as it stands, or else below the project's own folder."""
    return str(ROOT / path) if not Path(path).exists() and (ROOT / path).exists() else path


def is_checkpoint(folder: str | Path) -> bool:
    folder = Path(folder)
    return (folder / "config.json").exists() and any(folder.glob("*.safetensors"))


def check_checkpoint(key: str, path: str) -> None:
    """Raises ValueError where `path` is neither a folder with a checkpoint nor a model on the hub."""
    if is_checkpoint(path):
        return
    if Path(path).is_dir():
        inside = sorted(str(file.parent) for file in Path(path).glob("*/config.json"))
        raise ValueError(f"{key}={path}: the folder has no checkpoint" + (f"; there are {', '.join(inside)}" if inside else ""))
    if not on_hub(path, "model"):
        raise ValueError(f"{key}={path}: neither a folder nor a model that the hub gives")


def check_split(data_path: str, split: str) -> None:
    """Raises ValueError where `data_path` is neither a folder nor a data set on the hub, or has no such split."""
    if Path(data_path).is_dir():
        if Path(data_path, f"{split}.json").exists() or any(Path(data_path).glob(f"**/{split}*.parquet")):
            return
        there = ", ".join(sorted(file.stem for file in Path(data_path).glob("*.json")))
        raise ValueError(f"split={split}: data_path={data_path} has no {split}.json; there are {there or 'no splits'}")
    if not on_hub(data_path, "dataset"):
        raise ValueError(f"data_path={data_path}: neither a folder nor a data set that the hub gives")


def on_hub(name: str, repo_type: str) -> bool:
    """Whether the hub, or its cache here, has the repository; answered within 2 seconds."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return False
    from huggingface_hub import HfApi, scan_cache_dir

    try:
        HfApi().repo_info(name, repo_type=repo_type, timeout=2)
        return True
    except Exception as error:
        if "timed out" in str(error).lower():
            return True  # a slow network: let the real download decide
    try:
        return any(repo.repo_id == name and repo.repo_type == repo_type for repo in scan_cache_dir().repos)
    except Exception:
        return False


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
    from unlearn.training import Settings

    return Settings(
        steps=steps,
        warmup_steps=steps_per_epoch,
        save_steps=cfg.save_steps or steps_per_epoch,
        bf16=use_bfloat16(cfg.dtype, family),
        lr=cfg.lr,
        seed=cfg.seed,
        gradient_accumulation_steps=cfg.gradient_accumulation_steps,
        weight_decay=cfg.weight_decay,
        max_grad_norm=cfg.max_grad_norm,
        optim=cfg.optim,
        gradient_checkpointing=cfg.gradient_checkpointing,
    )


def device() -> torch.device:
    """This process's device; the first call starts the process group where torchrun made several."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available()).device
