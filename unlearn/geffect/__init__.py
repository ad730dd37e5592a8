"""The G-effect (arXiv 2502.19301): the inner product of an objective's gradient with the gradient of a risk.

As one call (`geffect`), measured again as weights change (`meter_of`), inside any `Trainer` (`GEffectCallback`); by step,
layer, instance, position and token. `call` says what it is, `meter` how it is measured.
"""

from unlearn.geffect.call import GEffectCallback, geffect, meter_of
from unlearn.geffect.meter import Meter, Target, Wanted

__all__ = ["GEffectCallback", "Meter", "Target", "Wanted", "geffect", "meter_of"]
