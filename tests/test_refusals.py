"""What cannot be trained or measured is said in a line that names it as the user knows it, before anything is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, make_workplace, run_in
from safetensors.torch import load_file
from slow_geffect import FORGET, RETAIN, build
from test_measuring import TOKENS
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from unlearn.geffect.call import geffect
from unlearn.models.checkpoints import load_model, save_model
from unlearn.objectives.functions import ga
from unlearn.scores.extraction import score_rows

# ---- from scratch only where there is nothing of a model ----

LEFTOVERS = {
    "a .bin": "pytorch_model.bin",
    "a torn file": "model.safetensors",
    "an index alone": "model.safetensors.index.json",
    "a lacking shard": "model-00001-of-00002.safetensors",
    "another format": "tf_model.h5",
    "an unfinished download": "model.safetensors.incomplete",
    "weights in a folder": "original/consolidated.00.pth",
    "an adapter": "adapter_config.json",
}


@pytest.mark.parametrize("what", LEFTOVERS)
def test_no_new_model_beside_what_is_left_of_one(what: str, young: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / LEFTOVERS[what]).parent.mkdir(parents=True)
    shutil.copy(ROOT / "config" / "tiny" / "config.json", folder)
    whole = (young / "model.safetensors").read_bytes()
    index = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})
    (folder / LEFTOVERS[what]).write_bytes(index.encode() if "index" in what else b"{}" if "adapter" in what else whole[:5000])
    if what == "a lacking shard":
        (folder / "model.safetensors.index.json").write_text(index)
        (folder / LEFTOVERS[what]).write_bytes(whole)
    done = run_in(ROOT, f"python finetune.py model_family=tiny hf_key={folder} save_dir={tmp_path}/run", check=False)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert f"hf_key={folder}" in done.stderr
    assert LEFTOVERS[what] in done.stderr
    assert not (tmp_path / "run").exists()


def test_other_formats_are_told_with_the_call_that_converts_them(young: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(young, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.yaml", "logs"))
    torch.save(load_file(young / "model.safetensors"), folder / "pytorch_model.bin")
    for line in (
        f"forget.py model_family=tiny split=forget05 method=ga model_path={folder} save_dir={tmp_path}/run",
        f"tofu_evaluation.py model_family=tiny split=forget05 model_path={folder}",
    ):
        done = run_in(ROOT, f"python {line}", check=False)
        assert done.returncode == 2
        call = f"AutoModelForCausalLM.from_pretrained('{folder}').save_pretrained(NEW)"
        assert f"its weights are pytorch_model.bin, and only safetensors are read: {call}" in done.stderr


def test_fine_tuned_models_of_other_settings_are_named(young: Path, tmp_path: Path) -> None:
    place = make_workplace(tmp_path)
    other = place / "data" / "weight" / "ft_epoch3_lr0.002_tiny_full_wd0.0"
    shutil.copytree(young, other)
    done = run_in(place, "python basher1.py ga --model=tiny --setting=forget05", check=False)
    assert done.returncode == 2
    assert "no fine-tuned model" in done.stderr
    assert "data/weight/ft_epoch3_lr0.002_tiny_full_wd0.0; give model_path=FOLDER" in done.stderr


def test_a_saved_tokenizer_has_the_names_of_transformers_4(young: Path, tmp_path: Path) -> None:
    """Checked by hand with 4.57: the same ids there. Here it loads as it was, special tokens and all."""
    written = json.loads((young / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    tokenizer = AutoTokenizer.from_pretrained(young, extra_special_tokens=["<user>"])
    save_model(load_model(str(young), torch.device("cpu")), tokenizer, tmp_path, "float32")
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert written["additional_special_tokens"] == ["<user>"]
    assert "extra_special_tokens" not in written
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "<user>Riga, March 1954<eos>"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert set(again.all_special_tokens) == set(tokenizer.all_special_tokens)


# ---- rows that the model has no place for ----


@pytest.fixture(scope="module")
def short(young: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 with learned positions for 40 tokens, with the tiny family's tokenizer."""
    folder = tmp_path_factory.mktemp("short")
    tokenizer = AutoTokenizer.from_pretrained(young)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=40, **special)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def files_of(folder: Path, answer: str) -> tuple[Path, Path]:
    """Local data whose fourth row to forget has this answer."""
    for name, third in (("forget", answer), ("retain", "Oslo")):
        rows = [{"question": f"Where is {i}?", "answer": third if i == 3 else "Riga"} for i in range(8)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "forget.jsonl", folder / "retain.jsonl"


@pytest.mark.parametrize("script", ["finetune", "forget", "compute_geffect"])
def test_rows_longer_than_the_models_positions(script: str, short: Path, tmp_path: Path) -> None:
    forget, retain = files_of(tmp_path, "Riga, March 1954, " * 20)
    how = f"model_family=tiny forget_data={forget} retain_data={retain} batch_size=2 save_dir={tmp_path}/run"
    lines = {
        "finetune": f"finetune.py {how} hf_key={short}",
        "forget": f"forget.py {how} split=forget05 method=ga model_path={short} hf_key={short} gradient_accumulation_steps=1",
        "compute_geffect": f"compute_geffect.py {how} split=forget05 method=ga model_path={short} hf_key={short}",
    }
    done = run_in(ROOT, f"python {lines[script]}", check=False)
    assert done.returncode == 2
    assert f"{forget}, row 4: has " in done.stderr
    assert "tokens, and the model positions for 40; max_length=40 cuts rows" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run/config.yaml").exists()  # the same command runs once the row is mended


def with_too_many(young: Path) -> tuple[Any, int]:
    """The tiny family's tokenizer with more tokens than its model embeds, the last of them <last>, and how many those are."""
    tokenizer = AutoTokenizer.from_pretrained(young)
    embedded = json.loads((young / "config.json").read_text())["vocab_size"]
    tokenizer.add_tokens([f"<{i}>" for i in range(embedded - len(tokenizer))] + ["<last>"])
    return tokenizer, embedded


def test_tokens_that_the_model_does_not_embed(young: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(young, model)
    tokenizer, embedded = with_too_many(young)
    tokenizer.save_pretrained(model)
    forget, retain = files_of(tmp_path, "<last>")
    how = f"model_family=tiny split=forget05 forget_data={forget} retain_data={retain} batch_size=2 save_dir={tmp_path}/run"
    done = run_in(ROOT, f"python forget.py {how} method=ga model_path={model} gradient_accumulation_steps=1", check=False)
    assert done.returncode == 2
    assert f"{forget}, row 4: has the token {embedded}, and the model embeds {embedded}" in done.stderr


def test_the_calls_name_a_row_that_does_not_fit() -> None:
    model = build("gpt2")
    long = {"input_ids": torch.full((40,), 5), "labels": torch.full((40,), 5)}
    high = {"input_ids": torch.tensor([1, 37, 2]), "labels": torch.tensor([-100, 37, 2])}
    with pytest.raises(ValueError, match=r"forget\[5\]: has 40 tokens, and the model positions for 32"):
        geffect(model, TOKENS, [*FORGET, long], RETAIN, ga)
    with pytest.raises(ValueError, match=r"retain\[0\]: has the token 37, and the model embeds 37: 0 to 36"):
        geffect(model, TOKENS, FORGET, [high], ga)


def test_rotary_positions_go_on() -> None:
    """A rotary model is made for no number of positions: what it takes is not refused."""
    model = build("llama", max_position_embeddings=8)
    long = {"input_ids": torch.arange(20) % 30 + 3, "labels": torch.arange(20) % 30 + 3}
    assert geffect(model, TOKENS, [long], RETAIN, ga)["steps"]["geffect"].notna().all()


def test_scores_name_a_pair(young: Path) -> None:
    tokenizer, embedded = with_too_many(young)
    model = load_model(str(young), torch.device("cpu"))
    with pytest.raises(ValueError, match=rf"pairs\[1\]: has the token {embedded}, and the model embeds {embedded}"):
        score_rows(model, tokenizer, [("Where? ", "Riga"), ("Where? ", "<last>")])


def test_an_adapter_that_names_itself(young: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    (tmp_path / "adapter_model.safetensors").write_bytes((young / "model.safetensors").read_bytes())
    done = run_in(ROOT, f"python forget.py model_family=tiny model_path={tmp_path} save_dir={tmp_path}/run", check=False)
    assert done.returncode == 2
    assert "names its own folder as the base model" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_model_is_not_put_where_it_came_from(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "config/tiny", tmp_path / "own")
    line = f"python finetune.py model_family=tiny hf_key={tmp_path}/own save_dir={tmp_path}/own"
    done = run_in(ROOT, line, check=False)
    assert done.returncode == 2
    assert f"save_dir={tmp_path}/own: is hf_key's folder, and the model there would be written over" in done.stderr


def test_a_row_of_a_split_is_named_by_it(young: Path, tmp_path: Path) -> None:
    """In an evaluation that asks many sets at once, too."""
    done = run_in(
        ROOT,
        f"python evaluation_everything.py model_family=tiny split=forget05 model_path={young} max_length=3"
        f" original_path={young} save_dir={tmp_path}/out",
        check=False,
    )
    assert done.returncode == 2
    assert "split forget05, row 1: its prompt alone fills max_length=3 tokens" in done.stderr
