"""What is minimised: rows to tokens, the label tokens' numbers, the objectives and retain terms on them, the loss of a batch.

An objective is a function of `Tokens` and `Counts`; a `Loss` is one with its retain term.
"""

from unlearn.objectives.functions import Objective, ga, kl, mean_nll, needs, npo, rmu, tnpo, weighted, wga, wtnpo
from unlearn.objectives.loss import Loss
from unlearn.objectives.tokens import Counts, Tokens

__all__ = [
    "Counts",
    "Loss",
    "Objective",
    "Tokens",
    "ga",
    "kl",
    "mean_nll",
    "needs",
    "npo",
    "rmu",
    "tnpo",
    "weighted",
    "wga",
    "wtnpo",
]
