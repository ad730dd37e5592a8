"""method=task_vector: checkpoints are the model before less what fine-tuning on the rows to forget has added."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import ROOT, make_workplace, run_in
from safetensors.torch import load_file
from test_compute_geffect import measure, unlearn_split
from torch import Tensor

import compute_geffect
import forget
from app.compose import given
from unlearn.models.checkpoints import load_model
from unlearn.models.trained import negated

RUN = "model_family=tiny split=forget05 method=task_vector dtype=float32 save_steps=2 lr=2e-3"
STEPS = (2, 4, 6)


def weights(folder: Path) -> dict[str, Tensor]:
    """Of any model's folder, an adapter's merged."""
    model = load_model(str(folder), torch.device("cpu"))
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def place(young: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run at alpha 2, and the same fine-tuning with nothing subtracted."""
    folder = make_workplace(tmp_path_factory.mktemp("task_vector"))
    unlearn_split(folder, f"{RUN} model_path={young} hyper_param=2 save_dir=run")
    unlearn_split(folder, f"{RUN} model_path={young} method.negate=null save_dir=tuned")
    return folder


def off(run: Path, tuned: Path, original: Path, alpha: float, steps: tuple[int, ...] = STEPS) -> float:
    """How far the run's checkpoints are from theta_0 - alpha (theta - theta_0); they have moved."""
    before, worst = weights(original), 0.0
    for step in steps:
        found, trained = (weights(folder / f"checkpoint-{step}") for folder in (run, tuned))
        assert max((found[name] - before[name]).abs().max().item() for name in before) > 1e-4
        for name, start in before.items():
            worst = max(worst, (found[name] - (start - alpha * (trained[name] - start))).abs().max().item())
    return worst


def test_the_formula() -> None:
    """By hand; what was not trained stays, and of adapters B alone is turned."""
    before = {"a": torch.tensor([1.0, 2.0])}
    found = negated({"a": torch.tensor([1.5, 0.0]), "frozen": torch.ones(1)}, before, 2.0)
    assert {name: weight.tolist() for name, weight in found.items()} == {"a": [0.0, 6.0], "frozen": [1.0]}
    adapters = {"x.lora_A.default.weight": torch.ones(2), "x.lora_B.default.weight": torch.ones(2)}
    assert [weight.tolist() for weight in negated(adapters, {}, 0.5).values()] == [[1.0, 1.0], [-0.5, -0.5]]
    half = negated({"a": torch.ones(2, dtype=torch.bfloat16)}, before, 1.0)["a"]
    assert (half.dtype, half.tolist()) == (torch.bfloat16, [1.0, 3.0])


def test_every_checkpoint_is_an_unlearned_model(place: Path, young: Path) -> None:
    assert off(place / "run", place / "tuned", young, 2) < 1e-6


def test_the_losses_are_of_the_unlearned_model(place: Path) -> None:
    """They rise where fine-tuning's fall; another measurement of the last checkpoint gives the same."""
    run, tuned = (json.loads((place / name / "logs/losses.json").read_text()) for name in ("run", "tuned"))
    assert tuned["forget"]["end"] < tuned["forget"]["start"] == run["forget"]["start"] < run["forget"]["end"]
    measure(place, "model_path_cur=run method=ga save_dir=measured instances=false")
    steps = pd.read_csv(place / "measured/geffect/steps.csv")
    assert list(steps["step"]) == [0, 0, 2, 2, 4, 4, 6, 6]
    found = steps.set_index(["step", "risk"])["risk_value"]
    assert found[6, "unlearn"] == pytest.approx(run["forget"]["end"], rel=1e-5)
    assert found[6, "retain"] == pytest.approx(run["retain"]["end"], rel=1e-5)
    assert found.xs("unlearn", level="risk").is_monotonic_increasing


def test_killed_it_ends_with_the_same_bits(place: Path, young: Path) -> None:
    """What it goes on from are the trained weights, not those that it publishes."""
    line = f"{ROOT}/forget.py {RUN} model_path={young} hyper_param=2 save_dir=killed"
    killed = f"{ROOT}/tests/at.py torch.optim.AdamW.step 4 before {shlex.quote('kill -KILL $PID')}"
    assert run_in(place, f"python {killed} {line}", check=False).returncode == -9
    resumed = load_file(place / "killed/resume/checkpoint-2/model.safetensors")
    assert all(
        torch.equal(resumed[name], weight) for name, weight in load_file(place / "tuned/checkpoint-2/model.safetensors").items()
    )
    assert "going on after step 2" in run_in(place, f"python {line}").stderr
    for step in STEPS:
        one, two = ((place / name / f"checkpoint-{step}/model.safetensors").read_bytes() for name in ("killed", "run"))
        assert one == two
    losses = [json.loads((place / name / "logs/losses.json").read_text()) for name in ("killed", "run")]
    assert losses[0]["forget"] == losses[1]["forget"]


def test_with_adapters_and_with_some_parameters(place: Path, young: Path) -> None:
    for name, more in (("lora", "LoRA.r=4 LoRA.dropout=0 lr=2e-2"), ("some", "trainable=down_proj")):
        line = f"{RUN} model_path={young} num_epochs=2 {more}"
        unlearn_split(place, f"{line} hyper_param=0.5 save_dir={name}")
        unlearn_split(place, f"{line} method.negate=null save_dir={name}_tuned")
        assert off(place / name, place / f"{name}_tuned", young, 0.5, (2,)) < 1e-6
    before, after = weights(young), weights(place / "some/checkpoint-2")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {n for n in before if "down_proj" in n}


@pytest.mark.parametrize("parallel", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_two_processes(place: Path, parallel: str, young: Path) -> None:
    """Checkpoints and losses of one."""
    more = f"model_path={young} hyper_param=2 parallel={parallel} batch_size=2 save_dir={parallel}"
    run_in(place, f"torchrun --nproc_per_node=2 --master_port=18799 forget.py {RUN} {more}")
    assert off(place / parallel, place / "tuned", young, 2) < 3e-5
    one, two = (json.loads((place / name / "logs/losses.json").read_text()) for name in ("run", parallel))
    assert two["forget"]["end"] == pytest.approx(one["forget"]["end"], rel=1e-4)


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ("retain=kl", "^retain=kl: method=task_vector subtracts what it trains .*retain=none$"),
        ("geffect.every=5", "^geffect.every=5: method=task_vector .*; compute_geffect.py measures its checkpoints$"),
        ("eval.every=5", "^eval.every=5: method=task_vector .*; evaluation_everything.py measures its checkpoints$"),
        ("hyper_param=0", "^method.negate=0: needs to be a number above 0$"),
    ],
)
def test_what_it_does_not_go_with(place: Path, young: Path, more: str, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        forget.prepare(given("forget", [*RUN.split(), f"model_path={young}", f"save_dir={place}/new", *more.split()]))


@pytest.mark.parametrize("more", ["", "method=task_vector", "method=ga sweep=[wga,task_vector:2]"])
def test_it_has_no_g_effect_of_its_own(place: Path, more: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    key, instead = ("sweep", "leave it out") if "sweep" in more else ("method", "give method=METHOD")
    with pytest.raises(ValueError, match=f"^{key}=task_vector: it has no gradient at the unlearned weights; {instead}$"):
        compute_geffect.prepare(given("forget_ge", ["model_path_cur=run", "save_dir=none", *more.split()]))


def test_the_short_way(place: Path, young: Path) -> None:
    line = f"basher1.py task_vector --model=tiny --setting=forget05 --hyper=3 num_epochs=1 model_path={young}"
    run_in(place, f"python {line}")
    assert (place / "icml/tiny/task_vector_0.0008_forget05_1_0.0_3/checkpoint-1/model.safetensors").exists()
