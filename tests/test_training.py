"""Training: the same weights however a step is cut, the schedule, what a killed run leaves and goes on from."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, run_in
from safetensors.torch import load_file
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.integrations.flash_attention import get_target_dtype
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import forget
from app.compose import given
from app.runs import check_run, open_run, read_record, suffix
from dataloader import StepBatches
from unlearn.objectives.functions import rmu
from unlearn.objectives.loss import Loss
from unlearn.training.trainer import StepTrainer, freeze_unreached
from utils import REPEATABLE, be_deterministic, device_name, use_bfloat16

pytestmark = pytest.mark.several_processes
METHODS = ["finetune", "ga", "rmu_2", "npo_kl"]


@pytest.fixture(scope="module")
def cuts(young: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of 5 steps of 8 rows: one process, accumulated, two processes, and two with shards and accumulated."""
    out = tmp_path_factory.mktemp("cuts")
    script = ROOT / "tests" / "unlearn_five_steps.py"
    methods = " ".join(METHODS)
    torchrun = "torchrun --nproc_per_node=2 --master_port=18771"
    run_in(ROOT, f"python {script} {young} {out}/whole 8 1 ddp {methods}")
    run_in(ROOT, f"python {script} {young} {out}/accumulated 4 2 ddp {methods}")
    run_in(ROOT, f"python {script} {young} {out}/merged 4 2 ddp merge=true {methods}")
    run_in(ROOT, f"{torchrun} {script} {young} {out}/processes 4 1 ddp {methods}")
    run_in(ROOT, f"{torchrun} {script} {young} {out}/shards 2 2 fsdp {methods}")
    return {name: out / name for name in ("whole", "accumulated", "merged", "processes", "shards")}


@pytest.mark.parametrize("cut", ["accumulated", "merged", "processes", "shards"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_the_same_however_it_is_cut(cuts: dict[str, Path], method: str, cut: str) -> None:
    """2 processes x batch 4 (DDP), 2 x 2 x accumulation 2 (FSDP2) = 1 x batch 8 = 1 x batch 4 x accumulation 2.

    Weights and losses to 1e-5 in float32 after 5 steps.
    """
    expected = load_file(cuts["whole"] / method / "checkpoint-5" / "model.safetensors")
    found = load_file(cuts[cut] / method / "checkpoint-5" / "model.safetensors")
    assert expected.keys() == found.keys()
    worst = max((expected[name] - found[name]).abs().max().item() for name in expected)
    assert worst < 1e-5
    folder = "finetune/checkpoint-5" if method == "finetune" else method
    losses = [
        [json.loads(line)["loss"] for line in (cuts[name] / folder / "logs/train.jsonl").open()] for name in ("whole", cut)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5, abs=1e-5)
    AutoModelForCausalLM.from_pretrained(cuts[cut] / method / "checkpoint-5")


@pytest.mark.parametrize("method", METHODS)
def test_the_weights_moved(cuts: dict[str, Path], young: Path, method: str) -> None:
    before = load_file(young / "model.safetensors")
    after = load_file(cuts["whole"] / method / "checkpoint-5" / "model.safetensors")
    assert max((before[name] - after[name]).abs().max().item() for name in before) > 1e-4


def test_the_log_has_the_loss_and_its_parts(cuts: dict[str, Path]) -> None:
    """One line a step, the parts add up to the loss, and two processes log what one logs."""
    lines = {name: [json.loads(line) for line in (cuts[name] / "npo_kl/logs/train.jsonl").open()] for name in cuts}
    assert [line["step"] for line in lines["whole"]] == [1, 2, 3, 4, 5]
    for line in lines["whole"]:
        assert line["loss"] == pytest.approx(line["objective"] + line["retain"], rel=1e-5)
        assert line["grad_norm"] > 0
        assert line["tokens_per_second"] > 0
        assert 0.1 < line["peak_memory_gib"] < 20
    assert [line["learning_rate"] for line in lines["whole"]] == pytest.approx([0, *(8e-4 / 4 * n for n in range(1, 5))])
    for name in ("accumulated", "processes", "shards"):
        assert [line["loss"] for line in lines[name]] == pytest.approx([line["loss"] for line in lines["whole"]], rel=1e-4)


def test_gradient_checkpointing_changes_nothing(young: Path, tmp_path: Path) -> None:
    base = f"python {ROOT}/forget.py model_family=tiny split=forget05 method=npo model_path={young} num_epochs=2"
    for name in ("true", "false"):
        run_in(tmp_path, f"{base} gradient_checkpointing={name} save_dir=run_{name}")
    plain, checkpointed = (load_file(tmp_path / f"run_{name}/checkpoint-2/model.safetensors") for name in ("false", "true"))
    assert max((plain[name] - checkpointed[name]).abs().max().item() for name in plain) < 1e-6


def test_tensorboard_gets_what_the_log_has(young: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = f"model_path={young} num_epochs=2 save_dir=run logger=tensorboard"
    run_in(tmp_path, f"python {ROOT}/forget.py model_family=tiny split=forget05 method=npo retain=kl {settings}")
    lines = [json.loads(line) for line in (tmp_path / "run/logs/train.jsonl").open()]
    events = EventAccumulator(str(tmp_path / "run/logs")).Reload()
    for name in ("loss", "objective", "retain", "grad_norm", "learning_rate", "tokens_per_second", "peak_memory_gib"):
        found = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert found == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # nothing beside the run's folder


def test_keep_last_keeps_the_newest(young: Path, tmp_path: Path) -> None:
    """Its end is that of a run that keeps all, and started again it lacks nothing."""
    base = f"python {ROOT}/forget.py model_family=tiny split=forget05 method=ga model_path={young} num_epochs=4 save_steps=1"
    run_in(tmp_path, f"{base} save_dir=all")
    run_in(tmp_path, f"{base} save_dir=two keep_last=2")
    there = sorted(folder.name for folder in (tmp_path / "two").glob("checkpoint-*"))
    assert there == ["checkpoint-4", "checkpoint-5"]
    ends = [(tmp_path / name / "checkpoint-5/model.safetensors").read_bytes() for name in ("all", "two")]
    assert ends[0] == ends[1]
    again = run_in(tmp_path, f"{base} save_dir=two keep_last=2")
    assert "is done already: 5 steps\n" in again.stderr


class HalfOnly(torch.autograd.Function):
    """As flash-attn: half precision alone."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        if x.dtype not in (torch.float16, torch.bfloat16):
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", [1, 3])
def test_what_a_loss_reaches_is_told_as_training_runs(kind: torch.dtype, layer: int) -> None:
    """In its precision, for attention that has no other, and without dropout; in its mode, gradients and chance as before."""

    def half_only(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        q, k, v = (HalfOnly.apply(x.to(get_target_dtype(query, module) or query.dtype)) for x in (query, key, value))
        return sdpa_attention_forward(module, q, k, v, mask, **kwargs)

    AttentionInterface.register("half_only", half_only)
    AttentionMaskInterface.register("half_only", sdpa_mask)
    config = AutoConfig.from_pretrained(ROOT / "config" / "tiny", pad_token_id=0, vocab_size=100)
    config.num_hidden_layers, config.attention_dropout = 4, 0.5
    model = AutoModelForCausalLM.from_config(config, attn_implementation="half_only").to(kind).train()
    rows = [{"input_ids": torch.arange(2, 12), "labels": torch.tensor([-100] * 4 + list(range(6, 12)))}] * 2
    loss = Loss(partial(rmu, c=2.0), layer=layer, noise=torch.rand(config.hidden_size))
    before = torch.get_rng_state()
    freeze_unreached(model, loss, StepBatches(rows, [], 1, 2, 1, 0, 0)[0], bf16=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert [block.mlp.down_proj.weight.requires_grad for block in model.model.layers] == [i < layer for i in range(4)]
    assert all(p.grad is None for p in model.parameters())


def test_deterministic_training_and_measuring(young: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The switch is on while a run trains, measures and scores, and names no folder."""
    on: list[bool] = []
    compute_loss = StepTrainer.compute_loss

    def noted(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        on.append(torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic)
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(StepTrainer, "compute_loss", noted)
    for name in REPEATABLE:
        monkeypatch.delenv(name, raising=False)
    own = [
        "model_family=tiny",
        "split=forget05",
        "method=npo",
        f"model_path={young}",
        "num_epochs=1",
        f"save_dir={tmp_path}/run",
    ]
    cfg = given("forget", [*own, "geffect.every=1", "eval.every=1", "deterministic=true"])
    try:
        forget.run(cfg)
        assert on == [True] * len(on) != []
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert suffix(forget.prepare(cfg)[0]) == ""
        assert (tmp_path / "run/scores.csv").exists()
        assert (tmp_path / "run/geffect/steps.csv").exists()
    finally:
        be_deterministic(False)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(("major", "has"), [(7, False), (8, True)])
def test_bfloat16_is_not_what_a_gpu_only_emulates(major: int, has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    of = SimpleNamespace(major=major)
    for name, value in {"is_available": True, "current_device": 0, "get_device_properties": of}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.version, "hip", None)
    assert use_bfloat16("auto", None) is has
    assert use_bfloat16("bfloat16", None)
    assert not use_bfloat16("auto", "float32")


def test_a_run_goes_on_in_its_own_precision_alone(tmp_path: Path) -> None:
    own = ["model_family=tiny", "method=ga", f"save_dir={tmp_path}"]
    settings = {dtype: given("forget", [*own, f"dtype={dtype}"]) for dtype in ("auto", "float32", "bfloat16")}
    open_run(tmp_path, settings["bfloat16"])
    (tmp_path / "scores.csv").touch()
    note = read_record(tmp_path / "config.yaml")
    assert (note["precision"], note["device"]) == ("bfloat16", device_name())
    check_run(tmp_path, settings["bfloat16"])
    with pytest.raises(
        ValueError, match=f"begun in bfloat16, and this would be in float32: dtype=bfloat16 save_dir={tmp_path}"
    ):
        check_run(tmp_path, settings["float32"])
    note["settings"]["dtype"] = "auto"  # on another device
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(note))
    check_run(tmp_path, settings["bfloat16"])
    with pytest.raises(ValueError, match="float32"):
        check_run(tmp_path, settings["float32"])


def test_deterministic_is_true_or_false(tmp_path: Path) -> None:
    done = run_in(tmp_path, f"python {ROOT}/compute_geffect.py model_family=tiny method=ga deterministic=yes", check=False)
    assert done.returncode == 2
    assert "deterministic=yes: needs to be true or false" in done.stderr
