"""Objectives and retain terms on outputs of layers at the positions that predict label tokens. Letters as in `.functions`.

h is the output of one layer, (M, d), or of several, (M, L, d): then the mean over them. u is the run's fixed random vector.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from unlearn.objectives.needs import needed, needs
from unlearn.objectives.tokens import Counts, Tokens


@needs("hidden", "noise")
def rmu(tokens: Tokens, counts: Counts, c: float, normalize: bool = False) -> Tensor:
    """Representation misdirection, mean_t mean_d (h_t - c u)^2 with h a layer's output. arXiv 2403.03218.

    The published G-effect code does not normalise u (the run's `noise`); `normalize` is the original RMU.
    """
    noise: Tensor = needed(tokens, "noise")
    u = noise / noise.norm() if normalize else noise
    return _squares(needed(tokens, "hidden") - c * u) / counts.tokens


@needs("hidden", "ref_hidden", "noise")
def adaptive_rmu(tokens: Tokens, counts: Counts, k: float) -> Tensor:
    """RMU to a length that is each token's own, mean_t mean_d (h_t - k |h_t^r| u / |u|)^2. arXiv 2408.06223."""
    noise: Tensor = needed(tokens, "noise")
    lengths = needed(tokens, "ref_hidden").norm(dim=-1, keepdim=True)
    return _squares(needed(tokens, "hidden") - k * lengths * (noise / noise.norm())) / counts.tokens


@needs("hidden", "ref_hidden")
def hidden(tokens: Tokens, counts: Counts) -> Tensor:
    """On retain rows mean_t mean_d (h_t - h_t^r)^2: RMU's retain term. arXiv 2403.03218."""
    return _squares(needed(tokens, "hidden") - needed(tokens, "ref_hidden")) / counts.tokens


def _squares(difference: Tensor) -> Tensor:
    """(M, d) or (M, L, d): the sum over tokens of the mean over the rest."""
    return difference.square().flatten(1).mean(dim=1).sum()


@needs("hidden", "ref_hidden")
def circuit_breakers(tokens: Tokens, counts: Counts) -> Tensor:
    """Representation rerouting, mean over layers and tokens of relu(cos(h, h^r)). arXiv 2406.04313."""
    cosines = F.cosine_similarity(needed(tokens, "hidden"), needed(tokens, "ref_hidden"), dim=-1)  # (M,) or (M, L)
    return F.relu(cosines).reshape(len(cosines), -1).mean(dim=1).sum() / counts.tokens


@needs("hidden", "ref_hidden")
def circuit_breakers_retain(tokens: Tokens, counts: Counts) -> Tensor:
    """On retain rows the mean over layers and tokens of |h - h^r|. arXiv 2406.04313."""
    distances = (needed(tokens, "hidden") - needed(tokens, "ref_hidden")).norm(dim=-1)  # (M,) or (M, L)
    return distances.reshape(len(distances), -1).mean(dim=1).sum() / counts.tokens
