"""Attacks: what an unlearned model gives back when it is trained again, quantised, sampled, or asked in other words.

One module an attack, its arithmetic as pure functions; the scores are those of `unlearn.scores`. What needs torch is imported
when it is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unlearn.attacks.asking import Template, worst
    from unlearn.attacks.quantization import int8, nf4, quantize, resistance_to_quantization
    from unlearn.attacks.relearning import AtSteps, harmonic_mean, measured_steps, resistance_to_relearning
    from unlearn.attacks.sampling import expected_best, leak_at_k, upper_bound

WHERE = {
    "asking": ("Template", "worst"),
    "quantization": ("int8", "nf4", "quantize", "resistance_to_quantization"),
    "relearning": ("AtSteps", "harmonic_mean", "measured_steps", "resistance_to_relearning"),
    "sampling": ("expected_best", "leak_at_k", "upper_bound"),
}
__all__ = [
    "AtSteps",
    "Template",
    "expected_best",
    "harmonic_mean",
    "int8",
    "leak_at_k",
    "measured_steps",
    "nf4",
    "quantize",
    "resistance_to_quantization",
    "resistance_to_relearning",
    "upper_bound",
    "worst",
]


def __getattr__(name: str) -> Any:
    module = next((module for module, names in WHERE.items() if name in names), None)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{module}"), name)
