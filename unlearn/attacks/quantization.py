"""Quantised weights: what unlearning has changed by less than a step of the grid comes back (arXiv 2410.16454).

Here a weight goes to its grid and back, in float: what inference with such weights computes, but for the rounding of products
and for what LLM.int8() does to activations. The linear layers' weights are rounded, not the embeddings, the head, the norms and
the biases, nor experts that are kept as one tensor: as bitsandbytes does it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from unlearn.models.evaluating import unwrap

NF4 = (  # QLoRA's 16 levels, quantiles of a normal distribution scaled to [-1, 1] (arXiv 2305.14314, appendix E)
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
BLOCK = 64


def nf4(weight: Tensor, block: int = BLOCK) -> Tensor:
    """The weight as NF4 has it: in blocks of the flattened tensor, each number the nearest of absmax * NF4.

    The blocks' absmax stay as they are: QLoRA's double quantisation, which rounds these too, is left out. Half way between two
    levels it is the lower.

    Args:
        weight: any shape; the last block may be shorter than `block`.
    """
    flat = weight.detach().flatten().float()
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
    levels = torch.tensor(NF4, device=weight.device)
    absmax = padded.abs().amax(dim=1, keepdim=True)
    nearest = torch.bucketize(padded / absmax.clamp(min=torch.finfo(torch.float32).tiny), (levels[1:] + levels[:-1]) / 2)
    return (levels[nearest] * absmax).flatten()[: len(flat)].view_as(weight).to(weight.dtype)


def int8(weight: Tensor) -> Tensor:
    """The weight as int8 has it: of each row (output feature) round(w 127 / absmax) absmax / 127 (arXiv 2208.07339).

    LLM.int8()'s vector-wise weights; its int8 activations and its outlier columns in half precision are left out.

    Args:
        weight: (out, in).
    """
    wide = weight.detach().float()
    absmax = wide.abs().amax(dim=1, keepdim=True).clamp(min=1e-30)  # a row of zeros has no size
    return ((wide * (127 / absmax)).round() * (absmax / 127)).to(weight.dtype)


TO: dict[int, Callable[[Tensor], Tensor]] = {8: int8, 4: nf4}


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """What is quantised of a model, by name: its linear layers, but not its head."""
    inner = unwrap(model)
    head = inner.get_output_embeddings()
    return {name: m for name, m in inner.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head}


@torch.no_grad()
def quantize(model: PreTrainedModel, bits: int) -> None:
    """Round the model's linear weights to that many bits and back, in place.

    Raises:
        ValueError: the bits are neither 8 nor 4.
    """
    if bits not in TO:
        raise ValueError(f"bits={bits}: is one of {', '.join(map(str, TO))}")
    for module in linear_layers(model).values():
        weight = module.weight
        assert isinstance(weight, Tensor)
        across = isinstance(module, Conv1D)  # (in, out): bitsandbytes has it as a linear layer's
        weight.copy_(TO[bits](weight.T).T if across else TO[bits](weight))


def load_by_bitsandbytes(path: str, bits: int, device: torch.device) -> PreTrainedModel:
    """The checkpoint with its linear layers as bitsandbytes has them, LLM.int8() or NF4 computing in bfloat16."""
    in_four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    config = BitsAndBytesConfig(**({"load_in_8bit": True} if bits == 8 else in_four))
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=config, dtype=torch.bfloat16, device_map={"": device}
    )
    return model


def resistance_to_quantization(before: float, after: float, known: bool = True) -> float:
    """Q = min(m_after / m_before, 1), m a score that is higher the better (arXiv 2506.12618, equation 3).

    A score of the rows to forget that is higher the more the model knows of them is an m upside down, m = 1 / score: then
    Q = min(score_before / score_after, 1), below 1 where quantising brings back what was forgotten. Where nothing comes back,
    0 after it, Q = 1.

    Args:
        known: whether a higher score says that the model knows more of what it is to forget; false: higher is better.

    Returns:
        0 to 1; nan where a score has no value, or there was nothing (m_before = 0) to keep.
    """
    if before != before or after != after:
        return float("nan")
    part, whole = (before, after) if known else (after, before)
    if whole <= 0:
        return 1.0 if known else float("nan")
    return min(part / whole, 1.0)
