"""Devices: no tensor is left on another than the model's, by a pretended GPU (run_on_device.py); and which the tests have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import conftest
import devices
import pytest
import torch
from conftest import ROOT, run_in


@pytest.mark.on_cpu  # the GPU is a pretended one
def test_all_work_runs_on_the_device(tmp_path: Path) -> None:
    """Training, measuring in each way, scoring, decoding and saving."""
    ends = json.loads(run_in(tmp_path, f"python {ROOT}/tests/run_on_device.py").stdout)
    assert ends == dict.fromkeys(ends, "done")
    assert len(ends) == 14


@pytest.mark.on_cpu
def test_a_tensor_left_on_the_cpu_is_noticed(tmp_path: Path) -> None:
    """So that the test above can fail: the same work with one on purpose."""
    ends = json.loads(run_in(tmp_path, f"python {ROOT}/tests/run_on_device.py planted").stdout)
    assert [name for name, end in ends.items() if "on the same device" not in end] == []


# ---- which device the tests have ----


def test_this_process_sees_no_gpu_and_a_worker_keeps_what_there_was() -> None:
    env = {"CUDA_VISIBLE_DEVICES": "2,3"}
    devices.prepare(env, cores=16)
    devices.prepare(env, cores=16)  # a worker inherits it from the process that started it
    assert (env["CUDA_VISIBLE_DEVICES"], env[devices.KEPT]) == ("", "2,3")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert not torch.cuda.is_available()


@pytest.mark.parametrize(
    ("cores", "workers", "asked", "threads"),
    [(2, None, None, 1), (16, "2", None, 1), (16, "2", "16", 8), (16, "2", "4", 4), (2, "4", "8", 1), (8, "2", "2,1", 1)],
)
def test_no_workers_threads_starve_the_others(cores: int, workers: str | None, asked: str | None, threads: int) -> None:
    given = {"PYTEST_XDIST_WORKER_COUNT": workers, "OMP_NUM_THREADS": asked, "RAYON_NUM_THREADS": asked}
    env = {name: value for name, value in given.items() if value is not None}
    devices.prepare(env, cores)
    assert env["OMP_NUM_THREADS"] == env["RAYON_NUM_THREADS"] == str(threads)
    assert env["MKL_NUM_THREADS"] == "1"


@pytest.mark.parametrize("there", [devices.ALL, "4,6"])
@pytest.mark.parametrize(
    ("line", "n", "on_cpu", "gpu"),
    [
        ("python forget.py", 1, False, True),
        ("python forget.py", 1, True, False),
        ("torchrun --nproc_per_node=1 forget.py", 1, False, True),
        ("torchrun --standalone --nproc_per_node=2 forget.py", 1, False, False),
        ("torchrun --standalone --nproc_per_node=2 forget.py", 2, False, True),
        ("torchrun --nproc_per_node=3 forget.py", 2, False, False),
        ("python forget.py", 0, False, True),  # nothing is hidden from it, and it finds none
    ],
)
def test_commands_have_the_gpus_that_suffice(
    there: str, line: str, n: int, on_cpu: bool, gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "gpus", lambda _: n)
    env = {"PATH": "x"} | ({} if there == devices.ALL else {"CUDA_VISIBLE_DEVICES": there})
    before = dict(env)
    devices.prepare(env, 2)
    found = devices.of_command(env, line.split(), on_cpu)
    expected = before if gpu else before | {"CUDA_VISIBLE_DEVICES": ""}
    assert {name: value for name, value in found.items() if name not in devices.THREADS} == expected


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("on_cpu", [False, True])
def test_a_command_is_told_its_device(fresh: bool, on_cpu: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(devices.KEPT, "7")
    monkeypatch.setattr(conftest, "commands_on_cpu", on_cpu)
    (tmp_path / "tell.py").write_text("import os, json\nprint(json.dumps(dict(os.environ)))")
    env = json.loads(run_in(tmp_path, "python tell.py", fresh=fresh).stdout)
    assert env["CUDA_VISIBLE_DEVICES"] == ("" if on_cpu else "7")
    assert env["OMP_NUM_THREADS"] == os.environ["OMP_NUM_THREADS"]
    assert devices.ASKING not in env


@pytest.mark.on_cpu
def test_a_test_can_keep_its_commands_on_the_cpu(request: pytest.FixtureRequest) -> None:
    assert conftest.commands_on_cpu
    assert devices.is_on_cpu(request.node)


@pytest.mark.several_processes
@pytest.mark.parametrize("n", [0, 1, 2])
def test_several_processes_are_on_the_cpu_without_two_gpus(
    n: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "gpus", lambda _: n)
    assert devices.is_on_cpu(request.node) == (n < 2)


def test_a_fork_that_cannot_use_cuda_starts_anew(tmp_path: Path) -> None:
    """The script then runs in an interpreter of its own, with the same words, outputs and exit code."""
    (tmp_path / "tell.py").write_text("import sys; print(sys.argv, 'torch' in sys.modules); sys.exit(3)")
    code = (
        "import sys, torch, processes; from pathlib import Path; torch.cuda._is_in_bad_fork = lambda: True;"
        "processes._script(Path(sys.argv[1]), ['tell.py', 'a b'], {'NOTED': '1'}, [Path(sys.argv[1], x) for x in 'oe'])"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run([sys.executable, "-c", code, tmp_path], env=env)
    assert (done.returncode, (tmp_path / "o").read_text()) == (3, "['tell.py', 'a b'] False\n"), (tmp_path / "err").read_text()
