"""The G-effect the slow, obvious way, a backward pass for each instance and token, a dot for each tensor; and what it is of.

Tiny random models in float64, the reference a little off, rows of several lengths, losses. Convention: an instance's share is
that of its row's term in the loss with the whole set's counts; a token's share is what its own outputs contribute.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from conftest import doubled
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from unlearn.geffect.meter import Meter
from unlearn.geffect.parts import RISKS
from unlearn.geffect.tables import Tables
from unlearn.geffect.target import Target, Wanted
from unlearn.objectives.functions import Objective, ga, kl, mean_nll, npo, rmu, tnpo, wga, wtnpo
from unlearn.objectives.loss import Loss
from unlearn.objectives.rows import Row, collate
from unlearn.objectives.tokens import IGNORE

PAD, EOS, VOCABULARY, WIDTH = 0, 2, 37, 16
NOISE = torch.rand(WIDTH, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
ALL = Wanted(positions=True, tokens=True)
SPECIAL = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": EOS, "vocab_size": VOCABULARY}
SMALL = {**SPECIAL, "hidden_size": WIDTH, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 4}
GPT = {**SPECIAL, "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 32}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": GROUPED | {"tie_word_embeddings": False},
    "llama, tied": GROUPED | {"tie_word_embeddings": True},
    "phi": SMALL,
    "gpt_neox": SMALL,
    "qwen2": GROUPED | {"tie_word_embeddings": True},
    "gpt2": GPT,
    "gemma": GROUPED,
}


# ---- models, rows and losses ----


def build(kind: str, attention: str | None = "sdpa", **changes: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind.split(",")[0], **CONFIGS.get(kind, {}) | changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    return doubled(model).eval()


def shake(model: nn.Module, by: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(by * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype))


def pair(kind: str, attention: str = "sdpa") -> tuple[Any, Any]:
    """A model and its reference."""
    model = build(kind, attention)
    reference = copy.deepcopy(model).requires_grad_(False)
    shake(model)
    return model, reference


shared_pair = functools.cache(pair)  # for tests that leave the weights as they are


def use_weight_directly(model: Any, call_too: bool) -> None:
    """The first block's MLP takes a projection's weight without calling it, or beside calling it."""
    mlp = model.model.layers[0].mlp

    def forward(x: Tensor) -> Tensor:
        up = F.linear(x, mlp.up_proj.weight)
        return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * (0.5 * (up + mlp.up_proj(x)) if call_too else up))

    mlp.forward = forward


def random_rows(n: int, seed: int) -> list[Row]:
    """Of different lengths, the answer somewhere in the second half; with the padding's and end-of-sequence ids inside."""
    generator = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    rows = []
    for _ in range(n):
        length = integer(5, 11)
        ids = torch.randint(0, VOCABULARY, (length,), generator=generator)
        ids[integer(1, length)], ids[-1] = PAD, EOS
        labels = ids.clone()
        labels[: integer(length // 2, length - 1)] = IGNORE
        rows.append({"input_ids": ids, "labels": labels})
    return rows


FORGET, RETAIN, BESIDE = random_rows(5, 1), random_rows(4, 2), random_rows(3, 3)
RISK_ROWS = dict(zip(RISKS, (FORGET, RETAIN), strict=True))
OBJECTIVES: dict[str, Loss] = {
    "ga": Loss(ga),
    "wga": Loss(partial(wga, alpha=0.7)),
    "npo": Loss(partial(npo, beta=0.5)),
    "tnpo": Loss(partial(tnpo, beta=2)),
    "wtnpo": Loss(partial(wtnpo, beta=2, alpha=0.5)),
    "rmu_1": Loss(partial(rmu, c=2), layer=1, noise=NOISE),
    "rmu_2": Loss(partial(rmu, c=2), layer=2, noise=NOISE),
    "idk": Loss(mean_nll),
}
TERMS: dict[str, Objective | None] = {"none": None, "gd": mean_nll, "kl": kl}


def with_reference(rows: Sequence[Row], reference: nn.Module) -> list[Row]:
    with torch.no_grad():
        return [row | {"ref_nll": SlowRow(reference, row).nll} for row in rows]


def target_of(name: str, reference: nn.Module, term: str = "none", weight: float = 0.3) -> Target:
    objective, retain = OBJECTIVES[name], TERMS[term]
    loss = Loss(objective.objective, retain, weight, objective.layer, objective.noise, reference if term == "kl" else None)
    return Target(loss, with_reference(FORGET, reference), BESIDE if retain else [])


def meter_of(model: Any, target: Target, wanted: Wanted = ALL, batch_size: int = 2, **more: Any) -> Meter:
    risks = more.pop("risks", RISK_ROWS)
    return Meter(model, target, risks, PAD, wanted, batch_size=batch_size, **more)


# ---- the slow way ----


class SlowRow:
    """A row alone, without padding, through the model's own forward: the label tokens' numbers."""

    def __init__(self, model: nn.Module, row: Row) -> None:
        out = model(input_ids=row["input_ids"][None], output_hidden_states=True, use_cache=False)
        self.at = [t for t in range(1, len(row["labels"])) if row["labels"][t] != IGNORE]  # of the label tokens
        self.log_p = torch.stack([torch.log_softmax(out.logits[0, t - 1], -1) for t in self.at])
        self.nll = torch.stack([-p[row["input_ids"][t]] for p, t in zip(self.log_p, self.at, strict=True)])
        self.hidden = [torch.stack([h[0, t - 1] for t in self.at]) for h in out.hidden_states]


def count_tokens(rows: Sequence[Row]) -> int:
    return sum(int((row["labels"][1:] != IGNORE).sum()) for row in rows)


def slow_terms(name: str, row: SlowRow, ref_nll: Tensor) -> list[Tensor]:
    """For each label token a scalar whose gradient is its share of the objective's, from the table of objectives."""
    m, n, terms = count_tokens(FORGET), len(FORGET), []
    margin = (row.nll - ref_nll).sum().item()
    for i, (loss, ref) in enumerate(zip(row.nll, ref_nll.tolist(), strict=True)):
        p, o = math.exp(-loss.item()), math.exp(-ref)
        weight = {
            "ga": -1 / m,
            "wga": -(p**0.7) / m,
            "npo": -2 / n / (1 + math.exp(0.5 * margin)),
            "tnpo": -2 * p**2 / (p**2 + o**2) / m,
            "wtnpo": -2 * p**2.5 / (p**2 + o**2) / m,
            "idk": 1 / m,
        }
        if name.startswith("rmu"):
            terms.append((row.hidden[int(name[-1])][i] - 2 * NOISE).square().mean() / m)
        else:
            terms.append(weight[name] * loss)
    return terms


def slow_retain(term: str, model: nn.Module, reference: nn.Module, row: Row) -> Tensor:
    here = SlowRow(model, row)
    if term == "gd":
        return here.nll.sum() / count_tokens(BESIDE)
    with torch.no_grad():
        there = SlowRow(reference, row)
    return (there.log_p.exp() * (there.log_p - here.log_p)).sum() / count_tokens(BESIDE)


Gradient = dict[str, Tensor]


def gradient(value: Tensor, parameters: Mapping[str, Tensor]) -> Gradient:
    grads = torch.autograd.grad(value, list(parameters.values()), allow_unused=True, retain_graph=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), grads, strict=True)}


def add(gradients: Sequence[Gradient]) -> Gradient:
    return {name: torch.stack([g[name] for g in gradients]).sum(0) for name in gradients[0]}


def slow_risk(model: nn.Module, parameters: Mapping[str, Tensor], rows: Sequence[Row]) -> Gradient:
    return add([gradient(SlowRow(model, row).nll.sum() / count_tokens(rows), parameters) for row in rows])


@dataclass(frozen=True)
class Slow:
    """A model whose uses of tied weights are apart, its parameters, and V for each risk (a tied weight's V in both uses)."""

    model: Any
    parameters: dict[str, Tensor]
    v: list[Gradient]

    def effects(self, g: Gradient) -> dict[tuple[str, str], float]:
        """By risk and module."""
        found: dict[tuple[str, str], float] = {}
        for name, x in g.items():
            for risk, v in zip(RISKS, self.v, strict=True):
                key = risk, name.rpartition(".")[0]
                found[key] = found.get(key, 0.0) + (x * v[name]).sum().item()
        return found


def slow_of(model: Any) -> Slow:
    twin = model
    if model.config.tie_word_embeddings:
        config = copy.deepcopy(model.config)
        config.tie_word_embeddings = False
        twin = doubled(AutoModelForCausalLM.from_config(config, attn_implementation=model.config._attn_implementation)).eval()
        twin.load_state_dict(model.state_dict())
    parameters = dict(twin.named_parameters())
    v = [slow_risk(twin, parameters, rows) for rows in RISK_ROWS.values()]
    if twin is not model:
        names = {id(p): name for name, p in parameters.items()}
        uses = [names[id(x.weight)] for x in (twin.get_input_embeddings(), twin.get_output_embeddings())]
        v = [g | dict.fromkeys(uses, g[uses[0]] + g[uses[1]]) for g in v]
    return Slow(twin, parameters, v)


slow_shared = functools.cache(lambda kind: slow_of(shared_pair(kind)[0]))


def slow_of_trained(model: Any, target: Target) -> dict[str, list[float]]:
    """Totals and instances over the trained parameters, by a backward pass for each row; its objective is the target's."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    v = [slow_risk(model, parameters, rows) for rows in RISK_ROWS.values()]
    m, found = (count_tokens(FORGET), len(FORGET)), []
    for row in target.forget:
        batch = collate([row], PAD) | {"n_forget": 1, "forget_counts": m, "retain_counts": (0, 0), "ref_nll": row["ref_nll"]}
        g = gradient(target.loss(model, batch)["objective"], parameters)
        found.append([sum((g[name] * x[name]).sum().item() for name in g) for x in v])
    return {"steps": [sum(e) for e in zip(*found, strict=True)], "instances": [e[d] for d in range(2) for e in found]}


def assert_close(got: Any, want: Any, rel: float = 1e-9) -> None:
    """To `rel` of the largest entry."""
    got, want = (torch.tensor(list(x), dtype=torch.float64) for x in (got, want))
    assert got.shape == want.shape
    assert want.abs().max() > 0
    assert ((got - want).abs().max() / want.abs().max()).item() <= rel


def totals(table: pd.DataFrame) -> list[float]:
    return [float(table[table["risk"] == risk]["geffect"].sum()) for risk in RISKS]


def assert_same_tables(got: Tables, want: Tables, rel: float = 1e-9, but: Sequence[str] = ()) -> None:
    assert set(got) == set(want)
    for name, table in want.items():
        assert list(got[name].columns) == list(table.columns)
        for column in table.columns.difference(but):
            a, b = got[name][column], table[column]
            if pd.api.types.is_float_dtype(b.dtype) and b.notna().any():
                assert (a.isna() == b.isna()).all()
                assert_close(a.dropna(), b.dropna(), rel)
            else:
                assert a.equals(b), (name, column)


def layer_of(module: str) -> str:
    """What the table should call the layer of a module of these families."""
    index = [part for part in module.split(".") if part.isdigit()]
    if index:
        return index[0]
    if module.endswith(("embed_tokens", "embed_in", "wte", "wpe")):
        return "embed"
    return "lm_head" if module in ("lm_head", "embed_out") else "norm"
