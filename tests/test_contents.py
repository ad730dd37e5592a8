"""Results and runs go by what data and models hold, not by where they are or what their files' sizes and times say."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, run_in
from safetensors.torch import load_file, save_file

import unlearn.reporting.figures
from app import data, evaluating, runs
from app.compose import given
from app.data import hash_rows
from app.runs import check_run, check_trained_on, made_of, open_run
from unlearn.io.weights import fingerprint, sampled
from unlearn.models.checkpoints import load_model, load_weights

SCRIPTS = {  # each started in a folder with `data` and `whole`, a model
    "finetune": "model_family=tiny hf_key=whole data_path=data split=retain99 num_epochs=0.1 batch_size=2 save_dir=tuned",
    "forget": "model_family=tiny model_path=whole data_path=data split=forget05 num_epochs=1 save_dir=run",
    "compute_geffect": "model_path_cur=run instances=false",
    "tofu_evaluation": "model_path=run/checkpoint-1 ds_size=3 generation.max_length=null generation.max_new_tokens=2",
    "evaluation_everything": "model_path=run/checkpoint-1 retain_holdout=4 control=false",
}
CONFIGS = {"finetune": "finetune", "forget": "forget", "compute_geffect": "forget_ge"}
CONFIGS |= {"tofu_evaluation": "eval_tofu", "evaluation_everything": "eval_everything"}


@pytest.fixture(scope="module")
def studied(young: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a run, and what each script makes of them."""
    folder = tmp_path_factory.mktemp("studied")
    shutil.copytree(ROOT / "data/sample", folder / "data")
    shutil.copytree(young, folder / "whole", ignore=shutil.ignore_patterns("config.yaml", "logs"))
    for script, line in SCRIPTS.items():
        run_in(folder, f"python {ROOT}/{script}.py {line}")
    return folder


@pytest.fixture
def place(studied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, whose files have other times."""
    folder = tmp_path / "place"
    shutil.copytree(studied, folder, copy_function=shutil.copyfile)
    monkeypatch.chdir(folder)
    return folder


Start = Callable[[str], tuple[int, str]]


@pytest.fixture
def start(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Start:
    """Start a script again, without figures: its exit code and what it says."""
    monkeypatch.setattr(unlearn.reporting.figures, "draw", lambda folder: [])
    monkeypatch.setattr(evaluating, "draw_run", lambda found: None)

    def start(script: str) -> tuple[int, str]:
        capsys.readouterr()
        try:
            importlib.import_module(script).run(given(CONFIGS[script], SCRIPTS[script].split()))
        except ValueError as error:
            return 2, str(error)
        return 0, capsys.readouterr().err

    return start


def keeping_time(file: Path, change: Callable[[bytes], bytes]) -> None:
    """Change the file's bytes, but neither its size nor its time."""
    state, before = file.stat(), file.read_bytes()
    time.sleep(0.01)  # the clock of a file system may tick as slowly
    after = change(before)
    assert len(after) == len(before)
    assert after != before
    file.write_bytes(after)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))


def last_answer(text: bytes) -> bytes:
    """One letter of the last row's last text."""
    at = text.rstrip(b'"]}\r\n').rindex(b"a")
    return text[:at] + b"e" + text[at + 1 :]


def turn_sign(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.input_layernorm.weight"].neg_()


def weights(change: Callable[[dict[str, torch.Tensor]], Any], file: Path) -> None:
    """Change the tensors of a safetensors file that keeps its size and its time."""
    tensors, state = load_file(file), file.stat()
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    assert file.stat().st_size == state.st_size
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))


def spoil(name: str) -> None:
    file = Path(name)
    if file.suffix == ".safetensors":
        weights(turn_sign, file)
    elif file.name == "config.json":
        keeping_time(file, lambda text: text.replace(b'"silu"', b'"gelu"'))
    elif file.name == "tokenizer.json":
        keeping_time(file, lambda text: text.replace(b'"\xc4\xa0the"', b'"\xc4\xa0thq"'))
    else:
        keeping_time(file, last_answer)


DATA = {
    "finetune": ["retain99"],
    "forget": ["forget05", "retain95"],
    "compute_geffect": ["forget05", "retain95"],
    "tofu_evaluation": ["forget05_perturbed", "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed"],
    "evaluation_everything": ["forget05", "forget05_perturbed", "holdout05"],
}
MODELS = {
    "finetune": ("whole/model.safetensors", "hf_key=whole"),
    "forget": ("whole/model.safetensors", "model_path=whole"),
    "compute_geffect": ("whole/model.safetensors", "model_path=whole"),
}


def refused(start: Start, script: str, name: str) -> None:
    folder = {"finetune": "tuned", "forget": "run", "compute_geffect": "run/geffect"}.get(
        script, "run/checkpoint-1/eval_results"
    )
    before = {file: file.read_bytes() for file in Path(folder).rglob("*") if file.is_file()}
    code, err = start(script)
    assert code == 2, err
    assert "\n" not in err
    assert name in err
    assert "give save_dir=FOLDER" in err
    assert {file: file.read_bytes() for file in before} == before


@pytest.mark.parametrize("script", DATA)
def test_other_rows_of_a_split_are_refused(script: str, start: Start) -> None:
    for split in DATA[script]:
        file = Path(f"data/{split}.json")
        first = file.read_text().splitlines(keepends=True)[: 1 if "retain_holdout" in SCRIPTS[script] else 3]
        whole = file.read_text()
        file.write_text("".join(first))  # so that the last row is one of those that are read
        keeping_time(file, last_answer)
        changed = file.read_text().splitlines(keepends=True)
        file.write_text("".join([*changed, *whole.splitlines(keepends=True)[len(first) :]]))
        refused(start, script, f"{split} (data/{split}.json): is not what it was")
        file.write_text(whole)


@pytest.mark.parametrize("script", MODELS)
def test_a_run_from_another_model_is_refused(script: str, start: Start) -> None:
    """A norm whose sign is turned, and files that change what it answers."""
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        before = Path("whole", file).read_bytes()
        spoil(f"whole/{file}")
        refused(start, script, f"{MODELS[script][1]}: is not what it was")
        Path("whole", file).write_bytes(before)


@pytest.mark.parametrize("script", ["tofu_evaluation", "evaluation_everything"])
def test_a_changed_checkpoint_is_measured_anew(script: str, start: Start) -> None:
    file = Path("run/checkpoint-1/eval_results") / ("ds_size3" if script == "tofu_evaluation" else "ds_size300") / "scores.json"
    key = "tofu" if script == "tofu_evaluation" else "ps"
    before = json.loads(file.read_text())[key]
    spoil("run/checkpoint-1/model.safetensors")
    assert start(script)[0] == 0
    assert json.loads(file.read_text())[key] != before


def test_tables_of_a_changed_checkpoint_are_refused(start: Start) -> None:
    spoil("run/checkpoint-1/model.safetensors")
    code, err = start("compute_geffect")
    assert code == 2
    assert "run/geffect has the G-effects of other weights at step 1; remove it, or give save_dir=FOLDER" in err


@pytest.mark.parametrize("script", ["compute_geffect", "tofu_evaluation", "evaluation_everything"])
def test_first_results_of_a_run_on_other_data_are_refused(script: str, start: Start) -> None:
    """Data that have changed since the run was trained on them, before anything was measured."""
    for folder in (Path("run/geffect"), Path("run/checkpoint-1/eval_results")):
        shutil.rmtree(folder)
    keeping_time(Path("data/forget05.json"), lambda text: text.replace(b" was ", b" is  ", 1))
    code, err = start(script)
    assert code == 2, err
    assert err == "run was trained on other data: forget05 (data/forget05.json): is not what it was; give save_dir=FOLDER"


@pytest.mark.parametrize("earlier", [False, True])
def test_the_same_elsewhere_is_the_same(earlier: bool, start: Start) -> None:
    """Copied, written as one array, with other texts that nobody reads; `earlier`: as an earlier version noted it all."""
    for file in Path("data").glob("*.json"):
        rows = [json.loads(line) | {"note": "of no one"} for line in file.read_text().splitlines()]
        file.write_text(json.dumps(rows, indent=2))
    for file in [*Path().glob("*/config.yaml"), *Path("run").glob("*/config.yaml"), *Path("run").glob("*/*/*/*.yaml")]:
        record = yaml.safe_load(file.read_text())
        if earlier:
            record = {key: value for key, value in record.items() if key not in ("data", "models", "tokenizer")}
            if "weights" in record:
                record["weights"] = {path: sampled(Path(path)) for path in record["weights"]}
        file.write_text(yaml.safe_dump(record))
    if earlier:
        noted = {"0": sampled(Path("whole")), "1": sampled(Path("run/checkpoint-1"))}
        Path("run/geffect/weights.json").write_text(json.dumps(noted))
    said = {script: start(script) for script in SCRIPTS}
    assert {code for code, _ in said.values()} == {0}, said
    assert "is fine-tuned already" in said["finetune"][1]
    assert "is done already" in said["forget"][1]
    assert "0 of them measured now" in said["compute_geffect"][1]
    assert "is evaluated already" in said["evaluation_everything"][1]
    assert "losses" not in said["tofu_evaluation"][1]  # its progress


def test_a_fingerprint_is_of_every_byte(young: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(young, model)
    before = fingerprint(model)
    size = (model / "model.safetensors").stat().st_size
    for place in range(size // 3, size // 3 + 9000, 1000):  # between the samples of an earlier version, too

        def turn(text: bytes, at: int = place) -> bytes:
            return text[:at] + bytes([text[at] ^ 128]) + text[at + 1 :]

        keeping_time(model / "model.safetensors", turn)
        assert (now := fingerprint(model)) != before
        before = now
    for name, text in {"chat_template.jinja": "{{ messages }}", "generation_config.json": '{"eos_token_id": [1, 7]}'}.items():
        (model / name).write_text(text)
        assert (now := fingerprint(model)) != before
        before = now
    (model / "notes.txt").write_text("of no one")
    shutil.copytree(model, tmp_path / "copy", copy_function=shutil.copyfile)
    assert fingerprint(tmp_path / "copy") == fingerprint(model) == before


def test_a_fingerprint_is_of_an_adapters_model_too(young: Path, tmp_path: Path) -> None:
    shutil.copytree(young, tmp_path / "model")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "model")}))
    save_file({"a": torch.ones(2)}, adapter / "adapter_model.safetensors")
    before = fingerprint(adapter)
    weights(turn_sign, tmp_path / "model/model.safetensors")
    assert fingerprint(adapter) != before


def test_the_sentences_of_idk_are_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["model_family=tiny", "method=idk", "hf_key=some/model", "model_path=some/model"]
    cfg = given("forget", [*words, f"data_path={ROOT / 'data/sample'}"])
    before = made_of(cfg)["data"]
    assert set(before) == {"forget10", "retain90", "retain_perturbed", "idontknow"}
    (tmp_path / "idontknow.jsonl").write_text('{"idk": "No idea."}\n')
    for module in (data, runs):
        monkeypatch.setattr(module, "IDK", tmp_path / "idontknow.jsonl")
    after = made_of(cfg)["data"]
    assert {name for name in before if after[name] != before[name]} == {"idontknow"}
    open_run(tmp_path / "run", cfg, {"data": before})
    (tmp_path / "run/logs").mkdir()  # begun
    with pytest.raises(ValueError, match=r"run of other data: idontknow \(.*idontknow\.jsonl\): is not what it was"):
        check_run(tmp_path / "run", cfg, made_of={"data": after})


@pytest.mark.parametrize("kept", [torch.float64, torch.bfloat16])
def test_a_checkpoints_own_precision_is_kept(kept: torch.dtype, young: Path, tmp_path: Path) -> None:
    """A model in float64 takes float64 weights, or half ones, to the last bit: as if they were loaded directly."""
    from transformers import AutoModelForCausalLM

    one: Any = AutoModelForCausalLM.from_pretrained(young, dtype=torch.float64)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.mul_(1 + 1e-10)
    one.to(kept).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(young, dtype=torch.float64)
    load_weights(model, str(tmp_path))
    expected = {name: parameter.double() for name, parameter in one.named_parameters()}
    assert all(torch.equal(parameter, expected[name]) for name, parameter in model.named_parameters())


def test_rows_are_told_by_what_is_read() -> None:
    rows: list[dict[str, Any]] = [{"question": "Where?", "answer": "There.", "id": 1}, {"question": "Who?", "answer": "He."}]
    others: list[list[dict[str, Any]]] = [[rows[1], rows[0]], rows[:1], [rows[0], rows[1] | {"answer": "She."}], []]
    assert hash_rows(rows) == hash_rows([row | {"id": 2} for row in rows])
    assert len({hash_rows(given) for given in (rows, *others)}) == 5


def test_an_adapter_is_merged_in_the_models_precision(young: Path, tmp_path: Path) -> None:
    """W + (alpha / r) B A in float64, from float32 files, whether a model is loaded or given the weights."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    how = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(young), how).save_pretrained(str(tmp_path))
    added = load_file(tmp_path / "adapter_model.safetensors")
    expected: Any = AutoModelForCausalLM.from_pretrained(young, dtype=torch.float64)
    given: Any = AutoModelForCausalLM.from_pretrained(young, dtype=torch.float64)
    for name, weight in expected.named_parameters():
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{layer}.lora_A.weight" in added:
            a, b = (added[f"{layer}.lora_{letter}.weight"].double() for letter in "AB")
            weight.data += 2 * b @ a
    load_weights(given, str(tmp_path))
    loaded = load_model(str(tmp_path), torch.device("cpu"), dtype=torch.float64)
    for found in (given, loaded):
        there = dict(found.named_parameters())
        assert all((there[name] - weight).abs().max() < 1e-14 for name, weight in expected.named_parameters())


def test_a_column_of_second_answers_is_data(tmp_path: Path) -> None:
    """Where an objective reads one, a run is told by it, when it goes on and when it is measured first."""
    for file in (ROOT / "data/sample").glob("*.json"):
        rows = [json.loads(line) | {"other": "It is not known."} for line in file.read_text().splitlines()]
        (tmp_path / file.name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["model_family=tiny", "hf_key=some/model", "model_path=some/model", f"data_path={tmp_path}"]
    plain, second = (given("forget", [*words, *more]) for more in ([], ["+method.second=other"]))
    for name, settings in (("plain", plain), ("second", second)):
        open_run(tmp_path / name, settings, made_of(settings))
        (tmp_path / name / "logs").mkdir()  # begun
        check_trained_on(tmp_path / name, settings, "forget10")
    file = tmp_path / "forget10.json"
    file.write_text(file.read_text().replace("It is not known.", "Nobody knows.", 1))
    check_trained_on(tmp_path / "plain", plain, "forget10")
    with pytest.raises(ValueError, match="was trained on other data: forget10"):
        check_trained_on(tmp_path / "second", second, "forget10")
    with pytest.raises(ValueError, match="run of other data: forget10"):
        check_run(tmp_path / "second", second, made_of(second))
