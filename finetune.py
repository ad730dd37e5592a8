"""Fine-tune a model family on a split of TOFU, or on local question-answer files.

    python finetune.py model_family=tiny
    torchrun --nproc_per_node=2 --master_port=18765 finetune.py --config-name=finetune.yaml split=full batch_size=4 \\
        gradient_accumulation_steps=4 model_family=phi lr=2e-5

Every key stands in config/finetune.yaml and config/common.yaml.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

import planning
import settings
import utils
from app.families import Family
from unlearn.io.weights import count_parameters, is_checkpoint

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def prepare(cfg: DictConfig) -> Family:
    """Fill in what the family decides, and refuse what cannot work before anything is loaded."""
    family = settings.prepare(cfg, "finetune")
    cfg.lr = utils.learning_rate(cfg, family.finetune_lr)
    cfg.num_epochs = family.finetune_epochs if cfg.num_epochs is None else cfg.num_epochs
    settings.check_finetune_data(cfg)
    settings.check_logger(cfg.logger)
    settings.check_optimizer(cfg.optim, cfg.parallel)
    if not family.from_scratch:
        settings.check_checkpoint("hf_key", family.hf_key)
    if cfg.save_dir is None:
        cfg.save_dir = str(utils.finetuned_folder(family, cfg))
    settings.check_folder(Path(cfg.save_dir))
    if Path(cfg.save_dir).resolve() == Path(cfg.hf_key).resolve():
        raise ValueError(f"save_dir={cfg.save_dir}: is hf_key's folder, and the model there would be written over")
    utils.check_run(Path(cfg.save_dir), cfg, made_of=made_of(cfg, family))
    if not family.from_scratch and Path(family.hf_key).is_dir():
        settings.check_disk(cfg, {Path(cfg.save_dir)}, count_parameters(Path(family.hf_key)))
    return family


def made_of(cfg: DictConfig, family: Family) -> utils.MadeOf:
    """What tells the run's rows and its pretrained model from others."""
    data = utils.hash_data(cfg, {cfg.split, "full"} if family.from_scratch else [cfg.split])
    if cfg.split != "full" and not family.from_scratch:  # its tokenizer is made of both files
        data.pop("forget_data", None)
    return {"data": data, "models": utils.hash_models(cfg, "hf_key")}


def run(cfg: DictConfig) -> None:
    if cfg.get("plan"):
        return planning.tell(cfg, "finetune")
    family = prepare(cfg)
    with utils.alone(Path(cfg.save_dir)):
        finetune_split(cfg, family)


def finetune_split(cfg: DictConfig, family: Family) -> None:
    folder = Path(cfg.save_dir)
    if is_checkpoint(folder):  # written after the last step
        utils.close_run(folder)
        return utils.say(f"{folder} is fine-tuned already")

    import torch

    import dataloader
    from unlearn.models.adapters import LoRA, add_lora, bare, merged_state
    from unlearn.models.checkpoints import base_on_disk, load, new_model, pad_id, save_adapter, save_into
    from unlearn.models.sharding import shard
    from unlearn.objectives.functions import mean_nll
    from unlearn.objectives.loss import Loss
    from unlearn.training.trainer import train

    rows = dataloader.finetune_rows(cfg)
    steps, per_epoch = utils.count_steps(cfg, len(rows))
    utils.open_run(folder, cfg, made_of(cfg, family))
    if family.from_scratch:
        texts = [family.prompt(row["question"]) + row["answer"] for row in dataloader.finetune_rows(cfg, "full")]
        tokenizer, model = new_model(family.hf_key, texts, cfg.seed, utils.model_device(cfg))
    else:
        flash = family.flash_attention2 and utils.use_bfloat16(cfg.dtype, family)
        tokenizer, model = load(family.hf_key, family.hf_key, utils.model_device(cfg), flash, getattr(torch, cfg.weights))

    if cfg.LoRA.r:
        add_lora(model, LoRA(**cfg.LoRA), cfg.seed, base_on_disk(family.hf_key, folder, model, tokenizer))
    settings.check_disk(cfg, {folder}, model.num_parameters())  # `prepare` can't tell for a hub's model, or a new one
    if cfg.parallel == "fsdp":
        shard(model, utils.use_bfloat16(cfg.dtype, family))
    tokenized = dataloader.tokenize(rows, tokenizer, family, cfg.max_length, model)
    batches = dataloader.step_batches(cfg, tokenized, [], steps, utils.processes(), pad_id(tokenizer))

    def publish(model: PreTrainedModel, weights: dict[str, Tensor], step: int) -> None:
        if step == steps and cfg.LoRA.r:
            save_adapter(folder, tokenizer, cfg.save_dtype, model, weights)
            save_into(folder, bare(model), tokenizer, cfg.save_dtype, merged_state(model, weights))
        elif step == steps:
            save_into(folder, model, tokenizer, cfg.save_dtype, weights)

    train(model, Loss(mean_nll), batches, utils.training_settings(cfg, family, steps, per_epoch), folder, publish)
    utils.close_run(folder)
    utils.say(f"{steps} steps done; the model is in {folder}")


if __name__ == "__main__":
    settings.cli(run, "finetune")
