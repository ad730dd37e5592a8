"""What objectives see of the whole distribution at a label position: a few numbers of it, (M,) each.

They are formed where an objective reads one. The forward-mode pass forms those that any objective needs, with their
tangents, (D, M), and drops the logits' own, (D, M, V): the vocabulary is passed over once for all.

Letters as in `.functions`: z the logits, p = softmax(z), y the label, ^r of the reference; x\\y: of all tokens but the label.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from unlearn.objectives.tokens import Tokens, nll_of

AT_ONCE = 2**20  # logits that a core's caches hold; a GPU takes more
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


def along(tokens: Tokens, names: Iterable[str], changes: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`nll` and those statistics, (M,) each, by name, and their tangents, (D, M).

    Each is of its own token's logits, so that its tangent is its gradient with respect to these times their change. Few
    tokens are taken at a time: what is formed of them stays in the caches.

    Args:
        changes: (D, M, V) tangents of the logits.
    """
    z = tokens.logits
    n = max(1, AT_ONCE * (16 if z.is_cuda else 1) // z.shape[1])
    place, values = tokens.place(), {name: z.new_empty(len(z)) for name in ("nll", *names)}
    tangents = {name: changes.new_zeros(changes.shape[:2]) for name in values}
    for first in range(0, len(z), n):
        part = slice(first, first + n)
        with torch.enable_grad():
            leaf = z[part].detach().requires_grad_()
            of = Vocabulary(replace(tokens.at(part), logits=leaf), place[part])
            found = {name: getattr(of, name)() for name in values}
            for name, value in found.items():
                values[name][part] = value.detach()
                if value.requires_grad:
                    [gradient] = torch.autograd.grad(value.sum(), leaf, retain_graph=True)
                    tangents[name][:, part] = (gradient * changes[:, part]).sum(-1)
    return values, tangents


class Vocabulary:
    """The label tokens' distributions, and the statistics of them, in nats where they are entropies.

    Attributes:
        place: (M,) how many label tokens of its row stand before each.
    """

    def __init__(self, tokens: Tokens, place: Tensor | None = None) -> None:
        self.tokens, self.z = tokens, tokens.logits
        self._place = place

    @cached_property
    def place(self) -> Tensor:
        return self.tokens.place() if self._place is None else self._place

    def nll(self) -> Tensor:
        assert self.tokens.label is not None
        return nll_of(self.z, self.tokens.label)

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
        return F.cross_entropy(self.z, refusal[self.place % len(refusal)], reduction="none")

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
