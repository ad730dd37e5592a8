"""Objectives on two answers to one question: that of the row, to forget, and a second one, to give. Letters as in `.functions`.

`tokens.second` has as many rows as `tokens`, the second answer to each row's question in its place.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from unlearn.objectives.needs import needed, needs
from unlearn.objectives.tokens import Counts, Tokens


@needs("ref_nll", "second")
def dpo(tokens: Tokens, counts: Counts, beta: float) -> Tensor:
    """-(2/beta) mean_i log sigmoid(beta ((S_i - S_i^r) - (S'_i - S'_i^r))), the row's own answer losing.

    Direct preference optimisation (arXiv 2305.18290) with NPO's factor 2; on answers of the model's own it is AltPO
    (arXiv 2409.13474).
    """
    second: Tokens = needed(tokens, "second")
    margin = tokens.sum_rows(_lost(tokens)) - second.sum_rows(_lost(second))  # (B,) nats
    return -(2 / beta) * F.logsigmoid(beta * margin).sum() / counts.rows


@needs("ref_nll", "second")
def ipo(tokens: Tokens, counts: Counts, tau: float) -> Tensor:
    """mean_i ((S_i - S_i^r) / T_i - (S'_i - S'_i^r) / T'_i - 1 / (2 tau))^2. arXiv 2310.12036, with means over tokens."""
    second: Tokens = needed(tokens, "second")
    margin = tokens.mean_rows(_lost(tokens)) - second.mean_rows(_lost(second))  # (B,) nats a token
    return (margin - 1 / (2 * tau)).square().sum() / counts.rows


def _lost(tokens: Tokens) -> Tensor:
    """(M,) nats that each token's loss is above the reference's."""
    lost: Tensor = tokens.nll - needed(tokens, "ref_nll")
    return lost


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of P (to forget) and P' (to give), (B,) each
    "tv": lambda p, q: (torch.tanh(p) - torch.tanh(q)) / 2,
    "kl": lambda p, q: torch.exp(p - 1) - q,
    "js": lambda p, q: F.softplus(-q) + F.softplus(p),
    "pearson": lambda p, q: p.square() / 4 + p - q,
}


@needs("second")
def flat(tokens: Tokens, counts: Counts, divergence: str) -> Tensor:
    """mean_i of an f-divergence's f*(g*(P_i)) - g*(P'_i), P_i and P'_i rows' mean token probabilities. arXiv 2410.11143.

    Args:
        divergence: tv, kl, js or pearson.

    Raises:
        ValueError: it is none of these.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence={divergence}: needs to be one of {', '.join(DIVERGENCES)}")
    second: Tokens = needed(tokens, "second")
    p, q = (one.mean_rows(torch.exp(-one.nll)) for one in (tokens, second))
    return DIVERGENCES[divergence](p, q).sum() / counts.rows


@needs("second")
def ap(tokens: Tokens, counts: Counts, beta: float) -> Tensor:
    """Answer preservation, on retain rows: -(1/beta) mean_i log sigmoid(beta (S'_i - S_i)). arXiv 2410.08109."""
    second: Tokens = needed(tokens, "second")
    margin = second.sum_rows(second.nll) - tokens.sum_rows(tokens.nll)  # (B,) nats
    return -(1 / beta) * F.logsigmoid(beta * margin).sum() / counts.rows
