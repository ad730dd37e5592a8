"""What a measurement asks of a device: one float32 sum at a time, and no waiting for it batch by batch or tensor by tensor."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import ROOT
from torch import Tensor

sys.path.insert(0, str(ROOT / "benchmarks"))

from launches import launches, llama, random_rows

from unlearn.geffect import risks
from unlearn.geffect.meter import Meter
from unlearn.geffect.target import Target, Wanted
from unlearn.objectives.functions import kl, mean_nll, npo
from unlearn.objectives.loss import Loss
from unlearn.passes.batches import set_batches

WAYS = {"norms": Wanted(), "without norms": Wanted(norms=False), "plain": Wanted(instances=False)}


def meter_of(layers: int, dtype: torch.dtype, wanted: Wanted, batch_size: int = 16, **more: Any) -> Meter:
    rows = random_rows(8, 128)
    target = Target(Loss(objective=mean_nll, retain=mean_nll), rows, random_rows(4, 128))
    model = llama(layers, dtype, "eager")
    return Meter(model, target, {"unlearn": rows, "retain": rows}, 0, wanted, batch_size=batch_size, **more)


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Without the collector of cycles, that what a cycle holds is seen."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("wanted", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("offload", [False, True])
def test_one_sum_at_a_time(monkeypatch: pytest.MonkeyPatch, uncollected: None, wanted: Wanted, offload: bool) -> None:
    """Of half-precision weights, over two measurements and an update; what still has the sums' names does not hold them."""
    made: list[weakref.ref[Tensor]] = []
    names = []
    real = risks.zeros

    def zeros(*args: Any) -> risks.Vectors:
        assert [x for x in made if x() is not None] == []
        found = real(*args)
        made.extend(map(weakref.ref, found.values()))
        names.append(found)
        return found

    monkeypatch.setattr(risks, "zeros", zeros)
    meter = meter_of(1, torch.bfloat16, wanted, offload=offload)
    for _ in range(2):
        meter.measure()
        meter.start_update()
        meter.update_effect()
    assert [x for x in made if x() is not None] == []
    sums = 2 + (wanted.norms or not wanted.instances)
    assert len(made) == 2 * sums * len(meter.parameters)


def waits(meter: Meter) -> dict[str, int]:
    meter.measure()  # finds the modules
    with launches() as found:
        meter.measure()
        meter.start_update()
        meter.update_effect()
        meter.risk_values()
    return dict(found.waits)


@pytest.mark.parametrize("wanted", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_measurement_waits_no_oftener_with_more_batches_or_tensors(wanted: Wanted, dtype: torch.dtype) -> None:
    of_one = waits(meter_of(1, dtype, wanted))
    assert of_one == waits(meter_of(1, dtype, wanted, batch_size=2))
    assert of_one == waits(meter_of(3, dtype, wanted))
    assert sum(of_one.values()) <= 16


def test_a_training_step_does_not_wait() -> None:
    """Of forget rows, retain rows and a reference: only its line in the log is read."""
    model, reference = llama(2, torch.float32, "eager"), llama(2, torch.float32, "eager")
    rows = [row | {"ref_nll": torch.ones(int((row["labels"] != -100).sum()))} for row in random_rows(4, 128)]
    loss = Loss(objective=lambda tokens, counts: npo(tokens, counts, beta=0.1), retain=mean_nll)
    [batch] = set_batches(rows, [], 4, 0)
    with launches() as found:
        sum(loss(model, batch).values(), torch.zeros(())).backward()
    assert found.waits.total() == 0
    with launches() as found:
        Loss(objective=mean_nll, retain=kl, reference=reference)(model, batch)
    assert found.waits.total() == 0


def test_waits_are_seen() -> None:
    x = torch.arange(3.0)
    with launches() as found:
        x.sum().item()
        bool(x[0] > 1)
        x.nonzero()
        x[x > 1]
        x.tolist()
    assert found.waits.total() >= 5
