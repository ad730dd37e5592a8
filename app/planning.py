"""What a command needs of memory and disk, told in place of running it: `plan=N`, N being the number of processes (GPUs)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from app.attack_settings import Robustness
from app.attack_weights import training
from app.checks import count_steps, model_config, shapes, two_gradients
from app.data import TEXTS, Data, data_of, finetune_sets
from app.families import Family
from app.filling import with_family
from app.runs import alone
from app.settings import BYTES, OPTIMIZERS, Common, EvalEverything, Finetune, Forget, GEffects, Training
from utils import use_bfloat16

if TYPE_CHECKING:
    from unlearn.models.plan import Work

Some = TypeVar("Some", bound=Training)

CHARACTERS = 4.6  # of English, to a token
LABELS = 0.63  # of a row of TOFU's tokens
LONGEST, LONG = 139, 76  # tokens, of TOFU's rows with their prompts; and what 7 of 8 rows are within
PROMPT = 20  # characters of a family's tags
ROWS = {"forget01": 40, "forget05": 200, "forget10": 400}  # of TOFU's


def plan_or_run(
    asked: Some, prepare: Callable[[Some], tuple[Some, Family]], work: Callable[[Some, Family, Path], None]
) -> Path | None:
    """Tell the plan where one is asked for; else prepare, and do the work in its folder alone, which is returned."""
    if asked.plan:
        tell(asked)
        return None
    settings, family = prepare(asked)
    folder = Path(str(settings.save_dir))
    with alone(folder):
        work(settings, family, folder)
    return folder


def tell(asked: Common) -> None:
    """Print the plan of what the settings would run: memory a process by what it is for, and disk."""
    from unlearn.models import plan

    settings, family = with_family(asked)
    shape = plan.shape_of(configuration(settings, family))
    work = work_of(settings, family)
    if isinstance(settings, Training):
        needs = [plan.training(shape, work)]
        if isinstance(settings, Forget) and settings.geffect.every:
            needs.append(plan.measuring(shape, work, optimizer=True))
    elif isinstance(settings, GEffects):
        needs = [plan.measuring(shape, work, optimizer=False)]
    else:
        everything = settings if isinstance(settings, EvalEverything) else None
        models, gradients = (3 if everything and everything.control else 1), bool(everything and everything.gradnorm)
        needs = [plan.scoring(shape, work, models, gradients)]
        needs += [plan.asking(shape, work)] if everything and everything.lm_eval else []
    if isinstance(settings, Robustness) and "relearn" in settings.attacks:
        needs.append(plan.training(shape, work_of(training(settings, family), family)))
    kind = "GPU" if work.gpu else "CPU"
    print(f"{family.name}: {shape.parameters:,} parameters, {settings.plan} x {kind}, parallel={settings.parallel}")
    print(plan.table(needs))


def configuration(settings: Common, family: Family) -> Any:
    """The model's configuration: of the folder or hub name given, else of config/shapes.yaml.

    Raises:
        ValueError: it is in none of these.
    """
    from transformers import AutoConfig

    for path in (getattr(settings, "model_path", None), getattr(settings, "model_path_cur", None), family.hf_key):
        found = path and model_config(str(path))
        if found:
            return AutoConfig.for_model(**found)
    known = shapes()
    shape = known.get(family.name)
    shape = known[shape] if isinstance(shape, str) else shape
    if shape is None:
        raise ValueError(
            f"hf_key={family.hf_key}: no config.json there, and config/shapes.yaml does not have model_family={family.name};"
            " give hf_key=FOLDER with the model's config.json"
        )
    return AutoConfig.for_model(**({"tie_word_embeddings": False} | shape))


def work_of(settings: Common, family: Family) -> Work:
    """How the settings have the work done, on as many processes as are planned for."""
    from app.building import compares
    from unlearn.models.plan import MEASURED_ROWS, Work

    gpu, tokens = has_gpu(settings.plan_for), longest_row(settings)
    dtype = getattr(settings, "dtype")  # noqa: B009
    work: dict[str, Any] = {
        "rows": settings.batch_size or MEASURED_ROWS,
        "tokens": tokens,
        "labels": round(LABELS * tokens),
        "bf16": gpu if dtype == "auto" and family.dtype is None and gpu else use_bfloat16(dtype, family.dtype),
        "checkpointing": family.gradient_checkpointing,
        "shards": settings.plan if settings.parallel == "fsdp" else 1,
        "gpu": gpu,
        "optimizer": 0,
    }
    if isinstance(settings, Training | GEffects):
        work |= {"weight": BYTES[settings.weights], "lora": settings.LoRA.r or 0, "trainable": settings.trainable}
        work["checkpointing"] = settings.gradient_checkpointing
    if isinstance(settings, Training):
        work |= {"optimizer": OPTIMIZERS[settings.optim].state, "saved": BYTES[settings.save_dtype]}
        work |= {"checkpoints": checkpoints(settings), "merged": isinstance(settings, Finetune)}
        accumulated = settings.gradient_accumulation_steps
        work |= {"accumulated": accumulated, "buckets": settings.plan > 1 and settings.parallel == "ddp"}
        work["later"] = longest_later(settings, accumulated)
    if isinstance(settings, Forget):
        work["gradients"] = 2 if two_gradients(settings) else 1
        work["average"] = settings.rule.average is not None
    if isinstance(settings, Forget | GEffects):
        retain = settings.retain.name != "none"
        norms = settings.norms if isinstance(settings, GEffects) else settings.geffect.norms
        work |= {"retain": retain, "reference": compares(settings.method, settings.retain), "norms": norms}
        work |= {"offload": settings.geffect.offload, "before": settings.method.negate is not None}
        work["ruled"] = settings.rule.name != "sum"
        work["tapped"] = settings.instances if isinstance(settings, GEffects) else settings.geffect.instances
    return Work(**work)


def has_gpu(plan_for: str | None) -> bool:
    """Whether the plan is for GPUs: where `plan_for` does not say, whether there is one here."""
    if plan_for is not None:
        return plan_for == "gpu"
    import torch

    return torch.cuda.is_available()


def checkpoints(settings: Training) -> int:
    """How many a run leaves: of the data's rows where they are at hand, else of TOFU's."""
    if not isinstance(settings, Forget):
        return 1
    data = data_of(settings)
    found = [data.at_hand(name) for name in data.benchmark.unlearn[settings.split].forget]
    there = None not in found
    rows = sum(len(rows or ()) for rows in found) if there else ROWS.get(settings.split, max(ROWS.values()))
    number = -(-count_steps(settings, rows)[0] // settings.save_steps)
    return min(number, settings.keep_last or number)


def longest_row(settings: Common) -> int:
    """Tokens of the longest row: told from its characters where the data are at hand, else of TOFU."""
    return quantile(settings, 1.0)


def longest_later(settings: Training, accumulated: int) -> int:
    """Tokens of the longest row of a step's micro-batches after the first, which has the longest 1 / n of its rows.

    Steps are drawn: half of that share is left for those with more long rows than most.
    """
    return quantile(settings, 1 - 1 / (2 * accumulated))


def quantile(settings: Common, share: float) -> int:
    """So many tokens at most that share of the rows has."""
    data = data_of(settings)
    rows = [row for name in sets(settings, data) for row in data.at_hand(name) or ()]
    texts = [[row[text] for text in (*TEXTS, "text") if text in row] for row in rows]
    lengths = sorted(sum(len(str(text)) for text in of_row) + PROMPT for of_row in texts)
    at = -(-len(lengths) * share // 1) - 1
    found = round(lengths[int(at)] / CHARACTERS) if lengths else LONGEST if share == 1 else LONG
    return min(settings.max_length or 500, found)


def sets(settings: Common, data: Data) -> list[str]:
    """Those that are trained on, or measured."""
    split = getattr(settings, "split", None)
    if isinstance(settings, Finetune):
        return finetune_sets(data, settings.split)
    of = data.benchmark.unlearn.get(str(split))
    retain = isinstance(settings, Forget | GEffects) and settings.retain.name != "none"
    return [] if of is None else [*of.forget, *(of.retain if retain else [])]
