"""The monitor: each step's own gradient and update along V, against copies of them and plain inner products in float64."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import ROOT, make_workplace, run_in
from matplotlib.figure import Figure
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from unlearn.geffect.call import GEffectCallback, meter_of
from unlearn.geffect.monitor import CHUNK, products
from unlearn.geffect.target import Wanted
from unlearn.models.adapters import LoRA, add_lora
from unlearn.objectives.functions import ga
from unlearn.objectives.rows import tokenize_pairs
from unlearn.reporting.monitor_figure import draw_monitor
from unlearn.training.logs import Progress

FORGET = [("Where was Ada born? ", "In Riga."), ("And Ben? ", "In Oslo, in 1954.")]
KEEP = [("What is the capital of France? ", "Paris.")]
RUN = (
    "forget.py model_family=tiny split=forget05 method=npo retain=kl save_dir=run save_steps=2 model_path={young}"
    " retain_holdout=8"
)


def read(file: Path) -> pd.DataFrame:
    return pd.read_csv(file, float_precision="round_trip")


@pytest.mark.parametrize("shape", [(3,), (7, 5), (2 * CHUNK + 11,), (0, 4)])
@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16])
def test_products_are_those_of_float64(shape: tuple[int, ...], kind: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, *v = (torch.randn(shape, generator=generator).to(kind) for _ in range(4))
    found = products([a, b], torch.stack(v))
    pairs = [(a, v[0]), (a, v[1]), (b, v[0]), (b, v[1]), (a, a)]
    wide = [(x.double().flatten(), y.double().flatten()) for x, y in pairs]
    for number, (x, y) in zip(found.tolist(), wide, strict=True):
        bound = (1e-14 if kind == torch.float64 else 1e-5) * float(x.norm() * y.norm())
        assert number == pytest.approx(float(x @ y), abs=bound)


class Copies(TrainerCallback):
    """Copies of each step's gradient, of the weights around it, and of V."""

    def __init__(self, meter: Any) -> None:
        self.meter = meter
        self.steps: list[dict[str, Any]] = []

    def copied(self, gradient: bool = False) -> dict[str, Tensor]:
        named = {name: p.grad if gradient else p for name, p in self.meter.parameters.items()}
        return {name: x.detach().double().clone() for name, x in named.items() if x is not None}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        v = {name: x.double().clone() for name, x in self.meter.directions.items()}
        self.steps.append({"g": self.copied(gradient=True), "before": self.copied(), "v": v})

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps[-1]["after"] = self.copied()


def trained(
    young: Path, out: Path, monitor: bool, change: Any = lambda model: None, every: int = 3, **arguments: Any
) -> tuple[Any, Copies]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(young), AutoTokenizer.from_pretrained(young)
    change(model)
    meter = meter_of(model, tokenizer, FORGET, KEEP, ga, wanted=Wanted(instances=False))
    rows = tokenize_pairs(FORGET, tokenizer)
    copies = Copies(meter)
    settings: dict[str, Any] = {
        "max_steps": 5,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.1,
    }
    settings |= {"report_to": [], "save_strategy": "no", "learning_rate": 1e-3, "use_cpu": True, "logging_steps": 1, "seed": 3}
    Trainer(
        model=model,
        args=TrainingArguments(str(out / "out"), **settings | arguments),
        train_dataset=[dict(row) for row in rows],
        callbacks=[GEffectCallback(meter, every, out / "geffect", monitor=monitor), copies],
    ).train()
    return model, copies


CHANGES = {
    "float32": lambda model: None,
    "float64": lambda model: model.double(),
    "bfloat16": lambda model: model.bfloat16(),
    "lora": lambda model: add_lora(model, LoRA(r=2, alpha=4, dropout=0.0), 0, "unused"),
    "partly frozen": lambda model: model.get_input_embeddings().requires_grad_(False),
}


@pytest.mark.filterwarnings("ignore:'pin_memory'")
@pytest.mark.parametrize("kind", CHANGES)
def test_every_step_is_as_exact_inner_products_tell(kind: str, young: Path, tmp_path: Path) -> None:
    """Of the gradient after accumulation and clipping, and of the update, along the V of the last measurement; its age."""
    _, copies = trained(young, tmp_path, True, CHANGES[kind])
    table = read(tmp_path / "geffect" / "monitor.csv")
    assert list(table["step"]) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert list(table["age"]) == [0, 0, 1, 1, 2, 2, 0, 0, 1, 1]
    bound, of_update = (1e-13, 5e-13) if kind == "float64" else (2 * CHUNK**0.5 * 2**-24, 5e-5)  # of so many float32 roundings
    for step, found in enumerate(copies.steps):
        norm = sum(float(g.square().sum()) for g in found["g"].values()) ** 0.5
        assert norm <= 0.1 * (1 + 1e-2)  # clipped, in the gradient's precision
        for d, risk in enumerate(("unlearn", "retain")):
            row = table[(table["step"] == step) & (table["risk"] == risk)].iloc[0]
            v = {name: x[d] for name, x in found["v"].items()}
            of_v = sum(float(x.square().sum()) for x in v.values()) ** 0.5
            ends = (found["before"], found["after"])
            weights = max(sum(float((x * v[name]).square().sum()) for name, x in end.items()) ** 0.5 for end in ends)
            gradient = sum(float((g * v[name]).sum()) for name, g in found["g"].items())
            update = sum(float(((x - found["before"][name]) * v[name]).sum()) for name, x in found["after"].items())
            assert row["gradient"] == pytest.approx(gradient, abs=bound * norm * of_v)
            assert row["cosine"] == pytest.approx(gradient / (norm * of_v), abs=bound)
            assert row["update"] == pytest.approx(update, abs=of_update * weights)
            assert update != 0


@pytest.mark.filterwarnings("ignore:'pin_memory'")
def test_at_a_measurement_the_update_is_the_measured_one(young: Path, tmp_path: Path) -> None:
    trained(young, tmp_path, True)
    steps, table = (read(tmp_path / "geffect" / f"{name}.csv") for name in ("steps", "monitor"))
    both = steps.dropna(subset="update_effect").merge(table, on=["step", "risk"])
    assert len(both) == 4
    assert (both["age"] == 0).all()
    assert both["update"].tolist() == pytest.approx(both["update_effect"].tolist(), rel=1e-3)


@pytest.mark.filterwarnings("ignore:'pin_memory'")
def test_training_and_tables_are_the_same_bits_with_and_without(young: Path, tmp_path: Path) -> None:
    runs = {name: trained(young, tmp_path / name, name == "with")[0] for name in ("with", "without")}
    assert all(torch.equal(a, b) for a, b in zip(runs["with"].parameters(), runs["without"].parameters(), strict=True))
    tables = {name: {file.name: file.read_bytes() for file in (tmp_path / name / "geffect").iterdir()} for name in runs}
    assert tables["with"].pop("monitor.csv")
    assert tables["with"] == tables["without"]


@pytest.mark.filterwarnings("ignore:'pin_memory'")
def test_a_fresh_training_leaves_none_of_an_earlier_ones_lines(young: Path, tmp_path: Path) -> None:
    file = tmp_path / "geffect" / "monitor.csv"
    trained(young, tmp_path, True)
    first = file.read_bytes()
    trained(young, tmp_path, True)
    assert file.read_bytes() == first
    trained(young, tmp_path, False, max_steps=1)
    assert not file.exists()


def test_scaled_gradients_and_nothing_to_measure_along_are_refused(young: Path, tmp_path: Path) -> None:
    meter = meter_of(AutoModelForCausalLM.from_pretrained(young), AutoTokenizer.from_pretrained(young), FORGET, KEEP, ga)
    told = GEffectCallback(meter, 1, tmp_path, monitor=True)
    arguments, state = copy.copy(TrainingArguments(str(tmp_path), use_cpu=True)), type("State", (), {"global_step": 0})()
    arguments.fp16 = True
    with pytest.raises(ValueError, match="^monitor: not with fp16=True"):
        told.on_train_begin(arguments, state, None)  # type: ignore[arg-type]
    words = f"{ROOT}/forget.py model_family=tiny split=forget05 method=ga geffect.monitor=true model_path={young}"
    refused = run_in(tmp_path, f"python {words}", check=False)
    assert refused.returncode == 2
    assert "geffect.every=1 or more" in refused.stderr


@pytest.fixture(scope="module")
def unkilled(young: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps, V measured before steps 0 and 4."""
    place = make_workplace(tmp_path_factory.mktemp("monitor"))
    run_in(place, f"python {ROOT}/{RUN.format(young=young)} geffect.every=4 geffect.instances=false geffect.monitor=true")
    return place / "run"


def test_the_script_writes_it_tells_it_and_draws_it(unkilled: Path, young: Path, tmp_path: Path) -> None:
    table = read(unkilled / "geffect" / "monitor.csv")
    steps = len((unkilled / "logs" / "train.jsonl").read_text().splitlines())
    assert list(table["step"]) == [step for step in range(steps) for _ in range(2)]
    assert (unkilled / "geffect" / "figures" / "monitor.pdf").exists()
    assert {"e_u", "e_r"}.isdisjoint(json.loads((unkilled / "logs" / "train.jsonl").read_text().splitlines()[0]))
    run_in(tmp_path, f"python {ROOT}/{RUN.format(young=young)}")
    last = max(unkilled.glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2])).name
    plain, monitored = (load_file(run / last / "model.safetensors") for run in (tmp_path / "run", unkilled))
    assert all(torch.equal(plain[name], monitored[name]) for name in plain)


def test_a_killed_run_goes_on_with_v_measured_where_it_goes_on(unkilled: Path, young: Path, tmp_path: Path) -> None:
    """After step 3's kill it goes on from step 2: lines before stay, V is of step 2 until step 4, and its age says so."""
    words = f"{ROOT}/{RUN.format(young=young)} geffect.every=4 geffect.instances=false geffect.monitor=true"
    kill = f"python {ROOT}/tests/at.py unlearn.geffect.monitor.Monitor.take 4 before 'kill -KILL $PID' {words}"
    assert run_in(tmp_path, kill, check=False).returncode != 0
    half = read(tmp_path / "run" / "geffect" / "monitor.csv")
    assert set(half["step"]) == {0, 1}
    run_in(tmp_path, f"python {words}")
    found, whole = (read(run / "geffect" / "monitor.csv") for run in (tmp_path / "run", unkilled))
    assert list(found["step"]) == list(whole["step"])
    assert [*found["age"]][:12] == [0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1]
    assert [*whole["age"]][:12] == [0, 0, 1, 1, 2, 2, 3, 3, 0, 0, 1, 1]
    again = ~whole["step"].isin((2, 3))
    pd.testing.assert_frame_equal(found[again], whole[again])
    assert (found["gradient"] != whole["gradient"])[~again].all()


def test_the_progress_bar_has_both() -> None:
    class Bar:
        def set_postfix(self, **shown: str) -> None:
            self.shown = shown

    progress: Any = Progress()
    bar = Bar()
    progress.training_bar = bar
    progress.on_log(None, None, None, logs={"loss": 2.0, "e_u": -0.0123, "e_r": 4.567})
    assert bar.shown == {"loss": "2.000", "e_u": "-0.012", "e_r": "4.6"}


def test_the_figure_shows_lines_and_measured_points() -> None:
    keys = [(step, risk) for step in range(5) for risk in ("unlearn", "retain")]
    frame = pd.DataFrame(keys, columns=["step", "risk"])
    monitor = frame.assign(gradient=range(10), update=range(10, 20))
    measured = frame[frame["step"] % 2 == 0]
    figure = draw_monitor(monitor, measured.assign(geffect=1.0), measured.assign(update_effect=2.0))
    assert isinstance(figure, Figure)
    grid: Any = figure.axes
    shown = [[list(line.get_ydata()) for line in axes.lines if len(line.get_xdata()) in (3, 5)] for axes in grid]
    assert shown[0] == [[0, 2, 4, 6, 8], [1, 1, 1]]
    assert shown[3] == [[11, 13, 15, 17, 19], [2, 2, 2]]
    assert draw_monitor(pd.DataFrame(), measured, measured) is None
    ruled = draw_monitor(monitor, measured.assign(geffect=1.0, rule_geffect=-3.0), measured.assign(update_effect=2.0))
    assert isinstance(ruled, Figure)
    first: Any = ruled.axes[0]
    assert [list(line.get_ydata()) for line in first.lines if len(line.get_xdata()) == 3] == [[-3, -3, -3]]


@pytest.mark.parametrize("parallel", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_two_processes_write_what_one_does(parallel: str, unkilled: Path, young: Path, tmp_path: Path) -> None:
    """Whole gradients on each, and shards whose inner products are added up: the first steps', to rounding."""
    words = f"{RUN.format(young=young)} geffect.every=4 geffect.instances=false geffect.monitor=true"
    torchrun = "torchrun --nproc_per_node=2 --master_port=18796"
    run_in(tmp_path, f"{torchrun} {ROOT}/{words} parallel={parallel} batch_size=2")
    one, two = (read(run / "geffect" / "monitor.csv") for run in (unkilled, tmp_path / "run"))
    assert list(one["step"]) == list(two["step"])
    assert list(one["age"]) == list(two["age"])
    for column in ("gradient", "update", "cosine"):
        pairs = zip(two[column][:4], one[column][:4], strict=True)
        assert all(a == pytest.approx(b, rel=1e-3, abs=1e-7) for a, b in pairs), column
