"""What a command needs of memory and disk, told in place of running it: `plan=N`, N being the number of processes (GPUs)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

import settings
import utils
from app.families import Family
from app.places import CONFIG, find_path
from unlearn.io.rows import read_jsonl

if TYPE_CHECKING:
    from unlearn.models.plan import Work

CHARACTERS = 4.6  # of English, to a token
LABELS = 0.63  # of a row of TOFU's tokens
LONGEST = 139  # tokens, of TOFU's rows with their prompts
PROMPT = 20  # characters of a family's tags


def tell(cfg: DictConfig, config_name: str) -> None:
    """Print the plan of what the configuration would run: memory a process by what it is for, and disk."""
    from unlearn.models import plan

    shards = cfg.plan
    family = settings.prepare(cfg, config_name)
    shape = plan.shape_of(model_config(cfg, family))
    work = work_of(cfg, config_name, family, shards)
    if config_name in ("finetune", "forget"):
        needs = [plan.training(shape, work)]
        if "geffect" in cfg and cfg.geffect.every:
            needs.append(plan.measuring(shape, work, optimizer=True))
    elif config_name == "forget_ge":
        needs = [plan.measuring(shape, work, optimizer=False)]
    else:
        needs = [plan.scoring(shape, work, models=3 if cfg.get("control") else 1)]
    print(f"{family.name}: {shape.parameters:,} parameters, {shards} x {'GPU' if work.gpu else 'CPU'}, parallel={cfg.parallel}")
    print(plan.table(needs))


def model_config(cfg: DictConfig, family: Family) -> Any:
    """The model's configuration: of the folder or hub name given, else of config/shapes.yaml.

    Raises:
        ValueError: it is in none of these.
    """
    from transformers import AutoConfig

    for path in (cfg.get("model_path"), cfg.get("model_path_cur"), family.hf_key):
        found = path and settings.model_config(str(path))
        if found:
            return AutoConfig.for_model(**found)
    shapes = OmegaConf.to_container(OmegaConf.load(CONFIG / "shapes.yaml"))
    assert isinstance(shapes, dict)
    shape = shapes.get(family.name)
    shape = shapes[shape] if isinstance(shape, str) else shape
    if shape is None:
        raise ValueError(
            f"hf_key={family.hf_key}: no config.json there, and config/shapes.yaml does not have model_family={family.name};"
            " give hf_key=FOLDER with the model's config.json"
        )
    return AutoConfig.for_model(**({"tie_word_embeddings": False} | shape))


def work_of(cfg: DictConfig, config_name: str, family: Family, shards: int) -> Work:
    """How the configuration has the work done, on as many processes."""
    from unlearn.models.plan import FULL, HALF, Work

    weight = HALF if cfg.get("weights") == "bfloat16" else FULL
    gpu = has_gpu(cfg)
    tokens = longest_row(cfg, family)
    retain = "retain" in cfg and cfg.retain is not None and cfg.retain.name != "none"
    checkpointing = cfg.get("gradient_checkpointing")
    return Work(
        rows=cfg.batch_size,
        tokens=tokens,
        labels=round(LABELS * tokens),
        optimizer=settings.OPTIMIZERS[cfg.optim].state if "optim" in cfg else 0,
        weight=weight,
        bf16=gpu if cfg.dtype == "auto" and family.dtype is None and gpu else utils.use_bfloat16(cfg.dtype, family),
        checkpointing=family.gradient_checkpointing if checkpointing is None else checkpointing,
        lora=(cfg.LoRA.r or 0) if "LoRA" in cfg else 0,
        retain=bool(retain),
        reference=bool(retain and cfg.retain.reference),
        shards=shards if cfg.parallel == "fsdp" else 1,
        gpu=gpu,
        checkpoints=checkpoints(cfg, config_name, family),
        merged=config_name == "finetune",
        saved=settings.BYTES[cfg.get("save_dtype", "float32")],
        norms=bool(cfg.geffect.get("norms", cfg.get("norms", True))) if "geffect" in cfg else True,
        offload=bool(cfg.geffect.get("offload", False)) if "geffect" in cfg else False,
    )


def has_gpu(cfg: DictConfig) -> bool:
    """Whether the plan is for GPUs: where `plan_for` does not say, whether there is one here."""
    if cfg.plan_for is not None:
        return bool(cfg.plan_for == "gpu")
    import torch

    return torch.cuda.is_available()


def checkpoints(cfg: DictConfig, config_name: str, family: Family) -> int:
    """How many a run leaves: of the data's rows where they are at hand, else of TOFU's."""
    if config_name != "forget":
        return 1
    rows = {"forget01": 40, "forget05": 200, "forget10": 400}
    file = Path(cfg.forget_data or Path(find_path(family.data_path), f"{cfg.split}.json"))
    steps, _ = utils.count_steps(cfg, len(read_jsonl(file)) if file.exists() else rows[cfg.split])
    number = -(-steps // cfg.save_steps)
    return min(number, cfg.keep_last or number)


def longest_row(cfg: DictConfig, family: Family) -> int:
    """Tokens of the longest row: told from its characters where the data are at hand, else of TOFU."""
    split = cfg.get("split")
    names = [split, utils.RETAIN_OF.get(split)] if "retain" in cfg and cfg.retain and cfg.retain.name != "none" else [split]
    files = [Path(find_path(family.data_path), f"{name}.json") for name in names if name]
    given = [Path(file) for file in (cfg.forget_data, cfg.retain_data) if file]
    lengths = [
        len(str(row.get("question"))) + len(str(row.get("answer"))) + PROMPT
        for file in given or files
        if file.exists()
        for row in read_jsonl(file)
    ]
    return min(cfg.get("max_length") or 500, round(max(lengths) / CHARACTERS) if lengths else LONGEST)
