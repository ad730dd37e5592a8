"""G-effects and scores on architectures of many kinds, against one backward pass for each row and a dot for each tensor.

Kinds: state spaces beside attention, alone, and gated; recurrences; experts in one tensor; windows by layer; configurations
within configurations, with a vision model as deep as the text model; BERT's heads; shared blocks; adapters on experts.

Tiny random models in float64. Where transformers' casts to float32 are lifted, to 1e-9 of the largest entry.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import doubled, float64_throughout
from slow_geffect import (
    BESIDE,
    FORGET,
    GPT,
    GROUPED,
    PAD,
    RISK_ROWS,
    SMALL,
    SPECIAL,
    WIDTH,
    assert_close,
    build,
    meter_of,
    shake,
    slow_of_trained,
    target_of,
    totals,
    use_weight_directly,
)
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from app.checks import check_architecture, check_layer
from app.families import load_family
from unlearn.geffect.target import Target, Wanted
from unlearn.models.adapters import LoRA, add_lora, merged_state
from unlearn.models.sharding import blocks
from unlearn.objectives.functions import ga, rmu
from unlearn.objectives.loss import Loss
from unlearn.objectives.tokens import token_outputs
from unlearn.passes.batches import on, set_batches
from unlearn.passes.forcing import Pass, teacher_force

MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
MIXED = {"layer_types": ["linear_attention", "full_attention"]}
STATES = {"mamba_d_state": 4, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
WINDOW = GROUPED | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
VISION = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
ZAMBA = {"mamba_d_state": 4, "n_mamba_heads": 4, "mamba_headdim": 8, "mamba_ngroups": 1, "chunk_size": 8}
KINDS: dict[str, dict[str, Any]] = {
    "bamba": GROUPED | STATES | {"attn_layer_indices": [1]},
    "jamba": GROUPED
    | MOE
    | {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 2, "use_mamba_kernels": False},
    "granitemoehybrid": GROUPED | MOE | STATES | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 12},
    "falcon_h1": GROUPED | STATES | {"mamba_d_ssm": 32},
    "zamba2": SMALL | ZAMBA | {"layers_block_type": ["mamba", "hybrid"], "num_mem_blocks": 1, "adapter_rank": 4},
    "recurrent_gemma": GROUPED | {"lru_width": WIDTH, "attention_window_size": 4, "block_types": ["recurrent", "attention"]},
    "olmoe": GROUPED | MOE,
    "gemma2": WINDOW,
    "gemma3": {
        "text_config": WINDOW,
        "vision_config": VISION | {"image_size": 8, "patch_size": 4},
        "mm_tokens_per_image": 4,
        "image_token_index": 35,
        "boi_token_index": 34,
        "eoi_token_index": 33,
    },
    "bert": SMALL | {"is_decoder": True},
    "roberta": SMALL | {"is_decoder": True, "max_position_embeddings": 40},
    "electra": SMALL | {"is_decoder": True, "embedding_size": WIDTH},
    "biogpt": SMALL | {"max_position_embeddings": 40},
    "phimoe": GROUPED | MOE,
    "bloom": {**SPECIAL, "hidden_size": WIDTH, "n_layer": 2, "n_head": 4},  # an autograd function without a forward mode
    "gemma3_text": GROUPED,  # norms over (rows, heads, positions, ...)
    "llama4_text": GROUPED | MOE | {"intermediate_size_mlp": 20, "num_experts_per_tok": 1},  # (experts x rows x positions, ...)
    "mamba2": {**SMALL, "num_heads": 4, "head_dim": 8, "state_size": 4, "n_groups": 1, "chunk_size": 8},
    "opt": SMALL | {"ffn_dim": 20, "word_embed_proj_dim": 8},  # projections around the blocks
    "qwen3_next": GROUPED
    | MOE
    | MIXED
    | {"shared_expert_intermediate_size": 12, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
    | {"linear_key_head_dim": 4, "linear_value_head_dim": 4},  # (rows x positions x heads, ...)
}
MORE: dict[str, dict[str, Any]] = {
    "apertus": GROUPED,
    "cohere2": GROUPED,
    "codegen": GPT | {"n_ctx": 32, "rotary_dim": 4},
    "falcon": SMALL | {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon, old": SMALL | {"new_decoder_architecture": False, "parallel_attn": True},
    "gpt_bigcode": GPT,
    "gpt_neo": {
        **SPECIAL,
        "hidden_size": WIDTH,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
    },
    "gptj": GPT | {"rotary_dim": 4},
    "lfm2": GROUPED | {"layer_types": ["conv", "full_attention"], "block_multiple_of": 4},
    "mamba": {**SPECIAL, "hidden_size": WIDTH, "num_hidden_layers": 2, "state_size": 4},
    "mistral": GROUPED,
    "mpt": {**SPECIAL, "d_model": WIDTH, "n_layers": 2, "n_heads": 4, "max_seq_len": 32},
    "nemotron": GROUPED,
    "olmo2": GROUPED,
    "phi3": GROUPED,
    "qwen3": GROUPED,
    "rwkv": {**SPECIAL, "hidden_size": WIDTH, "num_hidden_layers": 2, "attention_hidden_size": WIDTH, "context_length": 32},
    "smollm3": GROUPED,
    "stablelm": GROUPED,
    "starcoder2": GROUPED,
}
EXPERTS: dict[str, dict[str, Any]] = dict.fromkeys(("mixtral", "qwen3_moe"), GROUPED | MOE) | {
    "granitemoe": GROUPED | MOE,
    "gpt_oss": GROUPED | MOE | {"sliding_window": 4},
    "qwen2_moe": GROUPED | MOE | {"shared_expert_intermediate_size": 12},
}


def make(kind: str, attention: str | None = "eager", **changes: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind.split(",")[0], **copy.deepcopy((KINDS | MORE | EXPERTS)[kind]) | changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    if any(name.endswith("gate_up_proj") for name, _ in model.named_parameters()):
        model.set_experts_implementation("eager")  # the grouped product takes no float64
    return model.eval()


def pair(kind: str, attention: str | None = "eager") -> tuple[Any, Any]:
    """A model and its reference."""
    model = doubled(make(kind, attention))
    reference = copy.deepcopy(model)
    shake(model)
    return model, reference


@pytest.fixture
def lifted(request: pytest.FixtureRequest) -> Iterator[None]:
    """transformers' casts to float32 lifted, as long as the test runs."""
    generator = float64_throughout.__wrapped__()  # type: ignore[attr-defined]
    next(generator)
    yield
    with pytest.raises(StopIteration):
        next(generator)


@pytest.mark.usefixtures("lifted")
@pytest.mark.parametrize("kind", [*KINDS, *(pytest.param(kind, marks=pytest.mark.slow) for kind in [*MORE, *EXPERTS])])
def test_every_kind_is_the_slow_way(kind: str) -> None:
    """Totals, layers, instances and tokens; with `norms=false` and plainly too."""
    model, reference = pair(kind, None)
    target = target_of("npo", reference)
    slow = slow_of_trained(model, target)
    tables = meter_of(model, target, Wanted(tokens=True, positions=True)).measure()
    assert_close(tables["steps"]["geffect"], slow["steps"])
    assert_close(tables["instances"]["geffect"], slow["instances"])
    for part in ("layers", "tokens", "positions"):
        assert_close(totals(tables[part]), slow["steps"])
    assert {"0", "1", "embed", "lm_head"} <= set(tables["layers"]["layer"])
    lean = meter_of(model, target, Wanted(norms=False)).measure()
    assert_close(lean["instances"]["geffect"], slow["instances"])
    assert_close(meter_of(model, target, Wanted(instances=False)).measure()["steps"]["geffect"], slow["steps"])


@pytest.mark.usefixtures("lifted")
@pytest.mark.parametrize("kind", EXPERTS)
def test_adapters_on_experts(kind: str) -> None:
    """peft puts one around the other, each in a parameter's place while it runs. Merged they give the same logits."""
    pytest.importorskip("peft")
    model, reference = make(kind, None), doubled(make(kind, None))
    add_lora(model, LoRA(r=3, alpha=6, dropout=0.0), 0, "nowhere")
    model = doubled(model).eval()
    generator = torch.Generator().manual_seed(5)
    for p in (p for p in model.parameters() if p.requires_grad):
        p.data.copy_(0.1 * torch.randn(p.shape, generator=generator))
    target = target_of("wga", reference)
    slow = slow_of_trained(model, target)
    for norms in (True, False):
        assert_close(meter_of(model, target, Wanted(norms=norms)).measure()["instances"]["geffect"], slow["instances"])
    assert_close(meter_of(model, target, Wanted(instances=False)).measure()["steps"]["geffect"], slow["steps"])

    whole = make(kind, None)
    whole.load_state_dict(merged_state(model, model.state_dict()))
    [batch] = set_batches(FORGET, [], 5, PAD)
    with torch.no_grad():
        got, want = (token_outputs(m, batch).logits for m in (doubled(whole), model))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("lifted")
def test_outputs_that_mix_rows_are_refused() -> None:
    """Experts' rows sorted by expert can't be told apart by where they stand: an error, and no guess."""
    kind: dict[str, Any] = GROUPED | MOE | {"kv_channels": 4}
    model = build("jetmoe", **kind)
    target = Target(Loss(ga), FORGET)
    with pytest.raises(ValueError, match=r"does not tell 2 rows apart \(instances=false does without\)"):
        meter_of(model, target).measure()
    assert len(meter_of(model, target, Wanted(instances=False, tokens=True)).measure()["tokens"])


def test_dropout_on_experts_is_refused() -> None:
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match=r"LoRA\.dropout=0\.1: the experts of Mixtral.* share one weight.*LoRA\.dropout=0$"):
        add_lora(make("mixtral"), LoRA(r=3, alpha=6, dropout=0.1), 0, "nowhere")


# ---- float64 models that drop to float32 inside ----


@pytest.mark.parametrize("kind", ["bamba", "granitemoehybrid", "zamba2", "qwen3_next", "mamba2", "jamba"])
@pytest.mark.parametrize("norms", [True, False])
def test_float64_with_casts_is_not_refused(kind: str, norms: bool) -> None:
    """The tap and the whole gradient agree as far as float32 goes."""
    model, reference = pair(kind)
    target = target_of("npo", reference)
    want = meter_of(model, target, Wanted(instances=False)).measure()["steps"]["geffect"]
    assert_close(meter_of(model, target, Wanted(norms=norms)).measure()["steps"]["geffect"], want, 1e-6)


@pytest.mark.parametrize("norms", [True, False])
def test_with_casts_a_weight_used_beside_its_module_is_still_refused(norms: bool) -> None:
    model, reference = pair("gemma2")
    use_weight_directly(model, call_too=True)
    with pytest.raises(ValueError, match="is used other than by calling its module"):
        meter_of(model, target_of("wga", reference), Wanted(norms=norms)).measure()


@pytest.mark.parametrize("kind", ["gemma2", "gemma3", "recurrent_gemma", "gpt_oss"])
def test_a_window_shorter_than_the_padding(kind: str) -> None:
    """A padding token that sees nothing but padding changes nothing: G-effects, tokens and scores are those of rows alone."""
    model = doubled(make(kind)).double()
    target = Target(Loss(ga), FORGET)
    assert max(len(row["input_ids"]) for row in FORGET) - min(len(row["input_ids"]) for row in FORGET) >= 4
    alone, together = (meter_of(model, target, Wanted(tokens=True), batch_size=n).measure() for n in (1, 8))
    for part in ("steps", "instances", "tokens"):
        assert_close(together[part]["geffect"], alone[part]["geffect"], 1e-5)
    forced = [teacher_force(Pass(model, PAD, 2, batch_size=n), [*FORGET, *BESIDE]) for n in (1, 8)]
    for one, other in zip(*forced, strict=True):
        torch.testing.assert_close(torch.from_numpy(other.nll), torch.from_numpy(one.nll), rtol=1e-5, atol=1e-6)


# ---- configurations within configurations ----


def test_a_text_model_beside_a_vision_model_as_deep() -> None:
    """Its blocks are the text model's, a step with rmu's layer trains, and its scores are those of the text model alone."""
    model = make("gemma3")
    assert [type(block).__name__ for block in blocks(model)] == 2 * ["Gemma3DecoderLayer"]
    noise = torch.rand(WIDTH, generator=torch.Generator().manual_seed(0))
    loss = Loss(functools.partial(rmu, c=2), layer=1, noise=noise)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    values = []
    for _ in range(2):
        [batch] = set_batches(FORGET, [], 8, PAD)
        value = loss(model, on(batch, model.device))["objective"]
        values.append(value.item())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert values[1] < values[0]
    text = AutoModelForCausalLM.from_config(model.config.text_config, attn_implementation="eager").eval()
    text.model.load_state_dict(model.model.language_model.state_dict())
    text.lm_head.load_state_dict(model.lm_head.state_dict())
    got, want = (teacher_force(Pass(m, PAD, 2), list(RISK_ROWS["retain"]), moments=True) for m in (model, text))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(torch.from_numpy(one.nll), torch.from_numpy(other.nll))


@pytest.mark.parametrize("depth", ["num_hidden_layers", "n_layer", "num_layers"])
def test_a_nested_configuration_is_looked_into(tmp_path: Path, depth: str) -> None:
    """For a layer's number and for the vocabulary, which are not at its top."""
    for name, vocabulary in (("one", 37), ("other", 38)):
        (tmp_path / name).mkdir()
        config = {"model_type": "gemma3", "text_config": {depth: 2, "vocab_size": vocabulary}}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    check_layer(str(tmp_path / "one"), 2)
    with pytest.raises(ValueError, match=r"method\.layer=3: .* has 0 \(its embeddings\) to 2"):
        check_layer(str(tmp_path / "one"), 3)
    family = load_family("tiny", hf_key=str(tmp_path / "one"))
    check_architecture("model_path", str(tmp_path / "one"), family)
    with pytest.raises(ValueError, match="has vocab_size 38, and model_family=tiny 37"):
        check_architecture("model_path", str(tmp_path / "other"), family)


def test_a_list_of_small_modules_beside_the_blocks() -> None:
    """As long as the model is deep, and before them."""
    model = make("olmoe")
    inner = model.model.layers
    del model.model.layers
    model.model.projections = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
    model.model.layers = inner
    assert blocks(model) == list(inner)


def test_a_parameter_that_is_an_output_is_refused_by_instance() -> None:
    """GPT-NeoX-Japanese hands an attention's bias on, the same for all rows."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("gpt_neox_japanese", **SMALL, intermediate_multiple_size=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    target = Target(Loss(ga), FORGET)
    with pytest.raises(ValueError, match=r"does not tell 2 rows apart \(instances=false does without\)"):
        meter_of(model, target, Wanted()).measure()
    plain = meter_of(model, target, Wanted(instances=False)).measure()["steps"]["geffect"]
    assert_close(plain, slow_of_trained(model, target_of("ga", model))["steps"], 1e-4)
