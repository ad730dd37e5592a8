"""Objectives and retain terms on the whole distribution at each label position. Letters as in `.functions`.

z are the logits at a position, p = softmax(z), y its label, V the vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from unlearn.objectives.needs import needed, needs
from unlearn.objectives.tokens import Counts, Tokens


@needs("logits", "ref_logits")
def kl(tokens: Tokens, counts: Counts) -> Tensor:
    """Mean over label positions of KL(reference || theta) over the vocabulary, in nats. arXiv 2401.06121."""
    log_q = F.log_softmax(tokens.logits, dim=-1)
    log_p = F.log_softmax(needed(tokens, "ref_logits"), dim=-1)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True) / counts.tokens


@needs("logits", "ref_logits")
def undial(tokens: Tokens, counts: Counts, beta: float) -> Tensor:
    """Self-distillation with adjusted logits, mean CE(softmax(z^r - beta e_y), softmax(z)). arXiv 2402.10052."""
    lowered = needed(tokens, "ref_logits").scatter_add(1, *_at_label(tokens, -beta))
    return F.cross_entropy(tokens.logits, lowered.softmax(-1), reduction="sum") / counts.tokens


@needs("logits")
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
    without = tokens.logits.detach().scatter_add(1, *_at_label(tokens, -math.inf)).softmax(-1)
    entropies = F.cross_entropy(tokens.logits, without, reduction="none")
    return entropies[tokens.place() >= n].sum() / left


def _at_label(tokens: Tokens, value: float) -> tuple[Tensor, Tensor]:
    """Where each position's label stands, (M, 1), and that value for each of them."""
    label = needed(tokens, "label").unsqueeze(1)
    return label, torch.full_like(label, value, dtype=tokens.logits.dtype)


@needs("logits")
def me(tokens: Tokens, counts: Counts, direction: str) -> Tensor:
    """Maximum entropy: forward mean KL(U || p), as its code has it; reverse mean KL(p || U), as its text. arXiv 2410.08109.

    Raises:
        ValueError: the direction is neither.
    """
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction={direction}: needs to be one of forward, reverse")
    log_p = F.log_softmax(tokens.logits, dim=-1)
    log_v = math.log(log_p.shape[1])
    of_each = -log_v - log_p.mean(1) if direction == "forward" else log_v + (log_p.exp() * log_p).sum(1)
    return of_each.sum() / counts.tokens


@needs("logits", "refusal")
def jensun(tokens: Tokens, counts: Counts) -> Tensor:
    """Mean Jensen-Shannon divergence of p and the refusal's token, its k tokens repeated along each answer. arXiv 2509.02820.

    With p the probability of that token it is ln 2 + (p ln p - (1 + p) ln(1 + p)) / 2.
    """
    refusal: Tensor = needed(tokens, "refusal")
    wanted = refusal[tokens.place() % len(refusal)].unsqueeze(1)
    log_p = F.log_softmax(tokens.logits, dim=-1).gather(1, wanted)
    p = log_p.exp()
    return (math.log(2) + (p * log_p - (1 + p) * torch.log1p(p)) / 2).sum() / counts.tokens


@needs("logits", "ref_logits")
def jensun_retain(tokens: Tokens, counts: Counts) -> Tensor:
    """Mean Jensen-Shannon divergence of the reference's distribution and p, in nats. arXiv 2509.02820."""
    log_p = F.log_softmax(needed(tokens, "ref_logits"), dim=-1)
    log_q = F.log_softmax(tokens.logits, dim=-1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    halves = [F.kl_div(log_m, one, reduction="sum", log_target=True) for one in (log_p, log_q)]
    return (halves[0] + halves[1]) / 2 / counts.tokens


@needs("logits")
def pdu(tokens: Tokens, counts: Counts) -> Tensor:
    """Mean (max_v z_v - mean_v z_v)^2, which flattens the logits: primal-dual unlearning's forget term. arXiv 2506.05314."""
    z = tokens.logits
    return (z.amax(1) - z.mean(1)).square().sum() / counts.tokens
