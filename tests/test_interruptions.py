"""What stops a run - a kill, a signal, a full disk, a number that is not finite - loses nothing that was saved."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import devices
import pytest
import torch
from conftest import ROOT, run_in
from safetensors.torch import load_file, save_file
from torch import Tensor

import dataloader
from unlearn.io.files import seal, what_is_torn, written_whole
from unlearn.models.checkpoints import load_model
from unlearn.objectives.loss import Loss
from unlearn.objectives.tokens import Counts, Tokens
from unlearn.training.resuming import last_whole
from unlearn.training.trainer import Settings, train

STEPS = range(1, 7)  # of 16 of forget05's 20 rows, five epochs; saved after every second one


def command(model: Path, save_dir: str = "run") -> str:
    settings = "model_family=tiny split=forget05 method=npo retain=kl save_steps=2"
    if devices.gpus(os.environ[devices.KEPT]):  # where only that is promised the same bits
        settings += " deterministic=true"
    return f"{ROOT}/forget.py {settings} model_path={model} save_dir={save_dir}"


def weights(run: Path) -> dict[str, dict[str, Tensor]]:
    return {file.parent.name: load_file(file) for file in sorted(run.glob("checkpoint-*/model.safetensors"))}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def undisturbed(young: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """The checkpoints of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_in(folder, f"python {command(young)}")
    return weights(folder / "run")


def at(folder: Path, moment: str, then: str, model: Path) -> subprocess.CompletedProcess[str]:
    """Start the run, and have the shell command `then` run at the moment `function nth when`."""
    return run_in(folder, f"python {ROOT}/tests/at.py {moment} {shlex.quote(then)} {command(model)}", check=False)


def goes_on_to_the_same_bits(folder: Path, model: Path, expected: dict[str, dict[str, Tensor]]) -> None:
    """What is there already is whole; the same command again ends with the undisturbed run's weights and log."""
    run = folder / "run"
    before = weights(run)
    assert all(same(before[name], expected[name]) for name in before)
    run_in(folder, f"python {command(model)}")
    found = weights(run)
    assert found.keys() == expected.keys()
    assert all(same(found[name], expected[name]) for name in found)
    assert not (run / "resume").exists()
    assert [json.loads(line)["step"] for line in (run / "logs/train.jsonl").open()] == list(STEPS)


# ---- SIGKILL ----

# Saves come after steps 2, 4 and 6; in each Trainer's model and optimiser (torch.save, four times) are written to resume/,
# then the model again and the tokenizer to checkpoint-N, which are renamed, and then resume/'s seal.
SHORT = [
    "unlearn.models.checkpoints.load_model 1 after",
    "torch.optim.AdamW.step 5 before",
    "torch.save 6 during",
    "pathlib.Path.rename 2 before",
    "unlearn.training.trainer.seal 2 before",
]
LONG = [
    # load
    "unlearn.passes.forcing.token_nlls 1 before",
    "unlearn.training.trainer.train 1 before",
    "unlearn.training.logs.StepLog.on_train_begin 1 after",
    # step
    "unlearn.training.trainer.StepTrainer.compute_loss 10 during",
    "torch.optim.AdamW.step 1 before",
    "torch.optim.AdamW.step 4 after",
    "unlearn.training.trainer.StepTrainer.log 6 after",
    # save
    "transformers.PreTrainedModel.save_pretrained 1 during",
    "transformers.PreTrainedModel.save_pretrained 4 during",
    "torch.save 1 during",
    "unlearn.models.checkpoints.save_model 1 during",
    "unlearn.models.checkpoints.save_model 3 after",
    "shutil.rmtree 3 during",
    # rename and after
    "pathlib.Path.rename 1 after",
    "unlearn.training.trainer.seal 1 after",
]
INSIDE_A_SAVE = [
    *("torch.save 1 during", "torch.save 6 during", "unlearn.models.checkpoints.save_model 1 during"),
    *("unlearn.models.checkpoints.save_model 3 after", "pathlib.Path.rename 1 after", "pathlib.Path.rename 2 before"),
    "unlearn.training.trainer.seal 2 before",
]


@pytest.mark.parametrize("moment", [*SHORT, *(pytest.param(moment, marks=pytest.mark.slow) for moment in LONG)])
def test_killed_at_any_moment(moment: str, young: Path, undisturbed: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    killed = at(tmp_path, moment, "kill -KILL $PID", young)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    torn = [folder for folder in (tmp_path / "run/resume").glob("checkpoint-*") if what_is_torn(folder)]
    assert torn or moment not in INSIDE_A_SAVE
    goes_on_to_the_same_bits(tmp_path, young, undisturbed)


def test_a_torn_resume_checkpoint_is_left_aside(young: Path, undisturbed: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    """What the file system lost of the newest is told by its files' sizes; the run goes on from the one before."""
    assert at(tmp_path, "unlearn.training.trainer.StepTrainer.log 6 before", "kill -KILL $PID", young).returncode
    newest = tmp_path / "run/resume/checkpoint-4"
    os.truncate(newest / "optimizer.pt", 1000)
    shutil.rmtree(tmp_path / "run/checkpoint-4")
    with (tmp_path / "run/logs/train.jsonl").open("a") as log:
        log.write('{"step": 5, "lo')
    again = run_in(tmp_path, f"python {command(young)}")
    assert "checkpoint-4: torn, left aside (optimizer.pt has 1000 of" in again.stderr
    assert "going on after step 2" in again.stderr
    goes_on_to_the_same_bits(tmp_path, young, undisturbed)


@pytest.mark.parametrize("seal_is", ["", "garbage", "[1]"])
def test_a_seal_that_is_not_readable(seal_is: str, tmp_path: Path) -> None:
    for step in (2, 4):
        folder = tmp_path / f"resume/checkpoint-{step}"
        folder.mkdir(parents=True)
        seal(folder)
    (folder / "whole.json").write_text(seal_is)
    (tmp_path / "resume/checkpoint-foo").mkdir()
    (tmp_path / "resume/checkpoint-99").touch()
    assert what_is_torn(folder) == "its whole.json is not readable"
    assert last_whole(tmp_path / "resume") == tmp_path / "resume/checkpoint-2"


def test_a_finished_run_is_not_trained_again(young: Path, tmp_path: Path) -> None:
    """Not even where what it had to go on from is still there in part."""
    run_in(tmp_path, f"python {command(young)}")
    resume = tmp_path / "run/resume/checkpoint-6"
    resume.mkdir(parents=True)
    (resume / "whole.json").write_text('{"optimizer.pt": 1000}')
    done = run_in(tmp_path, f"python {command(young)}")
    assert done.stderr.splitlines()[-1] == "run is done already: 6 steps"
    assert not resume.exists()
    shutil.rmtree(tmp_path / "run/checkpoint-4")
    done = run_in(tmp_path, f"python {command(young)}")
    assert done.stderr.splitlines()[-1] == "run is done already: 6 steps; not there, or not whole: checkpoint-4"


def test_two_processes_in_one_folder(young: Path, undisturbed: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    other = shlex.join(["sh", "-c", f"{sys.executable} {command(young)} 2> other; echo $? >> other"])
    at(tmp_path, "unlearn.training.trainer.StepTrainer.compute_loss 9 before", other, young)
    line, code = (tmp_path / "other").read_text().splitlines()[-2:]
    assert (line, code) == ("forget.py: run: another process writes there now", "2")
    goes_on_to_the_same_bits(tmp_path, young, undisturbed)


def test_a_torn_model_is_no_checkpoint(young: Path, tmp_path: Path) -> None:
    shutil.copytree(young, tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    size = file.stat().st_size
    for left in (size - 1, 1000, 4, 0):
        os.truncate(file, left)
        done = run_in(tmp_path, f"python {command(tmp_path / 'model')}", check=False)
        assert done.returncode == 2
        [line] = done.stderr.splitlines()
        assert "model.safetensors: torn" in line
        assert f"{left} " in line


# ---- signals ----


@pytest.mark.parametrize(
    ("moment", "name", "code"),
    [
        ("unlearn.models.checkpoints.load_model 1 before", "TERM", 143),
        ("torch.save 2 during", "TERM", 143),
        ("unlearn.training.trainer.StepTrainer.compute_loss 9 before", "INT", 130),
    ],
)
def test_a_signal_saves_and_stops(
    moment: str, name: str, code: int, young: Path, undisturbed: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    done = at(tmp_path, moment, f"kill -{name} $PID", young)
    assert done.returncode == code
    line = done.stderr.splitlines()[-1]
    assert re.match(rf"forget.py: stopped by SIG{name}.*the same command goes on", line)
    if "load" not in moment:
        step = int(re.search(r"after step (\d) of 6; the", line)[1])  # type: ignore[index]
        assert what_is_torn(tmp_path / f"run/resume/checkpoint-{step}") is None
        assert set(weights(tmp_path / "run")) == {f"checkpoint-{n}" for n in range(2, step + 1, 2)}  # no others than of saves
    goes_on_to_the_same_bits(tmp_path, young, undisturbed)


@pytest.mark.slow
def test_a_signal_to_torchrun_saves_and_stops(young: Path, tmp_path: Path) -> None:
    words = f"{command(young)} num_epochs=200 save_steps=100000".split()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=18781"]
    process = subprocess.Popen([*torchrun, *words], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run/logs/train.jsonl"
    while not log.exists() or not log.read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    _, stderr = process.communicate()
    assert process.returncode
    step = int(re.search(r"stopped by SIGTERM after step (\d+) of", stderr)[1])  # type: ignore[index]
    assert what_is_torn(tmp_path / f"run/resume/checkpoint-{step}") is None


# ---- disks ----


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder of 110 MiB: the run writes 97 MB, which is three checkpoints and, twice, what to go on from."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=110m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("needs to mount a tmpfs, which only root can")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fails_to_save(done: subprocess.CompletedProcess[str], step: int) -> None:
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"forget.py: step {step} could not be saved, what was saved before it is kept: ")
    assert "Traceback" not in done.stderr


def test_a_disk_without_room_is_found_at_once(young: Path, small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(b"0" * (50 << 20))
    done = run_in(small_disk, f"python {command(young)}", check=False)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert re.search(r"0\.06 GiB are free there, and the run writes 0\.09 GiB: 3 checkpoints", line)
    assert not (small_disk / "run").exists()


@pytest.mark.parametrize("moment", ["torch.save 6 before", "unlearn.models.checkpoints.save_model 2 before"])
def test_a_disk_that_fills_up_harms_nothing(
    moment: str, young: Path, small_disk: Path, undisturbed: dict[str, dict[str, Tensor]]
) -> None:
    fails_to_save(at(small_disk, moment, "cat /dev/zero > filler", young), 4)
    (small_disk / "filler").unlink()
    goes_on_to_the_same_bits(small_disk, young, undisturbed)


def test_a_disk_that_cannot_be_written(young: Path, small_disk: Path, undisturbed: dict[str, dict[str, Tensor]]) -> None:
    remount = ["mount", "-o", "remount,{}", str(small_disk)]
    read_only, writable = (shlex.join(remount).replace("{}", how) for how in ("ro", "rw"))
    subprocess.run(read_only, shell=True, check=True)
    done = run_in(small_disk, f"python {command(young)}", check=False)
    assert done.returncode == 2
    assert done.stderr.strip().endswith("can't be written")
    subprocess.run(writable, shell=True, check=True)
    fails_to_save(at(small_disk, "transformers.Trainer._save_checkpoint 2 before", read_only, young), 4)
    subprocess.run(writable, shell=True, check=True)
    goes_on_to_the_same_bits(small_disk, young, undisturbed)


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-5"
    with written_whole(folder) as beside:
        (beside / "a").write_text("old")

    def fail() -> None:
        with written_whole(folder) as beside:
            (beside / "a").write_text("new")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert [(file.name, file.read_text()) for file in folder.iterdir()] == [("a", "old")]
    assert list(tmp_path.iterdir()) == [folder]


def test_a_seal_tells_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside/a").write_text("four")
    assert what_is_torn(tmp_path) == "was not written to its end"
    seal(tmp_path)
    assert what_is_torn(tmp_path) is None
    (tmp_path / "inside/a").write_text("two")
    assert what_is_torn(tmp_path) == "inside/a has 3 of 4 bytes"
    (tmp_path / "inside/a").unlink()
    assert what_is_torn(tmp_path) == "inside/a has 0 of 4 bytes"


# ---- numbers that are not finite ----


def test_weights_that_are_not_finite(young: Path, tmp_path: Path) -> None:
    shutil.copytree(young, tmp_path / "model")
    broken = load_file(young / "model.safetensors")
    broken["model.norm.weight"][3] = float("nan")
    save_file(broken, tmp_path / "model/model.safetensors", {"format": "pt"})
    done = run_in(tmp_path, f"python {command(tmp_path / 'model')}", check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("its weights are not finite: model.norm.weight")
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_diverging_run_keeps_its_last_good_checkpoint(young: Path, tmp_path: Path) -> None:
    done = run_in(tmp_path, f"python {command(young)} lr=1e30 save_steps=1", check=False)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    step = int(re.match(r"forget.py: step (\d): (loss|grad_norm) is (nan|inf), on forget rows ", line)[1])  # type: ignore[index]
    assert set(weights(tmp_path / "run")) == {f"checkpoint-{n}" for n in range(1, step)}
    for kept in weights(tmp_path / "run").values():
        assert all(weight.isfinite().all() for weight in kept.values())


def test_weights_that_an_update_breaks_are_not_saved(young: Path, tmp_path: Path) -> None:
    """The first step's learning rate is 0, the second and last one's loss and gradient are finite."""
    words = command(young).replace("save_steps=2", "save_steps=1 num_epochs=2 lr=1e39")
    for _ in range(2):  # the second start goes on from step 1 again
        done = run_in(tmp_path, f"python {words}", check=False)
        assert done.returncode == 1
        line = done.stderr.splitlines()[-1]
        assert line.startswith("forget.py: step 2: its update has left weights that are not finite, on forget rows ")
        assert set(weights(tmp_path / "run")) == {"checkpoint-1"}


def test_an_infinite_loss_names_its_rows(young: Path, tmp_path: Path) -> None:
    """Rows 0 to 7, two a micro-batch and four a step; the loss is infinite where row 5 is."""
    model = load_model(str(young), torch.device("cpu"))
    rows = [{"input_ids": torch.arange(2, 6 + i), "labels": torch.arange(2, 6 + i)} for i in range(8)]
    batches = dataloader.StepBatches(rows, [], steps=2, batch_size=2, batches_per_step=2, seed=0, pad=0)
    step = next(n for n in (0, 1) if 5 in batches.forget_order[n])
    batch = next(batches[i]["rows"]["forget"] for i in range(4) if 5 in batches[i]["rows"]["forget"])

    def objective(tokens: Tokens, counts: Counts) -> Tensor:
        bad = (torch.bincount(tokens.row) == len(rows[5]["labels"]) - 1).any()
        return tokens.nll.sum() / counts.tokens + (torch.inf if bad else 0)

    how = Settings(steps=2, warmup_steps=1, lr=1e-3, gradient_accumulation_steps=2, seed=0, bf16=False, save_steps=1)
    with pytest.raises(
        FloatingPointError, match=rf"step {step + 1}: loss is inf, on forget rows {', '.join(map(str, sorted(batch)))};"
    ):
        train(model, Loss(objective), batches, how, tmp_path)


# ---- seeds ----


def test_a_seed_is_a_result(young: Path, undisturbed: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    """The same seed twice gives the same bits, another seed other ones, in a folder of its own."""
    words = command(young, "run").replace("save_dir=run", "output_dir=out num_epochs=5")
    run_in(tmp_path, f"python {words}")
    run_in(tmp_path, f"python {words} seed=7")
    first, second = sorted((tmp_path / "out/tiny").iterdir())
    assert second.name == f"{first.name}_seed=7"
    a, b = weights(first), weights(second)
    assert all(same(a[name], undisturbed[name]) for name in undisturbed)
    assert not any(same(a[name], b[name]) for name in a)
