"""Every objective from one pass: what a sweep of all gives is what each measured alone gives, and each row passes once.

All in float64 on a tiny random model, the reference a little off. The statistics of distributions are compared with what
they stand for, written out over the vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from slow_geffect import BESIDE, FORGET, NOISE, assert_close, meter_of, random_rows, shared_pair, with_reference
from torch import Tensor

from app.compose import compose
from app.methods import choices, retain_terms
from app.places import CONFIG
from unlearn import objectives
from unlearn.geffect import sharing, tangents
from unlearn.geffect.meter import Meter
from unlearn.geffect.target import Target, Wanted
from unlearn.objectives import Counts, Loss, Tokens, needs, statistics
from unlearn.objectives.needs import looks_at_layers, needs_of, needs_reference
from unlearn.objectives.rows import Row

pytestmark = pytest.mark.usefixtures("float64_throughout")

REFUSAL = torch.tensor([5, 3])

# ---- distributions, over the vocabulary ----


def drawn(scale: float, float_type: torch.dtype = torch.float64) -> Tokens:
    """Three rows of label tokens whose logits are so far apart, the label's and the reference's at either end."""
    generator = torch.Generator().manual_seed(0)
    z, ref = (scale * torch.randn(12, 29, generator=generator, dtype=float_type) for _ in range(2))
    label = torch.randint(0, 29, (12,), generator=generator)
    for i, by in enumerate((1, 1, -1, -1)):
        z[i, label[i]] += 2 * by * scale
        ref[i, label[i]] += (2 if i % 2 else -2) * scale
    row = torch.tensor([0] * 5 + [1] * 4 + [2] * 3)
    nll = F.cross_entropy(z, label, reduction="none")
    return Tokens(nll, row, 3, z, ref_logits=ref, label=label, refusal=REFUSAL)


def without_label(z: Tensor, label: Tensor) -> Tensor:
    return z.scatter(1, label[:, None], -math.inf).softmax(-1)


def written_out(t: Tokens) -> dict[str, tuple[Any, Tensor]]:
    """Objectives as their papers have them, and the same over the vocabulary."""
    assert t.ref_logits is not None
    assert t.label is not None
    assert t.refusal is not None
    z, ref, label = t.logits, t.ref_logits, t.label
    p, q, log_v = z.softmax(-1), ref.softmax(-1), math.log(z.shape[1])
    log_p, log_q = z.log_softmax(-1), ref.log_softmax(-1)
    one_hot = F.one_hot(label, z.shape[1]).to(z)
    wanted = t.refusal[[0, 1, 0, 1, 0, 0, 1, 0, 1, 0, 1, 0]]
    refusal, log_m = F.one_hot(wanted, z.shape[1]).to(z), torch.logaddexp(log_p, log_q) - math.log(2)
    first, own = t.place() >= 1, without_label(z.detach(), label)
    middle = (refusal + p) / 2
    return {
        "kl": (objectives.kl, (q * (log_q - log_p)).sum() / 12),
        "undial": (
            partial(objectives.undial, beta=3.0),
            -((ref - 3 * one_hot).softmax(-1) * log_p).sum() / 12,
        ),
        "ceu": (partial(objectives.ceu, n=1), -(own * log_p).sum(1)[first].sum() / 9),
        "me": (partial(objectives.me, direction="forward"), (-log_v - log_p).mean(1).sum() / 12),
        "me reverse": (partial(objectives.me, direction="reverse"), (p * (log_p + log_v)).sum() / 12),
        "jensun": (
            objectives.jensun,
            (p * log_p - (refusal + p) * middle.log()).sum() / 24,
        ),
        "jensun_retain": (objectives.jensun_retain, (q * (log_q - log_m) + p * (log_p - log_m)).sum() / 24),
        "pdu": (objectives.pdu, (z.max(1).values - z.mean(1)).square().sum() / 12),
    }


@pytest.mark.parametrize("scale", [1.0, 8.0])
@pytest.mark.parametrize("name", written_out(drawn(1.0)))
def test_statistics_are_what_they_stand_for(name: str, scale: float) -> None:
    """Loss and gradient, where the label has nearly all and nearly none of the probability too."""
    tokens = drawn(scale)
    results = []
    for way in (0, 1):
        z = tokens.logits.clone().requires_grad_()
        assert tokens.label is not None
        given = replace(tokens, logits=z, nll=F.cross_entropy(z, tokens.label, reduction="none"))
        objective, slow = written_out(given)[name]
        loss = slow if way else objective(given, Counts(12, 3))
        results.append((loss.detach(), torch.autograd.grad(loss, z)[0]))
    for got, want in zip(*results, strict=True):
        assert want.norm() > 0
        assert (got - want).norm() <= 1e-10 * want.norm()


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_ceus_gradient_is_that_of_the_odds(scale: float) -> None:
    """-(1/M) sum [p / (1 - p)] l, which takes no pass over the vocabulary."""
    tokens = drawn(scale)
    z = tokens.logits.clone().requires_grad_()
    assert tokens.label is not None
    nll = F.cross_entropy(z, tokens.label, reduction="none")
    got = objectives.ceu(replace(tokens, logits=z, nll=nll), Counts(12, 3), n=0)
    odds = torch.exp(z.gather(1, tokens.label[:, None]) - z.scatter(1, tokens.label[:, None], -math.inf).logsumexp(1, True))
    want = -(odds[:, 0].detach() * nll).sum() / 12
    of_got, of_want = (torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in (got, want))
    assert (of_got - of_want).norm() <= 1e-10 * of_want.norm()


# ---- all of them, at once and alone ----


def answers(rows: list[Row], reference: Any, seed: int, many: int) -> list[Row]:
    """With so many second answers each, and the losses of all before unlearning."""
    beside = with_reference(random_rows(len(rows) * many, seed), reference)
    several = [beside[i * many : (i + 1) * many] for i in range(len(rows))]
    return [
        row | {"second": of if many > 1 else of[0]} for row, of in zip(with_reference(rows, reference), several, strict=True)
    ]


@functools.cache
def rows_of() -> dict[str, list[Row]]:
    """The rows that losses are of: what a run tokenises by itself is not the same tensors again."""
    reference = shared_pair("llama")[1]
    idk = answers(FORGET, reference, 11, 1)
    copies = [{key: value.clone() for key, value in row["second"].items()} for row in idk]
    generated = answers(FORGET, reference, 12, 2)
    of_retain = answers(BESIDE, reference, 13, 1)
    plain = with_reference([{key: value.clone() for key, value in row.items()} for row in FORGET], reference)
    return {"forget": plain, "idk": copies, "dpo": idk, "altpo": generated, "retain": BESIDE, "ap": of_retain}


def target_of(method: str, term: str) -> Target:
    config = compose("forget", [f"method={method}", *([] if term == "default" else [f"retain={term}"])])
    own, beside = instantiate(config["method"]["objective"]), instantiate(config["retain"]["term"])
    paired = "altpo" if config["method"].get("second") == "generated" else "dpo"
    forget = config["method"]["answers"] if "second" not in needs_of(own) else paired
    layer = 1 if config["method"].get("layer") == 7 else [1, 2] if looks_at_layers(own) or looks_at_layers(beside) else None
    loss = Loss(
        own,
        beside,
        config["retain"]["weight"],
        layer,
        NOISE,
        shared_pair("llama")[1] if needs_reference(own, beside) else None,
        REFUSAL if "refusal" in needs_of(own) else None,
    )
    rows = rows_of()
    kept = [] if beside is None else rows["ap" if "second" in needs_of(beside) else "retain"]
    return Target(loss, rows[forget], kept)


NAMES = [
    (method, "default") for method in choices("method") if "\nnegate:" not in (CONFIG / f"method/{method}.yaml").read_text()
]
NAMES += [("npo", term) for term in retain_terms()]


@functools.cache
def all_at_once() -> tuple[Meter, pd.DataFrame, list[int]]:
    """The meter, its sweep of all, and how many rows each forward-mode pass had; none goes the slow way."""
    targets: dict[Any, Target] = {(f"{method} {term}", None): target_of(method, term) for method, term in NAMES}
    rows: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        rows.append(len(args[3]["labels"]))
        return tangents.token_tangents(*args, **kwargs)

    def slow(*_: Any) -> Any:
        raise AssertionError("an operation has no forward mode")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unlearn.geffect.meter.token_tangents", counted)
        patch.setattr(tangents, "by_transposes", slow)
        meter = meter_of(shared_pair("llama")[0], target_of("ga", "none"), Wanted(instances=False), sweep=targets)
        found = meter.measure()["sweep"]
    return meter, found, rows


@pytest.mark.parametrize(("method", "term"), NAMES)
def test_a_sweep_of_all_is_each_measured_alone(method: str, term: str) -> None:
    """The plain way: a backward pass over the objective's own rows, and a dot product for each tensor."""
    meter, found, _ = all_at_once()
    alone = meter_of(meter.model, target_of(method, term), Wanted(instances=False)).measure()["steps"]
    here = found[found["method"] == f"{method} {term}"]
    assert_close(here["geffect"], alone["geffect"])


def test_statistics_change_as_forward_mode_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens at a time, across rows, as all at once by `jvp`."""
    draw = torch.Generator().manual_seed(0)
    z, reference, first, second = torch.randn(4, 11, 13, dtype=torch.float64, generator=draw)
    row, label = torch.tensor([0] * 4 + [1] * 6 + [2]), torch.randint(13, (11,), generator=draw)
    of = Tokens(z.new_empty(0), row, 3, z, label=label, ref_logits=reference, refusal=torch.tensor([3, 1, 4]))
    monkeypatch.setattr(statistics, "AT_ONCE", 3 * 13)
    values, tangents = statistics.along(of, statistics.STATISTICS, torch.stack([first, second]))

    def whole(z: Tensor) -> dict[str, Tensor]:
        found = statistics.statistics(replace(of, logits=z), statistics.STATISTICS)
        return found | {"nll": F.cross_entropy(z, label, reduction="none")}

    for d, change in enumerate((first, second)):
        expected, along = torch.func.jvp(whole, (z,), (change,))  # type: ignore[misc]
        for name in expected:
            torch.testing.assert_close(values[name], expected[name], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(tangents[name][d], along[name], rtol=1e-12, atol=1e-12)
    assert set(values) == set(expected)


def test_each_distinct_row_passes_once() -> None:
    """The rows to forget, an "I don't know" and two generated answers to each, the rows to keep and a second answer to each."""
    _, _, rows = all_at_once()
    assert sum(rows) == len(FORGET) * (1 + 1 + 2) + len(BESIDE) * (1 + 1)
    assert max(rows) == 2  # the batch size


def test_the_reference_passes_over_what_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of undial's and kl's rows, once for both of each, and over no second answer."""
    rows: list[int] = []

    def counted(reference: Any, batch: Any, wanted: Any, layer: Any) -> Any:
        rows.append(len(batch["labels"]))
        return reference_outputs(reference, batch, wanted, layer)

    reference_outputs: Callable[..., Any] = sharing.reference_outputs
    monkeypatch.setattr(sharing, "reference_outputs", counted)
    chosen = (("undial", "kl"), ("undial", "jensun"), ("dpo", "ap"), ("altpo", "kl"))
    targets: dict[Any, Target] = {(method, i): target_of(method, term) for i, (method, term) in enumerate(chosen)}
    meter = meter_of(shared_pair("llama")[0], target_of("ga", "none"), Wanted(instances=False), sweep=targets)
    meter.risk_gradients()
    meter.swept()
    assert sum(rows) == len(FORGET) + len(BESIDE)


def test_an_objective_that_reads_logits_has_them() -> None:
    """Of one's own, beside others and on two answers: what no statistic has."""

    @needs("logits", "second")
    def flattened(tokens: Tokens, counts: Counts) -> Tensor:
        assert tokens.second is not None
        return (tokens.logits.square().sum() - tokens.second.logits.square().sum()) / counts.tokens

    target = Target(Loss(flattened), rows_of()["altpo"])
    model = shared_pair("llama")[0]
    others: dict[Any, Target] = {("own", None): target, ("pdu", None): target_of("pdu", "gd")}
    swept = meter_of(model, target_of("ga", "none"), Wanted(instances=False), sweep=others).measure()["sweep"]
    alone = meter_of(model, target, Wanted(instances=False)).measure()["steps"]
    assert_close(swept[swept["method"] == "own"]["geffect"], alone["geffect"])


def test_several_references_and_refusals_come_apart() -> None:
    """Targets of another reference model, or of another refusal, are passes of their own."""
    model = shared_pair("llama")[0]
    undial, jensun = target_of("undial", "none"), target_of("jensun", "none")
    targets: dict[Any, Target] = {
        ("undial", 0.0): undial,
        ("undial", 1.0): Target(replace(undial.loss, reference=model), undial.forget),
        ("jensun", 0.0): jensun,
        ("jensun", 1.0): Target(replace(jensun.loss, refusal=torch.tensor([7])), jensun.forget),
    }
    assert [list(one.targets) for one in sharing.shared(list(targets.values()))] == [[0, 2], [1, 3]]
    swept = meter_of(model, undial, Wanted(instances=False, sweep_norms=True), sweep=targets).measure()["sweep"]
    for (method, number), target in targets.items():
        alone = meter_of(model, target, Wanted(instances=False)).measure()["steps"]
        here = swept[(swept["method"] == method) & (swept["hyper_param"] == number)]
        for column in ("geffect", "cosine", "objective_norm"):
            assert_close(here[column], alone[column])
