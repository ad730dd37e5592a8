"""A process and its fellows: which of them this is, its device, what it says, and how it takes leave.

Nothing here imports torch before it must: a mistyped command is answered at once.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import TYPE_CHECKING

from unlearn.io.signals import PATIENCE

if TYPE_CHECKING:
    import torch

LEAVE = 10.0  # seconds that a process that has failed waits for the others
REPEATABLE = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "FLASH_ATTENTION_DETERMINISTIC": "1"}


def processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main_process() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def say(message: str) -> None:
    """Tell the user, once whatever the number of processes."""
    if is_main_process():
        print(message, file=sys.stderr)


def device() -> torch.device:
    """This process's device; the first call starts the process group where torchrun made several."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE).device


def model_device(parallel: str) -> torch.device:
    """Where a model is loaded to: this process's device, or the CPU where it is to be split over several."""
    import torch

    here = device()
    return torch.device("cpu") if parallel == "fsdp" and processes() > 1 else here


def use_bfloat16(dtype: str, of_family: str | None) -> bool:
    """Whether to train under bfloat16 autocast: `auto` is the family's dtype, else what the device has."""
    import torch

    dtype = (of_family or "auto") if dtype == "auto" else dtype
    if dtype != "auto":
        return dtype == "bfloat16"
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)  # a T4 or V100 only emulates it, many times slower
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def precision_of(dtype: str, of_family: str | None) -> str:
    """What is computed in: float64, bfloat16 (autocast) or float32."""
    return dtype if dtype == "float64" else "bfloat16" if use_bfloat16(dtype, of_family) else "float32"


def device_name() -> str:
    """The GPU's name; of a CPU the widest instructions that PyTorch uses on it."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.backends.cpu.get_cpu_capability()}"


def be_deterministic(wanted: bool) -> None:
    """Have torch use algorithms that give the same bits each time, or (a sweep's next job) what is fastest again."""
    os.environ.update(REPEATABLE if wanted else {})  # read when CUDA starts
    if wanted or "torch" in sys.modules:
        import torch

        torch.use_deterministic_algorithms(wanted)
        torch.backends.cudnn.deterministic = wanted


def end_processes(failed: bool = False) -> None:
    """Take leave of the other processes, if torchrun made several: NCCL warns of a process that ends without.

    Args:
        failed: the others may wait for something else by now: stay no longer than `LEAVE`.
    """
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return
    if not failed:
        distributed.barrier()  # who ends first closes connections that the others still listen on
    leave = threading.Thread(target=distributed.destroy_process_group, daemon=True)
    leave.start()
    leave.join(LEAVE if failed else None)


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "accelerate", "datasets")}
