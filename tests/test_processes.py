"""What several processes and GPUs need, as far as a CPU shows it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, run_in
from test_geffect import FORGET, RETAIN, build
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import utils
from dataloader import StepBatches
from unlearn import checkpoints, sharding
from unlearn.loss import Loss
from unlearn.meter import Meter, Target, Wanted
from unlearn.objectives import ga, rmu
from unlearn.training import freeze_unreached


def test_empty_shards(tmp_path: Path) -> None:
    """Three processes, some with several empty shards: weights come together, tied or not, and G-effects are one process's."""
    run_in(ROOT, f"torchrun --standalone --nproc_per_node=3 tests/shards.py {tmp_path}")
    run_in(ROOT, f"python tests/shards.py {tmp_path}", fresh=True)
    [alone] = [json.loads(file.read_text()) for file in tmp_path.glob("*of1.json")]
    together = [json.loads(file.read_text()) for file in tmp_path.glob("*of3.json")]
    assert len(together) == 3
    assert max(found["True"]["empty"] for found in together) > 2
    for found in together:
        for tied in ("True", "False"):
            assert found[tied]["geffect"] == pytest.approx(alone[tied]["geffect"], rel=1e-5)


def test_gradients_are_reduced_once_a_step(young: Path, tmp_path: Path) -> None:
    """Of two micro-batches in shards the first keeps its gradients: twice as many of them reduce as often."""
    counts = {}
    for accumulation in (1, 2):
        out = tmp_path / str(accumulation)
        line = f"tests/count_reductions.py {young} {out} {4 // accumulation} {accumulation}"
        run_in(ROOT, f"torchrun --standalone --nproc_per_node=2 {line}")
        counts[accumulation] = int((out / "reductions").read_text())
    assert counts[1] == counts[2] > 0


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"])
@pytest.mark.parametrize("script", ["forget.py method=ga", "finetune.py"])
def test_optimizers_that_cannot_take_shards(script: str, name: str, tmp_path: Path) -> None:
    done = run_in(ROOT, f"python {script} model_family=tiny parallel=fsdp optim={name} save_dir={tmp_path}/run", check=False)
    assert done.returncode == 2
    assert f"optim={name}: is of bitsandbytes, whose state parallel=fsdp can't split; adamw_torch_8bit" in done.stderr
    assert not (tmp_path / "run").exists()


def test_attention_is_chosen_by_where_the_model_runs(young: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by where it is loaded: what is to be sharded over GPUs is loaded on the CPU."""

    class OnGpu:
        device = torch.device("cuda", 0)

    monkeypatch.setattr(checkpoints, "PartialState", OnGpu)
    assert checkpoints.load_model(str(young), torch.device("cpu")).config._attn_implementation == "sdpa"
    monkeypatch.undo()
    assert checkpoints.load_model(str(young), torch.device("cpu")).config._attn_implementation == "eager"


def test_processes_wait_for_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    """For one that saves 75 GiB; PyTorch's default for GPUs is ten minutes."""
    asked: dict[str, Any] = {}

    class State:
        device = torch.device("cpu")

        def __init__(self, **kwargs: Any) -> None:
            asked.update(kwargs)

    monkeypatch.setattr("accelerate.PartialState", State)
    utils.device()
    assert asked["timeout"].total_seconds() >= 3600


def test_the_process_group_is_ended(young: Path, tmp_path: Path) -> None:
    line = f"forget.py model_family=tiny split=forget05 method=ga model_path={young} num_epochs=2 save_dir={tmp_path}/run"
    done = run_in(ROOT, f"torchrun --standalone --nproc_per_node=2 {line}")
    assert (tmp_path / "run" / "logs" / "losses.json").exists()
    assert "destroy_process_group" not in done.stderr


def test_v_off_the_gpu_is_never_on_it() -> None:
    """`offload`: V is made in CPU memory, and a tensor at a time comes to the device."""
    model = build("llama").float()
    meter = Meter(model, Target(Loss(ga), FORGET), {"unlearn": FORGET, "retain": RETAIN}, 0, Wanted(), offload=True)
    meta = {name: p.to("meta") for name, p in meter.parameters.items()}
    assert {sharding.zeros(p, (2,), p.dtype, offload=True).device.type for p in meta.values()} == {"cpu"}
    want = Meter(model, Target(Loss(ga), FORGET), {"unlearn": FORGET, "retain": RETAIN}, 0, Wanted()).measure()
    assert meter.measure()["steps"]["geffect"].tolist() == want["steps"]["geffect"].tolist()


def half_only(module: nn.Module, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    if not torch.is_autocast_enabled("cpu"):
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


def test_what_an_objective_reaches_is_found_under_autocast() -> None:
    """float32 weights and an attention for half precision: RMU's first look at what it trains runs as its steps do."""
    AttentionInterface.register("half_only", half_only)
    AttentionMaskInterface.register("half_only", sdpa_mask)
    model = build("llama").float()
    model.config._attn_implementation = "half_only"
    loss = Loss(partial(rmu, c=2.0), layer=1, noise=torch.rand(model.config.hidden_size))
    batch = StepBatches(FORGET, [], 1, 2, 2, 0, 0)[0]
    freeze_unreached(model, loss, batch, bf16=True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "embed" in name or "layers.0" in name}


def test_deterministic_runs(young: Path, tmp_path: Path) -> None:
    """Training, G-effects and scores run under PyTorch's switch, and it is on while they do."""
    run = tmp_path / "run"
    line = f"python forget.py model_family=tiny split=forget05 model_path={young} num_epochs=1 save_dir={tmp_path}/run"
    run_in(ROOT, f"{line} method=npo retain=kl geffect.every=4 eval.every=4 deterministic=true")
    run_in(ROOT, f"python compute_geffect.py model_path_cur={run} tokens=true deterministic=true save_dir={tmp_path}/g")
    [checkpoint, *_] = sorted((tmp_path / "run").glob("checkpoint-*"))
    run_in(ROOT, f"python evaluation_everything.py model_path={checkpoint} control=false deterministic=true")
    done = run_in(ROOT, f"{line} method=ga deterministic=maybe", check=False)
    assert done.returncode == 2
    assert "deterministic=maybe: needs to be true or false" in done.stderr
    try:
        utils.set_deterministic(True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        utils.set_deterministic(False)
    assert not torch.are_deterministic_algorithms_enabled()
