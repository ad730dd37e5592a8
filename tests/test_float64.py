"""Models in float64 as transformers runs them, with norms, softmax and state spaces in float32 inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from slow_geffect import FORGET, GROUPED, RETAIN, build, shake
from test_measuring import TOKENS

from unlearn.geffect.call import geffect
from unlearn.geffect.target import Wanted
from unlearn.models.checkpoints import load_model
from unlearn.objectives.functions import ga
from unlearn.passes.forcing import Pass, token_nlls

MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
HYBRIDS: dict[str, dict[str, Any]] = {
    "bamba": GROUPED | MAMBA | {"attn_layer_indices": [1]},
    "granitemoehybrid": GROUPED | MAMBA | MOE | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 20},
    "qwen3_next": GROUPED
    | MOE
    | {"layer_types": ["linear_attention", "full_attention"], "shared_expert_intermediate_size": 8}
    | {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 4, "linear_value_head_dim": 4},
    "jamba": GROUPED
    | MOE
    | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    | {"mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    "mixtral": GROUPED | MOE,
}


@pytest.mark.parametrize("kind", HYBRIDS)
def test_float64_is_not_refused_for_casts_inside(kind: str) -> None:
    """Norms, softmax and state spaces in float32 inside: no refusal; with tokens and norms, and the plain way's numbers."""
    model = build(kind, None, **HYBRIDS[kind])
    shake(model, 0.3)
    plain = geffect(model, TOKENS, FORGET, RETAIN, ga, wanted=Wanted(instances=False))
    tapped = geffect(model, TOKENS, FORGET, RETAIN, ga)
    assert tapped["steps"]["geffect"].tolist() == pytest.approx(plain["steps"]["geffect"].tolist(), rel=1e-5)


def test_in_float64_a_weight_used_past_its_module_is_still_told() -> None:
    model = build("bamba", None, **HYBRIDS["bamba"])
    shake(model, 0.3)
    model.model.final_layernorm.register_forward_hook(lambda m, _, out: out + 0.01 * m.weight)
    with pytest.raises(ValueError, match="a weight is used other than by calling its module"):
        geffect(model, TOKENS, FORGET, RETAIN, ga)


@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
def test_a_window_shorter_than_the_padding(kind: str) -> None:
    """Plain attention in float64: padding that sees padding alone is no nan; a row is what it is by itself."""
    model = build(kind, "eager", **GROUPED, sliding_window=3)
    ids = torch.arange(12) + 3
    long = {"input_ids": ids, "labels": torch.where(torch.arange(12) < 2, -100, ids)}
    rows = [*FORGET[:2], long]
    found = token_nlls(Pass(model, 0, 2), rows)
    for row, nll in zip(rows, found, strict=True):
        assert torch.allclose(nll, token_nlls(Pass(model, 0, 2), [row])[0], rtol=1e-6)
    assert geffect(model, TOKENS, rows, RETAIN, ga)["steps"]["geffect"].notna().all()


@pytest.mark.parametrize("kind", ["gemma2", "mixtral"])
def test_they_are_loaded_in_float64(kind: str, tmp_path: Path) -> None:
    """Also models that can't take SDPA, which float64 is loaded with, and a mixture of experts."""
    build(kind, None, **GROUPED, **(MOE if kind == "mixtral" else {})).float().save_pretrained(tmp_path)
    model = load_model(str(tmp_path), torch.device("cpu"), dtype=torch.float64)
    assert geffect(model, TOKENS, FORGET, RETAIN, ga)["steps"]["geffect"].notna().all()
