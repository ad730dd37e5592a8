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
from hydra.errors import HydraException, OverrideParseException
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

ALIASES = {"grad_ascent": "ga", "ins_npo": "tnpo", "w_ins_npo": "wtnpo", "po": "idk", "grad_diff": "gd", "KL": "kl"}
RETAIN_TERMS = ("gd", "kl")

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
    codes: list[int] = []

    @functools.wraps(run)
    def job(cfg: DictConfig) -> Any:  # Hydra would print a line of its own, and stop a sweep
        try:
            return run(cfg)
        except Exception as error:
            codes.append(report(error, config_name))

    try:
        parser = get_args_parser()
        parser.error = _refuse  # type: ignore[method-assign]
        config_name = parser.parse_args().config_name or config_name
        hydra.main(version_base=None, config_path=str(CONFIG), config_name=config_name)(job)()
    except Exception as error:
        codes.append(report(error, config_name))
    if codes:
        sys.exit(max(codes))


def _refuse(message: str) -> NoReturn:
    raise ValueError(f"{message}; settings are key=value, after the flags, which are Hydra's (--help lists them)")


def report(error: Exception, config_name: str) -> int:
    """Print an error as one line and return the exit code: 2 for what a user got wrong. Raises it where `debug=true`."""
    if any(word.lower() == "debug=true" for word in sys.argv):
        raise error
    users = isinstance(error, (ValueError, HydraException, OmegaConfBaseException))
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        clear = users or isinstance(error, FloatingPointError)
        line = one_line(error, config_name) if clear else f"{type(error).__name__}: {_flat(error)} (debug=true: the traceback)"
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    return 2 if users else 1


def _flat(error: BaseException) -> str:
    return " ".join(str(error).split())


def one_line(error: Exception, config_name: str) -> str:
    """What a user got wrong, in one line; Hydra's messages with the valid names and without its search path."""
    text = _flat(error)
    if key := re.search(r"Could not override '([^']+)'", text):
        return unknown_key(key[1], compose_config(config_name))
    if choice := re.search(r"Could not find '(\w+)/([^']*)' Available options in '\w+': (.*?) Config search path", text):
        group, name, options = choice.groups()
        return f"{group}={name}: unknown; there are {', '.join(options.split())}" + (hint(name) if group == "method" else "")
    if config := re.search(r"Cannot find primary config '([^']+)'", text):
        names = sorted(file.stem for file in CONFIG.glob("*.yaml") if file.stem not in ("common", "model_config"))
        return f"--config-name={config[1]}: unknown; there are {', '.join(names)}"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: no setting, which is key=value ({text.partition(' See https')[0]})"
    return f"{text} {_flat(error.__cause__)}" if isinstance(error, HydraException) and error.__cause__ else text


def unknown_key(key: str, config: DictConfig) -> str:
    """The line for a key that does not exist, with those that do, at the nearest place above it."""
    parent, there = key, None
    while not isinstance(there, DictConfig):
        parent = parent.rpartition(".")[0]
        there = OmegaConf.select(config, parent) if parent else config
    names = ", ".join(str(name) for name in there if not str(name).startswith("_"))
    return f"unknown key '{key}'; {parent or 'the configuration'} has {names}"


def compose_config(config_name: str, overrides: list[str] | None = None) -> DictConfig:
    """A configuration as Hydra composes it, inside a Hydra job or outside."""
    if GlobalHydra.instance().is_initialized():
        return compose(config_name, overrides)
    with initialize_config_dir(str(CONFIG), version_base=None):
        return compose(config_name, overrides)


# ---- the methods' names ----


def parse_method(name: str) -> list[str]:
    """A method's name, with its number and its retain term, as forget.py's settings: rmu_21_kl, npo_gd, wtnpo_0.5, ..."""
    methods = sorted(file.stem for file in (CONFIG / "method").glob("*.yaml"))

    def parse(name: str) -> list[str] | None:
        if (known := ALIASES.get(name, name)) in methods:
            return [f"method={known}"]
        stem, _, last = name.rpartition("_")
        base = parse(stem) if stem else None
        if base == ["method=rmu"] and last.isdecimal():
            return ["method=rmu", f"method.layer={last}"]
        if base == ["method=wtnpo"] and re.fullmatch(r"\d+(\.\d+)?", last):
            return ["method=wtnpo", f"method.alpha={float(last):g}"]
        return None

    stem, _, last = name.rpartition("_")
    if (settings := parse(name)) is not None:
        return settings
    if last in RETAIN_TERMS and (settings := parse(stem)) is not None:
        return [*settings, f"retain={last}"]
    raise ValueError(
        f"method {name}: unknown; there are {', '.join(methods)}, their other names {', '.join(ALIASES)},"
        f" rmu_LAYER and wtnpo_ALPHA, each with an optional _{' or _'.join(RETAIN_TERMS)}"
    )


def hint(name: str) -> str:
    """What forget.py calls the method that basher1.py knows by that name."""
    try:
        return f" (is it {' '.join(parse_method(name))}?)"
    except ValueError:
        return ""


# ---- what a setting may be ----


def _number(low: float, strict: bool = False, whole: bool = False) -> tuple[Callable[[Any], bool], str]:
    def fits(x: Any) -> bool:
        kind = isinstance(x, int) if whole else isinstance(x, int | float) and math.isfinite(x)
        return kind and not isinstance(x, bool) and (x > low if strict else x >= low)

    bound = "" if low == -math.inf else f" {'above' if strict else 'of at least'} {low:g}"
    return fits, f"a {'whole ' if whole else ''}number{bound}"


def _one_of(*choices: Any) -> tuple[Callable[[Any], bool], str]:
    return lambda x: any(x == c and type(x) is type(c) for c in choices), f"one of {', '.join(map(str, choices))}"


BOOL = (lambda x: isinstance(x, bool), "true or false")
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
    "method.layer": _number(0, whole=True),
    "method.objective.beta": _number(0, strict=True),
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
    defaults = _defaults(cfg, config_name)
    known = flatten(defaults)
    for key, value in flatten(cfg).items():
        if key not in known:
            raise ValueError(unknown_key(key, defaults))
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
    if family.from_scratch and not Path(cfg.hf_key, "config.json").exists():
        raise ValueError(f"hf_key={cfg.hf_key}: needs to be a folder with a config.json, {family.name} being made from scratch")
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
            f"num_epochs={cfg.num_epochs} of {rows} rows are no whole step of {size} rows (batch_size={cfg.batch_size}"
            f" x gradient_accumulation_steps={cfg.gradient_accumulation_steps} x {processes()} processes)"
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
    """Raises ValueError where the split is none, or its data are not there, wrong, or too few for a step."""
    if cfg.split not in TRAIN_SPLITS:
        raise ValueError(f"split={cfg.split}: to fine-tune on is one of {', '.join(TRAIN_SPLITS)}")
    if cfg.forget_data is None and cfg.retain_data is None:
        rows = check_split(cfg.data_path, cfg.split)
    elif cfg.split != "full" and cfg.retain_data is None:
        raise ValueError(
            f"split={cfg.split}: forget_data alone has no rows to retain; give retain_data=FILE too, or split=full"
        )
    else:
        keys = ("retain_data", "forget_data") if cfg.split == "full" else ("retain_data",)
        rows = sum(check_rows(cfg[key], key) for key in keys if cfg[key] is not None)
    if rows is not None:
        count_steps(cfg, rows)


def check_forget_data(cfg: DictConfig) -> None:
    """Raises ValueError where the split is no forget split, or its data are not there, wrong, or too few."""
    check_forget_split(cfg.split)
    for given, missing in (("forget_data", "retain_data"), ("retain_data", "forget_data")):
        if cfg[given] is not None and cfg[missing] is None:
            raise ValueError(f"{given}={cfg[given]}: local data come in pairs; give {missing}=FILE too")
    forget: int | None
    retain: int | None
    held_out = cfg.retain_holdout
    if cfg.forget_data is not None:
        forget, retain = check_rows(cfg.forget_data, "forget_data"), check_rows(cfg.retain_data, "retain_data")
    else:
        forget, retain = (check_split(cfg.data_path, split) for split in (cfg.split, RETAIN_OF[cfg.split]))
        held_out = check_split(cfg.data_path, "retain_perturbed") if held_out is None else held_out
    if retain is not None and held_out is not None and held_out >= retain:
        raise ValueError(f"retain_holdout={held_out}: the retain split has {retain} rows, and some must be left to train on")
    if forget is not None and "num_epochs" in cfg:
        count_steps(cfg, forget)


def check_forget_split(split: str) -> None:
    if split not in FORGET_SPLITS:
        raise ValueError(f"split={split}: to unlearn is one of {', '.join(FORGET_SPLITS)}")


def check_rows(file: str | Path, key: str = "data_path") -> int:
    """How many rows a JSON-lines file has. Raises ValueError where it has none, or a line that is no question and answer."""
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"{key}={file}: no such file")
    rows = 0
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        if line.strip():
            rows += 1
            try:
                row = json.loads(line)
            except ValueError as error:  # also text that is not UTF-8
                raise ValueError(f"{key}={file}, line {number}: not JSON ({error})") from error
            if not isinstance(row, dict) or not all(isinstance(row.get(text), str) for text in ("question", "answer")):
                raise ValueError(f"{key}={file}, line {number}: needs the texts 'question' and 'answer', and has {list(row)}")
    if rows == 0:
        raise ValueError(f"{key}={file}: no rows; needs lines of JSON with the texts 'question' and 'answer'")
    return rows


def find_path(path: str) -> str:
    """A relative path as it stands, or else below the project's own folder."""
    return str(ROOT / path) if not Path(path).exists() and (ROOT / path).exists() else path


def is_checkpoint(folder: str | Path) -> bool:
    folder = Path(folder)
    return (folder / "config.json").exists() and any(folder.glob("*.safetensors"))


def check_checkpoint(key: str, path: str) -> None:
    """Raises ValueError where `path` is neither a folder with a checkpoint nor a model on the hub."""
    if is_checkpoint(path) or (not Path(path).is_dir() and on_hub(path, "model")):
        return
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    inside = sorted((str(file.parent) for file in folder.glob("*/config.json")), key=lambda name: (len(name), name))
    what = "a folder without a checkpoint" if Path(path).is_dir() else "neither a folder nor a model that the hub gives"
    raise ValueError(f"{key}={path}: {what}" + (f"; there are {', '.join(inside)}" if inside else ""))


def check_layer(model_path: str, layer: int) -> None:
    """Raises ValueError where the model is not that deep."""
    file = Path(model_path, "config.json")
    if not file.exists():
        from huggingface_hub import hf_hub_download

        file = Path(hf_hub_download(model_path, "config.json", etag_timeout=2))
    config = json.loads(file.read_text())
    depth = next((config[key] for key in ("num_hidden_layers", "n_layer", "num_layers") if key in config), None)
    if depth is not None and layer > depth:
        raise ValueError(f"method.layer={layer}: {model_path} has 0 (its embeddings) to {depth} (after its final norm)")


def check_split(data_path: str, split: str) -> int | None:
    """How many rows the split has, None where only `datasets` can tell. Raises ValueError where it is not there."""
    if Path(data_path, f"{split}.json").exists():
        return check_rows(Path(data_path, f"{split}.json"))
    if Path(data_path).is_dir() and not any(Path(data_path).glob(f"**/{split}*.parquet")):
        there = ", ".join(sorted(file.stem for file in Path(data_path).glob("*.json")))
        raise ValueError(f"split={split}: data_path={data_path} has no {split}.json; there are {there or 'no splits'}")
    if not Path(data_path).is_dir() and not on_hub(data_path, "dataset"):
        raise ValueError(f"data_path={data_path}: neither a folder nor a data set that the hub gives, as {HUB_TOFU}")
    return None


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
