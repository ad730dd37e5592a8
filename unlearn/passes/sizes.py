"""How many rows are run at once: cut by rows or by padded tokens, chosen from a GPU's free memory, halved when it runs out.

A pass is of one of four kinds, which differ in what a token takes: `gradients` (with a backward pass), `tangents` (forward
mode), `losses` (teacher forcing), `decoding`.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import PreTrainedModel

from unlearn.models import plan
from unlearn.models.adapters import has_adapters
from unlearn.models.evaluating import unwrap
from unlearn.models.sharding import is_sharded

Kind = Literal["gradients", "tangents", "losses", "decoding"]
T = TypeVar("T")

ROWS = 16  # of a batch where nothing is said and there is no GPU: a CPU
MORE = 4  # times as much is decoded at once: a step reads all weights for a token a row, however many rows there are
HEADROOM = 0.8  # of a GPU's free memory, that a batch may take
BUSY = 2e13  # operations of a forward pass that keep a GPU busy for longer than it takes to launch them
ENOUGH, DECODED = 1 << 11, 1 << 17  # tokens that are never too many; that are decoded at once, keys and values counted
DIRECTIONS = 2  # of the forward-mode pass


@dataclass(frozen=True)
class Size:
    """At most so many rows at once, and at most so many tokens with their padding; None: as many as there are.

    Raises:
        ValueError: one is below 1.
    """

    rows: int | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        for key, value in (("batch_size", self.rows), ("tokens_per_batch", self.tokens)):
            if value is not None and value < 1:
                raise ValueError(f"{key}={value}: needs to be at least 1, or None")

    def __str__(self) -> str:
        return f"{self.rows} rows" if self.tokens is None else f"{self.tokens} tokens"

    def __mul__(self, n: int) -> Size:
        return Size(*(None if x is None else n * x for x in (self.rows, self.tokens)))

    def holds(self, rows: int, width: int) -> bool:
        """Whether so many rows, padded to `width` tokens, are not too many. One row always stands."""
        fits = (self.rows is None or rows <= self.rows) and (self.tokens is None or rows * width <= self.tokens)
        return rows == 1 or fits

    def half(self, rows: int, width: int) -> Size:
        """Half of what was too much, a batch of at least two rows; in tokens, where batches are cut by them."""
        if self.tokens is None:
            return replace(self, rows=rows // 2)
        return replace(self, tokens=min(self.tokens, rows * width) // 2)


def cut(numbers: Sequence[int], widths: Sequence[int], size: Size) -> list[list[int]]:
    """The row numbers, in their order, in batches that the size holds; `widths` has each row's tokens, by its number."""
    batches: list[list[int]] = []
    widest = 0
    for i in numbers:
        widest = max(widest, widths[i])
        if batches and size.holds(len(batches[-1]) + 1, widest):
            batches[-1].append(i)
        else:
            batches.append([i])
            widest = widths[i]
    return batches


# ---- by a GPU's memory ----


def bytes_a_token(kind: Kind, shape: plan.Shape, work: plan.Work, width: int) -> float:
    """What a padded token takes at a pass's peak, by the plan's arithmetic, as if each had a label.

    Args:
        width: of the longest row, in tokens.
    """
    layer = plan.activations(shape, replace(work, checkpointing=False, gpu=True), 1, width) / shape.layers
    if kind == "gradients":
        passing = plan.in_a_layer(shape, work, 1, width)
        return plan.activations(shape, work, 1, width) + passing + plan.logits(shape, 1, 5 + work.bf16 / 2)
    if kind == "tangents":  # in the weights' precision; attention is not fused
        whole = plan.activations(shape, replace(work, bf16=False, checkpointing=False, gpu=False), 1, width) / shape.layers
        return (1 + DIRECTIONS) * (whole + plan.logits(shape, 1, 4))
    keys = 2.0 * plan.run_in(work) * shape.key_values * shape.layers
    return layer + 2 * keys + (plan.logits(shape, 1, 5 + work.bf16 / 2) if kind == "losses" else 0)


def tokens_that_fit(kind: Kind, model: PreTrainedModel, bf16: bool, width: int, free: float) -> int:
    """How many padded tokens of rows of at most `width` a pass may run at once in `free` bytes; no more than are of use."""
    inner = unwrap(model)
    shape = plan.shape_of_model(inner)
    weight = next(inner.parameters()).element_size()
    work = plan.Work(1, 1, 1, weight=weight, bf16=bf16, lora=int(has_adapters(inner)))
    work = replace(work, checkpointing=inner.is_gradient_checkpointing)
    once = 2.0 * plan.FULL * shape.vocabulary * shape.hidden if kind == "gradients" else 0.0  # a tied head's, both uses
    if bf16 and weight == plan.FULL and kind != "tangents":  # autocast's copies of the weights
        once += plan.HALF * shape.parameters
    precision = max(1, weight / plan.FULL)  # the arithmetic knows no float64
    found = (HEADROOM * free - once) / (precision * bytes_a_token(kind, shape, work, width))
    most = DECODED if kind == "decoding" else max(ENOUGH, BUSY / (2 * shape.parameters))
    return max(1, int(min(found, most)))


def free_memory(device: torch.device) -> float:
    """Bytes of a GPU that a pass can still have: those that are free, and those that PyTorch holds and does not use."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return float(torch.cuda.mem_get_info(device)[0] + kept)


class Budget:
    """What is run at once of a model's passes, by their kind: what was asked, or what fits; and half of what did not.

    Each process has its own. A model in shards is run by all together: there they have the least of all, and none halves.
    """

    def __init__(self, model: PreTrainedModel, bf16: bool, asked: Size) -> None:
        self.model, self.bf16, self.asked = model, bf16, asked
        self.halved: dict[Kind, Size] = {}

    def size(self, kind: Kind, width: int) -> Size:
        """Of a pass that begins now, over rows of at most `width` tokens."""
        known = self.halved.get(kind)
        asked = known or (self.asked * MORE if kind == "decoding" else self.asked)
        device = self.model.device
        if self.asked.tokens is not None:
            return asked
        if device.type != "cuda":
            return asked if asked.rows else Size(ROWS * MORE if kind == "decoding" else ROWS)
        try:
            tokens = tokens_that_fit(kind, self.model, self.bf16, width, free_memory(device))
        except (AttributeError, TypeError):  # a model whose configuration the arithmetic can't read
            return asked if asked.rows or asked.tokens else Size(ROWS)
        if is_sharded(self.model):
            tokens = min(gather_object([tokens]))
        return replace(asked, tokens=min(tokens, asked.tokens or tokens))

    def can_halve(self, rows: int) -> bool:
        """Whether a batch of so many rows that did not fit can be run in parts."""
        return rows > 1 and not is_sharded(self.model)

    def halve(self, kind: Kind, what: str, size: Size, rows: int, width: int) -> Size:
        """Note that a batch of so many rows was too much for a size, say so, free what can be; returns the new size."""
        self.halved[kind] = smaller = size.half(rows, width)
        state = PartialState()
        who = f"process {state.process_index}: " if state.num_processes > 1 else ""
        old = Size(rows) if size.tokens is None else Size(None, rows * width)
        tqdm.write(f"{who}{what}: out of memory with {old} at once; goes on with {smaller}", file=sys.stderr)
        gc.collect()  # a graph that was not run to its end may be in cycles
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        return smaller


# ---- passes that meet with it ----


def each(
    budget: Budget,
    kind: Kind,
    what: str,
    numbers: Sequence[int],
    widths: Sequence[int],
    planned: Callable[[list[int], Size], list[list[int]]],
    measure: Callable[[list[int]], T],
) -> Iterator[tuple[list[int], T]]:
    """`measure` on batches of the row numbers as `planned` makes them; a batch that does not fit is run in parts.

    Raises:
        torch.OutOfMemoryError: one row alone does not fit.
    """
    size = budget.size(kind, max((widths[i] for i in numbers), default=1))
    batches = planned(list(numbers), size)
    while batches:
        batch = batches[0]
        try:
            found = measure(batch)
        except torch.OutOfMemoryError:
            if not budget.can_halve(len(batch)):
                raise
        else:
            yield batch, found
            batches = batches[1:]
            continue
        # past the `except`, which keeps what the pass had made
        size = budget.halve(kind, what, size, len(batch), max(widths[i] for i in batch))
        batches = planned([i for one in batches for i in one], size)
