"""From settings to the library's objects: models with their adapters and shards, losses, batches, how to train."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from hydra.utils import instantiate

import dataloader
from app.checks import check_disk, two_gradients
from app.families import Family
from app.methods import layer_of
from app.planning import work_of
from app.settings import Forget, GEffects, Method, Retain, Training
from unlearn.io.files import written_beside
from unlearn.models import plan
from unlearn.models.adapters import LoRA, add_lora, has_adapters
from unlearn.models.checkpoints import base_on_disk, load, pad_id, save_checkpoint
from unlearn.models.sharding import shard
from unlearn.models.trained import negated, state_before, train_only
from unlearn.objectives.dual import Dual
from unlearn.objectives.loss import Loss
from unlearn.objectives.needs import needs_of, needs_reference
from unlearn.passes.forcing import Pass, with_ref_nll
from unlearn.training.rules import Rule
from unlearn.training.trainer import Publish
from unlearn.training.trainer import Settings as HowToTrain
from utils import is_main_process, model_device, processes, say, use_bfloat16

OF_MEMORY = 0.85  # of a GPU, that what is planned may take

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from unlearn.objectives.rows import Row


def load_to_train(
    settings: Training, family: Family, path: str, folder: Path
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """The checkpoint's tokenizer and model, with adapters where the settings have some.

    Args:
        folder: the run's, where adapters' own model is put if it is on no disk.
    """
    flash = family.flash_attention2 and use_bfloat16(settings.dtype, family.dtype)
    kind = getattr(torch, settings.weights)
    tokenizer, model = load(path, family.hf_key, model_device(settings.parallel), flash, kind)
    adapt(model, settings, base_on_disk(path, folder, model, tokenizer) if settings.LoRA.r else path)
    return tokenizer, model


def adapt(model: PreTrainedModel, settings: Training | GEffects, base: str) -> None:
    """Give the model adapters where the settings have some, and freeze what they do not train.

    Args:
        base: where the model is loaded from when adapters are.
    """
    if settings.LoRA.r:
        add_lora(model, LoRA(**settings.LoRA.model_dump()), settings.seed, base)
    if settings.trainable is not None:
        train_only(model, settings.trainable)


def split_up(settings: Training | GEffects, bf16: bool, *models: PreTrainedModel | None) -> None:
    """Put the models, each once, into shards where the settings say so."""
    for model in dict.fromkeys(models) if settings.parallel == "fsdp" else ():
        if model is not None:
            shard(model, bf16)


def check_room(settings: Forget, model: PreTrainedModel, checkpoints: set[Path]) -> None:
    """Raises ValueError where the disk has no room for what the run has yet to write of the model, as it is trained."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    saved = trained if settings.LoRA.r else model.num_parameters()
    check_disk(settings, checkpoints, saved, settings.keep_last, trained)


def reference_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model as it is before unlearning, for later: a frozen copy, or itself where it has adapters to switch off."""
    return model if has_adapters(model) else copy.deepcopy(model).requires_grad_(False).eval()


def tokenizing(
    settings: Training | GEffects, family: Family, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> Callable[[Sequence[Mapping[str, Any]]], list[Row]]:
    """Rows to tokens, as the family has them, checked to have a place in the model."""
    length = settings.max_length
    return partial(dataloader.tokenize, tokenizer=tokenizer, family=family, max_length=length, model=model)


def cut_as_run(settings: Training, family: Family, model: PreTrainedModel) -> Training:
    """The settings with a step's micro-batches merged: into one where they say so, else into as few as a GPU's memory holds."""
    given, rows = settings.gradient_accumulation_steps, settings.batch_size * settings.gradient_accumulation_steps
    if settings.merge is False or given == 1 or not (settings.merge or torch.cuda.is_available()):
        return settings
    room = math.inf if settings.merge else OF_MEMORY * gpu_memory()
    numbers = [n for n in range(1, given) if given % n == 0]
    fewest = next((n for n in numbers if _needs(settings, family, model, rows // n) <= room), given)
    parts = max(gather_object([fewest]))  # of all processes: they step together
    if parts == given:
        return settings
    say(f"the {given} micro-batches of a step are run as {parts} (merge=false keeps them apart)")
    return settings.model_copy(update={"batch_size": rows // parts, "gradient_accumulation_steps": parts})


def gpu_memory() -> int:
    """Bytes of this process's GPU that are free, or its own already."""
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()


def _needs(settings: Training, family: Family, model: PreTrainedModel, rows: int) -> float:
    """Bytes that a training step of so many rows at once takes of a GPU, by the plan's arithmetic; with V, where it is kept."""
    several, sharded = processes(), settings.parallel == "fsdp"
    parts = settings.batch_size * settings.gradient_accumulation_steps // rows
    work = replace(work_of(settings, family), rows=rows, gpu=True, accumulated=parts)
    work = replace(work, shards=several if sharded else 1, buckets=several > 1 and not sharded)
    shape = plan.shape_of(model.config)
    kept = isinstance(settings, Forget) and settings.geffect.every > 0 and not settings.geffect.offload
    return plan.training(shape, work).peak + (plan.measuring(shape, work, True).memory["directions V"] if kept else 0)


def step_batches(
    settings: Training, forget: list[Row], retain: list[Row], steps: int, tokenizer: PreTrainedTokenizerBase, held_out: int = 0
) -> dataloader.StepBatches:
    """The run's micro-batches; rows are called by their numbers in the split.

    Args:
        held_out: how many rows of the retain split stand before the first of `retain`.
    """
    size = settings.batch_size, settings.gradient_accumulation_steps * processes()
    return dataloader.StepBatches(forget, retain, steps, *size, settings.seed, pad_id(tokenizer), first=(1, 1 + held_out))


def how_to_train(settings: Training, family: Family, steps: int, per_epoch: int) -> HowToTrain:
    """Warm-up over the first epoch; saved once an epoch unless `save_steps` is given."""
    return HowToTrain(
        steps=steps,
        warmup_steps=min(per_epoch, steps - 1),  # a run shorter than an epoch reaches its lr too
        save_steps=settings.save_steps or per_epoch,
        bf16=use_bfloat16(settings.dtype, family.dtype),
        lr=settings.lr,
        seed=settings.seed,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim=settings.optim,
        gradient_checkpointing=settings.gradient_checkpointing,
        logger=settings.logger,
        rule=rule_of(settings) if isinstance(settings, Forget) else None,
    )


def found(group: Method | Retain) -> Any:
    """The method's objective, or the retain term, with its hyper-parameters; None where there is none."""
    of = group.objective if isinstance(group, Method) else group.term
    return None if of is None else instantiate(of)


def rule_of(settings: Forget | GEffects) -> Rule | None:
    """What makes the step of two gradients; None where the loss's own is formed at once."""
    if not two_gradients(settings):
        return None
    return Rule(instantiate(settings.rule.combine), settings.rule.average)


def dual_of(method: Method, steps: int = 0) -> Dual | None:
    """The retain term's weight as the dual variable that the method's YAML has under `dual`, where it has one, at its start.

    Args:
        steps: of the run, of which the warm-up is a share.
    """
    found = method.get("dual")
    return None if found is None else Dual(found["start"], found["eps"], found["eta"], round(found["warmup"] * steps))


def needs(group: Method | Retain) -> frozenset[str]:
    """What the method's objective, or the retain term, says that it needs."""
    return needs_of(found(group))


def compares(method: Method, retain: Retain) -> bool:
    """Whether a reference model is kept beside the one that is trained, for either of the two."""
    return needs_reference(found(method), found(retain))


def with_second(
    rows: list[Row],
    texts: Sequence[dict[str, Any]],
    group: Method | Retain,
    seed: int,
    tokenize: Callable[..., list[Row]],
    chosen: Sequence[int] | None = None,
) -> list[Row]:
    """The rows with their second answers, where the method's objective (or the retain term) needs them.

    Args:
        texts: what the second answers are drawn for.
        chosen: which of `texts` the rows are; None: all.

    Raises:
        ValueError: the YAML does not say which.
    """
    if "second" not in needs(group):
        return rows
    kind, what = ("method", "its objective") if isinstance(group, Method) else ("retain", "the term")
    if group.second is None:
        raise ValueError(
            f"{kind}={group.name}: {what} needs second answers: its YAML has `second: idk`, or a column of the rows"
        )
    several = dataloader.second_rows(texts, group.second, seed, f"{kind}.second")
    several = [several[i] for i in (range(len(texts)) if chosen is None else chosen)]
    second = iter(tokenize([answer for answers in several for answer in answers]))
    answered = [[next(second) for _ in answers] for answers in several]
    return [row | {"second": of if len(of) > 1 else of[0]} for row, of in zip(rows, answered, strict=True)]


def with_reference(rows: list[Row], group: Method | Retain, how: Pass, nlls: Sequence[Tensor] | None = None) -> list[Row]:
    """The rows with their log-probabilities under the model as it is, before unlearning, where the objective needs them.

    Args:
        nlls: of the rows' own answers, where they are known.
    """
    if "ref_nll" not in needs(group) or not rows:
        return rows
    if nlls is None and "ref_nll" in rows[0]:
        nlls = [row["ref_nll"] for row in rows]
    return with_ref_nll(how, rows, nlls)


def build_loss(
    method: Method,
    retain: Retain,
    seed: int,
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    steps: int = 0,
) -> Loss:
    """The loss that the method's and the retain term's YAML describe.

    Args:
        seed: of the run's fixed random vector, where the loss looks at a layer.
        reference: the model before unlearning, for an objective or a retain term that compares with it.
        tokenizer: of the method's refusal, where it has one.
        steps: of the run, for a dual variable's warm-up.

    Raises:
        ValueError: the two look at other layers, or one looks at a layer and none is given; there is no refusal.
    """
    layer, noise = layer_of(method, retain), None
    if layer is not None:
        width = model.config.get_text_config().hidden_size
        noise = torch.rand(width, generator=torch.Generator().manual_seed(seed)).to(model.device)
    return Loss(
        objective=found(method),
        retain=found(retain),
        weight=retain.weight,
        layer=layer,
        noise=noise,
        reference=reference if compares(method, retain) else None,
        refusal=_refusal(method, tokenizer, model.device) if "refusal" in needs(method) else None,
        dual=dual_of(method, steps),
    )


def _refusal(method: Method, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> Tensor:
    """(k,) the tokens of the method's refusal, as they stand in an answer."""
    if not method.refusal:
        raise ValueError(f"method={method.name}: its objective needs a refusal: its YAML has `refusal: TEXT`")
    return torch.tensor(tokenizer(method.refusal, add_special_tokens=False)["input_ids"], device=device)


def save_noise(settings: Forget, loss: Loss) -> None:
    """The run's fixed random vector, where its loss has one."""
    if loss.noise is not None and is_main_process():
        from safetensors.torch import save_file

        with written_beside(Path(str(settings.save_dir), "noise.safetensors")) as beside:
            save_file({"noise": loss.noise.cpu()}, beside)


def publisher(settings: Forget, folder: Path, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Publish:
    """What saves the run's checkpoints: the trained weights, or what is left where the method subtracts what it trains.

    Args:
        model: before it is trained.
    """
    save = partial(save_checkpoint, folder, tokenizer, settings.save_dtype, settings.keep_last)
    if (scale := settings.method.negate) is None:
        return save
    before = state_before(model)

    def publish(model: PreTrainedModel, weights: dict[str, Tensor], step: int) -> None:
        save(model, negated(weights, before, scale), step)

    return publish
