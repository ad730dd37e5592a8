"""Unlearn a forget split from a fine-tuned model, with one of the objectives of config/method and a retain term.

    python forget.py model_family=phi split=forget05 method=npo retain=kl

`basher1.py` is the short way.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from app import door, planning
from app.checks import check_disk, check_folder, check_layer, check_logger, check_optimizer, check_rule, count_steps
from app.data import check_unlearning_data, data_of, unlearning_data
from app.evaluating import no_nan, told
from app.families import Family
from app.filling import with_family
from app.methods import RETAINED, layer_of
from app.runs import (
    check_run,
    checkpoints,
    close_run,
    is_done,
    learning_rate,
    made_of,
    not_there,
    open_run,
    original_of,
    run_folder,
)
from app.settings import Forget
from unlearn.io.rows import write_json
from unlearn.io.weights import count_parameters
from utils import is_main_process, say, use_bfloat16

if TYPE_CHECKING:
    from transformers import TrainerCallback


def prepare(settings: Forget) -> tuple[Forget, Family]:
    """The settings with what the family decides; refuses what cannot work before anything is loaded."""
    settings, family = with_family(settings)
    settings = settings.model_copy(update={"lr": learning_rate(settings.lr, family.unlearn_lr, bool(settings.LoRA.r))})
    rows = check_unlearning_data(data_of(settings), settings.split, settings.retain_holdout)
    steps = None if rows is None else count_steps(settings, rows)[0]
    check_rule(settings)
    check_logger(settings.logger)
    check_optimizer(settings.optim, settings.parallel)
    settings = settings.model_copy(update={"model_path": original_of(settings, family)})
    if settings.geffect.monitor and not settings.geffect.every:
        raise ValueError("geffect.monitor=true: along what geffect.every measures, which is 0; geffect.every=1 or more")
    method, retain = settings.method, settings.retain
    if method.name in RETAINED and retain.name != method.name:
        raise ValueError(f"retain={retain.name}: method={method.name} is ga with the retain term {method.name} already")
    check_layer(settings.model_path, layer_of(method, retain))
    folder = Path(settings.save_dir or run_folder(settings))
    settings = settings.model_copy(update={"save_dir": str(folder)})
    check_folder(folder)
    check_run(folder, settings, made_of(settings))
    if steps is not None and Path(settings.model_path).is_dir() and not settings.LoRA.r:
        check_disk(settings, checkpoints(settings, steps), count_parameters(Path(settings.model_path)), settings.keep_last)
    return settings, family


def run(settings: Forget) -> Path | None:
    return planning.plan_or_run(settings, prepare, unlearn)


def unlearn(settings: Forget, family: Family, folder: Path) -> None:
    data = unlearning_data(data_of(settings), settings.split, settings.retain_holdout)
    steps, per_epoch = count_steps(settings, len(data.forget))
    if is_done(folder, steps):
        close_run(folder)
        return say(f"{folder} is done already: {steps} steps" + not_there(settings, steps))

    from app import building
    from app.building import build_loss, how_to_train, load_to_train, step_batches, with_reference, with_second
    from dataloader import beside_rows, idk_rows
    from unlearn.geffect import GEffectCallback, Meter, Target, Wanted
    from unlearn.models.checkpoints import pad_id, save_checkpoint
    from unlearn.models.vectors import trainable
    from unlearn.passes.forcing import Pass, token_mean, token_nlls
    from unlearn.reporting.figures import draw
    from unlearn.reporting.score_figures import draw_scores
    from unlearn.scores import ScoreCallback
    from unlearn.training import train

    bf16 = use_bfloat16(settings.dtype, family.dtype)
    tokenizer, model = load_to_train(settings, family, settings.model_path, folder)
    trained = sum(parameter.numel() for parameter in trainable(model).values())
    # `prepare` can't tell for a hub's model, or for adapters
    check_disk(settings, checkpoints(settings, steps), trained, settings.keep_last)
    reference = building.reference_of(model) if building.compares(settings.method, settings.retain) else None
    building.split_up(settings, bf16, model, reference)
    tokenize, pad = building.tokenizing(settings, family, tokenizer, model), pad_id(tokenizer)
    measured = {"forget": tokenize(data.forget), "retain": tokenize(data.held_out)}
    if settings.method.answers == "idk":
        measured["idk"] = tokenize(idk_rows(data.forget, settings.seed))
    retain = tokenize(data.retain) if settings.retain.term else []
    retain = with_second(retain, data.retain, settings.retain, settings.seed, tokenize)
    open_run(folder, settings, made_of(settings))
    how = Pass(model, pad, tokenizer.eos_token_id, bf16)
    before = {name: token_nlls(how, rows, f"{name} loss before") for name, rows in measured.items()}
    answers = settings.method.answers
    target = with_second(measured[answers], data.forget, settings.method, settings.seed, tokenize)
    target = with_reference(target, settings.method, how, before[answers])  # the model before unlearning is the reference
    retain = with_reference(retain, settings.retain, how)
    loss = build_loss(settings.method, settings.retain, settings.seed, model, reference, tokenizer, steps)
    building.save_noise(settings, loss)

    callbacks: list[TrainerCallback] = []
    if settings.geffect.every:
        wanted = settings.geffect
        beside = beside_rows(retain, wanted.retain_rows, len(target), settings.seed)
        risks = {"unlearn": measured["forget"], "retain": measured["retain"]}
        parts = Wanted(instances=wanted.instances, norms=wanted.norms)
        meter = Meter(model, Target(loss, target, beside), risks, pad, parts, bf16=bf16, offload=wanted.offload)
        callbacks.append(GEffectCallback(meter, wanted.every, folder / "geffect", wanted.monitor))
    if settings.eval.every:
        rows = {name: measured[name] for name in ("forget", "retain")}
        callbacks.append(ScoreCallback(how, rows, settings.eval.every, folder / "scores.csv"))
    cut = building.cut_as_run(settings, family, model)
    batches = step_batches(cut, target, retain, steps, tokenizer, len(data.held_out))
    publish = partial(save_checkpoint, folder, tokenizer, settings.save_dtype, settings.keep_last)
    began = time.time()
    train(model, loss, batches, how_to_train(cut, family, steps, per_epoch), folder, publish, callbacks)
    seconds = time.time() - began
    after = {name: token_nlls(how, rows, f"{name} loss after") for name, rows in measured.items()}
    losses = {name: {"start": token_mean(before[name]), "end": token_mean(after[name])} for name in measured}
    if is_main_process():
        write_json(folder / "logs/losses.json", no_nan(losses | {"steps": steps, "training_seconds": round(seconds, 1)}))
        if settings.geffect.every:
            draw(folder / "geffect")
        if settings.eval.every:
            draw_scores(folder)
    close_run(folder)
    for name, value in losses.items():
        start, end = (told(value[when], 3) for when in ("start", "end"))
        say(f"{name + ' loss':12} {start:>8} -> {end:>8} nats a token")
    say(f"{steps} steps in {seconds:.0f} s; checkpoints and logs are in {folder}" + not_there(settings, steps))


if __name__ == "__main__":
    door.cli(run, Forget)
