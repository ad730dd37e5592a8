"""plan=N: shapes, the arithmetic's parts, and that nothing is run."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, run_in
from live_memory import Live, measured, trained
from transformers import AutoConfig, PreTrainedConfig

from unlearn.geffect.target import Wanted
from unlearn.models.plan import MEASURED_ROWS, Shape, Work, measuring, scoring, shape_of, training

SHAPES = yaml.safe_load((ROOT / "config/shapes.yaml").read_text())
MILLIONS = {  # as published
    **{"llama2-7b": 6738.4, "phi": 1418.3, "smollm2-135m": 134.515, "smollm2-360m": 361.8, "smollm2-1.7b": 1711.4},
    **{"llama-3.2-1b": 1235.8, "llama-3.2-3b": 3212.7, "Llama-3.1-8B-Instruct": 8030.3},
    **{"qwen2.5-0.5b": 494.0, "qwen2.5-1.5b": 1543.7, "pythia-1.4b": 1414.6},
    **{"Phi-3.5-mini-instruct": 3821.1, "gemma-7b-it": 8537.7, "zephyr-7b-beta": 7241.7, "Llama-2-13b-hf": 13015.9},
    **{"Qwen2.5-3B-Instruct": 3085.9, "Qwen2.5-7B-Instruct": 7615.6},
}


DTYPES = {2: torch.bfloat16, 4: torch.float32}


def config(name: str, **changed: int) -> PreTrainedConfig:
    return AutoConfig.for_model(**({"tie_word_embeddings": False} | SHAPES[name] | changed))


def shape(name: str) -> Shape:
    return shape_of(config(name))


@pytest.mark.parametrize("name", MILLIONS)
def test_shapes_have_the_published_size(name: str) -> None:
    assert shape(name).parameters / 1e6 == pytest.approx(MILLIONS[name], rel=2e-4)


def test_every_family_has_a_shape() -> None:
    families = yaml.safe_load((ROOT / "config/model_config.yaml").read_text())
    assert {name for name, entry in families.items() if isinstance(entry, dict)} - set(SHAPES) == {"tiny"}


def test_what_saves_memory_does() -> None:
    """Each setting against plain training, part by part."""
    model = shape("smollm2-135m")
    plain = training(model, Work(rows=4, tokens=100, labels=60, accumulated=2)).memory
    assert plain["weights"] == plain["gradients"] == plain["optimiser"] / 2 == 4 * model.parameters
    half = training(model, Work(rows=4, tokens=100, labels=60, accumulated=2, weight=2)).memory
    assert half["weights"] == half["gradients"] == half["optimiser"] / 2 == 2 * model.parameters
    again = training(model, Work(rows=4, tokens=100, labels=60, accumulated=2, checkpointing=True)).memory
    assert again["activations"] < plain["activations"] / 5
    whole = training(model, Work(rows=8, tokens=100, labels=60)).memory  # one micro-batch: gradients come as activations go
    assert sum(whole.values()) < sum(plain.values())
    shorter = training(model, Work(rows=4, tokens=100, labels=60, accumulated=2, later=60)).memory
    assert shorter["activations"] == pytest.approx(0.6 * plain["activations"])
    in_buckets = training(model, Work(rows=4, tokens=100, labels=60, buckets=True)).memory
    assert in_buckets == plain
    shards = training(model, Work(rows=4, tokens=100, labels=60, shards=8)).memory
    assert shards["optimiser"] == plain["optimiser"] / 8
    blocks = 2 * model.parameters / (model.layers + 1)
    assert shards["blocks gathered"] == 2 * blocks  # in bfloat16, as they are run, and autocast keeps no copy of its own
    assert shards["gradients not yet reduced"] == (2 + 4) * blocks
    assert [part for part in ("gradients not yet reduced", "blocks gathered") if part in plain] == []
    for work in (Work(4, 100, 60), Work(4, 100, 60, weight=2), Work(4, 100, 60, bf16=False), Work(4, 100, 60, shards=8)):
        copies = 2 * model.parameters if work == Work(4, 100, 60) else None
        needs = (training(model, work), measuring(model, work, True), scoring(model, work, 1))
        assert [need.memory.get("weights in bfloat16") for need in needs] == [copies] * 3
    lora = training(model, Work(rows=4, tokens=100, labels=60, lora=8))
    assert lora.memory["optimiser"] == 8 * 2_442_240
    assert lora.disk["checkpoints"] == 4 * 2_442_240
    of_half = Work(rows=4, tokens=100, labels=60, lora=8, weight=2)  # adapters are in float32 all the same
    assert training(model, of_half).memory["optimiser"] == measuring(model, of_half, True).memory["optimiser"] == 8 * 2_442_240
    offload = measuring(model, Work(rows=4, tokens=100, labels=60, offload=True), optimizer=True)
    assert "directions V" not in offload.memory


def near(live: Live, peak: float, held: float = 0) -> None:
    """Within 10% of what the library's own code takes, also without what is held all the while."""
    for at in (0, held):
        assert peak - at == pytest.approx(live.peak - at, rel=0.1), live.table()


@pytest.mark.parametrize(
    ("name", "layers", "weight", "bf16", "checkpointing", "micro"),
    [
        ("llama2-7b", 2, 2, True, False, [(90, 57), (70, 44)]),
        ("llama2-7b", 3, 2, True, True, [(139, 88), (139, 88)]),
        ("llama-3.2-1b", 2, 2, True, False, [(139, 88)]),
        ("llama-3.2-1b", 1, 2, True, False, [(20, 13), (20, 13)]),
        ("smollm2-135m", 4, 4, True, True, [(100, 63)]),
        ("smollm2-135m", 3, 4, False, False, [(100, 63)]),
        ("pythia-1.4b", 3, 2, True, False, [(139, 88), (139, 88)]),
        ("phi", 2, 4, True, False, [(139, 88), (139, 88)]),
    ],
)
def test_training_takes_what_the_plan_says(
    name: str, layers: int, weight: int, bf16: bool, checkpointing: bool, micro: list[tuple[int, int]]
) -> None:
    """Models of few layers, so that what comes and goes is much of it."""
    of = config(name, num_hidden_layers=layers)
    live = trained(of, DTYPES[weight], bf16, checkpointing, 8, micro)
    work = Work(8, *micro[0], weight=weight, bf16=bf16, checkpointing=checkpointing, retain=True)
    work = replace(work, accumulated=len(micro), later=micro[-1][0])
    near(live, training(shape_of(of), work).peak, 3 * weight * shape_of(of).parameters)


@pytest.mark.parametrize("wanted", [Wanted(), Wanted(norms=False), Wanted(instances=False)])
@pytest.mark.parametrize("weight", [2, 4])
def test_measuring_takes_what_the_plan_says(weight: int, wanted: Wanted) -> None:
    small = {
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 1000,
    }
    of = config("llama2-7b", num_hidden_layers=4, **small)
    live = measured(of, DTYPES[weight], True, wanted, MEASURED_ROWS, 24, 15)
    work = Work(MEASURED_ROWS, 24, 15, weight=weight, tapped=wanted.instances, norms=wanted.norms)
    near(live, measuring(shape_of(of), work, optimizer=False).peak)


@pytest.mark.parametrize(
    "line",
    [
        "finetune.py model_family=llama plan=8 plan_for=gpu parallel=fsdp",
        "forget.py model_family=phi split=forget05 method=npo retain=kl plan=1 geffect.every=5",
        "forget.py --config-name=forget_lora model_family=smollm2-135m plan=1 plan_for=cpu",
        "compute_geffect.py model_family=phi method=npo plan=1",
        "tofu_evaluation.py model_family=phi plan=1",
        "evaluation_everything.py model_family=llama plan=2",
    ],
)
def test_a_plan_runs_nothing(tmp_path: Path, line: str) -> None:
    done = run_in(tmp_path, f"python {ROOT}/{line}")
    assert re.search(r"[\d,]+ parameters, \d x (GPU|CPU), parallel=(ddp|fsdp)\n", done.stdout)
    assert "GiB of memory a process" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("forget.py model_family=lama plan=1", ["lama", "smollm2-135m"]),
        ("finetune.py model_family=phi plan=-1", ["plan=-1", "whole number of at least 0"]),
        ("tofu_evaluation.py model_family=phi plan=x", ["plan=x", "whole number of at least 0"]),
        ("evaluation_everything.py model_family=phi plan=-2 parallel=fsdp", ["plan=-2", "whole number of at least 0"]),
        ("compute_geffect.py model_family=phi method=ga plan=x", ["plan=x", "whole number of at least 0"]),
        ("compute_geffect.py method=ga plan=1", ["model_family is missing", "phi"]),
        ("finetune.py model_family=phi plan=two", ["plan=two", "whole number of at least 0"]),
        ("finetune.py model_family=phi plan=1 plan_for=tpu", ["plan_for=tpu", "gpu, cpu"]),
        ("finetune.py model_family=phi plan=1 optim=foo", ["optim=foo", "adamw_8bit"]),
    ],
)
def test_what_a_user_can_get_wrong(tmp_path: Path, line: str, words: list[str]) -> None:
    done = run_in(tmp_path, f"python {ROOT}/{line}", check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert [word for word in words if word not in done.stderr] == []
