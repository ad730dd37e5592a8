"""trainable=REGEX: only the parameters that it names are trained, and G-effects are of them alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import make_workplace, run_in
from safetensors.torch import load_file
from test_adapters import CONFIGS, adapted, rows_of
from test_compute_geffect import call, measure, unlearn_split
from test_plan import shape
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import compute_geffect
import finetune
import forget
from app import planning
from app.compose import given
from app.door import quote
from app.runs import suffix
from dataloader import StepBatches
from unlearn.geffect.meter import Meter
from unlearn.geffect.target import Target, Wanted
from unlearn.models.adapters import LoRA
from unlearn.models.plan import Work, measuring, trained, training
from unlearn.models.trained import matching, names_of, train_only, trained_names
from unlearn.objectives.functions import npo, rmu
from unlearn.objectives.loss import Loss
from unlearn.training.trainer import freeze_unreached

NAMES = {"llama": "model.layers.1.mlp.down_proj", "gpt2": "transformer.h.1.mlp.c_proj"}
DOWN = r"layers\.(1|3)\.mlp\.down_proj"
FOUND = {f"model.layers.{i}.mlp.down_proj.weight" for i in (1, 3)}


def small(name: str, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="sdpa").double()


def tables(model: PreTrainedModel, wanted: Wanted, sweep: bool = False) -> dict[str, pd.DataFrame]:
    """Of npo on four rows, and of an update that moves every weight that is trained."""
    forget, keep = rows_of(4, 1), rows_of(3, 2)
    forget = [row | {"ref_nll": torch.ones(int((row["labels"] != -100).sum()), dtype=torch.float64)} for row in forget]
    target = Target(Loss(partial(npo, beta=0.5)), forget)
    more: Any = {("npo", None): target} if sweep else {}
    meter = Meter(model, target, {"unlearn": forget, "retain": keep}, 0, wanted, more, batch_size=2)
    found = meter.measure()
    meter.start_update()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            change = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(change if parameter.requires_grad else 0, alpha=1e-3)
    return found | meter.update_effect()


# ---- measured ----


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("wanted", [Wanted(tokens=True, positions=True), Wanted(norms=False), Wanted(instances=False)], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_rows_are_those_of_the_whole_measurement(name: str, wanted: Wanted) -> None:
    """float64, 1e-9: layers and updates by module; instances, positions, tokens and the sweep add up to them."""
    whole, model = small(name), small(name)
    train_only(model, NAMES[name].replace(".", r"\."))
    full, part = tables(whole, wanted), tables(model, wanted, sweep=True)
    for table, column in (("layers", "geffect"), ("updates", "update_effect")):
        rows = full[table][full[table]["module"] == NAMES[name]].reset_index(drop=True)
        assert len(rows) == 2
        pd.testing.assert_frame_equal(part[table], rows, rtol=1e-9, atol=0)
        assert full[table][column].abs().sum() > part[table][column].abs().sum()
    totals = part["layers"].groupby("risk")["geffect"].sum()
    for table in {"steps", "instances", "positions", "tokens", "sweep"} & part.keys():
        assert part[table].groupby("risk")["geffect"].sum().to_dict() == pytest.approx(totals.to_dict(), rel=1e-9)


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("wanted", [Wanted(tokens=True), Wanted(norms=False), Wanted(instances=False)], ids=str)
def test_an_objective_on_a_layer_below_all_that_is_trained(wanted: Wanted) -> None:
    """It does not depend on them: no G-effect, and no training."""
    model = small("llama")
    train_only(model, r"layers\.1\.mlp\.down_proj")
    loss = Loss(partial(rmu, c=2.0), layer=1, noise=torch.rand(16, dtype=torch.float64))
    rows = rows_of(4, 1)
    found = Meter(model, Target(loss, rows), {"unlearn": rows, "retain": rows_of(3, 2)}, 0, wanted).measure()
    assert [table for table in found if (found[table]["geffect"] != 0).any()] == []
    assert (found["steps"]["risk_norm"] > 0).all()
    with pytest.raises(ValueError, match="depends on none of the trained parameters"):
        freeze_unreached(model, loss, StepBatches(rows, [], 1, 2, 1, 0, 0)[0])


def test_what_is_frozen_stays_so() -> None:
    """Where an objective on a layer's output freezes what is above it."""
    model = small("llama")
    train_only(model, "mlp.down_proj")
    loss = Loss(partial(rmu, c=2.0), layer=1, noise=torch.rand(16, dtype=torch.float64))
    freeze_unreached(model, loss, StepBatches(rows_of(4, 1), [], 1, 2, 1, 0, 0)[0])
    assert trained_names(model) == ["model.layers.0.mlp.down_proj.weight"]


# ---- names ----


def test_names_of_a_configuration_are_those_of_the_model() -> None:
    for name in CONFIGS:
        assert names_of(CONFIGS[name]) == trained_names(small(name))
        assert names_of(CONFIGS[name], LoRA(4, 8, 0.0)) == trained_names(adapted(name))


def test_tied_weights_are_named_once() -> None:
    config = LlamaConfig(**CONFIGS["llama"].to_dict() | {"tie_word_embeddings": True})
    assert "lm_head.weight" not in names_of(config)
    model = AutoModelForCausalLM.from_config(config)
    train_only(model, "embed_tokens")
    assert trained_names(model) == ["model.embed_tokens.weight"]
    assert model.lm_head.weight.requires_grad
    with pytest.raises(ValueError, match="trainable=lm_head: is found in no trained parameter's name; there are model.embed"):
        train_only(model, "lm_head")


def test_a_line_names_a_parameter_of_each_kind() -> None:
    names = names_of(CONFIGS["llama"])
    with pytest.raises(ValueError, match="there are ") as error:
        matching("layers.7", names)
    listed = str(error.value).partition("there are ")[2].partition(", and as many")[0].split(", ")
    assert set(listed) < set(names)
    assert "model.layers.0.mlp.down_proj.weight" in listed
    assert not [name for name in listed if "layers.1." in name]
    with pytest.raises(ValueError, match=r"trainable=\(a: no regular expression \(.*\); there are model.embed_tokens.weight, "):
        matching("(a", names)


@pytest.mark.parametrize("pattern", [DOWN, r"[01]\.mlp", "it's", "a,b{1,2}", "^model.*weight$", "null", "'quoted'"])
def test_a_pattern_reaches_the_settings_as_typed(pattern: str) -> None:
    expected = None if pattern == "null" else pattern.strip("'") if pattern == "'quoted'" else pattern
    for command in ("forget", "finetune", "forget_ge"):
        assert given(command, [quote(f"trainable={pattern}")]).trainable == expected


def test_a_folder_is_named_after_it() -> None:
    names = [
        suffix(given("forget", [quote(f"trainable={pattern}")])) for pattern in ("null", "mlp", r"a\.b", "a.b", "x/y|" * 99)
    ]
    assert names[:2] == ["", "_trainable=mlp"]
    assert len(set(names)) == 5
    assert max(map(len, names)) < 90
    assert not [name for name in names if "/" in name or "\\" in name]


# ---- the plan ----


def test_the_plan_counts_what_is_trained() -> None:
    model = shape("smollm2-135m")
    down = 3 * 576 * 1536
    work = partial(Work, rows=4, tokens=100, labels=60, accumulated=2, trainable=r"layers\.(5|6|7)\.mlp\.down_proj")
    assert trained(model, work()) == down
    need, plain = training(model, work()), training(model, Work(4, 100, 60, accumulated=2))
    assert (need.memory["gradients"], need.memory["optimiser"]) == (4 * down, 8 * down)
    assert need.memory["weights"] == plain.memory["weights"]
    assert need.disk["checkpoints"] == plain.disk["checkpoints"]  # whole models
    assert need.disk["to go on from"] == 2 * (4 * model.parameters + 8 * down)
    few: dict[str, Any] = {"rows": 1, "tokens": 4, "labels": 2, "accumulated": 1}  # so that they are the peak
    assert "gradients of the tied head" in training(model, Work(**few)).memory
    assert "gradients of the tied head" not in training(model, work(**few)).memory
    assert training(model, work(shards=8)).memory["gradients not yet reduced"] == 4 * down
    assert measuring(model, work(), True).memory["directions V"] == 2 * 4 * down
    assert trained(model, work(lora=8)) == 3 * 8 * (576 + 1536)
    with pytest.raises(ValueError, match="trainable=nothing"):
        training(model, work(trainable="nothing"))


# ---- commands ----

RUN = "model_family=tiny split=forget05 method=npo retain=kl dtype=float32 num_epochs=2 save_steps=1"
OF = f"trainable='{DOWN}'"


@pytest.fixture(scope="module")
def place(young: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of a run, measured while unlearning."""
    folder = make_workplace(tmp_path_factory.mktemp("trained"))
    unlearn_split(folder, f"{RUN} model_path={young} {OF} save_dir=run geffect.every=1")
    return folder


def changed(run: Path, original: Path, file: str = "checkpoint-2/model.safetensors") -> set[str]:
    before, after = load_file(original / "model.safetensors"), load_file(run / file)
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def off(one: Path, two: Path) -> float:
    a, b = (load_file(run / "checkpoint-2/model.safetensors") for run in (one, two))
    return max((a[name] - b[name]).abs().max().item() for name in a)


def refused(job: Any, config: str, place: Path, words: str) -> str:
    with pytest.raises(ValueError, match="trainable=") as error:
        call(job, config, place, words)
    return str(error.value)


def test_the_others_keep_their_bits(place: Path, young: Path) -> None:
    """And checkpoints are whole."""
    assert changed(place / "run", young) == FOUND
    AutoModelForCausalLM.from_pretrained(place / "run/checkpoint-2")


def test_g_effects_while_unlearning_and_of_its_checkpoints(place: Path) -> None:
    measure(place, "model_path_cur=run save_dir=later")
    one, two = (pd.read_csv(place / name / "geffect/layers.csv") for name in ("run", "later"))
    assert {f"{name}.weight" for name in one["module"]} == FOUND
    pd.testing.assert_frame_equal(one, two, rtol=1e-3, atol=1e-7)
    error = refused(compute_geffect.run, "forget_ge", place, "model_path_cur=run save_dir=later trainable=mlp")
    assert f"trainable={DOWN} there, mlp here" in error


def test_another_pattern_is_another_run(place: Path, young: Path, tmp_path: Path) -> None:
    """One that an earlier version made trained all."""
    for more, here in ((" trainable=mlp", "mlp"), ("", "None")):
        error = refused(forget.run, "forget", place, f"{RUN} model_path={young} save_dir=run{more}")

        assert f"trainable={DOWN} there, {here} here" in error
    text = (place / "run/config.yaml").read_text()
    (tmp_path / "config.yaml").write_text("".join(x for x in text.splitlines(keepends=True) if "trainable" not in x))
    (tmp_path / "logs").mkdir()  # begun
    error = refused(forget.run, "forget", place, f"{RUN} model_path={young} trainable=mlp save_dir={tmp_path}")
    assert "trainable=None there, mlp here" in error


@pytest.mark.parametrize(
    ("job", "config", "line", "words"),
    [
        (forget.run, "forget", f"{RUN} model_path=MODEL trainable=layers.9", ["no trained", "model.embed_tokens.weight"]),
        (forget.run, "forget", f"{RUN} model_path=MODEL trainable='(mlp'", ["no regular expression", "layers.0.mlp.down_proj"]),
        (forget.run, "forget", f"{RUN} model_path=MODEL LoRA.r=4 trainable=base_layer", ["lora_A.default.weight"]),
        (finetune.run, "finetune", "model_family=tiny trainable=layers.9", ["model.layers.0.mlp.down_proj.weight"]),
        (compute_geffect.run, "forget_ge", "model_path_cur=run trainable=layers.9", ["model.norm.weight"]),
        (planning.tell, "forget", "model_family=phi split=forget05 plan=1 trainable=layers.99", ["model.layers.0.mlp"]),
    ],
)
def test_what_a_user_can_get_wrong(
    place: Path, young: Path, monkeypatch: pytest.MonkeyPatch, job: Any, config: str, line: str, words: list[str]
) -> None:
    """It is told before a weight is read."""
    monkeypatch.setattr("unlearn.models.checkpoints.load_model", None)
    error = refused(job, config, place, f"{line.replace('MODEL', str(young))} save_dir=wrong")
    assert [word for word in words if word not in error] == []
    assert not (place / "wrong").exists()


def test_adapters_of_some_weights(place: Path, young: Path) -> None:
    line = f"{RUN} model_path={young} LoRA.r=4 LoRA.dropout=0 lr=1e-2"
    unlearn_split(place, f"{line} trainable='1\\.mlp\\.down_proj' save_dir=lora geffect.every=2")
    weights = load_file(place / "lora/checkpoint-2/adapter_model.safetensors")
    moved = {name for name, weight in weights.items() if "lora_B" in name and weight.any()}
    assert moved == {"base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"}
    modules = set(pd.read_csv(place / "lora/geffect/layers.csv")["module"])
    assert modules == {f"model.layers.1.mlp.down_proj.lora_{letter}.default" for letter in "AB"}


def test_activations_are_recomputed_all_the_same(place: Path, young: Path) -> None:
    unlearn_split(place, f"{RUN} model_path={young} {OF} gradient_checkpointing=true save_dir=again")
    assert changed(place / "again", young) == FOUND
    assert off(place / "run", place / "again") < 1e-6


def test_fine_tuning(place: Path, young: Path) -> None:
    line = f"model_family=tiny hf_key={young} num_epochs=0.1 lr=1e-3 trainable=layernorm save_dir=tuned"
    call(finetune.run, "finetune", place, line)
    found = changed(place / "tuned", young, "model.safetensors")
    assert found == {name for name in load_file(young / "model.safetensors") if "layernorm" in name}


@pytest.mark.parametrize("parallel", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_two_processes(place: Path, young: Path, parallel: str) -> None:
    """Weights and G-effects of one process."""
    more = f"model_path={young} 'trainable={DOWN}' parallel={parallel} batch_size=2 save_dir={parallel} geffect.every=1"
    run_in(place, f"torchrun --nproc_per_node=2 --master_port=18797 forget.py {RUN} {more}")
    assert changed(place / parallel, young) == FOUND
    assert off(place / "run", place / parallel) < 1e-5
    one, two = (pd.read_csv(place / name / "geffect/layers.csv") for name in ("run", parallel))
    pd.testing.assert_frame_equal(one, two, rtol=1e-3, atol=1e-6)


def test_a_layer_below_all_that_is_trained_is_refused(place: Path, young: Path) -> None:
    line = f"model_family=tiny split=forget05 method=rmu method.layer=1 model_path={young} {OF} save_dir=unreached"
    with pytest.raises(ValueError, match="the loss depends on none of the trained parameters: they are above the layer"):
        unlearn_split(place, line)
