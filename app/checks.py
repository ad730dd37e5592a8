"""What can be told wrong before anything is loaded: checkpoints, folders, disk, optimisers, loggers. Imports no torch."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from app.data import on_hub
from app.families import Family, load_families
from app.methods import RETAINED
from app.places import CONFIG
from app.settings import BYTES, OPTIMIZERS, Adapters, Forget, GEffects, InheritedAdapters, Method, Training
from unlearn.io.rows import read_object
from unlearn.io.weights import base_of, is_checkpoint, why_no_checkpoint
from utils import processes

MOST_STEPS = 10_000_000  # whose rows are drawn before the first


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


def count_steps(settings: Training, rows: int) -> tuple[int, int]:
    """The run's optimiser steps, floor(epochs x rows / rows a step), and those of one epoch, at least 1."""
    size = settings.batch_size * settings.gradient_accumulation_steps * processes()
    epochs = settings.num_epochs
    steps = math.floor(epochs * rows / size)
    if steps > MOST_STEPS:
        raise ValueError(f"num_epochs={epochs} of {rows} rows are {steps} steps, and at most {MOST_STEPS} can be planned")
    if steps == 0:
        raise ValueError(
            f"num_epochs={epochs} of {rows} rows are no whole step of {size} rows (batch_size={settings.batch_size}"
            f" x gradient_accumulation_steps={settings.gradient_accumulation_steps} x {processes()} processes); make it smaller"
        )
    return steps, max(1, rows // size)


def two_gradients(settings: Forget | GEffects) -> bool:
    """Whether a step's gradients of the objective and of the retain term are kept apart."""
    return settings.rule.name != "sum" or (isinstance(settings, Forget) and settings.log_conflict)


def check_rule(settings: Forget | GEffects) -> None:
    """Raises ValueError where what takes a retain term has none, or its weight is given twice."""
    method, retain = settings.method, settings.retain
    if two_gradients(settings) and retain.term is None:
        key = "log_conflict=true" if settings.rule.name == "sum" else f"rule={settings.rule.name}"
        raise ValueError(f"{key}: retain={retain.name} has no gradient beside that of method={method.name}; {_terms()}")
    if (dual := method.get("dual")) is not None:
        if retain.term is None:
            raise ValueError(f"retain={retain.name}: the dual variable of method={method.name} is a term's weight; {_terms()}")
        if retain.weight != 1:
            start = dual["start"]
            raise ValueError(f"retain.weight={retain.weight}: method={method.name} has method.dual.start={start} in its place")


def _terms() -> str:
    return f"give retain={'|'.join(file.stem for file in sorted(CONFIG.glob('retain/*.yaml')) if file.stem != 'none')}"


# ---- folders and disk ----


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


def check_disk(
    settings: Training, checkpoints: set[Path], parameters: int, keep_last: int | None = None, trained: int | None = None
) -> None:
    """Raises ValueError where the disk has no room for what the run has yet to write.

    That is those of its `checkpoints` that are not there, of `parameters` numbers each, and what a killed run goes on from:
    float32 weights, the optimiser's numbers (of those that are `trained`; None: of all) and a rule's moving average, twice, for
    a new one is written before the old one goes.
    """
    folder = Path(str(settings.save_dir))
    missing = sum(not is_checkpoint(checkpoint) for checkpoint in checkpoints)
    missing += missing > 0 and keep_last is not None  # a new one is written before an old one goes
    trained = parameters if trained is None else trained
    average = BYTES["float32"] if isinstance(settings, Forget) and settings.rule.average is not None else 0
    state = round(parameters * BYTES["float32"] + trained * (OPTIMIZERS[settings.optim].state + average))
    there = sum(file.stat().st_size for file in folder.glob("resume/**/*") if file.is_file())
    needed = missing * parameters * BYTES[settings.save_dtype] + (max(0, 2 * state - there) if missing else 0)
    free = shutil.disk_usage(nearest(folder)).free
    if needed > free:
        raise ValueError(
            f"save_dir={folder}: {free / 2**30:.2f} GiB are free there, and the run writes {needed / 2**30:.2f} GiB: {missing}"
            f" checkpoints of {parameters:,} parameters in {settings.save_dtype}, and twice {state / 2**30:.2f} GiB to go on"
            " from when it is killed (save_steps=N: fewer checkpoints; keep_last=N: the newest alone; save_dtype=bfloat16:"
            " half their size)"
        )


# ---- models ----


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
                    f" the families are {', '.join(load_families())} (or give hf_key=FOLDER of a model like it)"
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


def check_layer(model_path: str, layer: int | Sequence[int] | None) -> None:
    """Raises ValueError where the model is not as deep as that layer, or one of them."""
    if layer is None:
        return
    config = model_config(model_path)
    if config is None:
        from huggingface_hub import hf_hub_download

        config = json.loads(Path(hf_hub_download(model_path, "config.json", etag_timeout=2)).read_text())
    text = text_config(config)
    depth = next((text[key] for key in ("num_hidden_layers", "n_layer", "num_layers") if key in text), None)
    deepest = layer if isinstance(layer, int) else max(layer)
    if depth is not None and deepest > depth:
        raise ValueError(f"method.layer={layer}: {model_path} has 0 (its embeddings) to {depth} (after its final norm)")


def check_trainable(pattern: str | None, path: str, adapters: Adapters | InheritedAdapters) -> None:
    """Raises ValueError where the pattern is found in no trained parameter's name of the model (if its config.json is here)."""
    if pattern is None or (config := model_config(path)) is None:
        return
    from transformers import AutoConfig

    from unlearn.models.adapters import LoRA
    from unlearn.models.trained import matching, names_of

    lora = LoRA(**adapters.model_dump()) if adapters.r else None
    matching(pattern, names_of(AutoConfig.for_model(**config), lora))


def check_method(settings: Forget) -> None:
    """Raises ValueError where the method does not go with the retain term; or with measuring while it trains, what it trains
    being subtracted afterwards; or where a monitor has nothing to go along."""
    method, retain = settings.method, settings.retain
    if settings.geffect.monitor and not settings.geffect.every:
        raise ValueError("geffect.monitor=true: along what geffect.every measures, which is 0; geffect.every=1 or more")
    if method.refusal == "":
        raise ValueError(f"method.refusal='': method={method.name} needs a text; its YAML has one")
    if method.name in RETAINED and retain.name != method.name:
        raise ValueError(f"retain={retain.name}: method={method.name} is ga with the retain term {method.name} already")
    if method.negate is None:
        return
    who = f"method={method.name} subtracts what it trains (method.negate)"
    if retain.term:
        raise ValueError(f"retain={retain.name}: {who}, so that a retain term would be subtracted too; retain=none")
    for group, what in (("geffect", "compute_geffect.py"), ("eval", "evaluation_everything.py")):
        if every := getattr(settings, group).every:
            raise ValueError(
                f"{group}.every={every}: {who}, and while it trains the weights are not the unlearned ones; {what} measures its"
                " checkpoints"
            )


def check_gradient(method: Method, key: str, instead: str) -> None:
    """Raises ValueError where the method's objective is trained at other weights than the unlearned ones."""
    if method.negate is not None:
        raise ValueError(f"{key}={method.name}: it has no gradient at the unlearned weights; {instead}")


def shapes() -> dict[str, Any]:
    """config/shapes.yaml: the configurations of families whose weights need not be here."""
    import yaml

    found: dict[str, Any] = yaml.safe_load((CONFIG / "shapes.yaml").read_text())
    return found
