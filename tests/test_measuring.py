"""What is measured is the model itself: without dropout, under the asked-for precision, each token at its own position, once.

Each test compares with the slow, obvious way or with a model that does without the trap; float64 to 1e-9 unless said.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import peft
import pytest
import torch
from slow_geffect import CONFIGS, FORGET, RETAIN, SPECIAL, SlowRow, build, shake
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from unlearn.geffect import meter as meters
from unlearn.geffect.call import GEffectCallback, geffect, meter_of
from unlearn.geffect.meter import Meter
from unlearn.geffect.tables import Tables, read
from unlearn.geffect.target import Target, Wanted
from unlearn.models import sharding
from unlearn.objectives.functions import ga, kl, mean_nll, npo
from unlearn.objectives.loss import Loss
from unlearn.objectives.rows import tokenize_pairs
from unlearn.passes.decoding import decode
from unlearn.passes.forcing import Pass, token_nlls
from unlearn.scores.extraction import score_rows

EVERYTHING = Wanted(positions=True, tokens=True)
DROPOUT: dict[str, dict[str, Any]] = {
    "opt": {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 20, "num_hidden_layers": 2, "num_attention_heads": 4},
    "falcon": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "new_decoder_architecture": False}
    | {"hidden_dropout": 0.3, "attention_dropout": 0.3},
    "biogpt": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 20}
    | {"hidden_dropout_prob": 0.3, "activation_dropout": 0.3, "layerdrop": 0.5, "max_position_embeddings": 64},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, "resid_pdrop": 0.3, "attn_pdrop": 0.3},
}


pytestmark = pytest.mark.usefixtures("float64_throughout")


class Stub:
    """Stands in for a tokenizer where rows are tokens already."""

    pad_token_id, eos_token_id = 0, 2
    decode = staticmethod(str)


TOKENS: Any = Stub()


def same(found: Tables, want: Tables, bound: float = 1e-9) -> None:
    for name in (name for name in want if name in found):
        values, right = (torch.tensor(tables[name]["geffect"].tolist(), dtype=torch.float64) for tables in (found, want))
        assert (values - right).abs().max() <= bound * right.abs().max(), name


def sums(table: Any) -> list[float]:
    return [table.loc[table["risk"] == risk, "geffect"].sum() for risk in ("unlearn", "retain")]


# ---- in eval mode ----


@pytest.mark.parametrize("kind", DROPOUT)
@pytest.mark.parametrize("reentrant", [False, True])
def test_no_dropout_under_gradient_checkpointing(kind: str, reentrant: bool) -> None:
    """Of a block's own forward, too: everything that measures gives what the model in eval mode gives, and puts modes back."""
    model = build(kind, None, **SPECIAL, **DROPOUT[kind])
    reference = copy.deepcopy(model)
    shake(model)
    loss = Loss(partial(npo, beta=0.5), retain=kl)
    want = geffect(model, TOKENS, FORGET, RETAIN, loss, reference=reference, beside=RETAIN, wanted=Wanted(tokens=True))
    nlls = token_nlls(Pass(model, 0, 2), FORGET)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    reference.train()
    meter = meter_of(model, TOKENS, FORGET, RETAIN, loss, reference=reference, beside=RETAIN, wanted=Wanted(tokens=True))
    same(meter.measure(), want, 1e-12)
    plain = geffect(model, TOKENS, FORGET, RETAIN, loss, reference=reference, beside=RETAIN, wanted=Wanted(instances=False))
    same({"steps": plain["steps"]}, want, 1e-12)
    assert meter.risk_values() == pytest.approx(want["steps"]["risk_value"].tolist(), rel=1e-12)
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(token_nlls(Pass(model, 0, 2), FORGET), nlls, strict=True))
    assert all(module.training for one in (model, reference) for module in one.modules())


# ---- virtual tokens ----

PROMPTS: dict[str, Callable[..., Any]] = {
    "prompt tuning": partial(peft.PromptTuningConfig, num_virtual_tokens=3),
    "p-tuning": partial(peft.PromptEncoderConfig, num_virtual_tokens=3, encoder_hidden_size=8),
    "prefix tuning": partial(peft.PrefixTuningConfig, num_virtual_tokens=3),
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_virtual_tokens(kind: str) -> None:
    """Losses and G-effects are those of the rows' own tokens; what can't be told apart by instance is said in a line."""
    config = PROMPTS[kind](task_type="CAUSAL_LM")
    model: Any = peft.get_peft_model(build("llama"), config).double().eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(3)) * p.requires_grad
    trained = [p for p in model.parameters() if p.requires_grad]

    def risk(rows: Any) -> Tensor:
        logits = [model(input_ids=row["input_ids"][None]).logits[0, -len(row["input_ids"]) :] for row in rows]
        pairs = [(z[:-1][row["labels"][1:] != -100], row["labels"][1:]) for z, row in zip(logits, rows, strict=True)]
        return torch.cat([nn.functional.cross_entropy(z, y[y != -100], reduction="none") for z, y in pairs]).mean()

    v = [torch.autograd.grad(risk(rows), trained) for rows in (FORGET, RETAIN)]
    want = [-sum(float((a * b).sum()) for a, b in zip(v[0], of, strict=True)) for of in v]
    tables = geffect(model, TOKENS, FORGET, RETAIN, ga, wanted=Wanted(instances=False, tokens=True))
    assert tables["steps"]["geffect"].tolist() == pytest.approx(want, rel=1e-7)
    assert sums(tables["tokens"]) == pytest.approx(want, rel=1e-7)
    assert tables["steps"]["risk_value"][0] == pytest.approx(float(risk(FORGET)), rel=1e-7)
    mean = torch.cat(token_nlls(Pass(model, 0, 2, batch_size=2), [*FORGET, *FORGET[:1]])[: len(FORGET)]).mean()
    assert mean.item() == pytest.approx(float(risk(FORGET)), rel=1e-7)
    prompt = FORGET[0]["input_ids"][:4]
    answer: list[int] = []
    for _ in range(4):
        seen = torch.tensor([*prompt.tolist(), *answer])
        answer.append(int(model(input_ids=seen[None]).logits[0, -1].argmax()))
    assert decode(Pass(model, 0, -1), [prompt], [4]) == [answer]
    if kind == "prefix tuning":
        assert geffect(model, TOKENS, FORGET, RETAIN, ga)["steps"]["geffect"].tolist() == pytest.approx(want, rel=1e-7)
    else:
        with pytest.raises(ValueError, match="instances=false"):
            geffect(model, TOKENS, FORGET, RETAIN, ga)
    with pytest.raises(ValueError, match="instances=false|positions=false"):
        geffect(model, TOKENS, FORGET, RETAIN, ga, wanted=EVERYTHING)


# ---- parts add up ----


class NormedEmbedding(nn.Embedding):
    """Normalises what it looks up, so that what it gives at the padding depends on a weight, too."""

    def __init__(self, like: nn.Embedding) -> None:
        super().__init__(like.num_embeddings, like.embedding_dim, 0)
        self.weight, self.norm = like.weight, nn.LayerNorm(like.embedding_dim)

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(super().forward(ids))


class ScaledEmbedding(nn.Embedding):
    def __init__(self, like: nn.Embedding) -> None:
        super().__init__(like.num_embeddings, like.embedding_dim, 0)
        self.weight, self.scale = like.weight, nn.Parameter(torch.ones(like.embedding_dim))

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.scale + self.scale


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("of", [NormedEmbedding, ScaledEmbedding])
def test_padding_inside_an_embedding_that_does_more(of: Any, tied: bool) -> None:
    """What its `padding_idx` holds is what is looked up, not what the module makes of it; a tied head keeps its own."""
    model = build("llama", tie_word_embeddings=tied)
    model.model.embed_tokens = of(model.model.embed_tokens)
    shake(model.double(), 0.3)
    plain = geffect(model, TOKENS, FORGET, RETAIN, ga, wanted=Wanted(instances=False))
    tables = geffect(model, TOKENS, FORGET, RETAIN, ga, wanted=EVERYTHING)
    same({"steps": tables["steps"]}, plain)
    for name in ("layers", "instances", "positions", "tokens"):
        assert sums(tables[name]) == pytest.approx(plain["steps"]["geffect"].tolist(), rel=1e-9)


class Once(torch.autograd.Function):
    """The identity, as a kernel that can be differentiated but once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def once_only(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    return sdpa_attention_forward(module, Once.apply(query), Once.apply(key), Once.apply(value), mask, **kwargs)


def half_only(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    if query.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    return once_only(module, query, key, value, mask, **kwargs)


@pytest.fixture(params=["sdpa", "half_flash_attn", "once_only"])
def attention(request: pytest.FixtureRequest) -> str:
    for name, function in (("half_flash_attn", half_only), ("once_only", once_only)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, sdpa_mask)
    return str(request.param)


def test_attention_that_differentiates_once(attention: str) -> None:
    """flash-attn is not measured with, whatever trains; of a kernel of one's own a part that was dropped is noticed."""
    model = build("llama")
    model.config._attn_implementation = attention
    reference = copy.deepcopy(model)
    shake(model)
    loss = Loss(partial(npo, beta=0.5), retain=kl)
    given = {"reference": reference, "beside": RETAIN}
    want = geffect(build_again(model, "sdpa"), TOKENS, FORGET, RETAIN, loss, **given, wanted=Wanted(tokens=True))
    same({"steps": geffect(model, TOKENS, FORGET, RETAIN, loss, **given)["steps"]}, {"steps": want["steps"]})
    token_nlls(Pass(model, 0, 2), FORGET)
    for more in ({"wanted": Wanted(tokens=True)}, {"wanted": Wanted(instances=False, tokens=True)}):
        if attention == "once_only":
            with pytest.raises(ValueError, match="by tokens add up to .*tokens=false"):
                geffect(model, TOKENS, FORGET, RETAIN, loss, **given, **more)
        else:
            found = geffect(model, TOKENS, FORGET, RETAIN, loss, **given, **more)
            same({"tokens": found["tokens"]}, {"tokens": want["tokens"]})
    assert model.config._attn_implementation == reference.config._attn_implementation == attention


def build_again(model: Any, attention: str) -> Any:
    other = copy.deepcopy(model)
    other.config._attn_implementation = attention
    return other


def test_a_sweep_beside_a_dropped_path_is_refused(attention: str) -> None:
    model = build_again(build("llama"), attention)
    rows = {"unlearn": FORGET, "retain": RETAIN}
    meter = Meter(model, Target(Loss(ga), FORGET), rows, 0, sweep={("idk", None): Target(Loss(mean_nll), FORGET)})
    if attention == "once_only":
        with pytest.raises(ValueError, match="by forward-mode pass add up to"):
            meter.measure()
    else:
        tables = meter.measure()
        assert tables["sweep"]["geffect"].tolist() == pytest.approx((-tables["steps"]["geffect"]).tolist(), rel=1e-7)


@pytest.mark.parametrize("name", ["layers", "instances", "positions", "tokens"])
@pytest.mark.parametrize("norms", [True, False])
def test_every_table_is_compared_with_the_total(name: str, norms: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each measurement, not at the first alone: a hundredth more somewhere is told."""
    meter = meter_of(build("llama"), TOKENS, FORGET, RETAIN, ga, wanted=Wanted(norms=norms, positions=True, tokens=True))
    meter.measure()
    maker = {"layers": "by_site", "positions": "by_position", "tokens": "by_token", "instances": "instance_table"}[name]
    where = meter if hasattr(meter, maker) else meters
    make = getattr(where, maker)

    def wrong(*args: Any) -> Any:
        table = make(*args)
        return table.assign(geffect=table["geffect"] * 1.01)

    monkeypatch.setattr(where, maker, wrong)
    with pytest.raises(ValueError, match=f"by {name} add up to"):
        meter.measure()


# ---- special tokens ----


def tokenizer_that_adds(template: str) -> Any:
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "[g]", "<user>", "who", "?", "me", "you"])}
    made = Tokenizer(WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = WhitespaceSplit()
    made.post_processor = TemplateProcessing(single=template, special_tokens=[(w, i) for w, i in words.items() if i < 4])
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "extra_special_tokens": ["[g]", "<user>"]}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


@pytest.mark.parametrize("template", ["<s> $A", "<s> $A </s>", "[g] <s> $A", "$A </s>", "$A"])
def test_special_tokens_come_once(template: str) -> None:
    """A prompt that a chat template made has those that stand in front, an answer perhaps its end: no token is doubled."""
    tokenizer = tokenizer_that_adds(template)
    front = template.partition("$A")[0].split()
    written = "".join(front)
    plain = tokenize_pairs([("who ? ", "me")], tokenizer)[0]["input_ids"].tolist()
    assert tokenizer.convert_ids_to_tokens(plain) == [*front, "who", "?", "me", "</s>"]
    row = tokenize_pairs([(f"{written}who ? ", "me"), ("who ? ", "me</s>"), (f"{written}who ? ", "")], tokenizer)
    assert row[0]["input_ids"].tolist() == row[1]["input_ids"].tolist() == plain
    assert row[0]["labels"].tolist() == row[1]["labels"].tolist() == [-100] * (len(plain) - 2) + plain[-2:]
    assert row[2]["labels"].tolist() == [-100] * (len(plain) - 2) + plain[-1:]


def test_the_calls_see_a_chat_template() -> None:
    """G-effects and scores of prompts by `apply_chat_template` are those of its own tokens."""
    tokenizer = tokenizer_that_adds("<s> $A")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %} <user> {{ m.content }} {% endfor %}{% if add_generation_prompt %}? {% endif %}"
    )
    ask = [{"role": "user", "content": "who"}]
    prompt = tokenizer.apply_chat_template(ask, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.apply_chat_template(ask, add_generation_prompt=True, return_dict=True)["input_ids"]
    ids = torch.tensor([*ids, *tokenizer.convert_tokens_to_ids(["me", "</s>"])])
    labels = torch.where(torch.arange(len(ids)) < len(ids) - 2, -100, ids)
    model = build("llama")
    found = geffect(model, tokenizer, [(prompt, "me")], [(prompt, "you")], ga)["steps"]
    other = ids.clone()
    other[-2] = tokenizer.convert_tokens_to_ids("you")
    rows = [{"input_ids": x, "labels": torch.where(labels == -100, -100, x)} for x in (ids, other)]
    want = geffect(model, tokenizer, rows[:1], rows[1:], ga)["steps"]
    assert found["geffect"].tolist() == want["geffect"].tolist()
    loss = score_rows(model, tokenizer, [(prompt, "me")], max_new_tokens=2)["loss"][0]
    assert loss == pytest.approx(float(SlowRow(model, rows[0]).nll.mean()), rel=1e-12)


# ---- under a trainer's autocast ----


@pytest.mark.parametrize("trainers", [1, 2])
def test_a_meter_inside_a_trainer_measures_in_its_own_precision(trainers: int, tmp_path: Path) -> None:
    """Before and after a step of `Trainer(bf16=True)`, to the last bit what is measured without a trainer; bfloat16 is not."""
    config = AutoConfig.for_model("gemma", **CONFIGS["gemma"])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    data = [{"input_ids": FORGET[0]["input_ids"], "labels": FORGET[0]["labels"]}]
    meter = meter_of(model, TOKENS, FORGET, RETAIN, ga, bf16=False)
    before = copy.deepcopy(model)
    for number in range(trainers):
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "out"), max_steps=1, bf16=True, use_cpu=True, report_to=[], save_strategy="no"
        )
        folder = tmp_path / f"geffect{number}"
        Trainer(model, arguments, train_dataset=data, callbacks=[GEffectCallback(meter, 1, folder)]).train()
        steps = read(folder / "steps.csv")
        for step, weights in ((0, before), (1, model)):
            found = steps[steps["step"] == step]["geffect"].tolist()
            want = geffect(copy_without_trainer(weights), TOKENS, FORGET, RETAIN, ga)["steps"]["geffect"].tolist()
            half = geffect(copy_without_trainer(weights), TOKENS, FORGET, RETAIN, ga, bf16=True)["steps"]["geffect"].tolist()
            assert found == want
            assert found != half
        before = copy_without_trainer(model)
    losses = token_nlls(Pass(model, 0, 2), FORGET)
    assert all(map(torch.equal, losses, token_nlls(Pass(copy_without_trainer(model), 0, 2), FORGET)))


def copy_without_trainer(model: Any) -> Any:
    other = AutoModelForCausalLM.from_config(model.config, attn_implementation="sdpa")
    other.load_state_dict(model.state_dict())
    return other.eval()


# ---- nothing to measure ----

ROW = {"input_ids": torch.tensor([1, 5, 6, 2]), "labels": torch.tensor([-100, -100, 6, 2])}
NONE = ROW | {"labels": torch.full((4,), -100)}


@pytest.mark.parametrize(
    ("forget", "retain", "words"),
    [
        ([NONE], [ROW], "forget[0]: no label tokens"),
        ([ROW, NONE], [ROW], "forget[1]: no label tokens"),
        ([ROW], [ROW, ROW, ROW | {"labels": torch.tensor([1, -100, -100, -100])}], "retain[2]: no label tokens"),
        ([ROW], [{"input_ids": torch.zeros(0).long(), "labels": torch.zeros(0).long()}], "retain[0]: no label tokens"),
        ([ROW], [ROW | {"labels": torch.tensor([6, 2])}], "retain[0]: input_ids and labels need to be (T,) both"),
        ([{"input_ids": ROW["input_ids"]}], [ROW], "forget[0]: needs input_ids and labels, and lacks labels"),
    ],
)
@pytest.mark.parametrize("compared", [True, False])
def test_rows_without_label_tokens_are_named(forget: Any, retain: Any, words: str, compared: bool) -> None:
    model = build("llama")
    with pytest.raises(ValueError, match=re.escape(words)):
        geffect(model, TOKENS, forget, retain, ga, reference=copy.deepcopy(model) if compared else None)
    with pytest.raises(ValueError, match=r"the retain risk: its 1 rows have no label tokens"):
        Meter(model, Target(Loss(ga), [ROW]), {"unlearn": [ROW], "retain": [NONE]}, 0)


# ---- V off the GPU ----


def test_v_off_the_gpu_is_never_on_it() -> None:
    """`offload`: V is made in CPU memory, and a tensor at a time comes to the device."""
    model = build("llama").float()
    meter = Meter(model, Target(Loss(ga), FORGET), {"unlearn": FORGET, "retain": RETAIN}, 0, Wanted(), offload=True)
    meta = {name: p.to("meta") for name, p in meter.parameters.items()}
    assert {sharding.zeros(p, (2,), p.dtype, offload=True).device.type for p in meta.values()} == {"cpu"}
    want = Meter(model, Target(Loss(ga), FORGET), {"unlearn": FORGET, "retain": RETAIN}, 0, Wanted()).measure()
    assert meter.measure()["steps"]["geffect"].tolist() == want["steps"]["geffect"].tolist()


# ---- what is around a measurement ----


@pytest.mark.parametrize("wanted", [Wanted(), Wanted(norms=False), Wanted(instances=False, tokens=True)])
def test_a_callers_autocast_changes_nothing(wanted: Wanted) -> None:
    model = build("llama")
    plain = geffect(model, TOKENS, FORGET, RETAIN, ga, wanted=wanted)
    with torch.autocast("cpu", torch.bfloat16):
        around = geffect(model, TOKENS, FORGET, RETAIN, ga, wanted=wanted)
    for name, table in plain.items():
        pd.testing.assert_frame_equal(table, around[name], rtol=1e-6)


def test_padding_that_is_read_is_refused() -> None:
    """CPM-Ant takes no mask: its rows can't be padded."""
    small = {"hidden_size": 16, "num_attention_heads": 2, "dim_head": 8, "dim_ff": 16, "num_hidden_layers": 2}
    config = AutoConfig.for_model("cpmant", vocab_size=37, **small)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    with pytest.raises(ValueError, match="CpmAntForCausalLM: the padding behind a row changes what the model says of it"):
        geffect(model, TOKENS, FORGET, RETAIN, ga)


def test_a_models_parameters_are_its_own_afterwards() -> None:
    """Of tied trainable tokens, too, whose module stands in the model twice."""
    from peft import TrainableTokensConfig, get_peft_model

    model: Any = get_peft_model(build("gpt2").requires_grad_(True), TrainableTokensConfig(token_indices=[5, 6, 7]))
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    geffect(model, TOKENS, FORGET, RETAIN, ga, wanted=Wanted(instances=False, tokens=True))
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("where", ["target", "retain", "sweep"])
@pytest.mark.parametrize("what", ["none", "first"])
def test_a_meters_rows_have_labels_behind_their_first_token(where: str, what: str) -> None:
    ids = torch.tensor([5, 6, 7])
    labels = torch.full((3,), -100)
    bad = [{"input_ids": ids, "labels": torch.cat([ids[:1], ids[1:] if what == "first" else labels[1:]])}]
    if what == "none":
        bad[0]["labels"] = labels
    good = [{"input_ids": ids, "labels": torch.tensor([-100, 6, 7])}]
    targets = {
        "target": Target(Loss(ga), bad),
        "retain": Target(Loss(ga, mean_nll), good, bad),
        "sweep": Target(Loss(ga), good),
    }
    sweep: Any = {("ga", None): Target(Loss(ga), bad)} if where == "sweep" else {}
    line = "rows have no label tokens" if what == "none" else "its first token has a label, and nothing before it to tell it"
    with pytest.raises(ValueError, match=line):
        Meter(build("llama"), targets[where], {"unlearn": good, "retain": good}, 0, sweep=sweep)


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [("input_ids", -1, "the token -1"), ("labels", 77, "the token 77"), ("input_ids", 0.5, "torch.float32")],
)
def test_tokens_that_are_none(key: str, value: float, line: str) -> None:
    row: dict[str, Any] = {"input_ids": torch.tensor([5, 6, 7]), "labels": torch.tensor([-100, 6, 7])}
    row[key] = row[key].to(torch.tensor(value).dtype).index_fill(0, torch.tensor([2]), value)
    with pytest.raises(ValueError, match=rf"forget\[0\].*{line}"):
        geffect(build("llama"), TOKENS, [row], RETAIN, ga)


@pytest.mark.parametrize("offload", [False, True])
def test_inner_products_are_read_once_a_measurement(offload: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not tensor by tensor: on a GPU each reading waits for all that was launched before it."""
    meter = meter_of(build("llama"), TOKENS, FORGET, RETAIN, ga, wanted=Wanted(instances=False))
    meter.offload = offload
    meter.measure()
    read: list[str] = []

    def noted(name: str) -> Callable[..., Any]:
        function = getattr(Tensor, name)

        def called(*args: Any) -> Any:
            read.append(name)
            return function(*args)

        return called

    for name in ("item", "tolist", "__float__", "__bool__", "__int__"):
        monkeypatch.setattr(Tensor, name, noted(name))
    meter._dots(meter.parameters)
    assert read == ["tolist"]
    assert len(meter.parameters) > 10
