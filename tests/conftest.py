"""What the tests share: a folder to run commands in as a user types them, and tiny models trained once a session."""

from __future__ import annotations

import gc
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from fcntl import LOCK_EX, flock
from functools import wraps
from itertools import takewhile
from pathlib import Path
from typing import Any

import devices
import pytest
from processes import run_script

pytest.register_assert_rewrite("slow_geffect")

# MKL's kernels on every processor: in float32, as in transformers' norms, others round otherwise, and 1e-9 is compared with.
os.environ.setdefault("MKL_CBWR", "AVX2")

devices.prepare(os.environ, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))

FIRST = ("demo", "training", "sharding", "sweeps", "interruptions", "rules", "robustness", "extending", "tutorial", "lm_eval")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that neither of the two processes is left with one at the end."""
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in FIRST)


def pytest_collection_finish() -> None:
    """What is imported by now stays: leave it out of every later collection."""
    gc.collect()
    gc.freeze()


commands_on_cpu = False  # those of the test that is running


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """Where a test's commands run: from before its fixtures are made."""
    global commands_on_cpu
    commands_on_cpu = devices.is_on_cpu(item)
    return (yield)


def run_in(folder: Path, command: str, check: bool = True, fresh: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a command line in `folder` as typed, `python` and `torchrun` being those of this environment (see `devices`).

    Args:
        fresh: start a new interpreter, or torchrun, also where forks would do.
    """
    words = shlex.split(command)
    env = devices.of_command(os.environ, words, commands_on_cpu) | {"HF_HUB_OFFLINE": "1"}
    options = list(takewhile(lambda word: word.startswith("--"), words[1:]))
    script = words[1 + len(options) :]
    if not fresh and script[0].endswith(".py"):
        done = run_script(folder, script, env, devices.processes(words) if words[0] == "torchrun" else None)
    else:
        program = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}[words[0]]
        done = subprocess.run([*program, *words[1:]], cwd=folder, capture_output=True, text=True, env=env)
    assert not check or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def make_workplace(folder: Path) -> Path:
    """A folder that looks like the project's own from inside, and keeps what commands write out of it."""
    for file in ROOT.glob("*.py"):
        (folder / file.name).symlink_to(file)
    return folder


@pytest.fixture(scope="session")
def young(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model after three epochs: enough for what does not depend on knowing anything.

    One for all workers, who have a copy each: what is measured of a model is written beside it.
    """
    base, folder = tmp_path_factory.getbasetemp(), tmp_path_factory.mktemp("young") / "model"
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "young_of_all"
    with shared.with_suffix(".lock").open("w") as lock:
        flock(lock, LOCK_EX)
        if not (shared / "model.safetensors").exists():  # written last
            run_in(ROOT, f"python finetune.py model_family=tiny num_epochs=3 save_dir={shared}")
    shutil.copytree(shared, folder)
    return folder


def lifted(function: Callable[..., Any]) -> Callable[..., Any]:
    """A cast or softmax that leaves float64 tensors in float64."""
    import torch

    @wraps(function)
    def keep(x: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(x, torch.Tensor) and x.dtype == torch.float64:
            if function.__name__ == "float":
                return x
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in kwargs.items()}
        return function(x, *args, **kwargs)

    return keep


def doubled(model: Any) -> Any:
    """The model in float64, but for its rotary frequencies, which transformers multiplies with float32 positions."""
    import torch

    model.double()
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq"):
            buffer.data = buffer.data.type(torch.float32)  # `float` is lifted in such tests
    return model


@pytest.fixture(scope="module")
def float64_throughout() -> Iterator[None]:
    """transformers' norms, softmax and routers drop to float32 inside a float64 model: here they don't, in any model."""
    import torch

    import utils

    utils.device()
    with pytest.MonkeyPatch.context() as patch:
        casts = ((torch.Tensor, "float"), (torch.Tensor, "to"), (torch.nn.functional, "softmax"), (torch, "softmax"))
        for owner, name in casts:
            patch.setattr(owner, name, lifted(getattr(owner, name)))
        yield
