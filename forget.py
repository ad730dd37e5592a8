"""Unlearn a forget split from a fine-tuned model, with one of the objectives of config/method and a retain term.

python forget.py model_family=phi split=forget05 method=npo retain=kl    (basher1.py is the short way)
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from app import door, planning
from app.checks import (
    check_disk,
    check_folder,
    check_layer,
    check_logger,
    check_method,
    check_optimizer,
    check_rule,
    check_trainable,
    count_steps,
)
from app.data import check_unlearning_data, data_of, unlearning_data
from app.evaluating import no_nan, told
from app.families import Family
from app.filling import with_family
from app.methods import layer_of
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
    check_method(settings)
    check_layer(settings.model_path, layer_of(settings.method, settings.retain))
    check_trainable(settings.trainable, settings.model_path, settings.LoRA)
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
    from app.measuring import while_unlearning
    from app.second import Speaker, check_second, with_generated
    from dataloader import beside_rows, idk_rows
    from unlearn.geffect import Target
    from unlearn.models.checkpoints import load_weights, pad_id
    from unlearn.passes.forcing import Pass, token_mean, token_nlls
    from unlearn.reporting.figures import draw
    from unlearn.reporting.score_figures import draw_scores
    from unlearn.scores import ScoreCallback
    from unlearn.training import train

    check_second(data, settings)
    bf16 = use_bfloat16(settings.dtype, family.dtype)
    tokenizer, model = load_to_train(settings, family, settings.model_path, folder)
    building.check_room(settings, model, checkpoints(settings, steps))  # not known before for a hub's model, or for adapters
    reference = building.reference_of(model) if building.compares(settings.method, settings.retain) else None
    building.split_up(settings, bf16, model, reference)
    tokenize, pad = building.tokenizing(settings, family, tokenizer, model), pad_id(tokenizer)
    measured = {"forget": tokenize(data.forget), "retain": tokenize(data.held_out)}
    if settings.method.answers == "idk":
        measured["idk"] = tokenize(idk_rows(data.forget, settings.seed))
    retain = tokenize(data.retain) if settings.retain.term else []
    retain = with_second(retain, data.retain, settings.retain, settings.seed, tokenize)
    open_run(folder, settings, made_of(settings))
    how = Pass(model, pad, tokenizer.eos_token_id, bf16, tokens_per_batch=settings.tokens_per_batch)
    before = {name: token_nlls(how, rows, f"{name} loss before") for name, rows in measured.items()}
    texts = with_generated(data.forget, settings, folder, Speaker(how, family, tokenizer, tokenize))
    target = with_second(measured[settings.method.answers], texts, settings.method, settings.seed, tokenize)
    target = with_reference(target, settings.method, how, before[settings.method.answers])  # as yet it is the reference
    retain = with_reference(retain, settings.retain, how)
    loss = build_loss(settings.method, settings.retain, settings.seed, model, reference, tokenizer, steps)
    building.save_noise(settings, loss)

    callbacks: list[TrainerCallback] = []
    if settings.geffect.every:
        beside = beside_rows(retain, settings.geffect.retain_rows, len(target), settings.seed)
        callbacks.append(while_unlearning(settings, how, Target(loss, target, beside), measured, folder))
    if settings.eval.every:
        rows = {name: measured[name] for name in ("forget", "retain")}
        callbacks.append(ScoreCallback(how, rows, settings.eval.every, folder / "scores.csv"))
    cut = building.cut_as_run(settings, family, model)
    batches = step_batches(cut, target, retain, steps, tokenizer, len(data.held_out))
    publish = building.publisher(settings, folder, tokenizer, model)
    began = time.time()
    train(model, loss, batches, how_to_train(cut, family, steps, per_epoch), folder, publish, callbacks)
    seconds = time.time() - began
    if settings.method.negate is not None:  # the model is not what is published
        load_weights(model, str(folder / f"checkpoint-{steps}"))
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
