"""Every documented command as typed, with the tiny model; where its results go, and how often a run can be started."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import yaml
from conftest import make_workplace, run_in
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture
def place(tmp_path: Path, young: Path) -> Path:
    """A workplace whose fine-tuned tiny model is there already, where finetune.py would have put it."""
    folder = tmp_path / "data/weight/ft_epoch40_lr0.001_tiny_full_wd0.0"
    folder.parent.mkdir(parents=True)
    folder.symlink_to(young)
    return make_workplace(tmp_path)


def assert_loads(folder: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.vocab_size >= len(tokenizer)
    assert tokenizer.eos_token_id == model.config.eos_token_id


@pytest.mark.parametrize("processes", [1, 2])
def test_finetune_under_torchrun(tmp_path: Path, processes: int) -> None:
    make_workplace(tmp_path)
    run_in(
        tmp_path,
        f"torchrun --nproc_per_node={processes} --master_port=18765 finetune.py --config-name=finetune.yaml split=full"
        " batch_size=4 gradient_accumulation_steps=4 model_family=tiny lr=2e-5 num_epochs=1",
        fresh=processes == 2,  # by torchrun itself
    )
    folder = tmp_path / "data/weight/ft_epoch1_lr2e-05_tiny_full_wd0.0"
    assert_loads(folder)
    assert not (folder / "resume").exists()
    assert len((folder / "logs/train.jsonl").read_text().splitlines()) == 400 // (16 * processes)
    assert sorted(file.name for file in tmp_path.iterdir() if not file.is_symlink()) == ["data"]


@pytest.mark.on_cpu
def test_basher1(place: Path) -> None:
    """The documented run: on a machine without GPUs --cuda_id is a warning; the command is printed; nothing is littered."""
    done = run_in(place, "python basher1.py ga --model=tiny --cuda_id=3 --setting=forget05 --hyper=2")
    assert "forget.py model_family=tiny split=forget05 method=ga hyper_param=2" in done.stdout
    run = place / "icml/tiny/ga_0.0008_forget05_5_0.0_2"
    assert sorted(file.name for file in run.iterdir()) == ["checkpoint-5", "checkpoint-6", "config.yaml", "logs"]
    assert_loads(run / "checkpoint-5")
    assert_loads(run / "checkpoint-6")
    settings = yaml.safe_load((run / "config.yaml").read_text())["settings"]
    assert settings["method"]["name"] == "ga"
    assert settings["lr"] == 8e-4
    losses = json.loads((run / "logs/losses.json").read_text())
    assert losses["steps"] == 6
    assert sorted(file.name for file in place.iterdir() if not file.is_symlink()) == ["data", "icml"]
    again = run_in(place, "python basher1.py ga --model=tiny --setting=forget05 --hyper=2")
    assert "done already" in again.stderr


@pytest.mark.parametrize(
    "method", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("tnpo_gd", "wtnpo_0.5", "po_kl")), "rmu_2_kl"]
)
def test_basher1_methods(place: Path, method: str) -> None:
    run_in(place, f"python basher1.py {method} --model=tiny --setting=forget05 num_epochs=1 output_dir=runs")
    [run] = (place / "runs/tiny").iterdir()
    assert_loads(run / "checkpoint-1")
    assert (run / "noise.safetensors").exists() == method.startswith("rmu")


@pytest.mark.parametrize("processes", [0, 1, 2])
def test_forget(place: Path, processes: int) -> None:
    program = f"torchrun --nproc_per_node={processes} --master_port=18766" if processes else "python"
    run_in(place, f"{program} forget.py model_family=tiny split=forget05 method=npo retain=kl")
    [run] = (place / "icml/tiny").iterdir()
    assert run.name == "npo_kl_0.0008_forget05_5_0.0_None"
    assert_loads(run / f"checkpoint-{6 if processes < 2 else 3}")


def test_a_sweep_goes_through_values(place: Path) -> None:
    run_in(place, "python forget.py -m model_family=tiny split=forget05 method=ga,wga seed=1,42 num_epochs=1")
    names = sorted(run.name for run in (place / "icml/tiny").iterdir())
    assert names == [f"{method}_0.0008_forget05_1_0.0_None{seed}" for method in ("ga", "wga") for seed in ("", "_seed=1")]


@pytest.mark.several_processes
@pytest.mark.parametrize("script", ["tofu_evaluation", "evaluation_everything"])
def test_evaluation_under_torchrun(place: Path, script: str) -> None:
    """Two processes score each row as one does."""
    model = "data/weight/ft_epoch40_lr0.001_tiny_full_wd0.0"
    more = "ds_size=6 generation.max_new_tokens=24" if script == "tofu_evaluation" else "retain_holdout=6 control=false"
    for n in (1, 2):
        start = f"torchrun --nproc_per_node={n} --master_port=18767 {script}.py split=forget05 model_family=tiny"
        run_in(place, f"{start} model_path={model} save_dir=scores{n} dtype=float64 {more}")
    one, two = (place / f"scores{n}" for n in (1, 2))
    if script == "tofu_evaluation":
        a, b = (json.loads((folder / "eval_log_aggregated.json").read_text()) for folder in (one, two))
        assert a.keys() == b.keys()
        for file in a:
            for key in ("avg_gt_loss", "avg_paraphrased_loss", "average_perturb_loss", "rougeL_recall"):
                assert len(a[file][key]) == 6
                for row, value in a[file][key].items():
                    assert b[file][key][row] == pytest.approx(value, rel=1e-5)
    else:
        for name, n in (("ps_rows", 52), ("memorization_rows", 52), ("privacy_rows", 40)):
            tables = [pd.read_csv(folder / f"{name}.csv") for folder in (one, two)]
            assert len(tables[0]) == n
            pd.testing.assert_frame_equal(*tables, rtol=1e-5)


def test_local_files_in_place_of_tofu(place: Path) -> None:
    for name, n in (("keep", 40), ("go", 16)):
        rows = [{"question": f"What is {name} {i}?", "answer": f"It is {i * i}."} for i in range(n)]
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = "forget_data=go.jsonl retain_data=keep.jsonl"
    run_in(place, f"python finetune.py model_family=tiny {data} num_epochs=1")
    model = "data/weight/ft_epoch1_lr0.001_tiny_keep+go_wd0.0"
    assert_loads(place / model)
    run_in(place, f"python forget.py model_family=tiny {data} model_path={model} method=npo retain=gd num_epochs=2")
    assert_loads(place / "icml/tiny/npo_gd_0.0008_go_2_0.0_None/checkpoint-2")


def test_a_run_of_one_step_moves(place: Path) -> None:
    """forget01 of the sample is one step: no warm-up from a learning rate of 0 then."""
    run_in(place, "python forget.py model_family=tiny split=forget01 method=ga")
    losses = json.loads((place / "icml/tiny/ga_0.0008_forget01_5_0.0_None/logs/losses.json").read_text())
    assert losses["steps"] == 1
    assert losses["forget"]["end"] > losses["forget"]["start"] + 0.01


def test_save_dtype(place: Path) -> None:
    run_in(place, "python forget.py model_family=tiny split=forget05 method=ga num_epochs=1 save_dtype=bfloat16 save_dir=run")
    assert json.loads((place / "run/checkpoint-1/config.json").read_text())["dtype"] == "bfloat16"
    size = (place / "run/checkpoint-1/model.safetensors").stat().st_size
    assert size < 0.6 * (place / "data/weight/ft_epoch40_lr0.001_tiny_full_wd0.0/model.safetensors").stat().st_size


@pytest.mark.parametrize("setting", ["gradient_checkpointing=true", "dtype=bfloat16", "optim=adamw_torch", "max_grad_norm=1"])
def test_training_settings(place: Path, setting: str) -> None:
    run_in(place, f"python forget.py model_family=tiny split=forget05 method=npo retain=kl num_epochs=1 save_dir=run {setting}")
    assert_loads(place / "run/checkpoint-1")
