"""What the benchmarks share: clocks, counters, the rows' padding, the machine's own speed, and where all that was measured."""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from app.families import Family
from app.places import ROOT, find_path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# One process has one device, not torch's DataParallel over all.
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import dataloader
import settings
import utils
from unlearn.objectives.tokens import IGNORE

if TYPE_CHECKING:
    from omegaconf import DictConfig


def now() -> float:
    """Seconds, after the GPU, if there is one, has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def flop_counter() -> FlopCounterMode:
    """Counts matrix products and attention, that of the CPU's kernels too, which torch has no formula for."""
    aten = torch.ops.aten
    cpu_attention = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    }
    return FlopCounterMode(display=False, custom_mapping=cpu_attention)


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward_flops(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


def matrix_speed(size: int, dtype: torch.dtype, repeats: int = 3) -> float:
    """FLOPs a second of a product of two `size` x `size` matrices, the median of `repeats` after one that is not timed."""
    left, right = (torch.randn(size, size, device=utils.device(), dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    seconds = []
    for _ in range(1 + repeats):
        began = now()
        torch.mm(left, right, out=out)
        seconds.append(now() - began)
    return 2 * size**3 / median(seconds[1:])


def reset_peak() -> None:
    """Let `peak_memory` begin anew (without a GPU only where Linux lets a process do so)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def spread(values: list[float]) -> dict[str, Any]:
    return {"median": median(values), "min": min(values), "max": max(values), "values": values}


def times(ratio: dict[str, Any]) -> str:
    return f"{ratio['median']:.2f} ({ratio['min']:.2f}..{ratio['max']:.2f})"


# ---- where it was measured ----


def surroundings(seed: int) -> dict[str, Any]:
    """What the numbers depend on, beside the code: the machine, the versions, the commit, the command."""
    preloaded = [Path(name).name for name in os.environ.get("LD_PRELOAD", "").split()]
    return {
        "processor": processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "preloaded": preloaded or None,
        "versions": {"python": platform.python_version()} | utils.versions(),
        "commit": commit(),
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "seed": seed,
    }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", info.read_text(), re.MULTILINE) if info.exists() else []
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def commit() -> str:
    """The checkout's commit, and whether tracked files differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# ---- the command ----


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: needs to be a whole number of at least 1")
    return value


def prepare(cfg: DictConfig) -> Family:
    """Fill in what the family decides. Raises ValueError for what cannot work, before anything is loaded.

    It is forget.py's, without what concerns checkpoints: none is written.
    """
    family = settings.prepare(cfg, "forget")
    settings.check_forget_data(cfg)
    cfg.model_path = find_path(cfg.model_path)
    settings.check_checkpoint("model_path", cfg.model_path)
    return family


def padded(rows: list[dataloader.Row], pad_to: int | None, pad: int) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels`, (B, T) each on the device; T is `pad_to`, or the longest row's."""
    batch = dataloader.collate(rows, pad)
    missing = 0 if pad_to is None else pad_to - batch["input_ids"].shape[1]
    fill = {"input_ids": pad, "attention_mask": 0, "labels": IGNORE}
    return {key: F.pad(batch[key], (0, missing), value=value).to(utils.device()) for key, value in fill.items()}


@contextmanager
def attention(model: Any, kind: str) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation(kind)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def ratio(above: list[float], below: list[float]) -> dict[str, Any]:
    return spread([x / y for x, y in zip(above, below, strict=True)])


def reached(seconds: dict[str, list[float]], above: str, below: str, sign: str, bound: float) -> dict[str, Any]:
    found = ratio(seconds[above], seconds[below])
    met = found["median"] >= bound if sign == ">=" else found["median"] <= bound
    return {"above": above, "below": below, "sign": sign, "bound": bound, "ratio": found, "met": met}


def where_lines(results: dict[str, Any]) -> list[str]:
    where = results["surroundings"]
    preloaded = f"; preloaded {', '.join(where['preloaded'])}" if where["preloaded"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    attention = ", ".join(f"{name} {how}" for name, how in results["attention"].items())
    return [
        f"{where['gpu'] or where['processor']}; {where['threads']} threads{preloaded}",
        f"{versions}; commit {where['commit']}; {results['dtype']}; seed {where['seed']}",
        f"Attention: {attention}.",
    ]


def target_line(target: dict[str, Any], derived: Mapping[str, str] | None = None) -> str:
    """The page's line of a ratio and its target; `derived`: what cases that were not run are called."""
    names = [(derived or {}).get(target[key], target[key]) for key in ("above", "below")]
    met = "met" if target["met"] else "missed"
    sign = "at least" if target["sign"] == ">=" else "at most"
    return f"| {names[0]} | {names[1]} | {sign} {target['bound']:g} | {times(target['ratio'])} | {met} |"


def row_nlls(model: nn.Module, batch: dict[str, Tensor], bf16: bool) -> Tensor:
    """(B,) nats: the sum of l_t over each row's label tokens, from the logits of all positions."""
    with torch.autocast(utils.device().type, torch.bfloat16, enabled=bf16):
        out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    logits, labels = out.logits[:, :-1].float(), batch["labels"][:, 1:]  # (B, T-1, V), (B, T-1)
    nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none")
    return nll.view(labels.shape).sum(1)
