"""The model families: an entry of config/model_config.yaml each."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from app.places import CONFIG
from unlearn.io.weights import (
    is_checkpoint,
)

if TYPE_CHECKING:
    pass


HUB_TOFU = "locuslab/TOFU"


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
    file = CONFIG / "model_config.yaml"
    entries: dict[str, Any] = deepcopy(_entries(file, file.read_bytes()))
    return entries


@cache
def _entries(file: Path, _: bytes) -> Any:
    """Read once while it stays the same: the reader of YAML is slow."""
    return OmegaConf.to_container(OmegaConf.load(file))


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
