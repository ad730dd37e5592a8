"""Training: the same weights however a step is cut, the schedule, what a killed run leaves and goes on from."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_in
from safetensors.torch import load_file

METHODS = ["ga", "wga", "npo", "rmu_2", "idk", "npo_kl", "npo_gd", "gd"]


@pytest.fixture(scope="module")
def cuts(young: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of 5 steps of 8 rows: one process, accumulated, and two processes."""
    out = tmp_path_factory.mktemp("cuts")
    script = ROOT / "tests" / "unlearn_five_steps.py"
    methods = " ".join(METHODS)
    run_in(out, f"python {script} {young} {out}/whole 8 1 {methods}")
    run_in(out, f"python {script} {young} {out}/accumulated 4 2 {methods}")
    run_in(out, f"torchrun --nproc_per_node=2 --master_port=18771 {script} {young} {out}/processes 4 1 {methods}")
    return {name: out / name for name in ("whole", "accumulated", "processes")}


@pytest.mark.parametrize("cut", ["accumulated", "processes"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_the_same_however_it_is_cut(cuts: dict[str, Path], method: str, cut: str) -> None:
    """2 processes x batch 4 = 1 x batch 8 = 1 x batch 4 x accumulation 2, to 1e-5 in float32 after 5 steps."""
    expected = load_file(cuts["whole"] / method / "checkpoint-5" / "model.safetensors")
    found = load_file(cuts[cut] / method / "checkpoint-5" / "model.safetensors")
    assert expected.keys() == found.keys()
    worst = max((expected[name] - found[name]).abs().max().item() for name in expected)
    assert worst < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_the_weights_moved(cuts: dict[str, Path], young: Path, method: str) -> None:
    before = load_file(young / "model.safetensors")
    after = load_file(cuts["whole"] / method / "checkpoint-5" / "model.safetensors")
    assert max((before[name] - after[name]).abs().max().item() for name in before) > 1e-4


def test_the_log_has_the_loss_and_its_parts(cuts: dict[str, Path]) -> None:
    """One line a step, the parts add up to the loss, and two processes log what one logs."""
    lines = {name: [json.loads(line) for line in (cuts[name] / "npo_kl/logs/train.jsonl").open()] for name in cuts}
    assert [line["step"] for line in lines["whole"]] == [1, 2, 3, 4, 5]
    for line in lines["whole"]:
        assert line["loss"] == pytest.approx(line["objective"] + line["retain"], rel=1e-5)
    for name in ("accumulated", "processes"):
        assert [line["loss"] for line in lines[name]] == pytest.approx([line["loss"] for line in lines["whole"]], rel=1e-4)


def test_gradient_checkpointing_changes_nothing(young: Path, tmp_path: Path) -> None:
    base = f"python {ROOT}/basher1.py npo --model=tiny --setting=forget05 model_path={young} num_epochs=2"
    for name in ("true", "false"):
        run_in(tmp_path, f"{base} gradient_checkpointing={name} save_dir=run_{name}")
    plain, checkpointed = (load_file(tmp_path / f"run_{name}/checkpoint-2/model.safetensors") for name in ("false", "true"))
    assert max((plain[name] - checkpointed[name]).abs().max().item() for name in plain) < 1e-6


def test_a_killed_run_goes_on_and_ends_with_the_same_bits(young: Path, tmp_path: Path) -> None:
    """SIGKILL after the first checkpoint; the same command again ends with the weights of a run never killed."""
    command = f"{ROOT}/basher1.py npo_kl --model=tiny --setting=forget10 model_path={young} save_steps=2"
    run_in(tmp_path, f"python {command} save_dir=never_killed")
    killed = subprocess.Popen(
        [sys.executable, *command.split(), "save_dir=killed"], cwd=tmp_path, start_new_session=True, stderr=subprocess.DEVNULL
    )
    while not (tmp_path / "killed/checkpoint-4").exists():
        assert killed.poll() is None
        time.sleep(0.005)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert (tmp_path / "killed/resume").exists()
    run_in(tmp_path, f"python {command} save_dir=killed")
    assert not (tmp_path / "killed/resume").exists()
    for step in (2, 4, 6, 8, 10, 12):
        whole, resumed = (
            load_file(tmp_path / run / f"checkpoint-{step}/model.safetensors") for run in ("never_killed", "killed")
        )
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    steps = [json.loads(line)["step"] for line in (tmp_path / "killed/logs/train.jsonl").open()]
    assert steps == list(range(1, 13))


def test_a_loss_that_is_not_finite_stops_the_run(young: Path, tmp_path: Path) -> None:
    done = run_in(
        tmp_path,
        f"python {ROOT}/basher1.py ga --model=tiny --setting=forget10 model_path={young} lr=1e30 save_steps=1 save_dir=run",
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("forget.py: ") or "forget.py: step" in line]
    step = int(re.search(r"step (\d+): (loss|grad_norm) is nan", line)[1])  # type: ignore[index]
    kept = sorted(int(folder.name.split("-")[1]) for folder in (tmp_path / "run").glob("checkpoint-*"))
    assert kept == list(range(1, step))
    for weights in map(load_file, (tmp_path / "run").glob("checkpoint-*/model.safetensors")):
        assert all(weight.isfinite().all() for weight in weights.values())
