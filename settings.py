"""The command line and its settings: one line for what a user got wrong, before anything is loaded.

Nothing here imports torch: a mistyped command is answered at once.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from app.families import Family, load_families, load_family
from app.places import CONFIG, find_path
from unlearn.io.rows import read_jsonl, read_object
from unlearn.io.signals import Stopped, stop_at_once
from unlearn.io.weights import OF_A_MODEL, base_of, is_checkpoint, other_weights, why_no_checkpoint
from utils import (
    ALL_TEXTS,
    FORGET_SPLITS,
    RETAIN_OF,
    TRAIN_SPLITS,
    compose_config,
    count_steps,
    default_holdout,
    defaults_of,
    end_processes,
    flatten,
)

ALIASES = {"grad_ascent": "ga", "ins_npo": "tnpo", "w_ins_npo": "wtnpo", "po": "idk", "grad_diff": "gd", "KL": "kl"}
RETAIN_TERMS = ("gd", "kl")

REPEATABLE = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "FLASH_ATTENTION_DETERMINISTIC": "1"}

# ---- the command line ----


def cli(run: Callable[[DictConfig], Any], config_name: str) -> None:
    """Let Hydra in, and turn what a user got wrong into one line on standard error and exit code 2."""
    import hydra
    from hydra._internal.utils import get_args_parser

    if "WORLD_SIZE" not in os.environ:  # one process: one device, not torch's DataParallel over all
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors reach us
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")  # 1024 kernels, one a shape, would be a GiB on a CPU
    codes: list[int] = []
    sweep: Path | None = None

    @functools.wraps(run)
    def job(cfg: DictConfig) -> Any:  # Hydra would print a line of its own, and stop a sweep
        with noted(cfg) as failed:
            try:
                return run(cfg)
            except Exception as error:
                failed.append(one_line(error, config_name))
                codes.append(report(error, config_name))

    sys.argv[1:] = map(quote, sys.argv[1:])
    stop_at_once()
    try:
        parser = get_args_parser()
        parser.error = _refuse  # type: ignore[method-assign]
        args = parser.parse_args()
        config_name = args.config_name or config_name
        if args.help:
            return print(help_text(sys.modules[run.__module__].__doc__ or "", config_name))
        sweep = open_sweep(args, config_name) if args.multirun else None
        hydra.main(version_base=None, config_path=str(CONFIG), config_name=config_name)(job)()
    except Stopped as stopped:
        _tell(f"{stopped}; the same command goes on from what is saved")
        codes.append(stopped.code)
    except Exception as error:
        codes.append(report(error, config_name))
    if sweep is not None and close_sweep(sweep):
        codes.append(1)
    end_processes(failed=bool(codes))
    if codes:
        sys.exit(max(codes))


def open_sweep(args: argparse.Namespace, config_name: str) -> Path:
    """The folder of a sweep's summary, told by its script and its settings: the same call again has the same one."""
    given = [word.partition("=")[2] for word in args.overrides if word.startswith("hydra.sweep.dir=")]
    where = [word.partition("=")[2] for word in args.overrides if word.startswith("output_dir=")]
    digest = hashlib.sha256("\n".join(sorted(args.overrides)).encode()).hexdigest()[:8]
    name = f"{Path(sys.argv[0]).stem}_{digest}"
    output_dir = where[-1].strip("'\"") if where else compose_config(config_name).output_dir
    folder = Path(given[-1].strip("'\"")) if given else Path(output_dir, "sweeps", name)
    check_folder(folder, "output_dir")
    for file in (folder / "jobs").glob("*.json"):  # of an earlier call
        file.unlink()
    if not given:
        sys.argv.append(quote(f"hydra.sweep.dir='{folder}'"))
    return folder


@contextmanager
def noted(cfg: DictConfig) -> Iterator[list[str]]:
    """Around a job of a sweep: how it ends stands in the sweep's folder. What it failed with is put into the list."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    failed: list[str] = []
    job = HydraConfig.get()
    if job.mode != RunMode.MULTIRUN or int(os.environ.get("RANK", 0)) != 0:
        yield failed
        return
    from unlearn.io.files import write_whole

    def note(status: str) -> None:
        record = {
            "settings": list(job.overrides.task),
            "status": status,
            "folder": cfg.get("save_dir"),
            "error": "".join(failed),
        }
        write_whole(Path(job.sweep.dir, "jobs", f"{job.job.num}.json"), json.dumps(record, indent=2) + "\n")

    note("did not end")
    yield failed
    note("failed" if failed else "done")


def close_sweep(sweep: Path) -> bool:
    """Summarise the sweep, and say which of its jobs failed; returns whether any did."""
    if int(os.environ.get("RANK", 0)) != 0 or not (sweep / "jobs").is_dir():
        return False
    from unlearn.reporting.sweeps import summarise, told

    table = summarise(sweep)
    failures = told(table)
    for line in failures:
        _tell(line)
    _tell(f"{len(table) - len(failures)} of {len(table)} jobs are done; the summary is {sweep / 'summary.csv'}")
    return bool(failures)


def quote(word: str) -> str:
    """key=value as Hydra reads it where the value is a path with a = of its own (.../ga_..._seed=1) or such signs."""
    key, _, value = word.partition("=")
    if "=" not in word or word.startswith("-") or re.match(r"['\"\[{$]", value):
        return word
    if not re.fullmatch(r"[A-Za-z0-9_./:-]*", value) and Path(value).exists():
        return f"{key}='" + value.replace("'", "\\'") + "'"
    return f"{key}=" + ",".join(f"'{part}'" if "=" in part else part for part in value.split(","))


def help_text(description: str, config_name: str) -> str:
    """What a script does, and every key with its default and meaning, as the YAML files say them."""
    families = f"model_family: {', '.join(load_families())}"
    folders = [CONFIG / str(key) for key in compose_config(config_name) if (CONFIG / str(key)).is_dir()]
    groups = [f"{folder.name}: {', '.join(sorted(file.stem for file in folder.glob('*.yaml')))}" for folder in folders]
    texts = [(CONFIG / f"{Path(name).stem}.yaml").read_text() for name in (config_name, "common")]
    own, common = (
        [line for line in text.partition("\nhydra:")[0].splitlines() if re.match(r"\s*\w+: ", line)] for text in texts
    )
    names = {line.partition(":")[0] for line in own}  # with a default of its own
    keys = own + [line for line in common if line.partition(":")[0] not in names and "\n  - common\n" in texts[0]]
    return "\n".join(
        [description.strip(), "", families, *groups, "", "key: default # meaning", *keys, "", "--hydra-help: its flags"]
    )


def _refuse(message: str) -> NoReturn:
    raise ValueError(f"{message}; settings are key=value, after the flags, which are Hydra's (--help lists them)")


def report(error: Exception, config_name: str) -> int:
    """Print an error as one line and return the exit code: 2 for what a user got wrong. Raises it where `debug=true`."""
    if any(word.lower() == "debug=true" for word in sys.argv):
        raise error
    users = isinstance(error, (ValueError, HydraException, OmegaConfBaseException))
    clear = users or isinstance(error, FloatingPointError | OSError)
    _tell(one_line(error, config_name) if clear else f"{type(error).__name__}: {_flat(error)} (debug=true: the traceback)")
    return 2 if users else 1


def _tell(line: str) -> None:
    """Print the line once whatever the number of processes."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)


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
        names = sorted(file.stem for file in CONFIG.glob("*.yaml") if file.stem not in ("common", "model_config", "shapes"))
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


# ---- the methods' names ----


def methods() -> list[str]:
    return sorted(file.stem for file in (CONFIG / "method").glob("*.yaml"))


def parse_method(name: str) -> list[str]:
    """A method's name, with its number and its retain term, as forget.py's settings: rmu_21_kl, npo_gd, wtnpo_0.5, ..."""

    def parse(name: str) -> list[str] | None:
        if (known := ALIASES.get(name, name)) in methods():
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
        f"method {name}: unknown; there are {', '.join(methods())}, their other names {', '.join(ALIASES)},"
        f" rmu_LAYER and wtnpo_ALPHA, each with an optional _{' or _'.join(RETAIN_TERMS)}"
    )


def hint(name: str) -> str:
    """What forget.py calls the method that basher1.py knows by that name."""
    try:
        return f" (is it {' '.join(parse_method(name))}?)"
    except ValueError:
        return ""


# ---- what a setting may be ----


def _number(low: float, strict: bool = False, whole: bool = False, high: float = math.inf) -> tuple[Callable[[Any], bool], str]:
    def fits(x: Any) -> bool:
        kind = isinstance(x, int) if whole else isinstance(x, int | float) and math.isfinite(x)
        return kind and not isinstance(x, bool) and (x > low if strict else x >= low) and x <= high

    bound = "" if low == -math.inf else f" {'above' if strict else 'of at least'} {low:g}"
    bound += "" if high == math.inf else f" and at most {high}"
    return fits, f"a {'whole ' if whole else ''}number{bound}"


def _one_of(*choices: Any) -> tuple[Callable[[Any], bool], str]:
    return lambda x: any(x == c and type(x) is type(c) for c in choices), f"one of {', '.join(map(str, choices))}"


class Optimizer(NamedTuple):
    """How many bytes it keeps of each parameter, and the library that it is of, beside PyTorch's and transformers' own."""

    state: float
    library: str | None = None


OPTIMIZERS = {
    "adamw_torch_fused": Optimizer(8),
    "adamw_torch": Optimizer(8),
    "sgd": Optimizer(0),
    "adafactor": Optimizer(0),
    "adamw_8bit": Optimizer(2, "bitsandbytes"),
    "paged_adamw_32bit": Optimizer(8, "bitsandbytes"),
    "paged_adamw_8bit": Optimizer(2, "bitsandbytes"),
    "adamw_torch_8bit": Optimizer(2, "torchao"),
    "adamw_torch_4bit": Optimizer(1, "torchao"),
}
BOOL = (lambda x: isinstance(x, bool), "true or false")
LIST = (lambda x: isinstance(x, Sequence) and not isinstance(x, str), "a list, [A,B,...]")
VALID: dict[str, tuple[Callable[[Any], bool], str]] = {
    "seed": _number(0, whole=True, high=2**32 - 1),
    "batch_size": _number(1, whole=True),
    "gradient_accumulation_steps": _number(1, whole=True),
    "lr": _number(0, strict=True),
    "num_epochs": _number(0, strict=True),
    "weight_decay": _number(0),
    "max_grad_norm": _number(0),
    "save_steps": _number(1, whole=True),
    "retain_holdout": _number(1, whole=True),
    "max_length": _number(2, whole=True),
    "hyper_param": _number(-math.inf),
    "retain.weight": _number(0),
    "method.layer": _number(0, whole=True),
    "method.objective.beta": _number(0, strict=True),
    "geffect.every": _number(0, whole=True),
    "geffect.retain_rows": _number(1, whole=True),
    "step": _number(0, whole=True),
    "sweep": LIST,
    "ds_size": _number(1, whole=True),
    "generation.max_length": _number(2, whole=True),
    "generation.max_new_tokens": _number(1, whole=True),
    "truth_ratio": _one_of("geometric", "arithmetic"),
    "epsilon": _number(0),
    "rouge_tokenizer": _one_of("ascii", "unicode"),
    "ps_p": _number(0, high=1),
    "min_k": _number(0, strict=True, high=1),
    "similar": BOOL,
    "control": BOOL,
    "eval.every": _number(0, whole=True),
    "dtype": _one_of("auto", "float32", "bfloat16"),
    "weights": _one_of("float32", "bfloat16"),
    "save_dtype": _one_of("float32", "bfloat16"),
    "optim": _one_of(*OPTIMIZERS),
    "parallel": _one_of("ddp", "fsdp"),
    "plan": _number(0, whole=True),
    "plan_for": _one_of("gpu", "cpu"),
    "geffect.offload": BOOL,
    "keep_last": _number(1, whole=True),
    "LoRA.r": _number(0, whole=True),
    "LoRA.alpha": _number(1, whole=True),
    "LoRA.dropout": (lambda x: _number(0)[0](x) and x < 1, "a number of at least 0 and below 1"),
    "logger": _one_of("tensorboard", "wandb", "trackio"),
    "geffect.instances": BOOL,
    "geffect.norms": BOOL,
    "instances": BOOL,
    "norms": BOOL,
    "tokens": BOOL,
    "positions": BOOL,
    "gradient_checkpointing": BOOL,
    "loss_on_answer_tag": BOOL,
    "debug": BOOL,
    "deterministic": BOOL,
}
FLOAT64 = {"dtype": _one_of("auto", "float32", "bfloat16", "float64")}
VALID_OF = {"forget_ge": FLOAT64, "eval_tofu": FLOAT64, "eval_everything": FLOAT64}  # of one configuration
NULLABLE = {
    "split",
    "step",
    "model_path",
    "model_path_cur",
    "sweep",
    "geffect.retain_rows",
    "lr",
    "num_epochs",
    "save_steps",
    "retain_holdout",
    "hyper_param",
    "gradient_checkpointing",
    "ds_size",
    "generation.max_length",
    "generation.max_new_tokens",
    "logger",
}


def check_values(cfg: DictConfig, config_name: str) -> None:
    """Raises ValueError for a value of the wrong type or range, or a key that the configuration does not have."""
    if "method" in cfg and config_name not in ("forget", "forget_ge"):
        raise ValueError(f"the configuration is forget's: is --config-name={config_name} meant?")
    check_against(cfg, defaults_of(cfg, config_name), config_name)


def check_against(cfg: DictConfig, defaults: DictConfig, config_name: str) -> None:
    """Raises ValueError as `check_values` does, the defaults being given."""
    known = flatten(defaults)
    for group in {key.partition(".")[0] for key in known if "." in key} & set(cfg.keys()):
        if not OmegaConf.is_dict(cfg[group]):
            inside = ", ".join(key for key in known if key.startswith(f"{group}."))
            raise ValueError(f"{group}={cfg[group]}: is a group of settings, {inside}")
    if missing := [key for key in known if key not in flatten(cfg)]:
        lacks = dict.fromkeys(key.partition(".")[0] for key in missing)
        raise ValueError(f"the configuration lacks {', '.join(lacks)}: is --config-name={config_name} meant?")
    for key, value in flatten(cfg).items():
        if key not in known:
            raise ValueError(unknown_key(key, defaults))
        fits, what = VALID_OF.get(config_name, {}).get(key) or VALID.get(key) or _like(key, known[key])
        if not fits(value) and not (value is None and (key in NULLABLE or known[key] is None)):
            raise ValueError(f"{key}={value}: needs to be {what}")


def _like(key: str, default: Any) -> tuple[Callable[[Any], bool], str]:
    """A method's own keys: of its default's type."""
    if isinstance(default, bool):
        return BOOL
    if isinstance(default, int | float):
        return _number(-math.inf)
    return lambda x: isinstance(x, str), "a text"


def prepare(cfg: DictConfig, config_name: str) -> Family:
    """Check the settings' values and fill in those that the model family decides; returns the family."""
    if OmegaConf.is_missing(cfg, "model_family"):
        raise ValueError(f"model_family is missing; the families are {', '.join(load_families())}")
    family = load_family(
        cfg.model_family, hf_key=cfg.hf_key, data_path=cfg.data_path, loss_on_answer_tag=cfg.loss_on_answer_tag
    )
    if cfg.get("save_dir") == "":
        cfg.save_dir = None
    check_values(cfg, config_name)
    cfg.model_family, cfg.hf_key, cfg.data_path = family.name, find_path(family.hf_key), find_path(family.data_path)
    if family.from_scratch and not Path(cfg.hf_key, "config.json").exists():
        raise ValueError(f"hf_key={cfg.hf_key}: needs to be a folder with a config.json, {family.name} being made from scratch")
    if family.from_scratch and (others := other_weights(Path(cfg.hf_key), OF_A_MODEL)):
        why = why_no_checkpoint(Path(cfg.hf_key)) or ""
        raise ValueError(
            f"hf_key={cfg.hf_key}: {why}; a new model is made where nothing of one is but a config.json, and there is"
            f" {', '.join(others[:3])}"
        )
    if cfg.get("gradient_checkpointing", True) is None:
        cfg.gradient_checkpointing = family.gradient_checkpointing
    be_deterministic(cfg.deterministic)
    return replace(family, hf_key=cfg.hf_key, data_path=cfg.data_path)


def be_deterministic(wanted: bool) -> None:
    """Have torch use algorithms that give the same bits each time, or (a sweep's next job) what is fastest again."""
    os.environ.update(REPEATABLE if wanted else {})  # read when CUDA starts
    if wanted or "torch" in sys.modules:
        import torch

        torch.use_deterministic_algorithms(wanted)
        torch.backends.cudnn.deterministic = wanted


def check_logger(logger: str | None) -> None:
    """Raises ValueError where the logger is not installed."""
    if logger is not None and importlib.util.find_spec(logger) is None:
        raise ValueError(f"logger={logger}: not installed; pip install {logger}")


def check_optimizer(name: str, parallel: str) -> None:
    """Raises ValueError where the optimiser can't have its state in shards, or its library is not installed."""
    library = OPTIMIZERS[name].library
    if library == "bitsandbytes" and parallel == "fsdp":
        raise ValueError(
            f"optim={name}: is of bitsandbytes, whose state parallel=fsdp can't split; adamw_torch_8bit and adamw_torch_fused"
            " can be (or parallel=ddp)"
        )
    if library is not None and importlib.util.find_spec(library) is None:
        others = ", ".join(other for other, of in OPTIMIZERS.items() if of.library is None)
        raise ValueError(f"optim={name}: is of {library}, which is not installed; pip install {library}, or one of {others}")


# ---- where a run writes ----

BYTES = {"float32": 4, "bfloat16": 2}


def check_folder(folder: Path, key: str = "save_dir") -> None:
    """Raises ValueError where the folder can't be made or written."""
    there = nearest(folder)
    if not there.is_dir():
        raise ValueError(f"{key}={folder}: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{key}={folder}: {there} can't be written")


def nearest(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    return next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())


def check_disk(cfg: DictConfig, checkpoints: set[Path], parameters: int) -> None:
    """Raises ValueError where the disk has no room for what the run has yet to write.

    That is those of its `checkpoints` that are not there, of `parameters` numbers each, and what a killed run goes on from:
    float32 weights and the optimiser's numbers, twice, for a new one is written before the old one goes.
    """
    folder = Path(cfg.save_dir)
    missing = sum(not is_checkpoint(checkpoint) for checkpoint in checkpoints)
    missing += missing > 0 and cfg.get("keep_last") is not None  # a new one is written before an old one goes
    state = round(parameters * (BYTES["float32"] + OPTIMIZERS[cfg.optim].state))
    there = sum(file.stat().st_size for file in folder.glob("resume/**/*") if file.is_file())
    needed = missing * parameters * BYTES[cfg.save_dtype] + (max(0, 2 * state - there) if missing else 0)
    free = shutil.disk_usage(nearest(folder)).free
    if needed > free:
        raise ValueError(
            f"save_dir={folder}: {free / 2**30:.2f} GiB are free there, and the run writes {needed / 2**30:.2f} GiB: {missing}"
            f" checkpoints of {parameters:,} parameters in {cfg.save_dtype}, and twice {state / 2**30:.2f} GiB to go on from"
            " when it is killed (save_steps=N: fewer checkpoints; keep_last=N: the newest alone; save_dtype=bfloat16: half"
            " their size)"
        )


# ---- checkpoints and data, before they are loaded ----


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


def check_forget_data(cfg: DictConfig) -> int | None:
    """How many rows there are to forget, None where only `datasets` can tell.

    Raises ValueError where the split is no forget split, or its data are not there, wrong, or too few.
    """
    check_forget_split(cfg.split)
    for given, missing in (("forget_data", "retain_data"), ("retain_data", "forget_data")):
        if cfg[given] is not None and cfg[missing] is None:
            raise ValueError(f"{given}={cfg[given]}: local data come in pairs; give {missing}=FILE too")
    forget: int | None
    retain: int | None
    held_out = cfg.retain_holdout
    if cfg.forget_data is not None:
        forget, retain = check_rows(cfg.forget_data, "forget_data"), check_rows(cfg.retain_data, "retain_data")
        held_out = default_holdout(retain) if held_out is None else held_out
    else:
        forget, retain = (check_split(cfg.data_path, split) for split in (cfg.split, RETAIN_OF[cfg.split]))
        held_out = check_split(cfg.data_path, "retain_perturbed") if held_out is None else held_out
    if retain is not None and held_out is not None and held_out >= retain:
        raise ValueError(f"retain_holdout={held_out}: the retain split has {retain} rows, and some must be left to train on")
    if forget is not None and "num_epochs" in cfg:
        count_steps(cfg, forget)
    return forget


def check_forget_split(split: str) -> None:
    if split not in FORGET_SPLITS:
        raise ValueError(f"split={split}: to unlearn is one of {', '.join(FORGET_SPLITS)}")


def check_checkpoint(key: str, path: str) -> None:
    """Raises ValueError where `path` is neither a folder with a checkpoint nor a model on the hub."""
    if is_checkpoint(path) or (not Path(path).is_dir() and on_hub(path, "model")):
        return
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    inside = sorted((str(file.parent) for file in folder.glob("*/config.json")), key=lambda name: (len(name), name))
    what = "no such folder, and no model that the hub gives (offline? give a local folder)"
    if Path(path).is_dir():
        what = why_no_checkpoint(Path(path)) or what
    raise ValueError(f"{key}={path}: {what}" + (f"; there are {', '.join(inside)}" if inside else ""))


def check_architecture(key: str, path: str, family: Family) -> None:
    """Raises ValueError where the checkpoint has another architecture or vocabulary than the family's model (if it is here)."""
    there, of_family = model_config(path), model_config(family.hf_key)
    if there is not None and of_family is not None:
        for name in ("model_type", "vocab_size"):
            found, wanted = (config.get(name, text_config(config).get(name)) for config in (there, of_family))
            if found != wanted:
                raise ValueError(
                    f"{key}={path}: has {name} {found}, and model_family={family.name} {wanted};"
                    f" the families are {', '.join(load_families())}"
                )


def model_config(path: str) -> dict[str, Any] | None:
    """A model's (an adapter's model's) config.json, in a folder or in the hub's cache; None where it is in neither."""
    if (base := base_of(path)) is not None:
        return model_config(base)
    file = Path(path, "config.json")
    if not Path(path).is_dir():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = try_to_load_from_cache(path, "config.json")
        except HFValidationError:  # no name of the hub's
            return None
        if not isinstance(cached, str):
            return None
        file = Path(cached)
    return read_object(file) if file.exists() else None


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config.json that is of the text model: all of it, where there is none beside others (vision, audio)."""
    inner = next((config[key] for key in ("text_config", "decoder", "generator") if config.get(key)), config)
    return inner if isinstance(inner, dict) else config


def check_layer(model_path: str, layer: int) -> None:
    """Raises ValueError where the model is not that deep."""
    config = model_config(model_path)
    if config is None:
        from huggingface_hub import hf_hub_download

        config = json.loads(Path(hf_hub_download(model_path, "config.json", etag_timeout=2)).read_text())
    text = text_config(config)
    depth = next((text[key] for key in ("num_hidden_layers", "n_layer", "num_layers") if key in text), None)
    if depth is not None and layer > depth:
        raise ValueError(f"method.layer={layer}: {model_path} has 0 (its embeddings) to {depth} (after its final norm)")


def check_split(data_path: str, split: str) -> int | None:
    """How many rows the split has, None where only `datasets` can tell. Raises ValueError where it is not there."""
    if Path(data_path, f"{split}.json").exists():
        perturbed = () if not split.endswith("_perturbed") else ("perturbed_answer",)
        of_tofu = perturbed and split.startswith(("forget", "retain"))
        return check_rows(Path(data_path, f"{split}.json"), also=(*perturbed, "paraphrased_answer") if of_tofu else perturbed)
    if Path(data_path).is_dir() and not any(Path(data_path).glob(f"**/{split}*.parquet")):
        there = ", ".join(sorted(file.stem for file in Path(data_path).glob("*.json")))
        raise ValueError(f"split={split}: data_path={data_path} has no {split}.json; there are {there or 'no splits'}")
    if not Path(data_path).is_dir() and not on_hub(data_path, "dataset"):
        why = "no such folder, and no data set that the hub gives (offline? give a local copy of TOFU)"
        raise ValueError(f"data_path={data_path}: {why}")
    return None


def on_hub(name: str, repo_type: str) -> bool:
    """Whether the hub, or its cache here, has the repository; answered within 2 seconds."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return False
    from huggingface_hub import CacheNotFound, HfApi, scan_cache_dir

    try:
        HfApi().repo_info(name, repo_type=repo_type, timeout=2)
        return True
    except Exception as error:
        if "timed out" in str(error).lower():
            return True  # a slow network: let the real download decide
    try:
        return any(repo.repo_id == name and repo.repo_type == repo_type for repo in scan_cache_dir().repos)
    except CacheNotFound:
        return False


def check_rows(file: str | Path, key: str = "data_path", also: Sequence[str] = ()) -> int:
    """How many rows a JSON-lines file has. Raises ValueError where one is no question and answer, or there is none.

    Args:
        also: what its rows need beside question and answer.
    """
    if not Path(file).is_file():
        raise ValueError(f"{key}={file}: no such file")
    rows = read_jsonl(file)
    needed = ("question", "answer", *also)
    for number, row in enumerate(rows, start=1):
        if missing := [name for name in needed if row.get(name) is None]:
            kinds = {name: type(value).__name__ for name, value in row.items()}
            raise ValueError(f"{key}={file}, row {number}: needs {' and '.join(map(repr, missing))}, and has {kinds}")
        for name in {*needed, *ALL_TEXTS} & row.keys():
            texts, what = (row[name], "a list of texts") if name == "perturbed_answer" else ([row[name]], "a text")
            if any(isinstance(x, str) and re.search("[\ud800-\udfff]", x) for x in texts):
                raise ValueError(f"{key}={file}, row {number}: {name!r} holds half a surrogate pair, which is no text")
            if row[name] is not None and not (isinstance(texts, list) and texts and all(isinstance(x, str) for x in texts)):
                raise ValueError(f"{key}={file}, row {number}: {name!r} is {what}, and not {row[name]!r:.60}")
    return len(rows)
