"""What objectives see of the whole distribution at a label position: a few numbers of it, (M,) each.

They are formed where an objective reads one. The forward-mode pass forms those that any objective needs inside itself,
and so carries their tangents, (D, M), in place of the logits', (D, M, V): the vocabulary is passed over once for all.

Letters as in `.functions`: z the logits, p = softmax(z), y the label, ^r of the reference; x\\y: of all tokens but the label.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from unlearn.objectives.tokens import Tokens

# By name, with what else of `Tokens` it is made of; the methods of `Vocabulary`.
STATISTICS: dict[str, str | None] = {
    "from_uniform": None,
    "to_uniform": None,
    "spread": None,
    "rest": None,
    "refusal_nll": "refusal",
    "ref_kl": "ref_logits",
    "ref_js": "ref_logits",
    "ref_rest": "ref_logits",
    "ref_odds": "ref_logits",
}


def statistics(tokens: Tokens, names: Iterable[str]) -> dict[str, Tensor]:
    """Those of `STATISTICS`, (M,) each, by name; the distributions are normalised once for all."""
    of = Vocabulary(tokens)
    return {name: getattr(of, name)() for name in names}


class Vocabulary:
    """The label tokens' distributions, and the statistics of them, in nats where they are entropies."""

    def __init__(self, tokens: Tokens) -> None:
        self.tokens, self.z = tokens, tokens.logits

    @cached_property
    def log_p(self) -> Tensor:
        return F.log_softmax(self.z, dim=-1)

    @cached_property
    def ref_z(self) -> Tensor:
        assert self.tokens.ref_logits is not None
        return self.tokens.ref_logits

    @cached_property
    def ref_log_p(self) -> Tensor:
        return F.log_softmax(self.ref_z, dim=-1)

    @cached_property
    def _ref_others(self) -> Tensor:
        return self._without_label(self.ref_z)

    def _without_label(self, z: Tensor) -> Tensor:
        assert self.tokens.label is not None
        return z.scatter(1, self.tokens.label.unsqueeze(1), -math.inf)

    def from_uniform(self) -> Tensor:
        """KL(U || p) = -log V - mean_v log p_v."""
        return -math.log(self.z.shape[1]) - self.log_p.mean(1)

    def to_uniform(self) -> Tensor:
        """KL(p || U) = log V - H(p)."""
        return math.log(self.z.shape[1]) + (self.log_p.exp() * self.log_p).sum(1)

    def spread(self) -> Tensor:
        """max_v z_v - mean_v z_v."""
        return self.z.amax(1) - self.z.mean(1)

    def rest(self) -> Tensor:
        """CE([p\\y], p): its gradient is that of -[p_y / (1 - p_y)] l."""
        return -(self._without_label(self.z.detach()).softmax(-1) * self.log_p).sum(1)

    def refusal_nll(self) -> Tensor:
        """-log p of the refusal's tokens, repeated along each answer."""
        refusal = self.tokens.refusal
        assert refusal is not None
        return F.cross_entropy(self.z, refusal[self.tokens.place() % len(refusal)], reduction="none")

    def ref_kl(self) -> Tensor:
        """KL(p^r || p)."""
        return F.kl_div(self.log_p, self.ref_log_p, reduction="none", log_target=True).sum(1)

    def ref_js(self) -> Tensor:
        """The Jensen-Shannon divergence of p^r and p."""
        log_m = torch.logaddexp(self.ref_log_p, self.log_p) - math.log(2)
        halves = [F.kl_div(log_m, one, reduction="none", log_target=True).sum(1) for one in (self.ref_log_p, self.log_p)]
        return (halves[0] + halves[1]) / 2

    def ref_rest(self) -> Tensor:
        """CE(p^r\\y, p)."""
        return -(self._ref_others.softmax(-1) * self.log_p).sum(1)

    def ref_odds(self) -> Tensor:
        """log p^r_y - log(1 - p^r_y), exact near 0 and 1; no function of the weights."""
        assert self.tokens.label is not None
        return self.ref_z.gather(1, self.tokens.label.unsqueeze(1)).squeeze(1) - self._ref_others.logsumexp(1)
