"""The one training path of fine-tuning and unlearning: transformers' `Trainer`, step logs, saving and going on."""

from unlearn.training.trainer import Settings, freeze_unreached, train

__all__ = ["Settings", "freeze_unreached", "train"]
