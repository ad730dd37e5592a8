"""LoRA: adapters off are the original model, G-effects over the adapters are those of the plain way, runs and results."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import ROOT, doubled, make_workplace, run_in
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, PreTrainedModel

from unlearn.geffect.meter import Meter
from unlearn.geffect.target import Target, Wanted
from unlearn.models.adapters import LoRA, adapters_off, add_lora
from unlearn.models.evaluating import in_eval_mode
from unlearn.models.vectors import trainable
from unlearn.objectives.functions import Objective, ga, kl, mean_nll, npo
from unlearn.objectives.loss import Loss
from unlearn.objectives.tokens import token_outputs
from unlearn.passes.batches import on, set_batches

CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    ),
    "gpt2": GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=1),
}


def rows_of(n: int, seed: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(n):
        ids = torch.randint(2, 50, (6 + i,), generator=generator)
        rows.append({"input_ids": ids, "labels": torch.where(torch.arange(len(ids)) < 3, -100, ids)})
    return rows


def adapted(name: str, trained: bool = True) -> PreTrainedModel:
    """A float64 model with adapters, B no longer zero where `trained`."""
    torch.manual_seed(0)
    model = doubled(AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="sdpa"))
    add_lora(model, LoRA(r=4, alpha=8, dropout=0.1), 0, "nowhere")
    for parameter in trainable(model).values():
        if trained:
            torch.nn.init.normal_(parameter, std=0.1)
    return doubled(model)


@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_off_is_the_original_model(name: str) -> None:
    """Their log-probabilities to the last bit, in training mode too; and what is on comes back as it was."""
    torch.manual_seed(0)
    original = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="sdpa").double().eval()
    model = adapted(name).train()
    [batch] = set_batches(rows_of(3, 1), [], 3, 0)
    flags = {key: p.requires_grad for key, p in model.named_parameters()}
    with torch.no_grad():
        with in_eval_mode(model), adapters_off(model):
            off = token_outputs(model, batch).logits
        assert torch.equal(off, token_outputs(original, batch).logits)
        model.eval()
        assert not torch.allclose(off, token_outputs(model, batch).logits, atol=1e-3)
    assert flags == {key: p.requires_grad for key, p in model.named_parameters()}
    assert all("lora_" in key for key, flag in flags.items() if flag)


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("objective", [ga, partial(npo, beta=0.5)], ids=["ga", "npo"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_g_effect_over_the_adapters_is_the_plain_ways(name: str, objective: Objective, retain: bool) -> None:
    """By instance: one backward pass each, dot by dot; totals, layers and tokens add up to it. float64, 1e-9."""
    model = adapted(name)
    forget, keep, beside = rows_of(4, 1), rows_of(3, 2), rows_of(3, 3) if retain else []
    forget = [row | {"ref_nll": torch.ones(int((row["labels"] != -100).sum()), dtype=torch.float64)} for row in forget]
    loss = Loss(objective, retain=kl if retain else None, weight=0.7, reference=model if retain else None)
    meter = Meter(
        model, Target(loss, forget, beside), {"unlearn": forget, "retain": keep}, 0, Wanted(tokens=True), batch_size=2
    )
    tables = meter.measure()

    parameters = list(trainable(model).values())
    model.eval()

    def gradient(of: Loss, batch: dict) -> list[torch.Tensor]:
        return list(torch.autograd.grad(sum(of(model, on(batch, model.device)).values()), parameters))  # type: ignore[arg-type]

    for risk, rows in (("unlearn", forget), ("retain", keep)):
        [batch] = set_batches(rows, [], len(rows), 0)
        direction = gradient(Loss(mean_nll), batch)
        expected = {"retain": 0.0}
        for batch in set_batches(forget, beside, 1, 0):
            e = sum(float((g * v).sum()) for g, v in zip(gradient(loss, batch), direction, strict=True))
            key = str(int(batch["index"])) if batch["n_forget"] else "retain"
            expected[key] = expected.get(key, 0.0) + e
        total = sum(expected.values())
        scale = sum(map(abs, expected.values()))
        found = {name: table[table["risk"] == risk] for name, table in tables.items()}
        instances = {str(row): e for row, e in zip(found["instances"]["row"], found["instances"]["geffect"], strict=True)}
        for row, e in instances.items():
            assert e == pytest.approx(expected[row], abs=1e-9 * scale)
        for table in ("steps", "layers", "tokens"):
            assert found[table]["geffect"].sum() == pytest.approx(total, abs=1e-9 * scale)
        assert found["layers"]["module"].str.contains("lora_").all()


# ---- commands ----


@pytest.fixture(scope="module")
def place(young: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where adapters were fine-tuned on `young`, and a model was unlearnt by adapters, measured at every fifth step."""
    folder = make_workplace(tmp_path_factory.mktemp("adapters"))
    run_in(
        folder, f"python finetune.py --config-name=finetune_lora model_family=tiny num_epochs=1 hf_key={young} save_dir=tuned"
    )
    start = "python forget.py --config-name=forget_lora model_family=tiny split=forget10 method=npo retain=kl lr=2e-3"
    run_in(folder, f"{start} model_path={young} save_dir=run geffect.every=5 eval.every=6")
    return folder


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(10)[None]).logits


def test_a_fine_tuned_adapter_is_there_alone_and_merged(place: Path) -> None:
    merged = AutoModelForCausalLM.from_pretrained(place / "tuned")
    alone = AutoModelForCausalLM.from_pretrained(place / "tuned/adapter")
    assert torch.allclose(logits(merged), logits(alone), atol=1e-4)
    assert len(AutoTokenizer.from_pretrained(place / "tuned")) == len(AutoTokenizer.from_pretrained(place / "tuned/adapter"))


def test_checkpoints_are_small_and_load(place: Path, young: Path) -> None:
    file = place / "run/checkpoint-12/adapter_model.safetensors"
    assert file.stat().st_size < (young / "model.safetensors").stat().st_size / 4
    assert not torch.allclose(
        logits(AutoModelForCausalLM.from_pretrained(file.parent)),
        logits(AutoModelForCausalLM.from_pretrained(young)),
        atol=1e-2,
    )
    losses = json.loads((place / "run/logs/losses.json").read_text())
    assert losses["forget"]["end"] > losses["forget"]["start"]


def test_g_effects_of_saved_adapters_are_those_while_unlearning(place: Path) -> None:
    run_in(place, "python compute_geffect.py model_path_cur=run save_dir=measured")
    found, expected = (pd.read_csv(place / name / "geffect/steps.csv") for name in ("measured", "run"))
    keys = ["geffect", "cosine", "objective_norm", "risk_norm", "risk_value"]
    expected = expected[expected["step"].isin(found["step"])].reset_index(drop=True)
    assert list(found["step"]) == [0, 0, 5, 5, 10, 10, 12, 12]
    pd.testing.assert_frame_equal(found[keys], expected[keys], rtol=1e-3, atol=1e-7)


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(place: Path, young: Path) -> None:
    """With dropout, whose random state is part of what it goes on from."""
    start = (
        f"forget.py --config-name=forget_lora model_family=tiny split=forget10 method=npo retain=kl lr=2e-3 model_path={young}"
    )
    killed = run_in(
        place, f'python {ROOT}/tests/at.py torch.save 8 before "kill -KILL $PID" {start} save_dir=killed', check=False
    )
    assert killed.returncode == -9
    assert "going on after step" in run_in(place, f"python {start} save_dir=killed").stderr
    names = ("killed", "run")
    one, two = ((place / name / "checkpoint-12/adapter_model.safetensors").read_bytes() for name in names)
    assert one == two


@pytest.mark.parametrize("start", [pytest.param("tuned", marks=pytest.mark.slow), "tuned/adapter"])
def test_unlearning_from_a_merged_or_an_adapter_checkpoint(place: Path, start: str) -> None:
    name = start.replace("/", "_")
    line = (
        f"python forget.py --config-name=forget_lora model_family=tiny split=forget05 method=ga model_path={start} eval.every=6"
    )
    run_in(place, f"{line} save_dir=from_{name}")
    losses = json.loads((place / f"from_{name}/logs/losses.json").read_text())
    assert losses["forget"]["end"] > losses["forget"]["start"]
    AutoModelForCausalLM.from_pretrained(place / f"from_{name}/checkpoint-6")
    last = pd.read_csv(place / f"from_{name}/scores.csv").set_index("step")
    run_in(place, f"python evaluation_everything.py model_path=from_{name}/checkpoint-6 control=false retain_holdout=6")
    scores = json.loads(next((place / f"from_{name}/checkpoint-6").rglob("scores.json")).read_text())
    assert scores["ps"]["unlearned"]["forget"]["loss"] == pytest.approx(last.loc[6, "forget_loss"], rel=1e-3)
    assert scores["ps"]["original"]["forget"]["loss"] == pytest.approx(last.loc[0, "forget_loss"], rel=1e-3)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("forget.py model_family=tiny model_path=orphan", ["model_path=orphan", "an adapter, and its model /nowhere"]),
        ("forget.py model_family=tiny model_path=tuned LoRA.r=-1", ["LoRA.r=-1", "whole number of at least 0"]),
        ("forget.py model_family=tiny model_path=tuned LoRA.r=2.5", ["LoRA.r=2.5", "whole number of at least 0"]),
        ("forget.py model_family=tiny model_path=tuned LoRA.r=100000", ["LoRA.r=100000", "rank 192 at most"]),
        ("forget.py model_family=tiny model_path=tuned LoRA.dropout=1", ["LoRA.dropout=1", "below 1"]),
        ("forget.py model_family=tiny model_path=tuned LoRA.rank=8", ["LoRA.rank", "r, alpha, dropout"]),
        ("forget.py model_family=tiny model_path=nameless", ["nameless", "names no base model"]),
        ("compute_geffect.py model_path_cur=run LoRA.r=4 save_dir=other", ["another adapter", "checkpoint-5"]),
    ],
)
def test_what_a_user_can_get_wrong(place: Path, line: str, words: list[str]) -> None:
    for name, text in (("orphan", '{"base_model_name_or_path": "/nowhere"}'), ("nameless", "{}")):
        (place / name).mkdir(exist_ok=True)
        (place / name / "adapter_config.json").write_text(text)
        (place / name / "adapter_model.safetensors").write_bytes(b"\2" + b"\0" * 7 + b"{}")
    done = run_in(place, f"python {line}", check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert [word for word in words if word not in done.stderr] == []


def test_the_reference_is_never_copied(young: Path) -> None:
    from app.building import reference_of

    model = AutoModelForCausalLM.from_pretrained(young)
    assert reference_of(model) is not model
    add_lora(model, LoRA(4, 8, 0.0), 0, str(young))
    assert reference_of(model) is model
    assert copy.deepcopy(model.peft_config["default"]).base_model_name_or_path == str(young.resolve())
