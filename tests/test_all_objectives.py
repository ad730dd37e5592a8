"""Every method and retain term of config, found there: a new one is tested without an edit.

The gradient that training forms (one step, cut in micro-batches) is the plain gradient of the whole set, and so are the sums
of the tap (layers x instances) and of the forward-mode pass; with all weights and with adapters. In float64 to 1e-9.
"""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, run_in
from slow_geffect import BESIDE, FORGET, PAD, RISK_ROWS, build, random_rows
from torch import Tensor

from app.building import build_loss, compares, needs
from app.compose import given
from app.methods import choices, retain_terms
from dataloader import StepBatches
from unlearn.geffect.meter import Meter
from unlearn.geffect.parts import RISKS
from unlearn.geffect.target import Target, Wanted
from unlearn.models.adapters import LoRA, add_lora, has_adapters
from unlearn.objectives.rows import Row
from unlearn.passes.forcing import Pass, with_ref_nll

pytestmark = pytest.mark.usefixtures("float64_throughout")
METHODS = choices("method")
# each method as it is, and each retain term beside a method that looks at a layer, for the terms that do
CASES = [*((method, None) for method in METHODS), *(("rmu", term) for term in retain_terms())]


class Refuser:
    """Stands in for the tokenizer of a refusal."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [5, 11]}


@cache
def settings_of(method: str, term: str | None) -> Any:
    """Its YAML, at layers that the small model has."""
    words = [f"method={method}", "model_family=tiny", *([] if term is None else [f"retain={term}"])]
    layer = given("forget", words).method.get("layer")
    small = [] if layer is None else ["method.layer=1"] if isinstance(layer, int) else ["method.layer=[1,2]"]
    return given("forget", [*words, *small])


def answered(rows: list[Row], several: bool) -> list[Row]:
    """With a second answer each; the first with three where `several`."""
    others = random_rows(len(rows) + 2, 8)
    found = [row | {"second": second} for row, second in zip(rows, others, strict=False)]
    return [found[0] | {"second": others[-3:]}, *found[1:]] if several else found


def models(lora: bool, kind: str = "llama") -> tuple[Any, Any]:
    """A model and what it is compared with: another, or itself without its adapters."""
    model = build(kind)
    reference = copy.deepcopy(model).requires_grad_(False)
    if lora:
        add_lora(model, LoRA(r=2, alpha=4, dropout=0.0), 0, "nowhere")
        model.double()
        reference = model
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64) * p.requires_grad)
    return model, reference


def target_of(method: str, term: str | None, lora: bool, several: bool = False, kind: str = "llama") -> tuple[Any, Target]:
    settings = settings_of(method, term)
    model, reference = models(lora, kind)
    kept = reference if compares(settings.method, settings.retain) else None
    loss = build_loss(settings.method, settings.retain, 0, model, kept, Refuser())  # type: ignore[arg-type]
    frozen = reference if not has_adapters(reference) else models(False, kind)[1]
    how = Pass(frozen, PAD, 2)
    kinds = ((settings.method, FORGET), (settings.retain, BESIDE))
    forget, beside = (with_ref_nll(how, answered(rows, several) if "second" in needs(group) else rows) for group, rows in kinds)
    return model, Target(loss, forget, beside if loss.retain is not None else [])


def trained_gradient(model: Any, target: Target, size: int) -> dict[str, Tensor]:
    """Of one step of all rows, `size` at once, as training sums it."""
    n = len(target.forget)
    retain = [*target.retain]
    batches = StepBatches([*target.forget], retain, 1, size, -(-n // size), 0, PAD)
    assert batches.step_size == n
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    for i in range(len(batches)):
        sum(target.loss(model, batches[i]).values()).backward()  # type: ignore[union-attr]
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named.items()}
    model.zero_grad()
    return found


def close(a: Tensor, b: Tensor, bound: float = 1e-9) -> bool:
    return bool((a - b).abs().max() <= bound * b.abs().max())


@pytest.mark.parametrize("lora", [False, True], ids=["weights", "adapters"])
@pytest.mark.parametrize(("method", "term"), CASES)
def test_one_gradient_in_every_way(method: str, term: str | None, lora: bool) -> None:
    model, target = target_of(method, term, lora)
    target = Target(target.loss, target.forget[:4], target.retain)
    whole, cut = (trained_gradient(model, target, size) for size in (4, 2))
    assert any(g.abs().max() > 0 for g in whole.values())
    flat = [torch.cat([g.flatten() for g in one.values()]) for one in (cut, whole)]
    assert close(flat[0], flat[1])


def asked_twice(method: str, term: str | None) -> bool:
    settings = settings_of(method, term)
    return any("second" in needs(group) for group in (settings.method, settings.retain))


@pytest.mark.parametrize("lora", [False, True], ids=["weights", "adapters"])
@pytest.mark.parametrize(("method", "term"), CASES)
def test_tap_and_forward_mode_are_the_plain_way(method: str, term: str | None, lora: bool) -> None:
    """Also where a row has several second answers."""
    for several in [False, True] if asked_twice(method, term) else [False]:
        compare(method, term, several, lora)


def compare(method: str, term: str | None, several: bool, lora: bool) -> None:
    model, target = target_of(method, term, lora, several)
    plain = Meter(model, target, RISK_ROWS, PAD, Wanted(instances=False), batch_size=5).measure()["steps"]["geffect"]
    meter = Meter(model, target, RISK_ROWS, PAD, Wanted(), {("same", None): target}, batch_size=2)
    tables = meter.measure()
    want = torch.tensor(plain.tolist(), dtype=torch.float64)
    assert want.abs().min() > 0
    parts = {name: tables[name].groupby("risk", sort=False)["geffect"].sum() for name in ("layers", "instances", "sweep")}
    for name, found in parts.items():
        norms = tables["steps"]["objective_norm"] * tables["steps"]["risk_norm"]
        values = torch.tensor([found[risk] for risk in RISKS], dtype=torch.float64)
        assert ((values - want).abs() <= 1e-9 * torch.tensor(norms.tolist())).all(), name


# ---- two processes ----


@pytest.mark.several_processes
@pytest.mark.parametrize("trained", ["weights", pytest.param("adapters", marks=pytest.mark.slow)])
def test_two_processes_form_the_same(tmp_path: Path, trained: str) -> None:
    """The plain G-effects, the forward-mode ones, and the step that training makes, each process with its rows."""
    script = ROOT / "tests" / "all_in_two_processes.py"
    out = run_in(ROOT, f"torchrun --standalone --nproc_per_node=2 {script} {tmp_path} {trained}").stdout
    found: dict[str, list[float]] = json.loads(out.splitlines()[-1])
    assert list(found) == [f"{method} {term}" for method, term in CASES]
    assert {name: off for name, off in found.items() if max(off) > 1e-9} == {}
