"""Attacks: what an unlearned model gives back when it is trained again, quantised, sampled, or asked in other words.

One module an attack, its arithmetic as pure functions; the scores are those of `unlearn.scores`.
"""

from unlearn.attacks.asking import Template, worst
from unlearn.attacks.quantization import int8, nf4, quantize, resistance_to_quantization
from unlearn.attacks.relearning import AtSteps, harmonic_mean, resistance_to_relearning
from unlearn.attacks.sampling import expected_best, leak_at_k, upper_bound

__all__ = [
    "AtSteps",
    "Template",
    "expected_best",
    "harmonic_mean",
    "int8",
    "leak_at_k",
    "nf4",
    "quantize",
    "resistance_to_quantization",
    "resistance_to_relearning",
    "upper_bound",
    "worst",
]
