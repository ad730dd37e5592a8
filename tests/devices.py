"""Which device each kind of test has, told by the environment of its processes.

This process, and so every unit test, is on the CPU. Commands have the GPUs that the tests were started with, but those of more
processes than there are GPUs (nccl takes no two of one), and those of tests marked `on_cpu` or `several_processes`: they
compare numbers with this process's, with other numbers of processes', or bits, and so are all on one device.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from functools import cache

import pytest

VISIBLE = "CUDA_VISIBLE_DEVICES"
KEPT = "CUDA_VISIBLE_DEVICES_OF_COMMANDS"  # what it was; inherited by xdist's workers
ALL = "all"  # it was not set
# torch then asks the driver's library whether there is a GPU, and starts nothing that a fork could not use.
ASKING = "PYTORCH_NVML_BASED_CUDA_CHECK"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")


def prepare(env: MutableMapping[str, str], cores: int) -> None:
    """Hide the GPUs from this process, and keep its threads, and its commands', from starving the other workers'."""
    env.setdefault(KEPT, env.get(VISIBLE, ALL))
    env.update({VISIBLE: "", ASKING: "1"})
    most = max(1, cores // int(env.get("PYTEST_XDIST_WORKER_COUNT", 1)))
    for name in THREADS:
        asked = env.get(name, "1")  # tiny models gain nothing by more
        env[name] = str(min(int(asked) if asked.isdecimal() else 1, most))


def of_command(env: Mapping[str, str], words: Sequence[str], on_cpu: bool = False) -> dict[str, str]:
    """The environment of a command: the GPUs as they were before `prepare`, or none."""
    shown = {name: value for name, value in env.items() if name not in (VISIBLE, KEPT, ASKING)}
    there = env.get(KEPT, ALL)
    if on_cpu or (processes(words) > 1 and processes(words) > gpus(there)):
        return shown | {VISIBLE: ""}
    return shown if there == ALL else shown | {VISIBLE: there}


def processes(words: Sequence[str]) -> int:
    """How many a command line asks torchrun for."""
    asked = [word.partition("=")[2] for word in words if word.startswith("--nproc_per_node=")]
    return int(asked[0]) if asked else 1


@cache
def gpus(there: str) -> int:
    """How many GPUs commands have, asked in a process of its own: one that has started CUDA can't be forked."""
    env = {name: value for name, value in os.environ.items() if name != VISIBLE}
    env |= {} if there == ALL else {VISIBLE: there}
    code = "import torch; print(torch.cuda.device_count())"
    return int(subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout)


def is_on_cpu(item: pytest.Item) -> bool:
    """Whether a test is marked to have its commands on the CPU, its fixtures' too."""
    several = item.get_closest_marker("several_processes") is not None
    return item.get_closest_marker("on_cpu") is not None or (several and gpus(os.environ.get(KEPT, ALL)) < 2)
