"""What is minimised: rows to tokens, the label tokens' numbers, the objectives and retain terms on them, the loss of a batch.

An objective is a function of `Tokens` and `Counts`; a `Loss` is one with its retain term.
"""

from unlearn.objectives.answers import ap, dpo, flat, ipo
from unlearn.objectives.functions import (
    ga,
    mean_nll,
    npo,
    satimp,
    simimp,
    simnpo,
    simsat,
    tnpo,
    weighted,
    wga,
    wtnpo,
)
from unlearn.objectives.layers import adaptive_rmu, circuit_breakers, circuit_breakers_retain, hidden, rmu
from unlearn.objectives.loss import Loss
from unlearn.objectives.needs import Objective, needs
from unlearn.objectives.tokens import Counts, Tokens
from unlearn.objectives.vocabulary import ceu, jensun, jensun_retain, kl, me, pdu, undial

__all__ = [
    "Counts",
    "Loss",
    "Objective",
    "Tokens",
    "adaptive_rmu",
    "ap",
    "ceu",
    "circuit_breakers",
    "circuit_breakers_retain",
    "dpo",
    "flat",
    "ga",
    "hidden",
    "ipo",
    "jensun",
    "jensun_retain",
    "kl",
    "me",
    "mean_nll",
    "needs",
    "npo",
    "pdu",
    "rmu",
    "satimp",
    "simimp",
    "simnpo",
    "simsat",
    "tnpo",
    "undial",
    "weighted",
    "wga",
    "wtnpo",
]
