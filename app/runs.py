"""Run folders: their names, what is noted of a run in its config.yaml, and whether a folder is one's to go on in."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import yaml

from app.checks import check_checkpoint
from app.compose import compose, given
from app.data import FILES, TEXTS, data_of, hash_text, unlearning_sets
from app.families import PROMPT, Family, load_family
from app.fields import flatten, marked
from app.methods import RETAINED
from app.places import IDK, find_path
from app.settings import Common, Finetune, Forget, GEffects, Training
from unlearn.io.files import locked, remove_whole, write_whole
from unlearn.io.weights import TOKENIZER, fingerprint, hash_file, is_checkpoint, lacks_tokenizer, weights_of
from utils import device_name, is_main_process, precision_of, processes, versions

# What a run is made of beside its settings, by its kind and name: {"data": {set: hash}, "models": {key: hash}}.
MadeOf = Mapping[str, Mapping[str, str]]
SECOND = "second"  # the file of the answers that the model itself has generated, SECOND.jsonl, and what begins with it
NOT_NOTED = {"trainable": None, "rule.name": "sum"}  # of runs that were made before there were such settings
NOT_IN_NAMES = {"method.name", "method.run_name", "method.layer", "retain.name", "rule.name"}  # they stand there otherwise

# ---- names ----


def learning_rate(given: float | None, of_family: float, lora: bool) -> float:
    """The given one, else the family's; ten times that for adapters, as in TOFU's code."""
    if given is not None:
        return float(given)
    return float(f"{of_family * 10:g}") if lora else of_family


def finetuned_folder(settings: Finetune, family: Family) -> Path:
    """Where finetune.py, by its settings, puts a model of the family by itself."""
    lr = learning_rate(settings.lr, family.finetune_lr, bool(settings.LoRA.r))
    epochs = family.finetune_epochs if settings.num_epochs is None else settings.num_epochs
    data = split_name(settings, (settings.retain_data, settings.forget_data if settings.split == "full" else None))
    name = f"ft_epoch{epochs:g}_lr{float(lr)}_{family.name}_{data}_wd{float(settings.weight_decay)}"
    return Path(settings.output_dir, name + suffix(settings))


def run_folder(settings: Forget) -> Path:
    """An unlearning run's folder, <output_dir>/<family>/<method>_<lr>_<split>_<epochs>_<weight decay>_<hyper>..."""
    method, retain = settings.method, settings.retain
    names = [method.get("run_name", method.name), *([] if retain.name == "none" or method.name in RETAINED else [retain.name])]
    hyper = "None" if settings.hyper_param is None else f"{settings.hyper_param:g}"
    data = split_name(settings, (settings.forget_data,))
    parts = ["_".join(names), float(settings.lr), data, f"{settings.num_epochs:g}", float(settings.weight_decay), hyper]
    return Path(settings.output_dir, settings.model_family, "_".join(map(str, parts)) + suffix(settings))


def split_name(settings: Training, files: Iterable[str | None]) -> str:
    """What a folder's name calls the data: the split, or the local files that stand in its place."""
    split: str = getattr(settings, "split")  # noqa: B009
    return "+".join(Path(file).stem for file in files if file is not None) or split


def suffix(settings: Training) -> str:
    """`_key=value` for every setting that changes the weights, differs from its default and is not in the name already."""
    own = as_dict(settings)
    groups = [f"{name}={own[name]['name']}" for name in ("retain", "method", "rule") if name in own]
    hyper = [] if own.get("hyper_param") is None else [f"hyper_param={own['hyper_param']}"]
    usual = compose(settings.config, groups + hyper)
    known, here = flatten(usual), flatten(own)
    of_groups = {key for key in here if key.startswith(("method.", "retain.", "rule."))}
    named = marked(type(settings), "named") | of_groups - NOT_IN_NAMES
    known["max_length"] = settings.benchmark.max_length
    changed = {key: here[key] for key in named if key in here and here[key] != known.get(key)}
    if settings.max_length is None:
        del changed["max_length"]
    if settings.benchmark.name not in ("tofu", "local"):
        changed["benchmark"] = settings.benchmark.name
    if here.get("rule.name", "sum") != "sum":
        changed["rule"] = here["rule.name"]
    copies = {f"method.objective.{key.removeprefix('method.')}" for key in changed}  # of a key that is named itself
    copies |= {f"rule.combine.{key.removeprefix('rule.')}" for key in changed}
    return "".join(f"_{key}={in_name(value)}" for key, value in sorted(changed.items()) if key not in copies)


def in_name(value: Any) -> str:
    """A value as a folder's name has it: of a text with other signs than a path's own, or a long one, a hash stands behind."""
    plain = re.sub(r"[^\w. -]", "", str(value))[:60] if isinstance(value, str) else str(value)
    return plain if plain == str(value) else f"{plain}-{hash_text(value)[:8]}"


def original_model(settings: Common, family: Family, key: str = "model_path") -> str:
    """The family's model fine-tuned on all the data: what finetune.py put here, else (for TOFU) `ft_model_path`."""
    of_data = {"benchmark": settings.benchmark, "forget_data": settings.forget_data, "retain_data": settings.retain_data}
    tuning = given("finetune").model_copy(update=of_data | {"model_family": family.name})
    here = finetuned_folder(tuning, family)
    if is_checkpoint(here):
        return str(here)
    data = split_name(tuning, (tuning.retain_data, tuning.forget_data))
    others = sorted(str(folder) for folder in here.parent.glob(f"ft_epoch*_{family.name}_{data}_*") if is_checkpoint(folder))
    if settings.forget_data is None and (published := settings.benchmark.models.get(family.name)) is not None:
        return find_path(published)
    if settings.benchmark.pretrained and not family.from_scratch:
        return find_path(family.hf_key)
    if family.ft_model_path is None or settings.benchmark.name != "tofu" or settings.forget_data is not None:
        raise ValueError(
            f"model_family={family.name}: no fine-tuned model, {here} is not there;"
            + (f" there are {', '.join(others)};" if others else f" run finetune.py model_family={family.name} first, or")
            + f" give {key}=FOLDER"
        )
    return find_path(family.ft_model_path)


# ---- records ----


def as_dict(settings: Common) -> dict[str, Any]:
    """The settings, nested; of the benchmark its name."""
    found = settings.model_dump()
    return found | {"benchmark": settings.benchmark.name} if "benchmark" in found else found


def run_settings(settings: Common) -> dict[str, Any]:
    """What a run is made of, nested: its settings, the number of processes, and the family's prompt."""
    family = load_family(settings.model_family)
    return as_dict(settings) | {"processes": processes(), "family": {key: getattr(family, key) for key in PROMPT}}


def record_of(settings: Common, made_of: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a result came from: all settings, their hash, the data's and models' hashes, and what it ran on, and in what."""
    chosen = run_settings(settings)
    digest = hash_text(json.dumps(chosen, sort_keys=True, default=str))[:12]
    ran = {"versions": versions(), "device": device_name(), "precision": precision(settings)}
    return {"settings": chosen, "hash": digest, **(made_of or {}), **ran}


def precision(settings: Common) -> str:
    """What `dtype` means for the family, on this device."""
    return precision_of(getattr(settings, "dtype"), load_family(settings.model_family).dtype)  # noqa: B009


def open_run(folder: Path, settings: Common, made_of: MadeOf | None = None) -> None:
    """Make the run's folder with its config.yaml: all settings, their hash, what it is made of, and versions."""
    if is_main_process() and not (begun(folder) and (folder / "config.yaml").exists()):
        write_whole(folder / "config.yaml", yaml.safe_dump(record_of(settings, made_of), sort_keys=False))


def begun(folder: Path) -> bool:
    """Whether the folder has more than the note of a run, as one has that ended at its rows."""
    return any(path.name != "config.yaml" for path in folder.iterdir()) if folder.is_dir() else False


def note_data(folder: Path, name: str, digest: str) -> None:
    """Add a hash of data that were made since to what is noted of a folder's run."""
    if is_main_process():
        record = read_record(folder / "config.yaml")
        record["data"] = (record.get("data") or {}) | {name: digest}
        write_whole(folder / "config.yaml", yaml.safe_dump(record, sort_keys=False))


def noted_data(folder: Path, name: str) -> str | None:
    """What is noted of a folder's run of that name's data."""
    file = folder / "config.yaml"
    noted = read_record(file).get("data") if file.exists() else None
    return noted.get(name) if isinstance(noted, dict) else None


def check_run(folder: Path, settings: Common, made_of: MadeOf | None = None, name: str = "config.yaml") -> None:
    """Raises ValueError where the folder holds a run, or results, of other settings, data or models: which ones.

    What an earlier version did not note is taken to be the same; a run that has not begun is none.
    """
    file = folder / name
    if not file.exists() or not begun(folder):
        return
    record = read_record(file)
    if not isinstance(there := record.get("settings"), dict):
        raise ValueError(f"{file}: holds no run's settings; mend it, or remove what it was written beside")
    before, now = flatten(there), flatten(run_settings(settings))
    may_differ = marked(type(settings), "may_differ") | ({"processes"} if not isinstance(settings, Training) else set())
    before = NOT_NOTED | before
    if isinstance(settings, Training) and "precision" in record:
        check_precision(folder, record["precision"], precision(settings))
        may_differ |= {"dtype"}
    differ = [key for key in now if key not in may_differ and before.get(key, now[key]) != now[key]]
    if differ:
        listed = "; ".join(f"{key}={before.get(key)} there, {now[key]} here" for key in differ)
        raise ValueError(f"{folder} holds a run of other settings: {listed}")
    for kind, found in (made_of or {}).items():
        noted = record.get(kind)
        noted = noted if isinstance(noted, dict) else {}
        if changed := [name for name, value in found.items() if noted.get(name, value) != value]:
            listed = ", ".join(place_of(settings, name) for name in changed)
            raise ValueError(f"{folder} holds a run of other {kind}: {listed}: is not what it was; give save_dir=FOLDER")


def check_precision(folder: Path, there: str, here: str) -> None:
    """Raises ValueError where a run was begun in another precision, as dtype=auto is another on another device."""
    if there != here:
        way = f"dtype={there} save_dir={folder} goes on as it was"
        raise ValueError(f"{folder} holds a run that was begun in {there}, and this would be in {here}: {way}")


def place_of(settings: Common, name: str) -> str:
    """A key of the settings with its value; a set with its file."""
    if (generated := generated_files(settings).get(name)) is not None:
        return str(generated)
    value = getattr(settings, name, None)
    return f"{name}={value}" if isinstance(value, str) else data_of(settings).place(name)


def hash_models(settings: Common, *keys: str) -> dict[str, str]:
    """A hash of each key's model; of the family's tokenizer too, where a model has none of its own."""
    paths = {key: str(getattr(settings, key)) for key in keys}
    found = {key: weights_of(path) for key, path in paths.items()}
    if any(map(lacks_tokenizer, paths.values())) and Path(str(settings.hf_key)).is_dir():
        found["hf_key"] = fingerprint(Path(str(settings.hf_key)), TOKENIZER)
    return found


def original_of(settings: Forget | GEffects, family: Family) -> str:
    """The model before unlearning: `model_path`, else the family's fine-tuned one. Raises ValueError where it is not there."""
    path = original_model(settings, family) if settings.model_path is None else find_path(settings.model_path)
    check_checkpoint("model_path", path)
    return path


def made_of(settings: Forget | GEffects) -> MadeOf:
    """What tells an unlearning run's rows and its original model from others."""
    data = data_of(settings)
    found = data.hashes(unlearning_sets(data, settings.split), texts_of(settings.method.second, settings.retain.second))
    if settings.retain_holdout is None and (first := data.benchmark.held_out.first_of) is not None:
        found |= data.hashes([first], texts=())  # its number of rows is what is held out
    if "idk" in (settings.method.answers, settings.method.second, settings.retain.second):
        found[IDK.stem] = hash_file(IDK)
    found |= {name: hash_file(file) for name, file in generated_files(settings).items()}
    return {"data": found, "models": hash_models(settings, "model_path")}


def generated_files(settings: Common) -> dict[str, Path]:
    """The files of second answers that the model has generated for a run, or for a measurement, by what they are noted as."""
    own = Path(str(settings.save_dir))
    files = []
    if isinstance(settings, GEffects):
        run = run_of(settings.model_path_cur)
        files = [*sorted((own / "geffect").glob(f"{SECOND}-*.jsonl")), *([] if run is None else [run / f"{SECOND}.jsonl"])]
    elif isinstance(settings, Forget):
        files = [own / f"{SECOND}.jsonl"]
    return {file.stem: file for file in files if file.is_file() and noted_data(file.parent, file.stem) is not None}


def checkpoints(settings: Forget, steps: int) -> set[Path]:
    """The folders that the run leaves."""
    saved = [*range(settings.save_steps, steps, settings.save_steps), steps]
    return {Path(str(settings.save_dir), f"checkpoint-{step}") for step in saved[-(settings.keep_last or 0) :]}


def is_done(folder: Path, steps: int) -> bool:
    """Whether the last checkpoint is there and nothing is left to do or to go on from."""
    written = (folder / "logs" / "losses.json").exists() or not (folder / "resume").exists()
    return is_checkpoint(folder / f"checkpoint-{steps}") and written


def not_there(settings: Forget, steps: int) -> str:
    """What to say of the run's checkpoints that were removed or harmed since, or that an earlier start did not write."""
    missing = sorted(int(path.name.split("-")[1]) for path in checkpoints(settings, steps) if not is_checkpoint(path))
    return f"; not there, or not whole: checkpoint-{', '.join(map(str, missing))}" if missing else ""


def texts_of(*second: str | None) -> tuple[str, ...]:
    """What an unlearning run reads of its rows, `second` being the columns of second answers, where they are columns."""
    return (*TEXTS, *dict.fromkeys(one for one in second if one not in (None, "idk")))


def check_trained_on(run: Path | None, settings: Common, split: str) -> None:
    """Raises ValueError where the files that a run was trained on are other ones now, where results go into its folder."""
    if run is None or settings.save_dir not in (None, str(run)):
        return
    saved, noted = saved_settings(run), read_record(run / "config.yaml").get("data") or {}
    same = all(saved.get(key) == getattr(settings, key) for key in ("data_path", *FILES)) and saved.get("split") == split
    if same:
        data = data_of(settings)
        now = data.hashes(
            unlearning_sets(data, split), texts_of(*(saved.get(group, {}).get("second") for group in ("method", "retain")))
        )
        if changed := [data.place(name) for name, value in now.items() if noted.get(name, value) != value]:
            raise ValueError(f"{run} was trained on other data: {', '.join(changed)}: is not what it was; give save_dir=FOLDER")


def saved_settings(folder: Path) -> dict[str, Any]:
    """The settings in a run folder's config.yaml; none where there is none. Raises ValueError where it is not YAML."""
    file = folder / "config.yaml"
    there = read_record(file).get("settings") if file.exists() else None
    return there if isinstance(there, dict) else {}


def read_record(file: Path) -> dict[str, Any]:
    """What `record_of` gave, from a file; nothing where it is of something else. Raises ValueError where it is not YAML."""
    try:
        record = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not YAML ({error})") from error
    return record if isinstance(record, dict) else {}


def run_of(path: str | None) -> Path | None:
    """The folder of the unlearning run that a checkpoint is of, or the folder itself; None where it is of none."""
    folders = [] if path is None else [Path(path), Path(path).parent]
    return next((folder for folder in folders if "method" in saved_settings(folder)), None)


def alone(folder: Path) -> AbstractContextManager[None]:
    """The folder for this run alone, whatever its number of processes. Raises ValueError where another run has it."""
    return locked(folder) if is_main_process() else nullcontext()


def close_run(folder: Path) -> None:
    """Drop what a killed run would have gone on from: all that the run writes is written."""
    if is_main_process():
        remove_whole(folder / "resume")
