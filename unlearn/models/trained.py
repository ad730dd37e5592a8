"""Which parameters are trained, by a regular expression; and the weights that are left where training is subtracted."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from unlearn.models.adapters import LoRA, add_lora, has_adapters
from unlearn.models.sharding import whole_state

LISTED = 16  # names, at most, of a line


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that the regular expression is found in (`re.search`).

    Raises:
        ValueError: it is no regular expression, or is found in none; the line has a name of each kind.
    """
    names = list(names)
    try:
        found = [name for name in names if re.search(pattern, name)]
        why = "is found in no trained parameter's name"
    except re.error as error:
        found, why = [], f"no regular expression ({error})"
    if not found:
        kinds = list({re.sub(r"\d+", "N", name): name for name in reversed(names)}.values())[::-1]
        listed = ", ".join(kinds[:LISTED]) + (" and more" if len(kinds) > LISTED else "")
        raise ValueError(f"trainable={pattern}: {why}; there are {listed}, and as many in each block")
    return found


def trained_names(model: nn.Module) -> list[str]:
    """The full names of the parameters that are trained (an adapter's alone, where there is one), tied ones once."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def names_of(config: PreTrainedConfig, lora: LoRA | None = None) -> list[str]:
    """`trained_names` of the causal LM that a configuration makes, with adapters where `lora` is given; no weights are made."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if lora is not None:
        add_lora(model, lora, 0, "")
    return trained_names(model)


def train_only(model: nn.Module, pattern: str) -> None:
    """Freeze those of the trained parameters whose full names the regular expression is not found in.

    Raises:
        ValueError: as `matching`.
    """
    kept = set(matching(pattern, trained_names(model)))
    for name, parameter in model.named_parameters():
        if name not in kept:
            parameter.requires_grad_(False)


# ---- training that is subtracted ----


def state_before(model: nn.Module) -> dict[str, Tensor]:
    """The trained weights as they are, whole and on the CPU, on the main process; every process has to call it.

    Nothing of adapters: what they add is 0 before they are trained.
    """
    if has_adapters(model):
        return {}
    weights, names = whole_state(model), trained_names(model)
    return {name: weights[name].to("cpu", copy=True) for name in names} if PartialState().is_main_process else {}


@torch.no_grad()
def negated(weights: Mapping[str, Tensor], before: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """theta_0 - scale (theta - theta_0): the weights before training without what it has added (arXiv 2212.04089).

    What an adapter adds to its weight is (alpha / r) B A, and B was 0: there B becomes -scale B, and A stays.

    Args:
        weights: theta, a whole state dict.
        before: theta_0 of what was trained, `state_before`; what is not in it stays.
    """
    found = dict(weights)
    for name, weight in weights.items():
        if name in before:
            start, end = (x.to("cpu", torch.float32) for x in (before[name], weight))
            found[name] = (start - scale * (end - start)).to(weight.dtype)
        elif "lora_B" in name:
            found[name] = -scale * weight
    return found
