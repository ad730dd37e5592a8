"""Fine-tune a model family on a split of its benchmark, or on local question-answer files.

    python finetune.py model_family=tiny
    torchrun --nproc_per_node=2 --master_port=18765 finetune.py --config-name=finetune.yaml split=full batch_size=4 \\
        gradient_accumulation_steps=4 model_family=phi lr=2e-5
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from app import door, planning
from app.checks import check_checkpoint, check_disk, check_folder, check_logger, check_optimizer, check_trainable, count_steps
from app.data import check_finetune_data, data_of, finetune_rows, finetune_sets
from app.families import Family
from app.filling import with_family
from app.runs import MadeOf, check_run, close_run, finetuned_folder, hash_models, learning_rate, open_run
from app.settings import Finetune
from unlearn.io.weights import count_parameters, is_checkpoint
from utils import model_device, say, use_bfloat16

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def prepare(settings: Finetune) -> tuple[Finetune, Family]:
    """The settings with what the family decides; refuses what cannot work before anything is loaded."""
    settings, family = with_family(settings)
    lr = learning_rate(settings.lr, family.finetune_lr, bool(settings.LoRA.r))
    epochs = family.finetune_epochs if settings.num_epochs is None else settings.num_epochs
    settings = settings.model_copy(update={"lr": lr, "num_epochs": epochs})
    rows = check_finetune_data(data_of(settings), settings.split)
    if rows is not None:
        count_steps(settings, rows)
    check_logger(settings.logger)
    check_optimizer(settings.optim, settings.parallel)
    if not family.from_scratch:
        check_checkpoint("hf_key", family.hf_key)
    check_trainable(settings.trainable, family.hf_key, settings.LoRA)
    folder = Path(settings.save_dir or finetuned_folder(settings, family))
    settings = settings.model_copy(update={"save_dir": str(folder)})
    check_folder(folder)
    if folder.resolve() == Path(family.hf_key).resolve():
        raise ValueError(f"save_dir={folder}: is hf_key's folder, and the model there would be written over")
    check_run(folder, settings, made_of(settings, family))
    if not family.from_scratch and Path(family.hf_key).is_dir():
        check_disk(settings, {folder}, count_parameters(Path(family.hf_key)))
    return settings, family


def made_of(settings: Finetune, family: Family) -> MadeOf:
    """What tells the run's rows and its pretrained model from others."""
    data = data_of(settings)
    names = finetune_sets(data, settings.split)
    if family.from_scratch:  # its tokenizer is made of all
        names += [name for name in finetune_sets(data, "full") if name not in names]
    return {"data": data.hashes(names), "models": hash_models(settings, "hf_key")}


def run(settings: Finetune) -> Path | None:
    return planning.plan_or_run(settings, prepare, finetune)


def finetune(settings: Finetune, family: Family, folder: Path) -> None:
    if is_checkpoint(folder):  # written after the last step
        close_run(folder)
        return say(f"{folder} is fine-tuned already")

    from app.building import adapt, cut_as_run, how_to_train, load_to_train, split_up, step_batches, tokenizing
    from unlearn.models.adapters import bare, merged_state
    from unlearn.models.checkpoints import base_on_disk, new_model, save_adapter, save_into
    from unlearn.objectives import Loss, mean_nll
    from unlearn.training import train

    data = data_of(settings)
    rows = finetune_rows(data, settings.split)
    steps, per_epoch = count_steps(settings, len(rows))
    if family.from_scratch:
        texts = [row.get("text") or family.prompt(row["question"]) + row["answer"] for row in finetune_rows(data, "full")]
        tokenizer, model = new_model(family.hf_key, texts, settings.seed, model_device(settings.parallel))
        adapt(model, settings, base_on_disk(family.hf_key, folder, model, tokenizer) if settings.LoRA.r else "")
    else:
        tokenizer, model = load_to_train(settings, family, family.hf_key, folder)
    check_disk(settings, {folder}, model.num_parameters())  # `prepare` can't tell for a hub's model, or a new one
    split_up(settings, use_bfloat16(settings.dtype, family.dtype), model)
    tokenized = tokenizing(settings, family, tokenizer, model)(rows)
    cut = cut_as_run(settings, family, model)
    batches = step_batches(cut, tokenized, [], steps, tokenizer)
    open_run(folder, settings, made_of(settings, family))

    def publish(model: PreTrainedModel, weights: dict[str, Tensor], step: int) -> None:
        if step == steps and settings.LoRA.r:
            save_adapter(folder, tokenizer, settings.save_dtype, model, weights)
            save_into(folder, bare(model), tokenizer, settings.save_dtype, merged_state(model, weights))
        elif step == steps:
            save_into(folder, model, tokenizer, settings.save_dtype, weights)

    train(model, Loss(mean_nll), batches, how_to_train(cut, family, steps, per_epoch), folder, publish)
    close_run(folder)
    say(f"{steps} steps done; the model is in {folder}")


if __name__ == "__main__":
    door.cli(run, Finetune)
