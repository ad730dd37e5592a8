"""The G-effects of an unlearning objective, at a run's original model and at its checkpoints: by layer, instance and token.

    python compute_geffect.py model_path_cur=icml/tiny/npo_kl_0.0008_forget10_5_0.0_None
    python compute_geffect.py model_family=phi split=forget05 method=npo model_path=ORIGINAL model_path_cur=CKPT save_dir=RUN

Tables and figures go to <save_dir>/geffect; standard output has, for each step, both totals and those of five groups of
layers. `basher2.py` is the short way.
"""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from app import door, measuring, planning
from app.checks import check_checkpoint, check_folder, check_gradient, check_layer, check_trainable
from app.data import check_unlearning_data, data_of
from app.families import Family
from app.filling import of_run, with_family
from app.measuring import Steps, build_meter, check_wanted, check_weights, find_steps, learning_rates, order_of, parse_sweep
from app.methods import layer_of
from app.places import find_path
from app.runs import alone, check_run, check_trained_on, made_of, open_run, original_of, run_of
from app.settings import GEffects
from unlearn.io.weights import run_checkpoints
from utils import device, is_main_process, say

if TYPE_CHECKING:
    import pandas as pd

    from unlearn.geffect.tables import TableFolder


def prepare(settings: GEffects) -> tuple[GEffects, Family]:
    """The settings with what the run and the family decide; refuses what cannot work before anything is loaded."""
    if settings.model_path_cur is not None:
        settings = settings.model_copy(update={"model_path_cur": find_path(settings.model_path_cur)})
        if not run_checkpoints(Path(str(settings.model_path_cur))):
            check_checkpoint("model_path_cur", str(settings.model_path_cur))
    run = run_of(settings.model_path_cur)
    settings, family = with_family(of_run(settings, run))
    check_unlearning_data(data_of(settings), settings.split, settings.retain_holdout)
    settings = settings.model_copy(update={"model_path": original_of(settings, family)})
    check_gradient(settings.method, "method", "give method=METHOD")
    check_layer(settings.model_path, layer_of(settings.method, settings.retain))
    check_trainable(settings.trainable, settings.model_path, settings.LoRA)
    check_wanted(settings)
    find_steps(settings)
    parse_sweep(settings, say)
    if settings.save_dir is None and run is None:
        raise ValueError(
            f"save_dir is missing: {settings.model_path_cur or settings.model_path} is of no run; give save_dir=FOLDER"
        )
    check_trained_on(run, settings, settings.split)
    settings = settings.model_copy(update={"save_dir": settings.save_dir or str(run)})
    check_folder(Path(str(settings.save_dir)))
    folder = Path(str(settings.save_dir), "geffect")
    if (folder / "steps.csv").exists():
        if not (folder / "config.yaml").exists():
            raise ValueError(f"{folder} was measured while unlearning (geffect.every); give save_dir=FOLDER")
        check_run(folder, settings, made_of(settings))
    return settings, family


def run(settings: GEffects) -> Path | None:
    if settings.plan:
        planning.tell(of_run(settings, run_of(settings.model_path_cur)))
        return None
    settings, family = prepare(settings)
    folder = Path(str(settings.save_dir), "geffect")
    with alone(folder):
        measure(settings, family, folder)
    return folder.parent


def measure(settings: GEffects, family: Family, folder: Path) -> None:
    from unlearn.geffect.tables import TableFolder, predictions
    from unlearn.reporting.figures import draw

    device()  # starts the process group
    store = TableFolder(folder)
    if not store.tables and is_main_process():
        for left in ("config.yaml", "weights.json"):  # by a start that failed before it measured anything
            (folder / left).unlink(missing_ok=True)
    open_run(folder, settings, made_of(settings))
    steps, following = find_steps(settings)
    names = ["layers", *(name for name in ("instances", "tokens", "positions") if getattr(settings, name))]
    check_weights(folder, steps, following)
    sweep = list(parse_sweep(settings))
    todo = [step for step, _ in steps if not store.has(step, names, sweep, settings.sweep_norms)]
    if todo:
        measure_steps(settings, family, store, steps, following, todo)
    else:
        for step, _ in steps:
            print_groups(store, step)
    rates = learning_rates(run_of(settings.model_path_cur))
    if len(foretold := predictions(store.tables["steps"], order_of(settings), rates)):
        store.replace("prediction", foretold)
    if is_main_process():
        draw(folder)
    say(f"{len(steps)} steps, {len(todo)} of them measured now; tables and figures are in {folder}")


def measure_steps(
    settings: GEffects, family: Family, store: TableFolder, steps: Steps, following: Steps, todo: list[int]
) -> None:
    """Measure the steps that are to do, each with the update to the next, and print all."""
    from unlearn.geffect.call import with_update
    from unlearn.models import load_weights

    meter = build_meter(settings, family)
    loaded, duals = settings.model_path, measuring.logged_duals(run_of(settings.model_path_cur))
    afterwards = [path for _, path in [*steps, *following][1:]]
    for (step, path), then in zip_longest(steps, afterwards):
        if step in todo:
            say(f"step {step}: {path}")
            if loaded != path:
                load_weights(meter.model, path)
            measuring.at_step(meter, step, duals)
            tables, loaded = meter.measure(), path
            if then is not None:
                meter.start_update()
                load_weights(meter.model, then)
                tables, loaded = with_update(tables, meter), then
            store.put(step, tables)
        print_groups(store, step)


def print_groups(store: TableFolder, step: int) -> None:
    """`ge u | TOTAL {group: value, ...}` and `ge r | ...`: the first, middle and last third of the layers, and around them."""
    if is_main_process():
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
    door.cli(run, GEffects)
