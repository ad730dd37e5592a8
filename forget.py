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

import settings
import utils
from unlearn.files import count_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from unlearn.loss import Loss


def prepare(cfg: DictConfig) -> utils.Family:
    """Fill in what the family decides, and refuse what cannot work before anything is loaded."""
    family = settings.prepare(cfg, "forget")
    cfg.lr = family.unlearn_lr if cfg.lr is None else cfg.lr
    rows = settings.check_forget_data(cfg)
    settings.check_logger(cfg.logger)
    cfg.model_path = utils.original_model(family, cfg) if cfg.model_path is None else utils.find_path(cfg.model_path)
    settings.check_checkpoint("model_path", cfg.model_path)
    if cfg.method.name in ("gd", "kl") and cfg.retain.name != cfg.method.name:
        raise ValueError(
            f"retain={cfg.retain.name}: method={cfg.method.name} is ga with the retain term {cfg.method.name} already"
        )
    if "layer" in cfg.method:
        settings.check_layer(cfg.model_path, cfg.method.layer)
    if cfg.save_dir is None:
        cfg.save_dir = str(utils.run_folder(cfg)) + utils.override_suffix(cfg, "forget")
    settings.check_folder(Path(cfg.save_dir))
    utils.check_run(Path(cfg.save_dir), cfg)
    if rows is not None and Path(cfg.model_path).is_dir():
        steps, _ = utils.count_steps(cfg, rows)
        settings.check_disk(cfg, checkpoints(cfg, steps), count_parameters(Path(cfg.model_path)))
    return family


def checkpoints(cfg: DictConfig, steps: int) -> set[Path]:
    """The folders that the run leaves."""
    return {Path(cfg.save_dir, f"checkpoint-{step}") for step in [*range(cfg.save_steps, steps, cfg.save_steps), steps]}


def run(cfg: DictConfig) -> None:
    family = prepare(cfg)
    with utils.alone(Path(cfg.save_dir)):
        unlearn_split(cfg, family)


def unlearn_split(cfg: DictConfig, family: utils.Family) -> None:
    import dataloader

    folder = Path(cfg.save_dir)
    data = dataloader.unlearning_data(cfg)
    steps, per_epoch = utils.count_steps(cfg, len(data.forget))
    utils.open_run(folder, cfg)
    if is_done(folder, steps):
        utils.close_run(folder)
        return utils.say(f"{folder} is done already: {steps} steps" + not_there(cfg, steps))

    from unlearn.checkpoints import load_model, load_tokenizer, pad_id, save_checkpoint
    from unlearn.scores import token_mean, token_nlls
    from unlearn.training import train

    bf16 = utils.use_bfloat16(cfg.dtype, family)
    model = load_model(cfg.model_path, utils.device(), family.flash_attention2 and bf16)
    settings.check_disk(cfg, checkpoints(cfg, steps), model.num_parameters())  # `prepare` can't tell for a hub's model
    tokenizer = load_tokenizer(cfg.model_path, family.hf_key)
    pad = pad_id(tokenizer)
    tokenize = partial(dataloader.tokenize, tokenizer=tokenizer, family=family, max_length=cfg.max_length)
    measured = {"forget": tokenize(data.forget), "retain": tokenize(data.held_out)}
    if cfg.method.answers == "idk":
        measured["idk"] = tokenize(dataloader.idk_rows(data.forget, cfg.seed))
    nlls = partial(token_nlls, collate=partial(dataloader.collate, pad=pad), bf16=bf16)

    before = {name: nlls(model, rows, what=f"{name} loss before") for name, rows in measured.items()}
    target = measured.get("idk", measured["forget"])
    if cfg.method.reference:  # the model before unlearning is the reference, and this pass its log-probabilities
        target = [row | {"ref_nll": nll} for row, nll in zip(target, before["forget"], strict=True)]
    retain = tokenize(data.retain) if cfg.retain.term else []
    batches = dataloader.step_batches(cfg, target, retain, steps, utils.processes(), pad)

    began = time.time()
    publish = partial(save_checkpoint, folder, tokenizer, cfg.save_dtype)
    how = utils.training_settings(cfg, family, steps, per_epoch)
    train(model, build_loss(cfg, model, folder), batches, how, folder, publish)
    seconds = time.time() - began
    after = {name: nlls(model, rows, what=f"{name} loss after") for name, rows in measured.items()}
    losses = {name: {"start": token_mean(before[name]), "end": token_mean(after[name])} for name in measured}
    if utils.is_main_process():
        utils.write_json(folder / "logs" / "losses.json", losses | {"steps": steps, "training_seconds": round(seconds, 1)})
    utils.close_run(folder)
    for name, loss in losses.items():
        utils.say(f"{name + ' loss':12} {loss['start']:8.3f} -> {loss['end']:8.3f} nats a token")
    utils.say(f"{steps} steps in {seconds:.0f} s; checkpoints and logs are in {folder}" + not_there(cfg, steps))


def is_done(folder: Path, steps: int) -> bool:
    """Whether the last checkpoint is there and nothing is left to do or to go on from."""
    written = (folder / "logs" / "losses.json").exists() or not (folder / "resume").exists()
    return utils.is_checkpoint(folder / f"checkpoint-{steps}") and written


def not_there(cfg: DictConfig, steps: int) -> str:
    """What to say of the run's checkpoints that were removed or harmed since, or that an earlier start did not write."""
    missing = sorted(int(path.name.split("-")[1]) for path in checkpoints(cfg, steps) if not utils.is_checkpoint(path))
    return f"; not there, or not whole: checkpoint-{', '.join(map(str, missing))}" if missing else ""


def build_loss(cfg: DictConfig, model: PreTrainedModel, folder: Path) -> Loss:
    """The loss that the method's and the retain term's YAML describe, at the model before unlearning."""
    import torch
    from safetensors.torch import save_file

    from unlearn.loss import Loss

    layer = cfg.method.get("layer")
    noise = None
    if layer is not None:
        noise = torch.rand(model.config.hidden_size, generator=torch.Generator().manual_seed(cfg.seed)).to(model.device)
        if utils.is_main_process():
            save_file({"noise": noise.cpu()}, folder / ".noise.tmp")
            (folder / ".noise.tmp").replace(folder / "noise.safetensors")
    return Loss(
        objective=instantiate(cfg.method.objective),
        retain=instantiate(cfg.retain.term),
        weight=cfg.retain.weight,
        layer=layer,
        noise=noise,
        reference=copy.deepcopy(model).requires_grad_(False).eval() if cfg.retain.reference else None,
    )


if __name__ == "__main__":
    settings.cli(run, "forget")
