"""What a step of the library's own code takes of memory, told without taking it: tensors without numbers, counted as they live.

The step runs under PyTorch's `FakeTensorMode`, where every operation gives tensors that have a size and no memory; their
storages are counted from when they are made until they are gone. What a kernel takes within itself is not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedConfig

from unlearn.geffect.meter import Meter
from unlearn.geffect.parts import RISKS
from unlearn.geffect.target import Target, Wanted
from unlearn.models.evaluating import enable_gradient_checkpointing
from unlearn.objectives.functions import ga, mean_nll, npo
from unlearn.objectives.loss import Loss
from unlearn.objectives.rows import Row, counts, forget_batch


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that live; `held` has each one's bytes and what made it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.held: dict[int, tuple[int, str]] = {}
        self.at_peak: list[tuple[int, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self._note(leaf, f"{func} {tuple(leaf.shape)} {leaf.dtype}")
        return found

    def _note(self, x: Tensor, what: str) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self.held:
            return
        self.held[key] = (storage.nbytes(), what)
        self.now += storage.nbytes()
        weakref.finalize(storage, self._gone, key)
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, list(self.held.values())

    def _gone(self, key: int) -> None:
        self.now -= self.held.pop(key)[0]

    def table(self) -> str:
        """What lived at the peak, in GiB, the most first."""
        sizes: Counter[str] = Counter()
        for size, what in self.at_peak:
            sizes[what] += size
        return "\n".join(f"{size / 2**30:9.3f}  {what}" for what, size in sizes.most_common(20))


def rows_of(n: int, tokens: int, labels: int, vocabulary: int, reference: bool = False) -> list[Row]:
    """Rows of one length, their last tokens labelled."""
    found = []
    for i in range(n):
        ids = (torch.arange(tokens) * 7 + i) % vocabulary
        row = {"input_ids": ids, "labels": ids.where(torch.arange(tokens) >= tokens - labels, -100)}
        found.append(row | ({"ref_nll": torch.ones(labels)} if reference else {}))
    return found


def trained(
    config: PreTrainedConfig, dtype: torch.dtype, bf16: bool, checkpointing: bool, rows: int, micro: Sequence[tuple[int, int]]
) -> Live:
    """Two steps of npo and gd with fused AdamW, as `StepTrainer` runs them.

    Args:
        rows: to forget of a micro-batch, and as many to retain.
        micro: tokens and label tokens of each micro-batch's rows.
    """
    batches = []
    for tokens, labels in micro:
        forget, retain = (rows_of(rows, tokens, labels, config.vocab_size, kind) for kind in (True, False))
        of_step = {"forget_counts": counts(forget * len(micro)), "retain_counts": counts(retain * len(micro))}
        batches.append(forget_batch(forget, retain, 0) | of_step)
    live, fake = Live(), FakeTensorMode(allow_non_fake_inputs=True)
    with fake, live:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").train()
        if checkpointing:
            enable_gradient_checkpointing(model)
        model.forward = torch.autocast("cpu", torch.bfloat16, enabled=bf16)(model.forward)  # as accelerate does
        loss, optimizer = Loss(partial(npo, beta=0.1), mean_nll), torch.optim.AdamW(model.parameters(), fused=True)
        for _ in range(2):
            for batch in batches:
                here = {k: fake.from_tensor(x) if isinstance(x, Tensor) else x for k, x in batch.items()}
                torch.stack(list(loss(model, here).values())).sum().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), torch.inf)  # the norm that is logged
            optimizer.step()
            optimizer.zero_grad()
    return live


def measured(
    config: PreTrainedConfig, dtype: torch.dtype, bf16: bool, wanted: Wanted, rows: int, tokens: int, labels: int
) -> Live:
    """A measurement of G-effects, of one batch each; run, for a `Meter` looks at numbers."""
    live = Live()
    with live:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        forget, held_out = (rows_of(rows, tokens, labels, config.vocab_size) for _ in range(2))
        risks = dict(zip(RISKS, (forget, held_out), strict=True))
        Meter(model, Target(Loss(ga), forget), risks, 0, wanted, bf16=bf16, batch_size=rows).measure()
    return live
