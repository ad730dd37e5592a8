"""What a training step and a tapped batch ask of a device: operations launched, and how often the host waits for it.

    python benchmarks/launches.py [--layers 16]

A Llama of random weights, many layers and small matrices, on the CPU: counts are those of any width. An operation that makes
no view is one launch; `milliseconds` is all the time of one, which at this width is that of Python and of launching, the
best of `--rounds`. Copies to the device that wait are not seen on a CPU.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from measuring import now  # which finds the package, too
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import LlamaConfig, LlamaForCausalLM

from unlearn.geffect import meter
from unlearn.geffect.meter import Meter, Target, Wanted
from unlearn.geffect.tap import Tap
from unlearn.models.evaluating import evaluating
from unlearn.objectives.functions import ga, mean_nll
from unlearn.objectives.loss import Loss
from unlearn.objectives.rows import Row
from unlearn.passes import batches as passes_batches
from unlearn.passes.batches import set_batches

aten = torch.ops.aten
# What a GPU's host waits in: the size of what comes out, or a number itself, is asked for.
WAITS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.equal, aten.is_nonzero}


class Launches(TorchDispatchMode):
    """Counts, while entered, the operations that are launched, by name, and those that the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in WAITS or func is aten.repeat_interleave.Tensor and not (kwargs or {}).get("output_size"):
            self.waits[func.overloadpacket.__name__] += 1
        elif func is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.waits["index by a mask"] += 1
        if not func.is_view:
            self.launched[func.overloadpacket.__name__] += 1
        return func(*args, **kwargs or {})


@contextmanager
def launches() -> Iterator[Launches]:
    """The counts of what is done within; reading a tensor's numbers as a list, or on the CPU, is one wait.

    Rows are put together to batches on the CPU, where nothing is waited for: that is not counted.
    """
    found = Launches()

    def batches(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return set_batches(*args, **kwargs)

    def counted(name: str) -> Any:
        real = getattr(Tensor, name)

        def read(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            found.waits[name] += 1
            return real(self, *args, **kwargs)

        return patch.object(Tensor, name, read)

    apart = patch.object(meter, "set_batches", batches), patch.object(passes_batches, "set_batches", batches)
    with apart[0], apart[1], counted("tolist"), counted("cpu"), counted("numpy"), found:
        yield found


def random_rows(n: int, vocabulary: int) -> list[Row]:
    """Rows of 12 to 19 tokens, the latter half labelled."""
    draw = torch.Generator().manual_seed(0)
    rows = []
    for i in range(n):
        ids = torch.randint(3, vocabulary, (12 + i % 8,), generator=draw)
        labels = ids.clone()
        labels[: len(ids) // 2] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def llama(layers: int, dtype: torch.dtype, attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 128}
    config = LlamaConfig(**sizes, num_hidden_layers=layers, tie_word_embeddings=False)
    config._attn_implementation = attention
    model: nn.Module = LlamaForCausalLM(config)
    return model.to(dtype)


def cases(layers: int, weights: torch.dtype, bf16: bool) -> dict[str, Callable[[], Any]]:
    """What is counted, each as a call."""
    model, rows = llama(layers, weights), random_rows(16, 128)
    loss = Loss(objective=ga, retain=mean_nll)
    [forget], [retain] = set_batches(rows, [], 16, 0), set_batches([], rows, 16, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        for batch in (forget, retain):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                total = sum(loss(model, batch).values())
            total.backward()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()

    risks = {"unlearn": rows, "retain": random_rows(16, 128)}
    measuring = Meter(model, Target(Loss(objective=ga), rows), risks, pad=0, wanted=Wanted(norms=False), bf16=bf16)
    measuring.measure()
    tap = Tap(measuring.sites, measuring.directions, len(rows))

    def tapped() -> None:
        with measuring.trained(False), evaluating(model):
            measuring._backward(tap, forget)

    return {"training step, 2 micro-batches": step, "tapped batch": tapped, "measurement, 1 batch a set": measuring.measure}


def count(do: Callable[[], Any], rounds: int) -> tuple[Launches, float]:
    """The counts of one call, and the seconds of the fastest of `rounds` others."""
    do()
    with launches() as found:
        do()
    seconds = []
    for _ in range(rounds):
        began = now()
        do()
        seconds.append(now() - began)
    return found, min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--most", type=int, default=0, help="also the so many most frequent operations (%(default)s)")
    args = parser.parse_args()
    print("| weights | what | launches | waits | milliseconds |", "|---|---|---|---|---|", sep="\n")
    for name, weights, bf16 in (("float32, autocast", torch.float32, True), ("bfloat16", torch.bfloat16, False)):
        for what, do in cases(args.layers, weights, bf16).items():
            found, seconds = count(do, args.rounds)
            total, waits = found.launched.total(), found.waits.total()
            print(f"| {name} | {what} | {total} | {waits} | {1e3 * seconds:.0f} |", flush=True)
            if args.most:
                print(found.launched.most_common(args.most), dict(found.waits))


if __name__ == "__main__":
    main()
