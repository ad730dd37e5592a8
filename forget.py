"""Unlearn a forget split from a fine-tuned model, with one of the objectives of config/method and a retain term.

    python forget.py model_family=phi split=forget05 method=npo retain=kl

Every key stands in config/forget.yaml, config/common.yaml, config/method and config/retain. `basher1.py` is the short way.
"""

from __future__ import annotations

import copy
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.utils import instantiate
from omegaconf import DictConfig

import evaluation
import planning
import settings
import utils
from app.families import Family
from app.places import IDK, find_path
from unlearn.io.files import written_beside
from unlearn.io.rows import write_json
from unlearn.io.weights import count_parameters, hash_file, is_checkpoint

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, TrainerCallback

    from unlearn.objectives.loss import Loss


def prepare(cfg: DictConfig) -> Family:
    """Fill in what the family decides, and refuse what cannot work before anything is loaded."""
    family = settings.prepare(cfg, "forget")
    cfg.lr = utils.learning_rate(cfg, family.unlearn_lr)
    rows = settings.check_forget_data(cfg)
    settings.check_logger(cfg.logger)
    settings.check_optimizer(cfg.optim, cfg.parallel)
    cfg.model_path = original_of(cfg, family)
    if cfg.method.name in ("gd", "kl") and cfg.retain.name != cfg.method.name:
        raise ValueError(
            f"retain={cfg.retain.name}: method={cfg.method.name} is ga with the retain term {cfg.method.name} already"
        )
    if "layer" in cfg.method:
        settings.check_layer(cfg.model_path, cfg.method.layer)
    cfg.save_dir = str(folder_of(cfg))
    settings.check_folder(Path(cfg.save_dir))
    utils.check_run(Path(cfg.save_dir), cfg, made_of=made_of(cfg))
    if rows is not None and Path(cfg.model_path).is_dir() and not cfg.LoRA.r:
        steps, _ = utils.count_steps(cfg, rows)
        settings.check_disk(cfg, checkpoints(cfg, steps), count_parameters(Path(cfg.model_path)))
    return family


def folder_of(cfg: DictConfig) -> Path:
    """The run's own folder: `save_dir`, else named after its settings."""
    if cfg.save_dir is not None:
        return Path(cfg.save_dir)
    return Path(str(utils.run_folder(cfg)) + utils.override_suffix(cfg, "forget"))


def made_of(cfg: DictConfig) -> utils.MadeOf:
    """What tells the run's rows and its original model from others."""
    data = utils.hash_data(cfg, (cfg.split, utils.RETAIN_OF[cfg.split]))
    if cfg.retain_holdout is None and cfg.forget_data is None:  # then its number of rows is what is held out
        data |= utils.hash_data(cfg, ("retain_perturbed",), texts=())
    if cfg.method.answers == "idk":
        data[IDK.stem] = hash_file(IDK)
    return {"data": data, "models": utils.hash_models(cfg, "model_path")}


def original_of(cfg: DictConfig, family: Family) -> str:
    """The model before unlearning: `model_path`, else the family's fine-tuned one. Raises ValueError where it is not there."""
    path = utils.original_model(family, cfg) if cfg.model_path is None else find_path(cfg.model_path)
    settings.check_checkpoint("model_path", path)
    return path


def checkpoints(cfg: DictConfig, steps: int) -> set[Path]:
    """The folders that the run leaves."""
    saved = [*range(cfg.save_steps, steps, cfg.save_steps), steps]
    return {Path(cfg.save_dir, f"checkpoint-{step}") for step in saved[-(cfg.keep_last or 0) :]}


def run(cfg: DictConfig) -> None:
    if cfg.get("plan"):
        return planning.tell(cfg, "forget")
    family = prepare(cfg)
    with utils.alone(Path(cfg.save_dir)):
        unlearn_split(cfg, family)


def unlearn_split(cfg: DictConfig, family: Family) -> None:
    import torch

    import dataloader

    folder = Path(cfg.save_dir)
    data = dataloader.unlearning_data(cfg)
    steps, per_epoch = utils.count_steps(cfg, len(data.forget))
    utils.open_run(folder, cfg, made_of(cfg))
    if is_done(folder, steps):
        utils.close_run(folder)
        return utils.say(f"{folder} is done already: {steps} steps" + not_there(cfg, steps))

    from unlearn.geffect.call import GEffectCallback
    from unlearn.geffect.meter import Meter
    from unlearn.geffect.risks import trainable
    from unlearn.geffect.target import Target, Wanted
    from unlearn.models.adapters import LoRA, add_lora
    from unlearn.models.checkpoints import base_on_disk, load, pad_id, save_checkpoint
    from unlearn.models.sharding import shard
    from unlearn.passes.forcing import Pass, token_mean, token_nlls
    from unlearn.reporting.figures import draw
    from unlearn.reporting.score_figures import draw_scores
    from unlearn.scores.callback import ScoreCallback
    from unlearn.training.trainer import train

    bf16 = utils.use_bfloat16(cfg.dtype, family)
    kind, flash = getattr(torch, cfg.weights), family.flash_attention2 and bf16
    tokenizer, model = load(cfg.model_path, family.hf_key, utils.model_device(cfg), flash, kind)
    if cfg.LoRA.r:
        add_lora(model, LoRA(**cfg.LoRA), cfg.seed, base_on_disk(cfg.model_path, folder, model, tokenizer))
    trained = sum(parameter.numel() for parameter in trainable(model).values())
    settings.check_disk(cfg, checkpoints(cfg, steps), trained)  # `prepare` can't tell for a hub's model, or for adapters
    reference = reference_of(model) if cfg.retain.reference else None
    if cfg.parallel == "fsdp":
        shard(model, bf16)
        if reference is not None and reference is not model:
            shard(reference, bf16)
    pad = pad_id(tokenizer)
    tokenize = partial(dataloader.tokenize, tokenizer=tokenizer, family=family, max_length=cfg.max_length, model=model)
    measured = {"forget": tokenize(data.forget), "retain": tokenize(data.held_out)}
    if cfg.method.answers == "idk":
        measured["idk"] = tokenize(dataloader.idk_rows(data.forget, cfg.seed))
    how = Pass(model, pad, tokenizer.eos_token_id, bf16)

    before = {name: token_nlls(how, rows, f"{name} loss before") for name, rows in measured.items()}
    target = measured.get("idk", measured["forget"])
    if cfg.method.reference:  # the model before unlearning is the reference, and this pass its log-probabilities
        target = [row | {"ref_nll": nll} for row, nll in zip(target, before["forget"], strict=True)]
    retain = tokenize(data.retain) if cfg.retain.term else []
    batches = dataloader.step_batches(cfg, target, retain, steps, utils.processes(), pad, len(data.held_out))

    began = time.time()
    publish = partial(save_checkpoint, folder, tokenizer, cfg.save_dtype, cfg.keep_last)
    training = utils.training_settings(cfg, family, steps, per_epoch)
    loss = build_loss(cfg, model, reference)
    if loss.noise is not None and utils.is_main_process():
        save_noise(folder, loss.noise)
    callbacks: list[TrainerCallback] = []
    if cfg.geffect.every:
        beside = dataloader.beside_rows(retain, cfg.geffect.retain_rows, len(target), cfg.seed)
        risks = {"unlearn": measured["forget"], "retain": measured["retain"]}
        wanted = Wanted(instances=cfg.geffect.instances, norms=cfg.geffect.norms)
        meter = Meter(model, Target(loss, target, beside), risks, pad, wanted, bf16=bf16, offload=cfg.geffect.offload)
        callbacks.append(GEffectCallback(meter, cfg.geffect.every, folder / "geffect"))
    if cfg.eval.every:
        rows = {name: measured[name] for name in ("forget", "retain")}
        callbacks.append(ScoreCallback(how, rows, cfg.eval.every, folder / "scores.csv"))
    train(model, loss, batches, training, folder, publish, callbacks)
    seconds = time.time() - began
    after = {name: token_nlls(how, rows, f"{name} loss after") for name, rows in measured.items()}
    losses = {name: {"start": token_mean(before[name]), "end": token_mean(after[name])} for name in measured}
    if utils.is_main_process():
        told = losses | {"steps": steps, "training_seconds": round(seconds, 1)}
        write_json(folder / "logs" / "losses.json", evaluation.no_nan(told))
        if cfg.geffect.every:
            draw(folder / "geffect")
        if cfg.eval.every:
            draw_scores(folder)
    utils.close_run(folder)
    for name, value in losses.items():
        start, end = (evaluation.told(value[when], 3) for when in ("start", "end"))
        utils.say(f"{name + ' loss':12} {start:>8} -> {end:>8} nats a token")
    utils.say(f"{steps} steps in {seconds:.0f} s; checkpoints and logs are in {folder}" + not_there(cfg, steps))


def is_done(folder: Path, steps: int) -> bool:
    """Whether the last checkpoint is there and nothing is left to do or to go on from."""
    written = (folder / "logs" / "losses.json").exists() or not (folder / "resume").exists()
    return is_checkpoint(folder / f"checkpoint-{steps}") and written


def not_there(cfg: DictConfig, steps: int) -> str:
    """What to say of the run's checkpoints that were removed or harmed since, or that an earlier start did not write."""
    missing = sorted(int(path.name.split("-")[1]) for path in checkpoints(cfg, steps) if not is_checkpoint(path))
    return f"; not there, or not whole: checkpoint-{', '.join(map(str, missing))}" if missing else ""


def reference_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model as it is before unlearning, for later: a frozen copy, or itself where it has adapters to switch off."""
    from unlearn.models.adapters import has_adapters

    return model if has_adapters(model) else copy.deepcopy(model).requires_grad_(False).eval()


def build_loss(cfg: DictConfig, model: PreTrainedModel, reference: PreTrainedModel | None) -> Loss:
    """The loss that the method's and the retain term's YAML describe.

    Args:
        reference: the model before unlearning, for a retain term that compares with it.
    """
    import torch

    from unlearn.objectives.loss import Loss

    layer = cfg.method.get("layer")
    noise = None
    if layer is not None:
        width = model.config.get_text_config().hidden_size
        noise = torch.rand(width, generator=torch.Generator().manual_seed(cfg.seed)).to(model.device)
    return Loss(
        objective=instantiate(cfg.method.objective),
        retain=instantiate(cfg.retain.term),
        weight=cfg.retain.weight,
        layer=layer,
        noise=noise,
        reference=reference if cfg.retain.reference else None,
    )


def save_noise(folder: Path, noise: Tensor) -> None:
    from safetensors.torch import save_file

    with written_beside(folder / "noise.safetensors") as beside:
        save_file({"noise": noise.cpu()}, beside)


if __name__ == "__main__":
    settings.cli(run, "forget")
