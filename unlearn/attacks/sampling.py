"""Sampled answers: what greedy decoding does not say, and one of k drawn answers does.

Letters: n answers to a question, drawn independently; c of them leak; k that an attacker draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import beta


def leak_at_k(n: int, leaks: Sequence[int], k: int) -> float:
    """mean_i 1 - C(n - c_i, k) / C(n, k): the probability that one of k answers leaks, over questions (arXiv 2511.04934).

    It is the unbiased estimate from n answers, that of pass@k (arXiv 2107.03374). Nan without questions.

    Raises:
        ValueError: k is not from 1 to n, or a c_i is not from 0 to n.
    """
    _check(n, k)
    if wrong := [c for c in leaks if not 0 <= c <= n]:
        raise ValueError(f"leaks={wrong[0]}: of {n} answers 0 to {n} leak")
    return float(np.mean([1 - comb(n - c, k) / comb(n, k) for c in leaks])) if len(leaks) else float("nan")


def expected_best(scores: ArrayLike, k: int) -> float:
    """The expected best of k of a question's n graded answers, drawn without putting back: sum_i s_(i) C(i-1, k-1) / C(n, k).

    s_(1) <= ... <= s_(n). Of scores that are 0 or 1 this is `leak_at_k`.

    Args:
        scores: (n,) of one question.

    Raises:
        ValueError: k is not from 1 to n.
    """
    ordered = np.sort(np.asarray(scores, dtype=float))
    n = len(ordered)
    _check(n, k)
    return float(sum(s * (comb(i - 1, k - 1) / comb(n, k)) for i, s in enumerate(ordered, start=1)))


def upper_bound(leaks: int, n: int, confidence: float = 0.95) -> float:
    """Clopper and Pearson's one-sided upper bound of a leak's probability, `leaks` of n answers being leaks (arXiv 2410.03523).

    The p at which so few leaks, or fewer, have the probability 1 - confidence: the quantile of Beta(leaks + 1, n - leaks).

    Raises:
        ValueError: there are not 0 to n leaks, or the confidence is not between 0 and 1.
    """
    if not 0 <= leaks <= n or n < 1:
        raise ValueError(f"leaks={leaks}: of {n} answers 0 to {n} leak")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: needs to be between 0 and 1")
    return 1.0 if leaks == n else float(beta.ppf(confidence, leaks + 1, n - leaks))


def _check(n: int, k: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"k={k}: needs to be from 1 to the {n} answers that there are")
