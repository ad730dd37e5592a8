"""The unlearning objectives and the retain terms, one pure function each. All are minimised.

Letters: for the label tokens t of the forget rows, l_t = -log p(y_t | y_<t, x; theta) in nats, p_t = exp(-l_t),
o_t the same probability under the reference model, S_i the sum of l_t over row i, M the number of label tokens,
[w] a weight through which no gradient flows.

Each takes the `Tokens` of any part of a step and the `Counts` of the whole step, and returns that part's share of the
loss: shares add up over rows, micro-batches and processes. What it reads of `Tokens` beside `nll` and `row` it `needs`, and
says so. A method is a function here and a YAML in `config/method/`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unlearn.objectives.tokens import Counts, Tokens

Objective = Callable[[Tokens, Counts], Tensor]
NEEDS = ("logits", "hidden", "ref_nll", "ref_logits", "second")  # of `Tokens`


def needs(*names: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Mark what an objective reads of `Tokens` beside `nll` and `row`; nothing else says so.

    Raises:
        ValueError: one is not of `NEEDS`.
    """
    if strange := set(names) - set(NEEDS):
        raise ValueError(f"needs {', '.join(sorted(strange))}: an objective may need {', '.join(NEEDS)}")

    def mark(objective: Callable[..., Tensor]) -> Callable[..., Tensor]:
        objective.needs = frozenset(names)  # type: ignore[attr-defined]
        return objective

    return mark


def needs_of(objective: Callable[..., Any] | None) -> frozenset[str]:
    """What an objective, perhaps with hyper-parameters given, needs; nothing where it says nothing."""
    while isinstance(objective, partial):
        objective = objective.func
    return getattr(objective, "needs", frozenset())


def weighted(weight: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Turn a function that gives each token's weight w_t, shape (M,), into the objective -(1/M) sum_t [w_t] l_t."""

    @wraps(weight)
    def objective(tokens: Tokens, counts: Counts, **hyper: Any) -> Tensor:
        w = weight(tokens, **hyper).detach()
        return -(w * tokens.nll).sum() / counts.tokens

    return objective


@weighted
def ga(tokens: Tokens) -> Tensor:
    """Gradient ascent, w_t = 1: -(1/M) sum l_t. Yao et al. 2023, arXiv 2310.10683."""
    return torch.ones_like(tokens.nll)


@weighted
def wga(tokens: Tokens, alpha: float) -> Tensor:
    """Weighted gradient ascent, w_t = p_t^alpha. arXiv 2502.19301."""
    return torch.exp(-alpha * tokens.nll)


@needs("ref_nll")
@weighted
def tnpo(tokens: Tokens, beta: float) -> Tensor:
    """Token-wise NPO, w_t = 2 p_t^beta / (p_t^beta + o_t^beta). arXiv 2502.19301 (its code's `ins_npo`)."""
    return 2 * _closeness(tokens, beta)


@needs("ref_nll")
@weighted
def wtnpo(tokens: Tokens, beta: float, alpha: float) -> Tensor:
    """Weighted token-wise NPO, w_t = 2 p_t^(alpha + beta) / (p_t^beta + o_t^beta). The code of arXiv 2502.19301."""
    return 2 * torch.exp(-alpha * tokens.nll) * _closeness(tokens, beta)


def _closeness(tokens: Tokens, beta: float) -> Tensor:
    """p^beta / (p^beta + o^beta) as sigmoid(beta (log p - log o)): no underflow where both are tiny."""
    return torch.sigmoid(beta * (reference_nll(tokens) - tokens.nll))


@needs("ref_nll")
def npo(tokens: Tokens, counts: Counts, beta: float) -> Tensor:
    """Negative preference optimisation, -(2/beta) mean_i log sigmoid(beta (S_i - S_i^o)). arXiv 2404.05868, eq. 3."""
    margin = tokens.sum_rows(tokens.nll - reference_nll(tokens))  # (B,) nats
    return -(2 / beta) * F.logsigmoid(beta * margin).sum() / counts.rows


@needs("hidden")
def rmu(tokens: Tokens, counts: Counts, c: float, normalize: bool = False) -> Tensor:
    """Representation misdirection, mean_t mean_d (h_t - c u)^2 with h a layer's output. arXiv 2403.03218.

    The published G-effect code does not normalise u (the run's `noise`); `normalize` is the original RMU.
    """
    assert tokens.hidden is not None
    assert tokens.noise is not None
    u = tokens.noise / tokens.noise.norm() if normalize else tokens.noise
    return (tokens.hidden - c * u).square().mean(dim=1).sum() / counts.tokens


def mean_nll(tokens: Tokens, counts: Counts) -> Tensor:
    """(1/M) sum l_t: fine-tuning; `gd` on retain rows; `idk` on "I don't know" answers (arXiv 2401.06121)."""
    return tokens.nll.sum() / counts.tokens


@needs("logits", "ref_logits")
def kl(tokens: Tokens, counts: Counts) -> Tensor:
    """Mean over label positions of KL(reference || theta) over the vocabulary, in nats. arXiv 2401.06121."""
    assert tokens.ref_logits is not None, "kl compares with the reference model: its Loss needs `reference`"
    log_q = F.log_softmax(tokens.logits, dim=-1)
    log_p = F.log_softmax(tokens.ref_logits, dim=-1)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True) / counts.tokens


def reference_nll(tokens: Tokens) -> Tensor:
    """(M,) nats under the reference model; an objective that calls this needs `ref_nll`."""
    how = 'it says so by `@needs("ref_nll")`, the library\'s call has `reference=MODEL`'
    assert tokens.ref_nll is not None, f"this objective compares with the reference model: {how}"
    return tokens.ref_nll
