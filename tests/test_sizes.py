"""How much is run at once: no number depends on it, and a pass that runs out of memory goes on with half.

In float64 to 1e-10, in float32 to 1e-5. Memory is pretended: a hook raises where a pass has more tokens than it has room for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from slow_geffect import ALL, BESIDE, EOS, FORGET, NOISE, PAD, RETAIN, RISK_ROWS, build, pair, target_of, with_reference
from torch import nn

from app import building
from app.compose import given
from app.families import load_family
from app.filling import with_family
from dataloader import StepBatches
from unlearn.geffect.meter import Meter
from unlearn.geffect.target import Wanted
from unlearn.objectives.functions import kl, npo, rmu
from unlearn.objectives.loss import Loss
from unlearn.passes import batches, sizes
from unlearn.passes.batches import set_batches
from unlearn.passes.decoding import decode
from unlearn.passes.forcing import Forced, Pass, teacher_force
from unlearn.passes.sizes import Size, cut, tokens_that_fit

pytestmark = pytest.mark.usefixtures("float64_throughout")

BUDGETS: dict[str, dict[str, int]] = {
    "a row": {"tokens_per_batch": 1},
    "a few": {"tokens_per_batch": 27},
    "tokens and rows": {"tokens_per_batch": 45, "batch_size": 3},
    "all": {"tokens_per_batch": 10**6},
}
ROOM = 24  # tokens: two of the longest rows


def in_kind(kind: torch.dtype, name: str = "npo", term: str = "kl") -> tuple[Any, Any]:
    """A model and the target of an objective, in this precision."""
    model, reference = pair("llama")
    target = target_of(name, reference.to(kind), term)
    noise = None if target.loss.noise is None else target.loss.noise.to(kind)
    return model.to(kind), replace(target, loss=replace(target.loss, noise=noise))


def meter(model: Any, target: Any, wanted: Wanted = ALL, **more: Any) -> Meter:
    return Meter(model, target, RISK_ROWS, PAD, wanted, sweep={("own", None): target}, **more)


def assert_near(got: dict[str, pd.DataFrame], want: dict[str, pd.DataFrame], bound: float) -> None:
    assert got.keys() == want.keys()
    for name, table in want.items():
        for column in table.columns:
            a, b = got[name][column], table[column]
            if pd.api.types.is_float_dtype(b.dtype):
                near = bound * np.nanmax(np.abs(b.to_numpy()), initial=0)
                np.testing.assert_allclose(a.to_numpy(), b.to_numpy(), rtol=0, atol=near, err_msg=f"{name}, {column}")
            else:
                assert a.equals(b)


def shared_prompts() -> list[dict[str, torch.Tensor]]:
    """Several answers to a prompt, prompts of one length, and rows that are alone with theirs."""
    draw, rows = torch.Generator().manual_seed(5), []
    for length, answers in ((4, (3, 1, 5, 5)), (4, (2, 6)), (6, (4, 7, 2)), (9, (1,))):
        prompt = torch.randint(3, 23, (length,), generator=draw)
        for size in answers:
            answer = torch.cat([torch.randint(3, 23, (size,), generator=draw), torch.tensor([EOS])])
            labels = torch.cat([torch.full((length,), -100), answer])
            rows.append({"input_ids": torch.cat([prompt, answer]), "labels": labels})
    return [*rows, *FORGET]


@contextmanager
def room(model: nn.Module, tokens: int, backward: bool = False) -> Iterator[list[int]]:
    """No pass has room for more tokens, those in its cache counted; `backward`: that shows at the backward pass's end."""
    tried: list[int] = []

    def refuse(*_: Any) -> None:
        raise torch.OutOfMemoryError("out of memory on purpose")

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        tried.append(kwargs.get("attention_mask", kwargs["input_ids"]).numel())
        if not backward and tried[-1] > tokens:
            refuse()

    def after(_: nn.Module, args: Any, output: Any) -> None:
        if backward and tried and tried[-1] > tokens and output.requires_grad:
            output.register_hook(refuse)

    handles: list[Any] = [model.register_forward_pre_hook(before, with_kwargs=True)]
    handles.append(model.get_input_embeddings().register_forward_hook(after))  # type: ignore[operator]
    try:
        yield tried
    finally:
        for handle in handles:
            handle.remove()


# ---- sizes ----


def test_rows_are_cut_so_that_each_batch_is_held() -> None:
    widths = [9, 9, 40, 7, 5, 5, 3, 3, 3, 1]
    order = sorted(range(10), key=lambda i: -widths[i])
    for size in (Size(), Size(3), Size(None, 20), Size(2, 30), Size(None, 1)):
        found = cut(order, widths, size)
        assert [i for batch in found for i in batch] == order
        for batch, then in zip(found, [*found[1:], []], strict=True):
            wide = len(batch) * max(widths[i] for i in batch)
            assert len(batch) == 1 or (len(batch) <= (size.rows or 10) and wide <= (size.tokens or 10**9))
            more = [*batch, *then[:1]]  # no batch had room for the next row
            held = size.holds(len(more), max(widths[i] for i in more))
            assert not (then and held)
    assert cut(order, widths, Size(None, 20))[0] == [2]  # too long for it, and alone
    assert Size(16).half(5, 9) == Size(2)
    assert (Size(16, 4096).half(16, 100), Size(None, 90).half(16, 100)) == (Size(16, 800), Size(None, 45))
    for wrong in ({"rows": 0}, {"tokens": -1}):
        with pytest.raises(ValueError, match="needs to be at least 1"):
            Size(**wrong)


@pytest.mark.parametrize("equally_many", [False, True])
def test_processes_may_cut_their_rows_otherwise(monkeypatch: pytest.MonkeyPatch, equally_many: bool) -> None:
    """Each row is one process's, whatever the others' sizes; of a model in shards all have equally many batches."""
    found = []
    for process, tokens in enumerate((1, 25, 1000) if not equally_many else (25, 25, 25)):
        monkeypatch.setattr(batches, "PartialState", lambda at=process: SimpleNamespace(process_index=at, num_processes=3))
        found.append(set_batches(FORGET, RETAIN[:2], None, PAD, equally_many, tokens))
    weighed = [batch for part in found for batch in part if batch["forget_counts"] != (float("inf"),) * 2]
    assert sorted(i for batch in weighed for i in batch["index"].tolist()) == list(range(7))
    if equally_many:
        assert len({tuple(batch["n_forget"] > 0 for batch in part) for part in found}) == 1


def test_what_fits_is_the_plans_arithmetic() -> None:
    """More memory, more tokens, up to what is of use; passes that keep more hold fewer; a row always stands."""
    model = build("llama")
    found = {kind: [tokens_that_fit(kind, model, False, 50, free) for free in (0, 1e6, 2e6, 1e15)] for kind in KINDS}
    for kind, (least, some, more, most) in found.items():
        assert (least, most) == (1, sizes.DECODED if kind == "decoding" else int(sizes.BUSY / (2 * model.num_parameters())))
        assert 1 < some < more < most
    assert found["gradients"][1] < found["losses"][1] < found["decoding"][1]


KINDS: tuple[sizes.Kind, ...] = ("gradients", "tangents", "losses", "decoding")


def test_on_a_gpu_it_is_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that were asked for are a bound beside; what was halved stays so, whatever is free later."""
    model = build("llama")
    on_gpu: Any = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    monkeypatch.setattr(sizes, "tokens_that_fit", lambda kind, model, bf16, width, free: int(free))
    monkeypatch.setattr(sizes, "is_sharded", lambda model: False)
    free = {"bytes": 1000.0}
    monkeypatch.setattr(sizes, "free_memory", lambda device: free["bytes"])
    assert sizes.Budget(on_gpu, False, Size()).size("losses", 9) == Size(None, 1000)
    assert sizes.Budget(on_gpu, False, Size(3)).size("losses", 9) == Size(3, 1000)
    assert sizes.Budget(on_gpu, False, Size(3, 70)).size("decoding", 9) == Size(12, 280)
    budget = sizes.Budget(on_gpu, False, Size())
    budget.halved["losses"] = Size(None, 400)
    assert budget.size("losses", 9) == Size(None, 400)
    free["bytes"] = 300
    assert budget.size("losses", 9) == Size(None, 300)
    here = sizes.Budget(model, False, Size())
    assert [here.size(kind, 9) for kind in ("losses", "decoding")] == [Size(16), Size(64)]


# ---- any size, the same numbers ----


@pytest.mark.parametrize(("kind", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("name", "term"), [("npo", "kl"), ("rmu_2", "gd")])
def test_effects_are_the_same_for_any_budget(kind: torch.dtype, bound: float, name: str, term: str) -> None:
    """Steps, layers, instances, positions, tokens, sweeps; the plain way; the risks' values."""
    model, target = in_kind(kind, name, term)
    for wanted in (ALL, Wanted(instances=False)):
        want, values = (made := meter(model, target, wanted, batch_size=2)).measure(), made.risk_values()
        for budget in BUDGETS.values():
            made = meter(model, target, wanted, **budget)
            assert_near(made.measure(), want, bound)
            assert made.risk_values() == pytest.approx(values, rel=bound)


@pytest.mark.parametrize(("kind", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_forced_and_decoded_are_the_same_for_any_budget(kind: torch.dtype, bound: float) -> None:
    model, rows = build("llama").to(kind), shared_prompts()
    want, texts = forced_and_decoded(Pass(model, PAD, EOS, batch_size=2), rows)
    for budget in BUDGETS.values():
        found, given = forced_and_decoded(Pass(model, PAD, EOS, False, **budget), rows)
        assert given == texts
        assert_same_forced(found, want, bound)


def forced_and_decoded(how: Pass, rows: list[Any]) -> tuple[list[Forced], list[list[int]]]:
    return teacher_force(how, rows, moments=True), decode(how, [row["input_ids"][:4] for row in rows], [5] * len(rows))


def assert_same_forced(found: list[Forced], want: list[Forced], bound: float) -> None:
    for one, other in zip(found, want, strict=True):
        for name in ("nll", "mean", "variance"):
            np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=bound, atol=bound)
        assert (one.predicted == other.predicted).all()


# ---- out of memory ----


@pytest.mark.parametrize("asked", [{}, {"tokens_per_batch": 1000}])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("wanted", [ALL, Wanted(instances=False), Wanted(norms=False)])
def test_effects_when_memory_runs_out(
    wanted: Wanted, backward: bool, asked: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    """V, the tapped and the plain way begin anew, also where gradients had been added already; so does forward mode."""
    model, target = in_kind(torch.float64, "wga", "gd")
    want, values = (made := meter(model, target, wanted)).measure(), made.risk_values()
    grads = {name: torch.full_like(p, 3) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.grad = grads[name]
    capsys.readouterr()
    made = meter(model, target, wanted, **asked)
    with room(model, ROOM, backward) as tried:
        assert_near(made.measure(), want, 1e-10)
        assert made.risk_values() == pytest.approx(values, rel=1e-12)
        lines = [line for line in capsys.readouterr().err.splitlines() if "out of memory with" in line]
        told = ["gradient of the unlearn risk", *([] if backward else ["forward mode", "unlearn risk"])]
        assert [what for what in told if not any(line.startswith(f"{what}: ") for line in lines)] == []
        unit = "tokens" if asked else "rows"
        assert lines[0].endswith({"rows": "with 5 rows at once; goes on with 2 rows"}.get(unit, unit))
        assert max(tried) > ROOM
        tried.clear()
        assert_near(made.measure(), want, 1e-10)  # what was halved stays so
    assert backward or max(tried) <= ROOM  # passes without a backward pass have room then
    assert "out of memory" not in capsys.readouterr().err
    assert all(p.grad is grads[name] for name, p in model.named_parameters())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.parametrize("asked", [{}, {"tokens_per_batch": 1000}])
def test_forcing_and_decoding_when_memory_runs_out(asked: dict[str, int], capsys: pytest.CaptureFixture[str]) -> None:
    model, rows = build("llama"), shared_prompts()
    want, texts = forced_and_decoded(Pass(model, PAD, EOS), rows)
    how = Pass(model, PAD, EOS, False, **asked)
    with room(model, ROOM) as tried:
        found, given = forced_and_decoded(how, rows)
        assert max(tried) > ROOM
        lines = capsys.readouterr().err
        assert "teacher forcing: out of memory with " in lines
        assert "decoding: out of memory with " in lines
        tried.clear()
        forced_and_decoded(how, rows)
    assert max(tried) <= ROOM
    assert given == texts
    assert_same_forced(found, want, 1e-12)


def test_a_row_that_does_not_fit_alone_is_an_error() -> None:
    """As it was: and not said to go on."""
    model, target = in_kind(torch.float64, "wga", "gd")
    tries: list[Callable[[], Any]] = [meter(model, target).risk_gradients, meter(model, target).risk_values]
    tries += [partial(forced_and_decoded, Pass(model, PAD, EOS), FORGET)]
    for run in tries:
        with room(model, 4), pytest.raises(torch.OutOfMemoryError, match="on purpose"):
            run()


def test_second_answers_count(capsys: pytest.CaptureFixture[str]) -> None:
    """They are rows of the batch, too: a budget holds both."""
    rows = [row | {"second": other} for row, other in zip(FORGET, [*RETAIN, RETAIN[0]], strict=True)]
    for batch in set_batches(rows, [], None, PAD, tokens_per_batch=45):
        assert batch["input_ids"].numel() <= 45
        assert len(batch["index"]) == 2 * batch["n_forget"]


# ---- micro-batches ----


@pytest.mark.parametrize(("kind", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", ["npo_kl", "rmu", "second"])
def test_merged_micro_batches_take_the_same_step(name: str, kind: torch.dtype, bound: float) -> None:
    """4 x 1, 2 x 2 and 1 x 4 rows, the loss's parts and the weights after three steps of SGD."""
    start, reference = pair("llama")
    start, reference = start.to(kind), reference.to(kind)
    loss = {
        "npo_kl": Loss(partial(npo, beta=0.5), kl, 0.3, reference=reference),
        "rmu": Loss(partial(rmu, c=2), layer=1, noise=NOISE.to(kind)),
        "second": Loss(lambda tokens, n: (tokens.nll.sum() - tokens.second.nll.sum()) / n.tokens),  # type: ignore[union-attr]
    }[name]
    rows = with_reference(FORGET, reference)
    if name == "second":
        rows = [row | {"second": other} for row, other in zip(rows, [*RETAIN, RETAIN[0]], strict=True)]
    ends = []
    for size, parts in ((1, 4), (2, 2), (4, 1)):
        model = copy.deepcopy(start)
        steps = StepBatches(rows, BESIDE if loss.retain else [], 3, size, parts, 0, PAD)
        for i in range(len(steps)):
            sum(loss(model, steps[i]).values()).backward()  # type: ignore[union-attr]
            if (i + 1) % parts == 0:
                with torch.no_grad():
                    for p in model.parameters():
                        if p.grad is not None:
                            p -= 0.05 * p.grad
                            p.grad = None
        ends.append(dict(model.named_parameters()))
    moved = max(float((p - ends[0][key]).abs().max()) for key, p in start.named_parameters())
    assert moved > 1e-3
    for end in ends[1:]:
        assert max(float((p - ends[0][key]).abs().max()) for key, p in end.items()) < bound


def test_a_step_is_merged_into_as_few_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU; where it is asked for, into one anywhere; never where it is not wanted."""
    model, family = build("llama"), load_family("tiny")
    usual = ["model_family=tiny", "method=npo", "retain=gd", "batch_size=2", "gradient_accumulation_steps=12"]
    need = partial(building._needs, family=family, model=model)

    def asked(*more: str) -> Any:
        return with_family(given("forget", [*usual, *more]))[0]

    def merged(*more: str) -> tuple[int, int]:
        settings = building.cut_as_run(asked(*more), family, model)
        return settings.batch_size, settings.gradient_accumulation_steps

    assert (merged(), merged("merge=true"), merged("merge=false")) == ((2, 12), (24, 1), (2, 12))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    settings = asked()
    for parts in (1, 2, 3, 4, 6):
        rows = 24 // parts
        monkeypatch.setattr(building, "gpu_memory", lambda rows=rows: 1.001 * need(settings, rows=rows) / building.OF_MEMORY)
        assert merged() == (rows, parts)
    monkeypatch.setattr(building, "gpu_memory", lambda: 0)
    assert merged() == (2, 12)
    measuring = asked("geffect.every=5")
    v = 2 * 4 * model.num_parameters()
    assert need(measuring, rows=2) - need(settings, rows=2) == v
    assert need(asked("geffect.every=5", "geffect.offload=true"), rows=2) == need(settings, rows=2)
