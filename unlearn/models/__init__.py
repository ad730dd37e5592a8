"""Models as they are loaded and saved, adapted by LoRA, split over processes, run where they are measured.

And what they need of memory: `plan`.
"""

from unlearn.models.adapters import LoRA, add_lora
from unlearn.models.checkpoints import load, load_model, load_weights, pad_id
from unlearn.models.evaluating import evaluating
from unlearn.models.sharding import shard

__all__ = ["LoRA", "add_lora", "evaluating", "load", "load_model", "load_weights", "pad_id", "shard"]
