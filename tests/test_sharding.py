"""FSDP2 on two processes: G-effects, scores and resuming are those of one process with whole weights."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import ROOT, make_workplace, run_in

import utils
from app.checks import check_optimizer
from app.compose import given
from app.settings import OPTIMIZERS
from unlearn.models import checkpoints
from unlearn.models.sharding import like

pytestmark = pytest.mark.several_processes
TORCHRUN = "torchrun --nproc_per_node=2 --master_port=18791"
RUN = (
    "model_family=tiny split=forget05 dtype=float32 batch_size=2 num_epochs=2 method=npo retain=kl model_path={young}"
    " retain_holdout=8 save_dir=run"
)


@pytest.fixture(scope="module")
def place(young: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, made by two processes in shards, and measured while unlearning."""
    folder = make_workplace(tmp_path_factory.mktemp("shards"))
    run_in(folder, f"{TORCHRUN} forget.py {RUN.format(young=young)} parallel=fsdp save_steps=1 geffect.every=1 eval.every=1")
    return folder


def assert_same_tables(one: Path, two: Path, names: list[str], rel: float) -> None:
    """Each number to `rel` of the largest of its column."""
    for name in names:
        read = pd.read_parquet if name.endswith("parquet") else pd.read_csv
        a, b = (read(folder / "geffect" / name) for folder in (one, two))
        assert list(a.columns) == list(b.columns)
        for column in a:
            if a[column].dtype.kind == "f" and column != "cosine":
                scale = a[column].abs().max() or 1.0
                assert not (a[column] - b[column]).abs().max() > rel * scale, (name, column)
                assert list(a[column].isna()) == list(b[column].isna())
            elif column != "cosine":
                assert list(a[column].astype(str)) == list(b[column].astype(str))


@pytest.mark.parametrize(("dtype", "rel"), [pytest.param("float64", 1e-9, marks=pytest.mark.slow), ("float32", 1e-6)])
def test_g_effects_are_those_of_one_process(place: Path, dtype: str, rel: float) -> None:
    line = f"compute_geffect.py model_path_cur=run dtype={dtype} positions=true batch_size=8"
    run_in(place, f"python {line} save_dir=one_{dtype}")
    run_in(place, f"{TORCHRUN} {line} parallel=fsdp save_dir=two_{dtype}")
    names = ["steps.csv", "layers.csv", "instances.csv", "updates.csv", "positions.parquet"]
    assert_same_tables(place / f"one_{dtype}", place / f"two_{dtype}", names, rel)


@pytest.mark.slow
@pytest.mark.parametrize("more", ["method=rmu method.layer=2", "method=ga instances=false"])
def test_other_objectives_and_the_plain_way(place: Path, young: Path, more: str) -> None:
    name = more.partition(" ")[0]
    line = f"compute_geffect.py model_family=tiny split=forget05 model_path={young} dtype=float64 {more}"
    run_in(place, f"python {line} save_dir=one_{name}")
    run_in(place, f"{TORCHRUN} {line} parallel=fsdp save_dir=two_{name}")
    assert_same_tables(place / f"one_{name}", place / f"two_{name}", ["steps.csv", "layers.csv"], 1e-9)


def test_measured_while_unlearning(place: Path, young: Path) -> None:
    line = RUN.format(young=young).replace("save_dir=run", "save_dir=whole").replace("batch_size=2", "batch_size=4")
    run_in(place, f"python forget.py {line} save_steps=1 geffect.every=1 eval.every=1")
    assert_same_tables(place / "whole", place / "run", ["steps.csv", "layers.csv", "instances.csv"], 1e-3)
    a, b = (pd.read_csv(place / name / "scores.csv") for name in ("whole", "run"))
    pd.testing.assert_frame_equal(a, b, rtol=1e-4)


@pytest.mark.parametrize("script", [pytest.param("tofu_evaluation", marks=pytest.mark.slow), "evaluation_everything"])
def test_scores_are_those_of_one_process(place: Path, script: str) -> None:
    line = f"{script}.py model_path=run/checkpoint-1 dtype=float64"
    line += " ds_size=5" if script == "tofu_evaluation" else " retain_holdout=5 control=true"
    run_in(place, f"python {line} save_dir=scores_one")
    run_in(place, f"{TORCHRUN} {line} parallel=fsdp save_dir=scores_two")
    if script == "tofu_evaluation":
        a, b = (json.loads((place / name / "eval_log_aggregated.json").read_text()) for name in ("scores_one", "scores_two"))
        for task, log in a.items():
            assert b[task]["generated_text"] == log["generated_text"]
            assert b[task]["avg_gt_loss"] == pytest.approx(log["avg_gt_loss"], rel=1e-9)
    else:
        for name in ("ps_rows", "memorization_rows", "privacy_rows", "control"):
            tables = [pd.read_csv(place / folder / f"{name}.csv") for folder in ("scores_one", "scores_two")]
            pd.testing.assert_frame_equal(*tables, rtol=1e-9)


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(place: Path, young: Path) -> None:
    line = RUN.format(young=young).replace("save_dir=run", "save_dir=killed") + " parallel=fsdp save_steps=1"
    at = f'{ROOT}/tests/at.py torch.optim.AdamW.step 2 before "kill -KILL $PID"'
    assert run_in(place, f"{TORCHRUN} {at} forget.py {line}", check=False).returncode != 0
    assert "going on after step 1" in run_in(place, f"{TORCHRUN} forget.py {line}").stderr
    one, two = ((place / name / "checkpoint-2/model.safetensors").read_bytes() for name in ("killed", "run"))
    assert one == two


@pytest.mark.slow
def test_adapters_in_shards(place: Path, young: Path) -> None:
    """Weights of one process; and forward mode, which can't be, is refused in a line."""
    line = RUN.format(young=young).replace("save_dir=run", "LoRA.r=4 LoRA.dropout=0")
    run_in(place, f"python forget.py {line.replace('batch_size=2', 'batch_size=4')} save_dir=lora_one")
    run_in(place, f"{TORCHRUN} forget.py {line} parallel=fsdp save_dir=lora_two")
    from safetensors.torch import load_file

    a, b = (load_file(place / name / "checkpoint-2/adapter_model.safetensors") for name in ("lora_one", "lora_two"))
    assert a.keys() == b.keys()
    assert max((a[name] - b[name]).abs().max().item() for name in a) < 1e-5
    for more in ("tokens=true", "sweep=[ga]", "norms=false"):
        done = run_in(place, f"python compute_geffect.py model_path_cur=run parallel=fsdp save_dir=x {more}", check=False)
        assert done.returncode == 2
        assert "parallel=" in done.stderr


@pytest.mark.on_cpu
def test_processes_without_a_part_of_a_weight(tmp_path: Path) -> None:
    """LoRA of r=1 on three processes, tied embeddings: states, gradients over micro-batches, bfloat16, and the end.

    They wait for each other for hours, take leave on an error, and the gradients of few weights are reduced once a step.
    """
    done = run_in(tmp_path, f"torchrun --nproc_per_node=3 --master_port=18795 {ROOT}/tests/three_shards.py", check=False)
    found = json.loads(done.stdout)
    assert found["empty"] > 0
    assert [
        name for name in ("same", "kept", "tied", "finite", "few", "unreduced", "gradients", "ended") if not found[name]
    ] == []
    assert found["off"] < 1e-5
    assert (found["run in"], found["kept in"]) == (["torch.bfloat16"], ["torch.float32"])
    assert found["bf16 off"] < 1e-2
    assert found["timeout"] >= 3600
    assert found["code"] == 2
    assert done.stderr.count("on purpose") == 1


@pytest.mark.parametrize("script", ["finetune.py", "forget.py split=forget05 method=ga"])
@pytest.mark.parametrize("name", [name for name, optimizer in OPTIMIZERS.items() if optimizer.library == "bitsandbytes"])
def test_optimizers_that_cannot_be_split(script: str, name: str) -> None:
    cfg = given(script.partition(".")[0], ["model_family=tiny", *script.split()[1:], f"optim={name}", "parallel=fsdp"])
    with pytest.raises(ValueError, match=f"^optim={name}: .*parallel=fsdp.*adamw_torch_8bit.*adamw_torch_fused"):
        check_optimizer(cfg.optim, cfg.parallel)
    check_optimizer("adamw_torch_fused", "fsdp")


def test_attention_is_of_the_device_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is to be split is loaded to the CPU."""
    for here, how in (("cpu", "eager"), ("cuda", "sdpa")):
        monkeypatch.setattr(checkpoints, "PartialState", lambda here=here: SimpleNamespace(device=torch.device(here)))
        assert checkpoints.attention(torch.device("cpu")) == how
        assert checkpoints.attention(torch.device("cuda")) == "sdpa"


def test_reading_a_checkpoint_makes_no_second_model(young: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[torch.Tensor]] = []

    def noted(parameter: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
        assert [one for one in made if one() is not None] == []
        copy = like(parameter, full).clone()
        made.append(weakref.ref(copy))
        return copy

    monkeypatch.setattr(checkpoints, "like", noted)
    utils.device()
    there, model = (
        checkpoints.load_model(str(young), torch.device("cpu"), dtype=kind) for kind in (torch.float32, torch.bfloat16)
    )
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    checkpoints.load_weights(model, str(young))
    assert len(made) == len(list(model.parameters()))
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(there.parameters(), model.parameters(), strict=True))
