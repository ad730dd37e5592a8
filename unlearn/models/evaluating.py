"""How a model is run where it is measured: G-effects, losses and scores alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


@contextmanager
def evaluating(model: nn.Module, checkpointing: bool = True) -> Iterator[None]:
    """The model as whatever measures it runs it: in eval mode, by its own forward pass, without flash-attn; and back.

    A caller's autocast is off: what is measured says its own, within.
    """
    device = next(model.parameters()).device.type
    own = _own_forward(unwrap(model)), _plain_kernels(unwrap(model))
    with in_eval_mode(model, checkpointing), own[0], own[1], torch.autocast(device, enabled=False):
        yield


@contextmanager
def in_eval_mode(model: nn.Module, checkpointing: bool = False) -> Iterator[None]:
    """Without dropout, where asked with gradient checkpointing, which transformers' layers do in training only; and back."""
    before = {module: module.training for module in model.modules()}
    layers: list[Any] = [m for m in before if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]
    checkpoints = {layer: layer._gradient_checkpointing_func for layer in layers}
    model.eval()
    for layer, checkpoint in checkpoints.items() if checkpointing else ():
        layer.training = True
        layer._gradient_checkpointing_func = partial(_in_eval_mode_too, layer, _not_reentrant(checkpoint))
    try:
        yield
    finally:
        for layer, checkpoint in checkpoints.items():
            layer._gradient_checkpointing_func = checkpoint
        for module, training in before.items():
            module.training = training


def _not_reentrant(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """PyTorch's other kind runs a graph of its own inside the backward pass, which the tap and forward mode do not see."""
    if isinstance(checkpoint, partial) and checkpoint.keywords.get("use_reentrant"):
        return partial(checkpoint.func, **checkpoint.keywords | {"use_reentrant": False})
    return checkpoint


def _in_eval_mode_too(layer: nn.Module, checkpoint: Callable[..., Any], forward: Callable[..., Any], *args: Any) -> Any:
    """Checkpoint a layer that is in training mode to that end only: what it runs itself, now and again, is in eval mode."""

    def evaluated(*args: Any) -> Any:
        layer.training = False
        try:
            return forward(*args)
        finally:
            layer.training = True

    return checkpoint(evaluated, *args)


@contextmanager
def _own_forward(model: nn.Module) -> Iterator[None]:
    """Without the autocast that accelerate has put around a model that is trained: what is measured says its own."""
    wrapped = model.__dict__.get("forward")
    if "_original_forward" not in model.__dict__ or wrapped is None:
        yield
        return
    forward: Any = wrapped
    while hasattr(forward, "__wrapped__") and not _is_inner(
        forward, model
    ):  # one for each `Trainer` that the model was given to
        forward = forward.__wrapped__
    model.forward = forward if isinstance(forward, partial | MethodType) else MethodType(forward, model)
    try:
        yield
    finally:
        model.forward = wrapped


def _is_inner(forward: Any, model: nn.Module) -> bool:
    """Whether this is the model's forward pass itself, or what moves its inputs between devices."""
    return isinstance(forward, partial) or getattr(forward, "__func__", forward) is type(model).forward


@contextmanager
def _plain_kernels(model: nn.Module) -> Iterator[None]:
    """With PyTorch's attention in place of flash-attn, which takes half precision only and has no second derivative; and in
    float64 with experts one by one, for their grouped product takes no float64."""
    found = (getattr(module, "config", None) for module in model.modules())
    configs = {id(config): config for config in found if isinstance(config, PreTrainedConfig)}.values()
    wanted = {"_attn_implementation": "sdpa" if getattr(model, "_supports_sdpa", True) else "eager"}
    if is_float64(model):
        wanted["_experts_implementation"] = "eager"
    before = [(config, key, getattr(config, key, None)) for config in configs for key in wanted]
    changed = [one for one in before if one[2] and (one[1] != "_attn_implementation" or "flash" in one[2])]
    for config, key, _ in changed:
        setattr(config, key, {"": wanted[key]})  # its own, not those of configurations inside it
    try:
        yield
    finally:
        for config, key, name in changed:
            setattr(config, key, {"": name})


def is_float64(model: nn.Module) -> bool:
    return any(p.dtype == torch.float64 for p in model.parameters())


def enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Recompute activations in the backward pass (transformers renamed the call between 5.17 and 5.23)."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()


def unwrap(model: nn.Module) -> Any:
    """The Hugging Face model inside a DistributedDataParallel one, or the model itself."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
