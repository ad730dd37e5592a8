"""The unlearning objectives that are functions of the label tokens' losses, one pure function each. All are minimised.

Letters, in the other files too: for the label tokens t of the forget rows, l_t = -log p(y_t | y_<t, x; theta) in nats,
p_t = exp(-l_t), o_t the same probability under the reference model, S_i the sum of l_t over row i, T_i how many they are,
M the number of label tokens, [w] a weight through which no gradient flows; ^r marks the reference, ' a second answer.

Each takes the `Tokens` of any part of a step and the `Counts` of the whole step, and returns that part's share of the
loss: shares add up over rows, micro-batches and processes. What it reads of `Tokens` beside `nll`, `row` and `label` it
`needs`, and says so. A method is a function here and a YAML in `config/method/`. Two answers to one question are in
`.answers`, whole distributions in `.vocabulary`, outputs of layers in `.layers`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unlearn.objectives.layers import rmu
from unlearn.objectives.needs import NEEDS, Objective, needed, needs, needs_of
from unlearn.objectives.tokens import Counts, Tokens
from unlearn.objectives.vocabulary import kl

__all__ = ["NEEDS", "Objective", "kl", "needs", "needs_of", "rmu"]  # what was here before it had files of its own
__all__ += [
    "ga",
    "mean_nll",
    "npo",
    "reference_nll",
    "satimp",
    "simimp",
    "simnpo",
    "simsat",
    "tnpo",
    "weighted",
    "wga",
    "wtnpo",
]


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


@weighted
def satimp(tokens: Tokens, beta1: float, beta2: float) -> Tensor:
    """Saturation and importance, w_t = p_t^beta1 (1 - p_t)^beta2. arXiv 2505.11953."""
    return torch.exp(-beta1 * tokens.nll) * _rest(tokens) ** beta2


@weighted
def simsat(tokens: Tokens, beta: float) -> Tensor:
    """Simple saturation, w_t = p_t^beta: what `wga` is, under its own name and default. arXiv 2505.11953."""
    return torch.exp(-beta * tokens.nll)


@weighted
def simimp(tokens: Tokens, beta: float) -> Tensor:
    """Simple importance, w_t = (1 - p_t)^beta. arXiv 2505.11953."""
    return _rest(tokens) ** beta


def _rest(tokens: Tokens) -> Tensor:
    """1 - p_t, exact where p_t is near 1."""
    return -torch.expm1(-tokens.nll)


@needs("ref_nll")
def npo(tokens: Tokens, counts: Counts, beta: float) -> Tensor:
    """Negative preference optimisation, -(2/beta) mean_i log sigmoid(beta (S_i - S_i^o)). arXiv 2404.05868, eq. 3."""
    margin = tokens.sum_rows(tokens.nll - reference_nll(tokens))  # (B,) nats
    return -(2 / beta) * F.logsigmoid(beta * margin).sum() / counts.rows


def simnpo(tokens: Tokens, counts: Counts, beta: float, gamma: float) -> Tensor:
    """NPO without a reference, -(2/beta) mean_i log sigmoid(beta (S_i / T_i - gamma)). arXiv 2410.07163.

    gamma stands inside beta, as in its code; in the paper it is this beta gamma.
    """
    return -(2 / beta) * F.logsigmoid(beta * (tokens.mean_rows(tokens.nll) - gamma)).sum() / counts.rows


def mean_nll(tokens: Tokens, counts: Counts) -> Tensor:
    """(1/M) sum l_t: fine-tuning; `gd` on retain rows; `idk` on "I don't know" answers (arXiv 2401.06121)."""
    return tokens.nll.sum() / counts.tokens


def reference_nll(tokens: Tokens) -> Tensor:
    """(M,) nats under the reference model; an objective that calls this needs `ref_nll`."""
    found: Tensor = needed(tokens, "ref_nll")
    return found
