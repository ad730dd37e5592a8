"""The G-effects of an unlearning objective, at a run's original model and at its checkpoints: by layer, instance and token.

    python compute_geffect.py model_path_cur=icml/tiny/npo_kl_0.0008_forget10_5_0.0_None
    python compute_geffect.py model_family=phi split=forget05 method=npo model_path=ORIGINAL model_path_cur=CKPT save_dir=RUN

Tables and figures go to <save_dir>/geffect; standard output has, for each step, both totals and those of five groups of
layers. Every key stands in config/forget_ge.yaml and config/common.yaml. `basher2.py` is the short way.
"""

from __future__ import annotations

from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf, open_dict

import planning
import settings
import utils
from app.families import Family
from app.places import find_path
from forget import build_loss, made_of, original_of, reference_of
from unlearn.io.rows import read_jsonl, read_object, write_json
from unlearn.io.weights import is_of, run_checkpoints, step_of, weights_of

if TYPE_CHECKING:
    import pandas as pd

    from unlearn.geffect.meter import Meter
    from unlearn.geffect.tables import TableFolder

# What is not given is as the checkpoint's run has it.
INHERITED = (
    *("model_family", "hf_key", "split", "data_path", "forget_data", "retain_data", "retain_holdout"),
    *("seed", "max_length", "loss_on_answer_tag", "model_path", "gradient_checkpointing"),
)
# What may differ when a folder is added to.
MAY_DIFFER = {
    *("model_path_cur", "step", "tokens", "positions", "sweep"),
    *("batch_size", "processes", "parallel", "gradient_checkpointing"),
}

Sweep = dict[tuple[str, float | None], DictConfig]
Steps = list[tuple[int, str]]


# ---- what to measure, and where ----


def inherit(cfg: DictConfig, run: Path | None) -> None:
    """Fill in what is not given: as the run has it, else as forget.yaml has it."""
    saved = {} if run is None else utils.saved_settings(run)
    default = utils.compose_config("forget")
    with open_dict(cfg):
        for key in INHERITED:
            if OmegaConf.is_missing(cfg, key):
                if key in saved:
                    cfg[key] = saved[key]
            elif cfg[key] is None:
                cfg[key] = saved.get(key, default[key])
        for key, value in cfg.LoRA.items():
            if value is None:
                cfg.LoRA[key] = saved.get("LoRA", default.LoRA)[key]
        if "method" not in cfg and not saved:
            raise ValueError(f"method is missing; there are {', '.join(settings.methods())}")
        if "method" not in cfg:
            cfg.method, cfg.retain = saved["method"], saved["retain"] if "retain" not in cfg else cfg.retain
            cfg.hyper_param = saved["hyper_param"] if cfg.hyper_param is None else cfg.hyper_param
        if "retain" not in cfg:
            cfg.retain = default.retain


def find_steps(cfg: DictConfig) -> tuple[Steps, Steps]:
    """The steps to measure, and the one that comes after the last of them, if there is one.

    Raises:
        ValueError: model_path_cur is no checkpoint nor a run's folder, or its step is not known.
    """
    if cfg.model_path_cur is None:
        return [(0, cfg.model_path)], []
    here = Path(cfg.model_path_cur)
    if inside := run_checkpoints(here):
        return [(0, cfg.model_path), *((step, str(path)) for step, path in inside)], []
    step = step_of(here) if cfg.step is None else cfg.step
    if step is None:
        raise ValueError(f"model_path_cur={here}: its folder is not called checkpoint-<step>; give step=N")
    later = [(s, str(path)) for s, path in run_checkpoints(here.parent) if s > step and step_of(here) is not None]
    return [(step, str(here))], later[:1]


def parse_sweep(cfg: DictConfig) -> Sweep:
    """The objectives of `sweep=[METHOD:HYPER,...]` by method and hyper-parameter, each as its YAML has it.

    Raises:
        ValueError: an entry is no method, or what stands behind its colon no number.
    """
    found: Sweep = {}
    for entry in cfg.sweep or []:
        name, colon, number = str(entry).partition(":")
        try:
            hyper = float(number) if colon else None
        except ValueError:
            raise ValueError(f"sweep={entry}: {number!r} is no number; entries are METHOD or METHOD:HYPER") from None
        overrides = [*settings.parse_method(name), *([] if hyper is None else [f"hyper_param={hyper:g}"])]
        one = utils.compose_config("forget", [f"model_family={cfg.model_family}", f"seed={cfg.seed}", *overrides])
        if "layer" in one.method:
            settings.check_layer(cfg.model_path, one.method.layer)
        found[name, hyper] = one
    return found


def prepare(cfg: DictConfig) -> Family:
    """Fill in what the run and the family decide, and refuse what cannot work before anything is loaded."""
    if cfg.model_path_cur is not None:
        cfg.model_path_cur = find_path(cfg.model_path_cur)
        if not run_checkpoints(Path(cfg.model_path_cur)):
            settings.check_checkpoint("model_path_cur", cfg.model_path_cur)
    run = utils.run_of(cfg.model_path_cur)
    inherit(cfg, run)
    family = settings.prepare(cfg, "forget_ge")
    settings.check_forget_data(cfg)
    cfg.model_path = original_of(cfg, family)
    if "layer" in cfg.method:
        settings.check_layer(cfg.model_path, cfg.method.layer)
    if cfg.dtype == "float64" and cfg.weights != "float32":
        raise ValueError(f"weights={cfg.weights}: dtype=float64 has its weights in float64")
    if cfg.positions and not cfg.instances:
        raise ValueError("positions=true: by position only with instances=true")
    if cfg.parallel == "fsdp" and (cfg.tokens or cfg.sweep):
        key = f"tokens={cfg.tokens}" if cfg.tokens else f"sweep={list(cfg.sweep)}"
        raise ValueError(f"{key}: needs whole weights on every process; parallel=ddp has them, parallel=fsdp has not")
    if cfg.parallel == "fsdp" and cfg.instances and not cfg.norms:
        raise ValueError("norms=False: parallel=fsdp forms the gradient anyway; norms=true, or instances=false")
    steps, _ = find_steps(cfg)
    parse_sweep(cfg)
    if cfg.save_dir is None and run is None:
        raise ValueError(f"save_dir is missing: {cfg.model_path_cur or cfg.model_path} is of no run; give save_dir=FOLDER")
    cfg.save_dir = str(run) if cfg.save_dir is None else cfg.save_dir
    settings.check_folder(Path(cfg.save_dir))
    utils.check_trained_on(run, cfg)
    folder = Path(cfg.save_dir, "geffect")
    if (folder / "steps.csv").exists():
        if not (folder / "config.yaml").exists():
            raise ValueError(f"{folder} was measured while unlearning (geffect.every); give save_dir=FOLDER")
        utils.check_run(folder, cfg, MAY_DIFFER, made_of=made_of(cfg))
    return family


# ---- the work ----


def run(cfg: DictConfig) -> None:
    if cfg.get("plan"):
        inherit(cfg, utils.run_of(cfg.model_path_cur))
        return planning.tell(cfg, "forget_ge")
    family = prepare(cfg)
    with utils.alone(Path(cfg.save_dir, "geffect")):
        measure(cfg, family)


def measure(cfg: DictConfig, family: Family) -> None:
    from unlearn.geffect.tables import TableFolder, predictions
    from unlearn.reporting.figures import draw

    folder = Path(cfg.save_dir, "geffect")
    utils.device()  # starts the process group
    store = TableFolder(folder)
    if not store.tables and utils.is_main_process():
        for left in ("config.yaml", "weights.json"):  # by a start that failed before it measured anything
            (folder / left).unlink(missing_ok=True)
    utils.open_run(folder, cfg, made_of(cfg))
    steps, following = find_steps(cfg)
    names = ["layers", *(name for name in ("instances", "tokens", "positions") if cfg[name])]
    check_weights(folder, steps, following)
    todo = [step for step, _ in steps if not store.has(step, names, list(parse_sweep(cfg)))]
    if todo:
        measure_steps(cfg, family, store, steps, following, todo)
    else:
        for step, _ in steps:
            print_groups(store, step)
    foretold = predictions(store.tables["steps"], order_of(cfg), learning_rates(utils.run_of(cfg.model_path_cur)))
    if len(foretold):
        store.replace("prediction", foretold)
    if utils.is_main_process():
        draw(folder)
    utils.say(f"{len(steps)} steps, {len(todo)} of them measured now; tables and figures are in {folder}")


def check_weights(folder: Path, steps: Steps, following: Steps) -> None:
    """Note which weights each step is of. Raises ValueError where the tables of one of `steps` are of others."""
    file = folder / "weights.json"
    noted = read_object(file) if file.exists() else {}
    if other := [str(step) for step, path in steps if not is_of(path, noted.get(str(step)))]:
        raise ValueError(
            f"{folder} has the G-effects of other weights at step {', '.join(other)}; remove it, or give save_dir=FOLDER"
        )
    if utils.is_main_process():
        write_json(file, noted | {str(step): weights_of(path) for step, path in [*steps, *following] if str(step) not in noted})


def measure_steps(cfg: DictConfig, family: Family, store: TableFolder, steps: Steps, following: Steps, todo: list[int]) -> None:
    """Measure the steps that are to do, each with the update to the next, and print all."""
    from unlearn.geffect.call import with_update
    from unlearn.models.checkpoints import load_weights

    meter = build_meter(cfg, family)
    loaded = cfg.model_path
    afterwards = [path for _, path in [*steps, *following][1:]]
    for (step, path), then in zip_longest(steps, afterwards):
        if step in todo:
            utils.say(f"step {step}: {path}")
            if loaded != path:
                load_weights(meter.model, path)
            tables, loaded = meter.measure(), path
            if then is not None:
                meter.start_update()
                load_weights(meter.model, then)
                tables, loaded = with_update(tables, meter), then
            store.put(step, tables)
        print_groups(store, step)


def build_meter(cfg: DictConfig, family: Family) -> Meter:
    """The meter of the configuration's objective and of its sweep's, on the original model."""
    import torch

    import dataloader
    from unlearn.geffect.meter import RISKS, Meter
    from unlearn.geffect.target import Target, Wanted
    from unlearn.models.adapters import LoRA, add_lora
    from unlearn.models.checkpoints import load, pad_id
    from unlearn.models.evaluating import enable_gradient_checkpointing
    from unlearn.models.sharding import shard
    from unlearn.passes.forcing import Pass, token_nlls

    data, training = dataloader.unlearning_data(cfg), dataloader.unlearning_data(trained_on(cfg))
    if len(data.held_out) > len(training.held_out):
        raise ValueError(f"retain_holdout={cfg.retain_holdout}: the run held out {len(training.held_out)} rows only")
    bf16 = cfg.dtype not in ("float64", "float32") and utils.use_bfloat16(cfg.dtype, family)
    kind = torch.float64 if cfg.dtype == "float64" else getattr(torch, cfg.weights)
    tokenizer, model = load(cfg.model_path, family.hf_key, utils.model_device(cfg), dtype=kind)
    if cfg.LoRA.r:
        add_lora(model, LoRA(**cfg.LoRA), cfg.seed, cfg.model_path)
    objectives = [cfg, *parse_sweep(cfg).values()]
    reference = reference_of(model) if any(one.retain.reference for one in objectives) else None
    if cfg.parallel == "fsdp":
        shard(model, bf16)
        if reference is not None and reference is not model:
            shard(reference, bf16)
    tokenize = partial(dataloader.tokenize, tokenizer=tokenizer, family=family, max_length=cfg.max_length, model=model)
    risks = dict(zip(RISKS, (tokenize(data.forget), tokenize(data.held_out)), strict=True))
    rows = {"forget": risks["unlearn"], "idk": []}
    if any(one.method.answers == "idk" for one in objectives):
        rows["idk"] = tokenize(dataloader.idk_rows(data.forget, cfg.seed))
    if any(one.method.reference for one in objectives):
        how = Pass(model, pad_id(tokenizer), tokenizer.eos_token_id, bf16, cfg.batch_size)
        nlls = token_nlls(how, rows["forget"], what="reference")
        rows["forget"] = [row | {"ref_nll": nll} for row, nll in zip(rows["forget"], nlls, strict=True)]
    beside = tokenize(dataloader.beside_rows(training.retain, cfg.geffect.retain_rows, len(data.forget), cfg.seed))
    targets = [
        Target(build_loss(one, model, reference), rows[one.method.answers], beside if one.retain.term else ())
        for one in objectives
    ]
    if cfg.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    return Meter(
        model=model,
        target=targets[0],
        risks=risks,
        pad=pad_id(tokenizer),
        wanted=Wanted(cfg.instances, cfg.norms, cfg.positions, cfg.tokens),
        sweep=dict(zip(parse_sweep(cfg), targets[1:], strict=True)),
        bf16=bf16,
        batch_size=cfg.batch_size,
        offload=cfg.geffect.offload,
        decode=lambda token: str(tokenizer.decode([token])),
    )


def order_of(cfg: DictConfig) -> list[int]:
    """The steps of the run that is measured, as far as its checkpoints are there, 0 first."""
    folders = [] if cfg.model_path_cur is None else [Path(cfg.model_path_cur), Path(cfg.model_path_cur).parent]
    there = next((found for folder in folders if (found := run_checkpoints(folder))), [])
    return [0, *(step for step, _ in there)]


def trained_on(cfg: DictConfig) -> DictConfig:
    """The configuration with as many retain rows held out as the run itself held out: the others it was trained on."""
    run = utils.run_of(cfg.model_path_cur)
    if run is None:
        return cfg
    saved = utils.saved_settings(run)
    same = {key: cfg[key] for key in ("data_path", "forget_data", "retain_data", "split")}
    return OmegaConf.create(same | {"retain_holdout": saved["retain_holdout"]})


def learning_rates(run: Path | None) -> dict[int, float]:
    """Each training step's, from the run's log."""
    file = None if run is None else run / "logs" / "train.jsonl"
    if file is None or not file.exists() or not file.stat().st_size:
        return {}
    try:
        return {line["step"]: line["learning_rate"] for line in read_jsonl(file)}
    except KeyError as error:
        raise ValueError(f"{file}: a line lacks {error}") from error


def print_groups(store: TableFolder, step: int) -> None:
    """`ge u | TOTAL {group: value, ...}` and `ge r | ...`: the first, middle and last third of the layers, and around them."""
    if utils.is_main_process():
        table = store.tables["layers"]
        for risk in ("unlearn", "retain"):
            groups = by_group(table[(table["step"] == step) & (table["risk"] == risk)])
            print(f"ge {risk[0]} | {sum(groups.values())} {groups}", flush=True)


def by_group(layers: pd.DataFrame) -> dict[str, float]:
    """A step's and a risk's rows of the table `layers` in five sums: embed, module1-3, lm (final norm and head)."""
    depth = 1 + max((int(layer) for layer in layers["layer"] if layer.isdecimal()), default=0)
    groups = dict.fromkeys(("embed", "module1", "module2", "module3", "lm"), 0.0)
    for layer, value in zip(layers["layer"], layers["geffect"], strict=True):
        name = f"module{1 + int(layer) * 3 // depth}" if layer.isdecimal() else "embed" if layer == "embed" else "lm"
        groups[name] += float(value)
    return groups


if __name__ == "__main__":
    settings.cli(run, "forget_ge")
