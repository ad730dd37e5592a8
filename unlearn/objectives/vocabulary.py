"""Objectives and retain terms on the whole distribution at each label position. Letters as in `.functions`.

z are the logits at a position, p = softmax(z), y its label, V the vocabulary. Each is a function of `.statistics`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unlearn.objectives.needs import needed, needs
from unlearn.objectives.tokens import Counts, Tokens


@needs("ref_kl")
def kl(tokens: Tokens, counts: Counts) -> Tensor:
    """Mean over label positions of KL(reference || theta) over the vocabulary, in nats. arXiv 2401.06121."""
    return needed(tokens, "ref_kl").sum() / counts.tokens


@needs("ref_rest", "ref_odds")
def undial(tokens: Tokens, counts: Counts, beta: float) -> Tensor:
    """Self-distillation with adjusted logits, mean CE(softmax(z^r - beta e_y), softmax(z)). arXiv 2402.10052.

    The label's part of the first is sigmoid(log p^r_y - log(1 - p^r_y) - beta), the rest is shared as the reference has it.
    """
    odds = needed(tokens, "ref_odds") - beta
    of_each = torch.sigmoid(odds) * tokens.nll + torch.sigmoid(-odds) * needed(tokens, "ref_rest")
    return of_each.sum() / counts.tokens


@needs("rest")
def ceu(tokens: Tokens, counts: Counts, n: int) -> Tensor:
    """Cross-entropy unlearning, mean CE([softmax(z, z_y = -inf)], softmax(z)), without each row's first n. arXiv 2503.01224.

    Raises:
        ValueError: n is no whole number of at least 0, a row has fewer than n label tokens, or no row has more.
    """
    if n != int(n) or n < 0:
        raise ValueError(f"n={n}: needs to be a whole number of at least 0")
    lengths = tokens.row_lengths()
    if n and tokens.n_rows and int(lengths.min()) < n:
        row = int(lengths.argmin())
        raise ValueError(f"n={n}: row {row} of a batch has {int(lengths.min())} label tokens, and needs at least {n}")
    if not (left := counts.without(int(n))):
        raise ValueError(f"n={n}: leaves no label token; the longest of {counts.rows} rows has {n}")
    return needed(tokens, "rest")[tokens.place() >= n].sum() / left


@needs("from_uniform", "to_uniform")
def me(tokens: Tokens, counts: Counts, direction: str) -> Tensor:
    """Maximum entropy: forward mean KL(U || p), as its code has it; reverse mean KL(p || U), as its text. arXiv 2410.08109.

    Raises:
        ValueError: the direction is neither.
    """
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction={direction}: needs to be one of forward, reverse")
    return needed(tokens, "from_uniform" if direction == "forward" else "to_uniform").sum() / counts.tokens


@needs("refusal_nll")
def jensun(tokens: Tokens, counts: Counts) -> Tensor:
    """Mean Jensen-Shannon divergence of p and the refusal's token, its k tokens repeated along each answer. arXiv 2509.02820.

    With p the probability of that token it is ln 2 + (p ln p - (1 + p) ln(1 + p)) / 2.
    """
    log_p = -needed(tokens, "refusal_nll")
    p = log_p.exp()
    return (math.log(2) + (p * log_p - (1 + p) * torch.log1p(p)) / 2).sum() / counts.tokens


@needs("ref_js")
def jensun_retain(tokens: Tokens, counts: Counts) -> Tensor:
    """Mean Jensen-Shannon divergence of the reference's distribution and p, in nats. arXiv 2509.02820."""
    return needed(tokens, "ref_js").sum() / counts.tokens


@needs("spread")
def pdu(tokens: Tokens, counts: Counts) -> Tensor:
    """Mean (max_v z_v - mean_v z_v)^2, which flattens the logits: primal-dual unlearning's forget term. arXiv 2506.05314."""
    return needed(tokens, "spread").square().sum() / counts.tokens
