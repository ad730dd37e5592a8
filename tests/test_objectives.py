"""The objectives: against published values, against a slow version written from their table, and by their identities.

Letters: B rows, T positions, M label tokens, V vocabulary, d hidden size. All in float64.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from app.compose import given
from unlearn.objectives.functions import Objective, ga, kl, mean_nll, needs_of, npo, rmu, tnpo, weighted, wga, wtnpo
from unlearn.objectives.loss import Loss
from unlearn.objectives.tokens import IGNORE, Counts, Tokens, label_positions, token_outputs

Batch = dict[str, Any]
GOLD = Path(__file__).parents[2] / "shared" / "gold" / "objectives"
EXPECTED: dict[str, Any] = json.loads((GOLD / "expected.json").read_text()) if GOLD.is_dir() else {"cases": {}}
needs_gold = pytest.mark.skipif(not GOLD.is_dir(), reason=f"no reference values: {GOLD} is not there")


@pytest.fixture(scope="module", autouse=True)
def float64_norms() -> Iterator[None]:
    """RMSNorm in the precision of its input, where transformers' drops to float32."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaRMSNorm, "forward", forward)
        yield


def loss_and_gradient(loss: Callable[[], Tensor], model: nn.Module) -> tuple[float, Tensor]:
    """A loss, and its gradient with respect to all parameters in one vector, zero where it does not depend on one."""
    value = loss()
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(value, parameters, allow_unused=True)
    flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    return value.item(), torch.cat([g.flatten() for g in flat])


def assert_same(got: tuple[float, Tensor], want: tuple[float, Tensor], rel: float = 1e-9) -> None:
    assert got[0] == pytest.approx(want[0], rel=rel)
    assert want[1].norm() > 0
    assert (got[1] - want[1]).norm() <= rel * want[1].norm()


# ---- published values ----


@functools.cache
def gold_model(name: str) -> nn.Module:
    config = LlamaConfig(**json.loads((GOLD / "llama_config.json").read_text()))
    model = AutoModelForCausalLM.from_config(config).double().eval()
    model.load_state_dict(load_file(GOLD / f"llama_fit_{name}.safetensors"))
    return model


def gold_rows(name: str) -> dict[str, Tensor]:
    tensors = load_file(GOLD / "batch.safetensors")
    return {key: tensors[f"{name}.{key}"] for key in ("input_ids", "attention_mask", "labels")}


def every_position(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Quirk: each of the B * T positions counts, padding included (one more column gives the last one a label)."""
    wider = {key: F.pad(value, (0, 1)) for key, value in rows.items()}
    return wider | {"labels": torch.zeros_like(wider["labels"])}


@weighted
def published_tnpo(tokens: Tokens, beta: float, alpha: float = 0.0) -> Tensor:
    """Quirk: 1e-5 in the denominator. The weight of wtnpo, and at alpha = 0 that of tnpo."""
    assert tokens.ref_nll is not None
    p, o = torch.exp(-tokens.nll), torch.exp(-tokens.ref_nll)
    return 2 * p ** (alpha + beta) / (p**beta + o**beta + 1e-5)


def gold_config(case: str) -> Any:
    """The configuration of a published name and its number, e.g. `rmu_2_kl | 5.0`."""
    name, number = case.split(" | ")
    method, *rest = name.removesuffix("_kl").split("_")
    overrides = [f"method={method.lower()}"] + (["retain=kl"] if name.endswith("_kl") else [])
    overrides += [] if number == "None" else [f"hyper_param={number}"]
    overrides += [f"retain.weight={number}"] if name == "npo_kl" else []  # quirk: beta is the weight, too
    overrides += [f"method.layer={rest[0]}"] if method == "rmu" else []
    overrides += [f"method.alpha={rest[0]}"] if method == "wtnpo" and rest[0] != "x" else []
    return given("forget", overrides)


def gold_loss(cfg: Any) -> tuple[Loss, Batch]:
    """The project's loss as its YAML describes it, and the published batch, with the published code's quirks put back."""
    rows = gold_rows(cfg.method.answers)
    retain = every_position(gold_rows("retain")) if cfg.retain.name == "kl" else gold_rows("retain")
    wider = retain["labels"].shape[1] - rows["labels"].shape[1]
    padding = {"input_ids": 0, "attention_mask": 0, "labels": IGNORE}
    batch: Batch = {key: torch.cat([F.pad(rows[key], (0, wider), value=padding[key]), retain[key]]) for key in padding}
    batch |= {"n_forget": 4, "forget_counts": count(rows["labels"]), "retain_counts": count(retain["labels"])}
    if "ref_nll" in needs_of(instantiate(cfg.method.objective)):
        with torch.no_grad():
            batch["ref_nll"] = token_outputs(gold_model("oracle"), rows).nll
    objective = instantiate(cfg.method.objective)
    if cfg.method.name in ("tnpo", "wtnpo"):
        objective = partial(published_tnpo, **objective.keywords)
    loss = Loss(
        objective=objective,
        retain=instantiate(cfg.retain.term),
        weight=cfg.retain.weight,
        layer=cfg.method.get("layer"),
        noise=load_file(GOLD / "rmu_noise.safetensors")["rmu_noise"].flatten()[:64],
        reference=gold_model("oracle") if cfg.retain.name == "kl" else None,
    )
    return loss, batch


def count(labels: Tensor) -> tuple[int, int]:
    """Label tokens and rows."""
    return len(label_positions(labels)), len(labels)


@needs_gold
@pytest.mark.parametrize("case", EXPECTED["cases"])
def test_published_values(case: str) -> None:
    loss, batch = gold_loss(gold_config(case))
    model = gold_model("theta")
    value, gradient = loss_and_gradient(lambda: torch.stack(list(loss(model, batch).values())).sum(), model)
    assert value == pytest.approx(EXPECTED["cases"][case]["loss"], rel=1e-6)
    assert gradient.norm().item() == pytest.approx(EXPECTED["cases"][case]["grad_norm"], rel=1e-6)


@needs_gold
@pytest.mark.parametrize("name", ["forget", "retain", "idk"])
@torch.no_grad()
def test_published_losses_of_rows(name: str) -> None:
    parts, rows = EXPECTED["parts"][name], gold_rows(name)
    theta, oracle = (token_outputs(gold_model(model), rows) for model in ("theta", "oracle"))
    assert theta.nll.mean().item() == pytest.approx(parts["ce_mean"], rel=1e-6)
    assert theta.sum_rows(theta.nll).tolist() == pytest.approx(parts["nll_sum_per_sequence"], rel=1e-6)
    assert oracle.sum_rows(oracle.nll).tolist() == pytest.approx(parts["oracle_nll_sum_per_sequence"], rel=1e-6)
    assert theta.sum_rows(torch.ones_like(theta.nll)).tolist() == parts["label_tokens_per_sequence"]


@needs_gold
@torch.no_grad()
def test_published_kl_at_label_positions() -> None:
    rows = gold_rows("retain")
    tokens = replace(token_outputs(gold_model("theta"), rows), ref_logits=token_outputs(gold_model("oracle"), rows).logits)
    want = EXPECTED["parts"]["retain_KL"]["mean over rows that predict a label"]
    assert kl(tokens, Counts(*count(rows["labels"]))).item() == pytest.approx(want, rel=1e-6)


# ---- the slow version, from the table ----

LLAMA = LlamaConfig(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    initializer_range=0.4,  # far from uniform predictions
)
LENGTHS = {"forget": (6, 11, 4, 8), "retain": (9, 3, 7, 5)}  # tokens of each row, the answer being the last half and more
NOISE = torch.rand(16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def random_model(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).double().eval()


@pytest.fixture(scope="module")
def theta() -> nn.Module:
    return random_model(LLAMA, 0)


@pytest.fixture(scope="module")
def reference() -> nn.Module:
    """A model near theta, as the model before unlearning is."""
    model = random_model(LLAMA, 0)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def random_rows(name: str) -> list[tuple[list[int], list[int]]]:
    """Token ids, and the places of those that carry loss, of a few rows."""
    draw = torch.Generator().manual_seed(list(LENGTHS).index(name))
    ids = [torch.randint(31, (length,), generator=draw).tolist() for length in LENGTHS[name]]
    return [(row, list(range(max(1, len(row) // 2 - 1), len(row)))) for row in ids]


def pad_rows(rows: list[tuple[list[int], list[int]]], width: int = 12) -> dict[str, Tensor]:
    batch = {key: torch.full((len(rows), width), fill) for key, fill in (("input_ids", 7), ("labels", IGNORE))}
    batch["attention_mask"] = torch.zeros(len(rows), width, dtype=torch.long)
    for i, (ids, answer) in enumerate(rows):
        batch["input_ids"][i, : len(ids)] = torch.tensor(ids)
        batch["attention_mask"][i, : len(ids)] = 1
        batch["labels"][i, answer] = torch.tensor(ids)[answer]
    return batch


@dataclass
class SlowToken:
    """A label token: its l and that of the reference (nats), the distributions it was drawn from, the layer's output."""

    nll: Tensor
    ref_nll: Tensor
    log_q: Tensor
    ref_log_p: Tensor
    h: Tensor

    @property
    def p(self) -> float:
        return math.exp(-self.nll.item())

    @property
    def o(self) -> float:
        return math.exp(-self.ref_nll.item())


SlowRows = list[list[SlowToken]]


def slow_rows(model: Any, reference: Any, name: str, layer: int = 0) -> SlowRows:
    """Row by row, without padding."""
    blocks = [model.model.embed_tokens, *model.model.layers[:-1], model.model.norm]  # whose outputs the layers are
    seen: list[Tensor] = []
    handle = blocks[layer].register_forward_hook(lambda *args: seen.append(args[2]))
    rows = []
    for ids, answer in random_rows(name):
        log_q = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        log_p = reference(torch.tensor([ids])).logits[0].log_softmax(-1).detach()
        h = seen.pop()[0]
        at = [(t - 1, ids[t]) for t in answer]
        rows.append([SlowToken(-log_q[t, y], -log_p[t, y], log_q[t], log_p[t], h[t]) for t, y in at])
    handle.remove()
    return rows


def slow_mean(rows: SlowRows, term: Callable[[SlowToken], Tensor]) -> Tensor:
    """(1/M) sum over rows and tokens."""
    total, m = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        for token in row:
            total = total + term(token)
            m += 1
    return total / m


def slow_npo(rows: SlowRows, beta: float) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        s, s_o = torch.stack([t.nll for t in row]).sum(), sum(t.ref_nll.item() for t in row)
        total = total + torch.log(1 / (1 + torch.exp(-beta * (s - s_o))))
    return -(2 / beta) * total / len(rows)


def slow_rmu(rows: SlowRows, c: float, u: Tensor) -> Tensor:
    def term(t: SlowToken) -> Tensor:
        return torch.stack([(t.h[i] - c * u[i].item()) ** 2 for i in range(16)]).sum() / 16

    return slow_mean(rows, term)


def slow_kl(rows: SlowRows) -> Tensor:
    def term(t: SlowToken) -> Tensor:
        return torch.stack([math.exp(p) * (p - q) for p, q in zip(t.ref_log_p.tolist(), t.log_q, strict=True)]).sum()

    return slow_mean(rows, term)


SLOW: dict[str, tuple[Objective, Callable[[SlowRows], Tensor]]] = {
    "ga": (ga, lambda rows: -slow_mean(rows, lambda t: t.nll)),
    "wga 0.7": (partial(wga, alpha=0.7), lambda rows: -slow_mean(rows, lambda t: t.p**0.7 * t.nll)),
    "npo 0.5": (partial(npo, beta=0.5), lambda rows: slow_npo(rows, 0.5)),
    "npo 0.1": (partial(npo, beta=0.1), lambda rows: slow_npo(rows, 0.1)),
    "tnpo 2": (
        partial(tnpo, beta=2),
        lambda rows: -slow_mean(rows, lambda t: 2 * t.p**2 / (t.p**2 + t.o**2) * t.nll),
    ),
    "wtnpo 2 0.5": (
        partial(wtnpo, beta=2, alpha=0.5),
        lambda rows: -slow_mean(rows, lambda t: 2 * t.p**2.5 / (t.p**2 + t.o**2) * t.nll),
    ),
    "mean_nll": (mean_nll, lambda rows: slow_mean(rows, lambda t: t.nll)),
    "rmu 2": (partial(rmu, c=2), lambda rows: slow_rmu(rows, 2, NOISE)),
    "rmu 6 normalized": (
        partial(rmu, c=6, normalize=True),
        lambda rows: slow_rmu(rows, 6, NOISE / math.sqrt(sum(x * x for x in NOISE.tolist()))),
    ),
}


def batch_of(rows: dict[str, Tensor], reference: nn.Module, retain: dict[str, Tensor] | None = None) -> Batch:
    """A step of one micro-batch."""
    retain = {key: value[:0] for key, value in rows.items()} if retain is None else retain
    with torch.no_grad():
        ref_nll = token_outputs(reference, rows).nll
    counts = {"forget_counts": count(rows["labels"]), "retain_counts": count(retain["labels"])}
    both = {key: torch.cat([rows[key], retain[key]]) for key in rows}
    return both | counts | {"n_forget": len(rows["labels"]), "ref_nll": ref_nll}


@pytest.mark.parametrize(
    ("name", "layer"), [(name, layer) for name in SLOW for layer in ((0, 1, 3) if name.startswith("rmu") else (0,))]
)
def test_objective_is_its_table_entry(name: str, layer: int, theta: nn.Module, reference: nn.Module) -> None:
    """Layer 0 is the embeddings, 3 the final norm."""
    objective, slow = SLOW[name]
    loss, batch = Loss(objective, layer=layer, noise=NOISE), batch_of(pad_rows(random_rows("forget")), reference)
    fast = loss_and_gradient(lambda: loss(theta, batch)["objective"], theta)
    assert_same(fast, loss_and_gradient(lambda: slow(slow_rows(theta, reference, "forget", layer)), theta))


@pytest.mark.parametrize(("name", "term"), [("gd", mean_nll), ("kl", kl)])
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_retain_term_is_its_table_entry(
    name: str, term: Objective, weight: float, theta: nn.Module, reference: nn.Module
) -> None:
    """Beside an objective, at other lengths and counts than the forget rows."""
    slow_term = {"gd": lambda rows: slow_mean(rows, lambda t: t.nll), "kl": slow_kl}[name]
    loss = Loss(ga, term, weight, reference=reference if name == "kl" else None)
    batch = batch_of(pad_rows(random_rows("forget")), reference, pad_rows(random_rows("retain")))

    def slow(part: str) -> Tensor:
        if part == "objective":
            return -slow_mean(slow_rows(theta, reference, "forget"), lambda t: t.nll)
        return weight * slow_term(slow_rows(theta, reference, "retain"))

    def fast(part: str) -> Tensor:
        return loss(theta, batch)[part]

    for part in ("objective", "retain"):
        assert_same(loss_and_gradient(partial(fast, part), theta), loss_and_gradient(partial(slow, part), theta))


# ---- identities ----


@pytest.mark.parametrize("name", [*SLOW, "ga + kl", "ga + gd"])
def test_shares_of_rows_add_up(name: str, theta: nn.Module, reference: nn.Module) -> None:
    """The loss of a batch is the sum of its rows', each taken alone with the whole batch's counts."""
    retain_term = {"ga + kl": kl, "ga + gd": mean_nll}.get(name)
    loss = Loss(SLOW[name.split(" + ")[0]][0], retain_term, 0.3, 2, NOISE, reference)
    forget, retain = random_rows("forget"), random_rows("retain")
    whole = batch_of(pad_rows(forget), reference, pad_rows(retain))
    counts = {key: whole[key] for key in ("forget_counts", "retain_counts")}
    one_each = [batch_of(pad_rows([f]), reference, pad_rows([r])) | counts for f, r in zip(forget, retain, strict=True)]

    def total(batches: list[Batch]) -> Tensor:
        return torch.stack([part for batch in batches for part in loss(theta, batch).values()]).sum()

    assert_same(loss_and_gradient(lambda: total(one_each), theta), loss_and_gradient(lambda: total([whole]), theta))


@pytest.fixture
def tokens(theta: nn.Module, reference: nn.Module) -> Tokens:
    """The forget rows' label tokens, with the reference's numbers and a layer's output."""
    batch = pad_rows(random_rows("forget"))
    with torch.no_grad():
        ref = token_outputs(reference, batch)
    return replace(token_outputs(theta, batch, layer=1), ref_nll=ref.nll, ref_logits=ref.logits)


@pytest.mark.parametrize("n", [0, 1, 3, 4])
def test_split(n: int, tokens: Tokens) -> None:
    rows = random_rows("forget")
    first = tokens.row < n
    tokens = replace(tokens, noise=NOISE)
    for part, here, chosen in zip(tokens.split(n), (rows[:n], rows[n:]), (first, ~first), strict=True):
        assert part.n_rows == len(here)
        assert part.noise is NOISE
        assert part.row.tolist() == [i for i, (_, answer) in enumerate(here) for _ in answer]
        for field in ("nll", "logits", "hidden", "ref_nll", "ref_logits"):
            assert torch.equal(getattr(part, field), getattr(tokens, field)[chosen]), field


@pytest.mark.parametrize("width", [11, 12, 20])
def test_padding_changes_nothing(width: int, theta: nn.Module) -> None:
    rows = random_rows("forget")
    alone = torch.cat([token_outputs(theta, pad_rows([row], len(row[0]))).nll for row in rows])
    assert torch.allclose(token_outputs(theta, pad_rows(rows, width)).nll, alone, rtol=1e-12, atol=0)


WEIGHTS: dict[str, tuple[Objective, Callable[[Tensor, Tensor], Tensor]]] = {
    "wga": (partial(wga, alpha=0.7), lambda p, o: p**0.7),
    "tnpo": (partial(tnpo, beta=2), lambda p, o: 2 * p**2 / (p**2 + o**2)),
    "wtnpo": (partial(wtnpo, beta=2, alpha=0.5), lambda p, o: 2 * p**2.5 / (p**2 + o**2)),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_no_gradient_through_the_weight(name: str, tokens: Tokens) -> None:
    objective, weight = WEIGHTS[name]
    assert tokens.ref_nll is not None
    leaf = tokens.nll.detach().requires_grad_()
    objective(replace(tokens, nll=leaf), Counts(tokens=50, rows=4)).backward()
    constant = weight(torch.exp(-leaf.detach()), torch.exp(-tokens.ref_nll))
    assert leaf.grad is not None
    assert torch.allclose(leaf.grad, -constant / 50, rtol=1e-12, atol=0)


def test_npo_tends_to_ga(tokens: Tokens) -> None:
    """For beta -> 0, npo = (2/beta) log 2 - mean_i m_i + beta mean_i m_i^2 / 4 with m_i = S_i - S_i^o: ga summed over rows."""
    beta, counts = 1e-6, Counts(tokens=len(tokens.nll), rows=4)
    assert tokens.ref_nll is not None
    leaf = tokens.nll.detach().requires_grad_()
    margin = tokens.sum_rows(leaf - tokens.ref_nll).detach()
    loss = npo(replace(tokens, nll=leaf), counts, beta=beta)
    want = -margin.mean() + beta * margin.square().mean() / 4
    assert loss.item() - 2 / beta * math.log(2) == pytest.approx(want.item(), abs=2e-9)  # 9 ulp of (2/beta) log 2

    (of_npo,) = torch.autograd.grad(loss, leaf)
    (of_ga,) = torch.autograd.grad(ga(replace(tokens, nll=leaf), counts), leaf)
    bound = beta * margin.abs().max().item() / 2  # 2 sigmoid(-x) = 1 - x/2 + O(x^3)
    assert torch.allclose(of_npo, of_ga * counts.tokens / counts.rows, rtol=1.01 * bound, atol=0)


def test_kl_is_0_at_the_reference(theta: nn.Module, reference: nn.Module) -> None:
    batch = batch_of(pad_rows(random_rows("forget")), reference, pad_rows(random_rows("retain")))
    loss = Loss(ga, kl, reference=theta)
    value, gradient = loss_and_gradient(lambda: loss(theta, batch)["retain"], theta)
    assert abs(value) < 1e-14
    assert gradient.norm() < 1e-13
    assert loss(reference, batch)["retain"] > 0.01


def synthetic(nll: list[float], ref_nll: list[float]) -> Tokens:
    row = torch.zeros(len(nll), dtype=torch.long)
    return Tokens(torch.tensor(nll), row, 1, torch.empty(len(nll), 0), ref_nll=torch.tensor(ref_nll))


def test_tnpo_does_not_underflow() -> None:
    """p = exp(-1000) is 0 in any float, but p against o is not."""
    tokens = synthetic([1000.0, 1000.0], [1000.0, 999.75])
    want = -(1000 + 2 / (1 + math.exp(1)) * 1000) / 2
    assert tnpo(tokens, Counts(2, 1), beta=4).item() == pytest.approx(want, rel=1e-6)
    assert wtnpo(tokens, Counts(2, 1), beta=4, alpha=0).item() == pytest.approx(want, rel=1e-6)
    assert npo(tokens, Counts(2, 1), beta=4).item() == pytest.approx(0.5 * math.log(1 + math.exp(-1)), rel=1e-6)


def test_npo_of_a_hopeless_row() -> None:
    """The margin's sigmoid underflows, its logarithm does not: -(2/beta) (beta margin) = 4000."""
    assert npo(synthetic([0.0], [2000.0]), Counts(1, 1), beta=4).item() == pytest.approx(4000)


def test_an_objective_without_its_reference_says_so() -> None:
    tokens = replace(synthetic([1.0], [1.0]), ref_nll=None)
    with pytest.raises(AssertionError, match="@needs.*ref_nll"):
        tnpo(tokens, Counts(1, 1), beta=4)


SMALL: dict[str, Any] = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 2}
GPT_NEOX: dict[str, Any] = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
MODELS: dict[str, PretrainedConfig] = {
    "llama": LLAMA,
    "llama, tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "phi": PhiConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL),
    "gpt-neox": GPTNeoXConfig(**GPT_NEOX),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_and_layers_are_the_full_forwards(name: str) -> None:
    """Of each architecture in model_config.yaml: formed at label positions only, the numbers are those of all positions."""
    model, batch = random_model(MODELS[name], 3), pad_rows(random_rows("forget"))
    full = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
    at = [(i, t - 1) for i, (_, answer) in enumerate(random_rows("forget")) for t in answer]
    layers = range(len(full.hidden_states))
    assert len(layers) == model.config.num_hidden_layers + 1
    for layer in layers:
        tokens = token_outputs(model, batch, layer)
        assert tokens.hidden is not None
        assert torch.equal(tokens.hidden, torch.stack([full.hidden_states[layer][i, t] for i, t in at]))
        want = torch.stack([full.logits[i, t] for i, t in at])
        assert torch.allclose(tokens.logits, want, rtol=1e-12, atol=1e-14)
    again = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert torch.equal(again, full.logits)  # the model is left as it was


@torch.no_grad()
def test_a_half_precision_model_gives_float32_losses() -> None:
    tokens = token_outputs(random_model(MODELS["phi"], 3).bfloat16(), pad_rows(random_rows("forget")), layer=1)
    assert tokens.hidden is not None
    assert {tokens.nll.dtype, tokens.logits.dtype, tokens.hidden.dtype} == {torch.float32}


@pytest.mark.parametrize("layer", [-1, 4])
def test_unknown_layer(layer: int, theta: nn.Module) -> None:
    with pytest.raises(ValueError, match=rf"layer {layer}: the model has layers 0 .* to 3"):
        token_outputs(theta, pad_rows(random_rows("forget")), layer)


# ---- an objective of one's own ----


def test_a_new_objective_is_a_function_and_a_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, theta: nn.Module, reference: nn.Module
) -> None:
    """Forget only what the model knows better than a threshold: one weight function, named by its YAML."""
    (tmp_path / "my_objectives.py").write_text(
        "from unlearn.objectives.functions import weighted\n\n\n"
        "@weighted\n"
        "def known(tokens, threshold):\n"
        "    return (tokens.nll < threshold).to(tokens.nll.dtype)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    method = OmegaConf.create("objective:\n  _target_: my_objectives.known\n  _partial_: true\n  threshold: 3.5\n")
    loss, batch = Loss(instantiate(method.objective)), batch_of(pad_rows(random_rows("forget")), reference)
    nll = token_outputs(theta, batch).nll
    known = nll[nll < 3.5]
    assert 0 < len(known) < len(nll)
    assert loss(theta, batch)["objective"].item() == pytest.approx(-known.sum().item() / len(nll), rel=1e-12)
