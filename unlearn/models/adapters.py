"""LoRA (arXiv 2106.09685) by peft: an adapter on every linear layer but the output head, trained in the weights' place.

A model keeps its class and its names: the adapters are injected (`add_adapter`), not wrapped around it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed

from unlearn.models.sharding import like

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of the names in peft's files


@dataclass(frozen=True)
class LoRA:
    """W + (alpha / r) B A with A (r, in) and B (out, r): A random, B zero at first. `dropout` is of A's input, in training."""

    r: int
    alpha: int
    dropout: float


def add_lora(model: PreTrainedModel, lora: LoRA, seed: int, base: str) -> None:
    """Give the model adapters, random from `seed`, and freeze its own weights.

    Args:
        base: the folder or hub name that the model is loaded from when an adapter is; noted in the adapters' files.

    Raises:
        ValueError: r is above the rank of any weight; there is dropout, and a layer's experts share one weight.
    """
    from peft import LoraConfig

    rank = max(min(weight.shape) for weight in model.parameters() if weight.ndim == 2)
    if lora.r > rank:
        raise ValueError(f"LoRA.r={lora.r}: the model's weights have rank {rank} at most")

    config = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    set_seed(seed)
    model.requires_grad_(False)
    try:
        model.add_adapter(config)
    except ValueError as error:
        if "lora_dropout" not in str(error):
            raise
        raise ValueError(
            f"LoRA.dropout={lora.dropout}: the experts of {type(model).__name__} share one weight, whose adapter has no input"
            " of its own to drop; LoRA.dropout=0"
        ) from error
    config.base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base


def has_adapters(model: nn.Module) -> bool:
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def has_virtual_tokens(model: nn.Module) -> bool:
    """Whether peft puts trained tokens before the rows' own (prompt tuning, prefix tuning), at each call anew."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


@torch.no_grad()
def read_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Put the adapter's weights of a folder into the model's adapters.

    Raises:
        ValueError: the folder has none, or one of another shape.
    """
    if not (folder / WEIGHTS).exists():
        raise ValueError(f"{folder}: no adapter, which the model here has")
    there = {name.removeprefix(PREFIX): value for name, value in load_file(folder / WEIGHTS).items()}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            found = there.get(name.replace(".default.", "."))
            if found is None or found.shape != parameter.shape:
                shape = "nothing" if found is None else tuple(found.shape)
                raise ValueError(f"{folder}: another adapter ({name} is {shape} there, {tuple(parameter.shape)} here)")
            parameter.copy_(like(parameter, found))


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model as it was without its adapters; a model that has none as it is."""
    if not has_adapters(model):
        yield
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    grads = {parameter: parameter.requires_grad for parameter in model.parameters()}  # which peft's switch changes
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, grad in grads.items():
            parameter.requires_grad_(grad)


def bare(model: PreTrainedModel) -> PreTrainedModel:
    """The model's class and configuration without adapters, and without weights."""
    with torch.device("meta"):
        found: PreTrainedModel = type(model)(model.config)
    found.generation_config = model.generation_config
    return found


@torch.no_grad()
def merged_state(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole state dict of a model with adapters as its bare model has it: each adapter added to its weight."""
    found = {}
    for name, weight in weights.items():
        if "lora_" in name:
            continue
        plain, kind = name.replace(".base_layer", ""), name.rpartition(".base_layer.")[2]
        layer = plain.removesuffix(f".{kind}")
        for depth in range(name.count(".base_layer")):  # experts have one around the other, each for a parameter
            around = layer + ".base_layer" * depth
            module: Any = model.get_submodule(around)
            if kind == getattr(module, "parameter_name", "weight"):
                a, b = (weights[f"{around}.lora_{letter}.default.weight"].float() for letter in "AB")
                weight = (weight + _added(module, a, b)).to(weight.dtype)
        found[plain] = weight
    return found


def _added(module: Any, a: Tensor, b: Tensor) -> Tensor:
    """What an adapter adds to a weight, like it: (out, in), or (experts, out, in) where A and B hold all experts'."""
    scale: float = module.scaling["default"]
    n = getattr(module, "num_experts", 1)
    if n == 1:
        return (b @ a).mul(scale).T if module.fan_in_fan_out else (b @ a).mul(scale)
    each = torch.einsum("ore,eri->eoi", b.reshape(len(b), -1, n), a.reshape(n, -1, a.shape[1])) * scale
    return each if module._did_swap_in_out_features else each.transpose(1, 2)


def merged(model: PreTrainedModel, folder: str) -> PreTrainedModel:
    """The model with the adapter of a folder added to its weights."""
    from peft import PeftModel

    with_adapter = PeftModel.from_pretrained(model, folder)
    if model.dtype == torch.float64:  # peft multiplies A and B as they are in the file
        for parameter in with_adapter.parameters():
            parameter.data = parameter.data.double()
    found: PreTrainedModel = with_adapter.merge_and_unload()
    return found.requires_grad_(True)
