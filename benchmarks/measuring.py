"""What the benchmarks share: clocks, counters, the rows' padding, the machine's own speed, and their commands' options."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the scripts too, which import this first
# One process has one device, not torch's DataParallel over all.
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import dataloader
import utils
from app.checks import check_checkpoint
from app.data import check_unlearning_data, data_of
from app.families import Family
from app.filling import benchmark, with_family
from app.places import find_path
from app.settings import Forget
from unlearn.objectives.rows import collate
from unlearn.objectives.tokens import IGNORE


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


def matrix_speed(size: int, bf16: bool, repeats: int = 3) -> float:
    """FLOPs a second of a product of two `size` x `size` matrices, the median of `repeats` after one that is not timed."""
    dtype = torch.bfloat16 if bf16 else torch.float32
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


# ---- the command ----


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: needs to be a whole number of at least 1")
    return value


def options(
    doc: str | None, dtypes: Sequence[str], plain: tuple[str, str], data: str | None = None, seeded: str | None = None
) -> argparse.ArgumentParser:
    """A parser of the shared options; `plain`: that of the plain ways' attention, and who they are; `seeded`: by the seed."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, (attention, whose) = parser.add_argument, plain
    add("--model", required=True, metavar="FOLDER", help="the model to measure with, as from_pretrained loads it")
    layout = "data of TOFU's layout, such as data/sample" + ("" if data is None else " (%(default)s)")
    add("--data", required=data is None, default=data, metavar="FOLDER", help=layout)
    add("--family", default="smollm2-135m", help="an entry of config/model_config.yaml (%(default)s)")
    add("--split", default="forget05", choices=list(benchmark("tofu").unlearn), help="of the rows to forget (%(default)s)")
    add("--dtype", default=dtypes[0], choices=dtypes, help="bfloat16 is autocast (%(default)s)")
    add("--rounds", type=positive, default=3, help="each of the cases in turn (%(default)s)")
    kinds = ["sdpa", "eager", "flash_attention_2"]
    add(attention, default=kinds[0], choices=kinds, help=f"of {whose} (%(default)s, transformers' own)")
    add("--threads", type=positive, help="left out, as many as torch takes")
    add("--out", "--output", type=Path, metavar="FILE.md", help="where the page goes, and all numbers, FILE.json")
    if seeded is not None:
        add("--seed", type=int, default=42, help=f"of {seeded} (%(default)s)")
        size = 8192 if torch.cuda.is_available() else 4096
        add("--matrix", type=positive, default=size, help="rows of the large matrices (%(default)s on this machine)")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """What was given, whose threads torch takes from here on."""
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    return args


@contextmanager
def refused(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Within, a ValueError is told as what is wrong with the command."""
    try:
        yield
    except ValueError as error:
        parser.error(str(error))


def prepare(settings: Forget) -> tuple[Forget, Family]:
    """Fill in what the family decides. Raises ValueError for what cannot work, before anything is loaded.

    It is forget.py's, without what concerns checkpoints: none is written.
    """
    settings, family = with_family(settings)
    check_unlearning_data(data_of(settings), settings.split, settings.retain_holdout)
    settings = settings.model_copy(update={"model_path": find_path(settings.model_path)})
    check_checkpoint("model_path", settings.model_path)
    return settings, family


def padded(rows: list[dataloader.Row], pad_to: int | None, pad: int) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels`, (B, T) each on the device; T is `pad_to`, or the longest row's."""
    batch = collate(rows, pad)
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


def row_nlls(model: nn.Module, batch: dict[str, Tensor], bf16: bool) -> Tensor:
    """(B,) nats: the sum of l_t over each row's label tokens, from the logits of all positions."""
    _, labels, nll = all_nlls(model, batch, bf16)
    return nll.view(labels.shape).sum(1)


def all_nlls(model: nn.Module, batch: dict[str, Tensor], bf16: bool) -> tuple[Tensor, Tensor, Tensor]:
    """All positions' logits, (B x (T-1), V), labels, (B, T-1), and l_t, (B x (T-1),) nats, 0 where there is no label."""
    with torch.autocast(utils.device().type, torch.bfloat16, enabled=bf16):
        out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    logits, labels = out.logits[:, :-1].float().flatten(0, 1), batch["labels"][:, 1:]
    return logits, labels, F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="none")
