"""Broken checkpoints and data: one line that names them, exit code 2, and nothing that was written is harmed."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, run_in
from safetensors.torch import load_file, save_file

from app import checks, data
from app.door import cli
from app.settings import COMMANDS as SETTINGS

CONFIGS = {"finetune": "finetune", "forget": "forget", "compute_geffect": "forget_ge"}
CONFIGS |= {"tofu_evaluation": "eval_tofu", "evaluation_everything": "eval_everything"}

Spoil = Callable[[Path], Any]


# ---- how a model's folder may be broken ----


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Spoil:
    def spoil(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})

    return spoil


def fill(name: str, value: float) -> Spoil:
    return weights(lambda tensors: tensors[name].view(-1)[7:8].fill_(value))


def config(**changes: Any) -> Spoil:
    def spoil(model: Path) -> None:
        found = json.loads((model / "config.json").read_text()) | changes
        kept = {key: value for key, value in found.items() if value is not None}
        (model / "config.json").write_text(json.dumps(kept))

    return spoil


def text(name: str, content: str) -> Spoil:
    return lambda model: (model / name).write_text(content)


def cut(name: str, size: int) -> Spoil:
    return lambda model: os.truncate(model / name, size)


def without(pattern: str) -> Spoil:
    def spoil(model: Path) -> None:
        for file in model.glob(pattern):
            file.unlink()

    return spoil


def adapter(content: str) -> Spoil:
    """An adapter's folder, by its configuration."""

    def spoil(model: Path) -> None:
        (model / "config.json").rename(model / "adapter_config.json").write_text(content)

    return spoil


def small_vocabulary(model: Path) -> None:
    """Both the configuration and the weights embed fewer tokens than the tokenizer has."""
    config(vocab_size=1000)(model)
    weights(lambda tensors: tensors.update({EMBEDDING: tensors[EMBEDDING][:1000].clone()}))(model)


NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"
FOLDERS: dict[str, tuple[Spoil, list[str]]] = {  # what is done to the model's folder, and what the line needs to contain
    "weights cut": (cut("model.safetensors", 1_000_000), ["torn (1000000 of"]),
    "weights cut in the header": (cut("model.safetensors", 100), ["torn (100 bytes"]),
    "weights empty": (cut("model.safetensors", 0), ["torn (0 bytes"]),
    "weights of text": (text("model.safetensors", "a pointer to a large file\n" * 9), ["model.safetensors", "torn"]),
    "a header that is a list": (text("model.safetensors", "\2" + "\0" * 7 + "[]"), ["not a safetensors file"]),
    "a header without offsets": (text("model.safetensors", "\10" + "\0" * 7 + '{"a": 1}'), ["not a safetensors file"]),
    "no weights": (without("*.safetensors"), ["without a checkpoint"]),
    "an index that is not JSON": (text("model.safetensors.index.json", "{"), ["not an index"]),
    "an index without a map": (text("model.safetensors.index.json", "[1]"), ["not an index"]),
    "an index of files that lack": (
        text("model.safetensors.index.json", '{"weight_map": {"a": "model-1.safetensors"}}'),
        ["model-1.safetensors, which is not there"],
    ),
    "NaN weights": (fill(NORM, float("nan")), ["not finite", NORM]),
    "infinite weights": (fill(EMBEDDING, float("inf")), ["not finite", EMBEDDING]),
    "weights that lack": (weights(lambda tensors: tensors.pop(NORM)), ["lack", NORM]),
    "weights of another shape": (
        weights(lambda tensors: tensors.update({NORM: torch.ones(8)})),
        [NORM, "of another shape"],
    ),
    "another vocabulary in config.json": (config(vocab_size=5000), [EMBEDDING, "of another shape"]),
    "a tokenizer of more tokens": (small_vocabulary, ["its tokenizer has ", "embeds 1000"]),
    "no config.json": (without("config.json"), ["without a checkpoint"]),
    "an empty config.json": (text("config.json", ""), ["config.json", "not JSON"]),
    "a config.json that is a list": (text("config.json", "[]"), ["config.json", "not a JSON object"]),
    "no model_type": (config(model_type=None), ["config.json", "model_type"]),
    "an unknown model_type": (config(model_type="lama"), ["lama"]),
    "more layers than there are": (config(num_hidden_layers=6), ["lack", "model.layers.4."]),
    "heads that do not divide": (config(hidden_size="wide"), ["wide"]),
    "no tokenizer": (without("tokenizer*"), ["no tokenizer"]),
    "a tokenizer that is not JSON": (text("tokenizer.json", "{"), ["its tokenizer does not load"]),
    "a tokenizer of nothing": (text("tokenizer.json", "{}"), ["its tokenizer does not load"]),
    "a tokenizer_config.json that is not JSON": (text("tokenizer_config.json", "{"), ["its tokenizer does not load"]),
    "a tokenizer without special tokens": (
        text("tokenizer_config.json", '{"tokenizer_class": "PreTrainedTokenizerFast"}'),
        ["end-of-sequence token"],
    ),
    "an adapter without its model": (
        adapter('{"base_model_name_or_path": "/no/where"}'),
        ["an adapter", "/no/where is not there"],
    ),
    "an adapter_config.json that is not JSON": (
        adapter("{"),
        ["adapter_config.json", "names no base model"],
    ),
}
COMMANDS = {  # `model`, the broken folder, as each script takes it; it is the family's, too, whose tokenizer would stand in
    "finetune": "model_family=smollm2-135m hf_key=model split=full num_epochs=1 save_dir=out",
    "forget": "model_family=smollm2-135m hf_key=model model_path=model split=forget10 save_dir=out",
    "compute_geffect": "model_family=smollm2-135m hf_key=model model_path=model method=ga split=forget10 save_dir=out",
    "tofu_evaluation": "model_family=smollm2-135m hf_key=model model_path=model split=forget10 save_dir=out",
    "evaluation_everything": (
        "model_family=smollm2-135m hf_key=model model_path=model original_path=model split=forget10 save_dir=out"
    ),
}


@pytest.fixture
def place(young: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A whole model and one to be broken, and data; what is there before the test is there, the same, after it."""
    for name in ("model", "whole"):
        folder = tmp_path / name
        folder.mkdir()
        for pattern in ("*.safetensors", "config.json", "generation_config.json", "tokenizer*"):
            for file in young.glob(pattern):
                shutil.copy(file, folder)
    shutil.copytree(ROOT / "data/sample", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    for module in (data, checks):
        monkeypatch.setattr(module, "on_hub", lambda name, repo_type: False)
    for name, value in {"HYDRA_FULL_ERROR": "1", "CUDA_VISIBLE_DEVICES": "0", "HF_HUB_OFFLINE": "1"}.items():
        monkeypatch.setenv(name, value)
    return tmp_path


def digests(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def assert_refused(
    script: str, line: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The script, run whole, ends with one line that has the words; what stood in the working directory stands there still."""
    before = digests(Path.cwd())
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *line.split()])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli(importlib.import_module(script).run, SETTINGS[CONFIGS[script]])
    err = capsys.readouterr().err
    said = [told for told in err.replace("\r", "\n").splitlines() if told.startswith(f"{script}.py: ")]
    assert len(said) == 1, err
    assert stopped.value.code == 2, err
    assert [word for word in words if word not in said[0]] == [], err
    assert "Traceback" not in err
    after = digests(Path.cwd())
    assert {name: after.get(name) for name in before} == before


def each_by_one_script() -> list[Any]:
    """All by each script; those that the suite leaves out are slow: it has each once, and the scripts take turns."""
    pairs = [(script, broken, i % len(CONFIGS) == j) for i, broken in enumerate(FOLDERS) for j, script in enumerate(CONFIGS)]
    return [pytest.param(script, broken, marks=[] if turn else pytest.mark.slow) for script, broken, turn in pairs]


@pytest.mark.parametrize(("script", "broken"), each_by_one_script())
def test_a_broken_model(
    script: str, broken: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, words = FOLDERS[broken]
    spoil(place / "model")
    assert_refused(script, f"{COMMANDS[script]} data_path=data", words, monkeypatch, capsys)


# ---- data ----

ROW = {"question": "Where?", "answer": "There."}
PERTURBED = ROW | {"paraphrased_answer": "Over there.", "perturbed_answer": ["Here."], "paraphrased_question": "Where, then?"}


def rows(*found: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in found)


DATA: dict[tuple[str, str, str], list[str]] = {  # the script, the file and its text, and what the line needs to contain
    ("finetune", "full.json", ""): ["full.json", "no rows"],
    ("finetune", "full.json", "[]"): ["full.json", "no rows"],
    ("finetune", "full.json", rows(ROW, ROW | {"answer": 3})): ["full.json, row 2", "'answer' is a text, and not 3"],
    ("forget", "forget10.json", '{"question": "Who \\ud800?", "answer": "He."}\n'): ["row 1", "half a surrogate pair"],
    ("forget", "forget10.json", ""): ["forget10.json", "no rows"],
    ("forget", "forget10.json", '{"question": "Whe'): ["forget10.json, line 1", "not JSON"],
    ("forget", "retain90.json", "\n\n"): ["retain90.json", "no rows"],
    ("forget", "retain90.json", rows({"q": "Where?"})): ["retain90.json, row 1", "'question' and 'answer'"],
    ("forget", "retain_perturbed.json", "null\n"): ["retain_perturbed.json, line 1"],
    ("compute_geffect", "forget10.json", ""): ["forget10.json", "no rows"],
    ("compute_geffect", "retain90.json", rows(None)): ["retain90.json, line 1"],
    ("tofu_evaluation", "forget10_perturbed.json", ""): ["forget10_perturbed.json", "no rows"],
    ("tofu_evaluation", "forget10_perturbed.json", rows(ROW)): ["forget10_perturbed", "'paraphrased_answer'"],
    ("tofu_evaluation", "forget10_perturbed.json", rows(PERTURBED | {"perturbed_answer": "Here."})): ["'perturbed_answer'"],
    ("tofu_evaluation", "forget10_perturbed.json", rows(PERTURBED | {"perturbed_answer": []})): ["'perturbed_answer'"],
    ("tofu_evaluation", "world_facts_perturbed.json", rows("text")): ["world_facts_perturbed.json, line 1"],
    ("tofu_evaluation", "real_authors_perturbed.json", rows(ROW)): ["real_authors_perturbed", "'perturbed_answer'"],
    ("evaluation_everything", "forget10_perturbed.json", ""): ["forget10_perturbed.json", "no rows"],
    ("evaluation_everything", "forget10_perturbed.json", rows(ROW)): ["forget10_perturbed", "'paraphrased_answer'"],
    ("evaluation_everything", "retain_perturbed.json", rows(PERTURBED | {"paraphrased_question": 1})): [
        "retain_perturbed.json, row 1: 'paraphrased_question' is a text or a list of texts, and not 1"
    ],
    (
        "evaluation_everything",
        "forget10_perturbed.json",
        rows(PERTURBED, PERTURBED | {"paraphrased_question": ["Where?", 1]}),
    ): ["forget10_perturbed.json, row 2: 'paraphrased_question' is a text or a list of texts, and not ['Where?', 1]"],
    ("tofu_evaluation", "forget10_perturbed.json", rows(PERTURBED | {"paraphrased_answer": ["Over there."]})): [
        "forget10_perturbed.json, row 1: 'paraphrased_answer' is a text, and not ['Over there.']"
    ],
    ("evaluation_everything", "holdout10.json", "{"): ["holdout10.json, line 1", "not JSON"],
}


@pytest.mark.parametrize(("script", "file", "content"), DATA, ids=lambda word: word[:40])
def test_broken_data(
    script: str, file: str, content: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "data" / file).write_text(content)
    line = COMMANDS[script].replace("=model", "=whole")
    assert_refused(script, f"{line} data_path=data", DATA[script, file, content], monkeypatch, capsys)


# ---- what a run and its measurements have left ----

LEFT: dict[tuple[str, str, str], list[str]] = {  # the script started again, a file of the run and its text
    **{
        (script, "config.yaml", "{"): ["run/config.yaml", "not YAML"]
        for script in ("forget", "compute_geffect", "tofu_evaluation", "evaluation_everything")
    },
    ("forget", "config.yaml", ""): ["run/config.yaml", "holds no run's settings"],
    ("forget", "config.yaml", "- 1\n"): ["run/config.yaml", "holds no run's settings"],
    ("forget", "config.yaml", "settings: 3\n"): ["run/config.yaml", "holds no run's settings"],
    ("compute_geffect", "config.yaml", "settings: 3\n"): ["method is missing"],
    ("tofu_evaluation", "config.yaml", "[]"): ["model_family is missing", "run is of no run"],
    ("compute_geffect", "logs/train.jsonl", "garbage\n"): ["train.jsonl, line 1", "not JSON"],
    ("compute_geffect", "logs/train.jsonl", '{"step": 1}\n'): ["train.jsonl", "lacks 'learning_rate'"],
    ("compute_geffect", "geffect/steps.csv", ""): ["steps.csv", "not a table"],
    ("compute_geffect", "geffect/steps.csv", "garbage\n"): ["steps.csv", "no column step"],
    ("compute_geffect", "geffect/instances.csv", "step,risk\none,two\n"): ["instances.csv", "no column step"],
    ("compute_geffect", "geffect/config.yaml", "settings"): ["geffect/config.yaml", "holds no run's settings"],
    ("compute_geffect", "geffect/weights.json", ""): ["weights.json", "not JSON"],
    ("compute_geffect", "geffect/weights.json", "[1]"): ["weights.json", "not a JSON object"],
    ("tofu_evaluation", "scores.csv", ""): ["scores.csv", "not a table of scores"],
    ("tofu_evaluation", "scores.csv", "garbage\n"): ["scores.csv", "not a table of scores"],
    ("tofu_evaluation", "checkpoint-1/eval_results/ds_size3/scores.json", "{"): ["scores.json", "not JSON"],
    ("tofu_evaluation", "checkpoint-1/eval_results/ds_size3/eval_log_aggregated.json", "[]"): ["not a JSON object"],
    ("tofu_evaluation", "checkpoint-1/eval_results/ds_size3/eval_log_aggregated.json", "{}"): ["lacks eval_log.json"],
    ("tofu_evaluation", "checkpoint-1/eval_results/ds_size3/tofu_evaluation.yaml", ""): ["holds no run's settings"],
}
AGAIN = {
    "forget": "model_family=tiny model_path=whole split=forget05 num_epochs=1 save_dir=run",
    "compute_geffect": "model_path_cur=run",
    "tofu_evaluation": "model_path=run ds_size=3 generation.max_new_tokens=9",
    "evaluation_everything": "model_path=run/checkpoint-1 retain_holdout=4 control=false",
}


@pytest.fixture(scope="module")
def run(young: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, measured and scored, beside the model that it is of."""
    folder = tmp_path_factory.mktemp("left")
    (folder / "whole").symlink_to(young)
    for script in ("forget", "compute_geffect", "tofu_evaluation"):
        run_in(folder, f"python {ROOT}/{script}.py {AGAIN[script]}")
    return folder / "run"


@pytest.mark.parametrize(("script", "file", "content"), LEFT)
def test_a_run_with_a_broken_file(
    script: str,
    file: str,
    content: str,
    run: Path,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(run, place / "run")
    assert (place / "run" / file).exists()
    (place / "run" / file).write_text(content)
    assert_refused(script, AGAIN[script], LEFT[script, file, content], monkeypatch, capsys)
