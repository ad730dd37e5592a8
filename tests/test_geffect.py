"""The G-effect engine against the slow, obvious way: a backward pass for each instance and token, a dot for each tensor.

Layer types: Linear (Llama, Phi, GPT-NeoX, Qwen2; with biases too), Conv1D (GPT-2), embeddings of tokens and positions, tied
and untied heads, LayerNorm, RMSNorm (w and 1 + w), LoRA on linear layers and embeddings; beyond the families, experts,
convolutions, state spaces and parameters that a module uses outside its children.

All in float64 on tiny random models, the reference a little off; to 1e-9 of the largest entry unless said.
"""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, doubled, run_in
from slow_geffect import (
    BESIDE,
    CONFIGS,
    FORGET,
    OBJECTIVES,
    PAD,
    RISK_ROWS,
    TERMS,
    WIDTH,
    SlowRow,
    assert_close,
    assert_same_tables,
    build,
    count_tokens,
    gradient,
    layer_of,
    meter_of,
    pair,
    random_rows,
    shake,
    shared_pair,
    slow_of_trained,
    slow_retain,
    slow_risk,
    slow_shared,
    slow_terms,
    target_of,
    totals,
    use_weight_directly,
    with_reference,
)
from torch import Tensor, nn

from unlearn.geffect.parts import RISKS
from unlearn.geffect.risks import add_gradient, zeros
from unlearn.geffect.tables import Tables
from unlearn.geffect.tap import row_products
from unlearn.geffect.target import Target, Wanted
from unlearn.objectives.functions import Objective, mean_nll
from unlearn.objectives.loss import Loss
from unlearn.passes.batches import set_batches
from unlearn.training.rules import blur, gru, pcgrad, sago

pytestmark = pytest.mark.usefixtures("float64_throughout")

# ---- against the slow way ----


@functools.cache
def slow_tokens(kind: str, name: str) -> list[tuple[int, int, int, float, dict[tuple[str, str], float]]]:
    """Row, position, token, loss, and effects by risk and module of each label token, by a backward pass for each."""
    slow, found = slow_shared(kind), []
    for i, row in enumerate(with_reference(FORGET, shared_pair(kind)[1])):
        here = SlowRow(slow.model, row)
        terms = slow_terms(name, here, row["ref_nll"])
        for t, loss, share in zip(here.at, here.nll.tolist(), terms, strict=True):
            effects = slow.effects(gradient(share, slow.parameters))
            found.append((i, t, int(row["input_ids"][t]), loss, effects))
    return found


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind != "llama, tied"])  # qwen2's and gemma's heads are tied
def test_every_table_is_the_slow_way(kind: str, name: str, term: str) -> None:
    """Totals, layers, instances, positions and tokens, of every objective with every retain term on every architecture."""
    model, reference = shared_pair(kind)
    slow = slow_shared(kind)
    target = target_of(name, reference, term)
    tables = meter_of(model, target, batch_size=3).measure()

    tokens = slow_tokens(kind, name)
    kept = [slow.effects(gradient(slow_retain(term, slow.model, reference, row), slow.parameters)) for row in target.retain]
    keys = list(tokens[0][-1])
    rest = {key: 0.3 * sum(effects[key] for effects in kept) for key in keys}
    by_row = [{key: sum(e[key] for i, *_, e in tokens if i == n) for key in keys} for n in range(len(FORGET))]
    whole = {key: sum(row[key] for row in by_row) + rest[key] for key in keys}

    def over(effects: dict[tuple[str, str], float], risk: str, layer: str | None = None) -> float:
        return sum(e for (r, module), e in effects.items() if r == risk and layer in (None, layer_of(module)))

    assert_close(tables["steps"]["geffect"], [over(whole, risk) for risk in RISKS])

    layers = tables["layers"]
    assert {*zip(layers["risk"], layers["module"], strict=True)} == set(keys)
    assert len(layers) == len(keys)
    assert list(layers["layer"]) == [layer_of(module) for module in layers["module"]]
    assert_close(layers["geffect"], [whole[key] for key in zip(layers["risk"], layers["module"], strict=True)])

    instances = tables["instances"]
    assert list(instances["row"]) == 2 * [*range(len(FORGET)), *(["retain"] if target.retain else [])]
    retain = [rest] if target.retain else []
    assert_close(instances["geffect"], [over(row, risk) for risk in RISKS for row in [*by_row, *retain]])

    found = tables["tokens"]
    for risk in RISKS:
        table = found[found["risk"] == risk]
        if target.retain:
            assert table.iloc[-1][["row", "position", "token_id"]].isna().all()
            assert_close([table.iloc[-1]["geffect"]], [over(rest, risk)])
            table = table.iloc[:-1].astype({"row": int, "position": int, "token_id": int})
        assert [*zip(table["row"], table["position"], table["token_id"], strict=True)] == [x[:3] for x in tokens]
        assert_close(table["loss"], [x[3] for x in tokens])
        assert_close(table["geffect"], [over(x[-1], risk) for x in tokens])

    positions = tables["positions"]
    for risk in RISKS:
        table = positions[positions["risk"] == risk]
        sums = table[table["row"].notna()].groupby(["row", "layer"])["geffect"].sum()
        assert_close(sums, [over(by_row[n], risk, layer) for n, layer in sums.index])
        if target.retain:
            of_rest = table[table["row"].isna()]
            assert_close(of_rest["geffect"], [over(rest, risk, layer) for layer in of_rest["layer"]])


@pytest.mark.parametrize("kind", ["llama", "gemma", "gpt2"])
def test_eager_attention(kind: str) -> None:
    model, reference = pair(kind, "eager")
    want = meter_of(shared_pair(kind)[0], target_of("npo", reference, "kl")).measure()
    assert_same_tables(meter_of(model, target_of("npo", reference, "kl")).measure(), want)


@pytest.mark.parametrize("kind", ["phi", "llama, tied"])
def test_a_position_is_where_the_activation_sits(kind: str) -> None:
    """The embeddings' share at a position is the loss's gradient at their output there times V of the token there.

    But where that is the embedding's `padding_idx`, autograd gives no gradient: none of that, though a tied V is not 0 there.
    """
    model, reference = shared_pair(kind)
    positions = meter_of(model, target_of("wga", reference)).measure()["positions"]
    embed = model.get_input_embeddings()
    for risk, v in zip(RISKS, slow_shared(kind).v, strict=True):
        (of_tokens,) = (v[name] for name in v if name.endswith("embed_tokens.weight"))
        for i, row in enumerate(with_reference(FORGET, reference)):
            kept: list[Tensor] = []
            handle = embed.register_forward_hook(lambda *args, kept=kept: kept.append(args[-1]))
            value = torch.stack(slow_terms("wga", SlowRow(model, row), row["ref_nll"])).sum()
            handle.remove()
            (b,) = torch.autograd.grad(value, kept)
            ids = row["input_ids"].tolist()
            assert embed.padding_idx in ids
            want = [(b[0, t] @ of_tokens[i]).item() if i != embed.padding_idx else 0.0 for t, i in enumerate(ids)]
            here = positions[(positions["risk"] == risk) & (positions["row"] == i) & (positions["layer"] == "embed")]
            assert list(here["position"]) == list(range(len(want)))
            assert_close(here["geffect"], want)


# ---- identities ----


@pytest.mark.parametrize("kind", ["llama, tied", "gpt2"])
@pytest.mark.parametrize("term", ["none", "kl"])
def test_parts_add_up_to_the_whole(kind: str, term: str) -> None:
    model, reference = shared_pair(kind)
    tables = meter_of(model, target_of("npo", reference, term)).measure()
    for name in ("layers", "instances", "tokens", "positions"):
        assert_close(totals(tables[name]), tables["steps"]["geffect"])
    by_layer = [table.groupby(["risk", "layer"])["geffect"].sum() for table in (tables["positions"], tables["layers"])]
    assert by_layer[0].index.equals(by_layer[1].index)
    assert_close(*by_layer)


def slow_objective(name: str, model: nn.Module, reference: nn.Module) -> Tensor:
    rows = with_reference(FORGET, reference)
    return torch.stack([torch.stack(slow_terms(name, SlowRow(model, row), row["ref_nll"])).sum() for row in rows]).sum()


@pytest.mark.parametrize("name", ["wga", "npo", "rmu_1"])
def test_a_step_along_the_gradient_changes_the_risks_by_e(name: str) -> None:
    """(R(theta - h grad L) - R(theta + h grad L)) / 2h = -e, to 1e-6."""
    model, reference = pair("llama")
    steps = meter_of(model, target_of(name, reference), Wanted()).measure()["steps"]
    parameters = dict(model.named_parameters())
    g = gradient(slow_objective(name, model, reference), parameters)
    h = 3e-4 / torch.stack([x.norm() for x in g.values()]).norm().item()
    at: dict[int, list[float]] = {}
    meter = meter_of(model, target_of(name, reference), Wanted())
    with torch.no_grad():
        for sign in (-1, 1):
            for key, p in parameters.items():
                p.add_(g[key], alpha=sign * h)
            at[sign] = meter.risk_values()
            for key, p in parameters.items():
                p.sub_(g[key], alpha=sign * h)
    slopes = [(minus - plus) / (2 * h) for minus, plus in zip(at[-1], at[1], strict=True)]
    assert slopes == pytest.approx([-e for e in steps["geffect"]], rel=1e-6)


def test_e_of_a_sum_is_the_sum() -> None:
    """Of two objectives, and of an objective and a retain term times its weight."""
    model, reference = shared_pair("phi")
    first, second = (OBJECTIVES[name].objective for name in ("npo", "wga"))

    def measure(objective: Objective, term: str = "none", weight: float = 1.0) -> Tables:
        loss = Loss(objective, TERMS[term], weight, reference=reference if term == "kl" else None)
        target = Target(loss, with_reference(FORGET, reference), BESIDE if term != "none" else [])
        return meter_of(model, target).measure()

    def both(tokens: Any, counts: Any) -> Tensor:
        return 2 * first(tokens, counts) + second(tokens, counts)

    of_both, of_first, of_second = measure(both), measure(first), measure(second)
    for name in ("steps", "layers", "instances", "tokens", "positions"):
        assert_close(of_both[name]["geffect"], 2 * of_first[name]["geffect"] + of_second[name]["geffect"])
    for term in ("gd", "kl"):
        once, thrice = measure(first, term), measure(first, term, 3.0)
        for name in ("steps", "layers"):
            alone = of_first[name]["geffect"]
            assert_close(thrice[name]["geffect"] - alone, 3 * (once[name]["geffect"] - alone))


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_a_sweep_is_each_measured_alone(kind: str) -> None:
    """Of targets on the same rows and others, with layers, retain terms and references, in one measurement."""
    model, reference = shared_pair(kind)
    rows, other = with_reference(FORGET, reference), with_reference(random_rows(3, 9), reference)
    targets: dict[tuple[str, float | None], Target] = {("other", None): Target(Loss(mean_nll), other)}
    for i, (name, loss) in enumerate(OBJECTIVES.items()):
        term = list(TERMS)[i % 3]
        whole = Loss(loss.objective, TERMS[term], 0.5, loss.layer, loss.noise, reference if term == "kl" else None)
        targets[name, float(i)] = Target(whole, rows, BESIDE if term != "none" else [])
    sweep = meter_of(model, targets["other", None], Wanted(instances=False), sweep=targets).measure()["sweep"]
    assert len(sweep) == 2 * len(targets)
    for (method, number), target in targets.items():
        here = sweep[
            (sweep["method"] == method) & (sweep["hyper_param"].isna() if number is None else sweep["hyper_param"] == number)
        ]
        alone = meter_of(model, target, Wanted(instances=False)).measure()["steps"]
        assert list(here["risk"]) == list(RISKS)
        assert_close(here["geffect"], alone["geffect"])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_update_effect_of_a_plain_step(kind: str) -> None:
    """theta' = theta - eta grad L: -eta e, in total and for each module."""
    model, reference = pair(kind)
    meter = meter_of(model, target_of("npo", reference), Wanted(instances=False))
    tables = meter.measure()
    meter.start_update()
    g = gradient(slow_objective("npo", model, reference), dict(model.named_parameters()))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.sub_(g[name], alpha=1e-3)
    update = meter.update_effect()
    assert list(update["updates"]["module"]) == list(tables["layers"]["module"])
    assert_close(update["totals"]["update_effect"], -1e-3 * tables["steps"]["geffect"])
    assert_close(update["updates"]["update_effect"], -1e-3 * tables["layers"]["geffect"])


@pytest.mark.parametrize("rule", [pcgrad, partial(pcgrad, by_tensor=True), gru, blur, sago])
def test_a_gradient_rules_own_effects(rule: Any) -> None:
    """Of the step that it makes of the two gradients, the retain term's with its weight; the loss's are as without."""
    model, reference = shared_pair("llama")
    target = target_of("npo", reference, "gd")
    measured = meter_of(model, target, Wanted(instances=False), rule=rule).measure()["steps"]
    parameters = dict(model.named_parameters())
    forget = gradient(slow_objective("npo", model, reference), parameters)
    retain = gradient(0.3 * torch.stack([slow_retain("gd", model, reference, row) for row in BESIDE]).sum(), parameters)
    step = dict(rule(forget, retain))
    v = [slow_risk(model, parameters, RISK_ROWS[risk]) for risk in RISKS]
    assert_close(measured["rule_geffect"], [sum(float((step[name] * of[name]).sum()) for name in step) for of in v])
    without = meter_of(model, target, Wanted(instances=False)).measure()["steps"]
    pd.testing.assert_frame_equal(measured.drop(columns="rule_geffect"), without)


def test_measuring_again_after_the_weights_changed() -> None:
    """The same meter, as in training, gives what a new one does."""
    model, reference = pair("gemma")
    meter = meter_of(model, target_of("wga", reference, "gd"))
    meter.measure()
    shake(model, 0.02)
    assert_same_tables(meter.measure(), meter_of(model, target_of("wga", reference, "gd")).measure(), 1e-12)


# ---- ways to the same numbers ----


@pytest.mark.parametrize("kind", ["llama, tied", "gemma"])
def test_with_and_without_norms_and_instances(kind: str) -> None:
    model, reference = shared_pair(kind)
    target = target_of("npo", reference, "kl")
    full = meter_of(model, target).measure()
    lean = meter_of(model, target, Wanted(norms=False, positions=True, tokens=True)).measure()
    norms = ("objective_norm", "cosine")
    assert lean["steps"][list(norms)].isna().all(axis=None)
    assert_same_tables(lean, full, 1e-12, but=norms)
    plain = meter_of(model, target, Wanted(instances=False)).measure()
    assert_close(plain["steps"]["geffect"], full["steps"]["geffect"])
    by_layer = [tables["layers"].groupby(["risk", "layer"])["geffect"].sum() for tables in (plain, full)]
    if kind == "gemma" or kind.endswith("tied"):  # one weight, counted at its first use
        moved = [x.drop(index=[i for i in x.index if i[1] in ("embed", "lm_head")]) for x in by_layer]
        assert_close(*moved)
    for column in (*norms, "risk_norm"):
        assert_close(plain["steps"][column], full["steps"][column])


def test_norms_and_cosines() -> None:
    model, reference = shared_pair("phi")
    steps = meter_of(model, target_of("tnpo", reference)).measure()["steps"]
    g = gradient(slow_objective("tnpo", model, reference), dict(model.named_parameters()))
    flat, *v = (torch.cat([x[name].flatten() for name in g]) for x in (g, *slow_shared("phi").v))
    assert_close(steps["objective_norm"], 2 * [flat.norm().item()])
    assert_close(steps["risk_norm"], [x.norm().item() for x in v])
    assert_close(steps["cosine"], [F.cosine_similarity(flat, x, dim=0).item() for x in v])
    risks = [sum(SlowRow(model, row).nll.sum().item() for row in rows) / count_tokens(rows) for rows in RISK_ROWS.values()]
    assert_close(steps["risk_value"], risks)


def count_calls(model: nn.Module, measure: Callable[[], Any]) -> int:
    """How often the first block's first module with weights runs."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    block = next(m for m in model.modules() if isinstance(m, nn.ModuleList))[0]
    module = next(m for m in block.modules() if list(m.parameters(recurse=False)))
    handle = module.register_forward_hook(count)
    measure()
    handle.remove()
    return calls


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
def test_gradient_checkpointing(kind: str, norms: bool) -> None:
    """The same numbers, and the blocks' forward really runs again: under all of the risks' batches and the loss's."""
    model, reference = pair(kind)
    wanted = Wanted(positions=True, norms=norms)
    meter = meter_of(model, target_of("wga", reference, "gd"), wanted)
    want = meter.measure()
    usual = count_calls(model, meter.measure)
    model.gradient_checkpointing_enable()
    meter = meter_of(model, target_of("wga", reference, "gd"), wanted)
    assert_same_tables(meter.measure(), want, 1e-12)
    assert count_calls(model, meter.measure) == usual + 3 + 2 + (3 + 2)
    assert not model.training


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_batches_change_nothing(batch_size: int) -> None:
    model, reference = shared_pair("qwen2")
    target = target_of("npo", reference, "kl")
    want = meter_of(model, target).measure()
    assert_same_tables(meter_of(model, target, batch_size=batch_size).measure(), want, 1e-11)


def test_the_model_is_left_as_it_was() -> None:
    """Weights bit for bit, gradients, what requires one, modes, hooks, and random numbers."""
    model, reference = pair("llama")
    model.model.layers[1].mlp.requires_grad_(False)
    for i, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, i) if i % 2 and p.requires_grad else None
    for i, module in enumerate(model.modules()):
        module.training = i % 3 > 0

    def state() -> tuple[Any, ...]:
        weights = {name: x.clone() for name, x in model.state_dict().items()}
        grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()]
        of_parameters = [(p.requires_grad, len(p._post_accumulate_grad_hooks or ())) for p in model.parameters()]
        return weights, grads, hooks, of_parameters, [m.training for m in model.modules()], torch.get_rng_state()

    before = state()
    target = target_of("wga", reference, "kl")
    meter = meter_of(model, target, sweep={("wga", None): target})
    meter.measure()
    meter.start_update()
    meter.update_effect()
    meter.risk_values()
    torch.testing.assert_close(state(), before, rtol=0, atol=0)


def test_frozen_parameters_are_not_measured() -> None:
    model, reference = pair("phi")
    target = target_of("wga", reference)
    whole = meter_of(model, target).measure()["layers"]
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith("bias"))
    tables = meter_of(model, target).measure()
    slow = slow_of_trained(model, target)
    assert_close(tables["steps"]["geffect"], slow["steps"])
    assert_close(tables["instances"]["geffect"], slow["instances"])
    assert len(tables["layers"]) < len(whole)


# ---- adapters ----


@pytest.mark.parametrize("modules", ["all-linear", ["q_proj", "embed_tokens", "lm_head"]], ids=["linear", "embedding"])
@pytest.mark.parametrize("name", ["npo", "rmu_1"])
def test_adapters(modules: Any, name: str) -> None:
    """LoRA: over its parameters alone. An embedding's belong to modules that are not called themselves."""
    peft = pytest.importorskip("peft")
    model, reference = pair("llama")
    model = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=modules, lora_dropout=0.1)).eval()
    generator = torch.Generator().manual_seed(5)
    for p in (p for p in model.parameters() if p.requires_grad):
        p.data.normal_(std=0.1, generator=generator)
    target = target_of(name, reference)
    tables = meter_of(model, target).measure()
    slow = slow_of_trained(model, target)
    assert_close(tables["steps"]["geffect"], slow["steps"])
    assert_close(tables["instances"]["geffect"], slow["instances"])
    for part in ("layers", "tokens", "positions"):
        assert_close(totals(tables[part]), slow["steps"])
    layers = set(tables["layers"]["layer"])
    assert layers == {"0", "1"} | (set() if modules == "all-linear" else {"embed", "lm_head"})


def test_a_fresh_adapter_then_a_trained_one() -> None:
    """At first B = 0, and V of A with it: what is linear is not read off V."""
    peft = pytest.importorskip("peft")
    model, reference = pair("llama")
    model = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["embed_tokens", "v_proj"])).eval()
    meter = meter_of(model, target_of("wga", reference))
    meter.measure()
    for p in (p for p in model.parameters() if p.requires_grad):
        p.data.add_(0.1)
    slow = slow_of_trained(model, target_of("wga", reference))
    assert_close(meter.measure()["instances"]["geffect"], slow["instances"])


# ---- precision ----


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_precision(kind: str, dtype: torch.dtype, rel: float) -> None:
    """Of the weights in use: the same rounded weights in float64 give the numbers to compare with."""
    model, reference = pair(kind)
    low = copy.deepcopy(model)._apply(lambda x: x.type(dtype) if x.is_floating_point() else x)
    exact = doubled(copy.deepcopy(low))
    target = target_of("wga", reference, "gd")
    want = meter_of(exact, target).measure()
    got = meter_of(low, target).measure()
    for name in ("steps", "layers", "instances"):
        assert_close(got[name]["geffect"], want[name]["geffect"], rel)
    assert_close(totals(got["tokens"]), totals(want["tokens"]), rel)


def test_v_of_half_precision_weights_is_summed_in_float32() -> None:
    """600 batches of the same row give its gradient; in bfloat16 the sum would stand still at 256 of them."""
    model = build("phi", num_hidden_layers=1)._apply(lambda x: x.bfloat16() if x.is_floating_point() else x)
    parameters = dict(model.named_parameters())
    sums = []
    for n in (1, 600):
        sums.append(zeros(parameters))
        add_gradient(model, parameters, Loss(mean_nll), set_batches(FORGET[:1] * n, [], 1, PAD), False, sums[-1])
    assert {x.dtype for x in sums[0].values()} == {torch.float32}
    one, many = (torch.cat([x.flatten() for x in s.values()]) for s in sums)
    assert (many - one).norm() < 0.01 * one.norm()


def test_the_taps_products_are_float32_under_autocast() -> None:
    """Each module's and instance's would else be a bfloat16 number: right to three figures."""
    a, b = torch.randn(4, 2, 300), torch.randn(4, 300)
    with torch.autocast("cpu", torch.bfloat16):
        found = row_products(a, b)
    torch.testing.assert_close(found, torch.einsum("ndk,nk->nd", a.double(), b.double()), rtol=1e-5, atol=1e-5)


# ---- several processes ----


def measure_with_a_sweep() -> Tables:
    model, reference = pair("phi")  # in float64 throughout as it is
    target = target_of("npo", reference, "kl")
    sweep = {("rmu", 1.0): target_of("rmu_1", reference), ("npo", None): target}
    return meter_of(model, target, sweep=sweep).measure()


@pytest.mark.on_cpu
def test_two_processes_give_what_one_does(tmp_path: Path) -> None:
    one = measure_with_a_sweep()
    assert set(one) == {"steps", "layers", "instances", "tokens", "positions", "sweep"}
    script = ROOT / "tests" / "measure_geffect.py"
    run_in(tmp_path, f"torchrun --standalone --nproc_per_node=2 {script} two.pickle")
    assert_same_tables(pickle.loads((tmp_path / "two.pickle").read_bytes()), one)


# ---- what a loss or a model may do ----


def test_above_rmus_layer_nothing() -> None:
    model, reference = shared_pair("llama")
    layers = meter_of(model, target_of("rmu_1", reference)).measure()["layers"]
    above = layers["layer"].isin(["1", "norm", "lm_head"])
    assert (layers[above]["geffect"] == 0).all()
    assert (layers[~above]["geffect"] != 0).all()


def test_a_weight_used_without_its_module() -> None:
    """It belongs to the nearest module above that is called."""
    model, reference = pair("llama")
    want = meter_of(model, target_of("wga", reference)).measure()
    use_weight_directly(model, call_too=False)
    got = meter_of(model, target_of("wga", reference)).measure()
    for name in ("steps", "instances", "tokens", "positions"):
        assert_close(got[name]["geffect"], want[name]["geffect"])
    assert "model.layers.0.mlp" in set(got["layers"]["module"])


@pytest.mark.parametrize("norms", [True, False])
def test_a_weight_used_beside_its_module_is_refused(norms: bool) -> None:
    model, reference = pair("llama")
    target = target_of("wga", reference)
    want = meter_of(model, target, Wanted(instances=False, tokens=True)).measure()
    use_weight_directly(model, call_too=True)
    with pytest.raises(ValueError, match=r"a weight\s+is used other than by calling its module \(instances=false does"):
        meter_of(model, target, Wanted(norms=norms)).measure()
    assert_same_tables(meter_of(model, target, Wanted(instances=False, tokens=True)).measure(), want)


@pytest.mark.parametrize("norms", [True, False])
def test_dora_is_refused(norms: bool) -> None:
    """Its magnitudes divide by the norms of B A: the adapter's weights are used beside their modules."""
    peft = pytest.importorskip("peft")
    model, reference = pair("llama")
    model = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["q_proj"], use_dora=True)).eval()
    for p in (p for p in model.parameters() if p.requires_grad):
        p.data.add_(0.1)
    target = target_of("wga", reference)
    with pytest.raises(ValueError, match="instances=false does without"):
        meter_of(model, target, Wanted(norms=norms)).measure()
    plain = meter_of(model, target, Wanted(instances=False)).measure()
    assert_close(plain["steps"]["geffect"], slow_of_trained(model, target)["steps"])


class Masked(nn.Module):
    """A block's MLP that changes its own output and a module's in place, takes a shared scale, and is called twice."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        y.mul_(self.scale).add_(1)
        return self.inner(y) + y


def test_in_place_changes_and_modules_called_twice() -> None:
    model, reference = pair("phi")
    model.model.layers[0].mlp = Masked(model.model.layers[0].mlp)
    target = target_of("npo", reference)
    tables = meter_of(model, target).measure()
    slow = slow_of_trained(model, target)
    assert_close(tables["steps"]["geffect"], slow["steps"])
    assert_close(tables["instances"]["geffect"], slow["instances"])
    for part in ("tokens", "positions"):
        assert_close(totals(tables[part]), slow["steps"])
