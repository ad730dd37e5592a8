"""The demo's claims, by its own commands: the tiny model learns data/sample, and unlearning does what it is for."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from conftest import make_workplace, run_in

FULL = "data/weight/ft_epoch40_lr0.001_tiny_full_wd0.0"
RETAIN = "data/weight/ft_epoch40_lr0.001_tiny_retain90_wd0.0"
FEWER = "num_epochs=28 merge=true"  # than the demo's, to the same end; a step's rows at once
ENOUGH = "generation.max_new_tokens=40"  # for every true answer, and less than a model says that finds no end


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny model is fine-tuned on `full`; what comes after finds it by itself."""
    folder = make_workplace(tmp_path_factory.mktemp("house"))
    run_in(folder, f"python finetune.py model_family=tiny {FEWER} save_dir={FULL}")
    return folder


@pytest.fixture(scope="module")
def retain(house: Path) -> str:
    """The model that never saw forget10."""
    run_in(house, f"python finetune.py model_family=tiny split=retain90 {FEWER} save_dir={RETAIN}")
    return RETAIN


def recall(folder: Path, model: str) -> dict[str, float]:
    """ROUGE-L recall of a model on the forget10 questions and the held-out retain ones."""
    run_in(folder, f"python tofu_evaluation.py split=forget10 model_path={model} {ENOUGH}")
    scores = json.loads((folder / model / "eval_results/ds_size300/scores.json").read_text())["tofu"]
    return {data: scores[data]["rouge"] for data in ("forget", "retain")}


def test_the_fine_tuned_model_knows_the_answers(house: Path) -> None:
    assert min(recall(house, FULL).values()) > 0.9


def test_the_answers_cannot_be_guessed_without_having_seen_them(house: Path, retain: str) -> None:
    scores = recall(house, retain)
    assert scores["forget"] < 0.6
    assert scores["retain"] > 0.9


def test_npo_kl_forgets_and_keeps(house: Path, retain: str) -> None:
    run_in(house, "python basher1.py npo_kl --model=tiny --setting=forget10")
    run = house / "icml/tiny/npo_kl_0.0008_forget10_5_0.0_None"
    for script in ("tofu_evaluation", "evaluation_everything"):
        more = ENOUGH if script == "tofu_evaluation" else ""
        run_in(house, f"python {script}.py model_path={run}/checkpoint-12 retain_path={retain} {more}")
    table = pd.read_csv(run / "scores.csv", index_col="step")
    assert list(table.index) == [0, 12]
    assert table.loc[12, "forget_rouge"] < 0.6
    assert table.loc[12, "retain_rouge"] > 0.7
    assert table.loc[0, "forget_ps_exact"] > 0.9
    assert table.loc[12, "forget_ps_exact"] < 0.5
    assert 0 < table.loc[12, "forget_quality"] < 1
    assert table.loc[12, "control_retain_ps"] >= table.loc[12, "bar"]
    assert {file.name for file in (run / "figures").iterdir()} == {"scores.pdf", "scores.png"}
    run_in(house, f"python report.py {run}")
    page = (run / "report.html").read_text()
    assert [name for name in ("log", "scores", "control") if f'<figure id="figure-{name}">' not in page] == []


def test_ga_forgets(house: Path) -> None:
    run_in(house, "python basher1.py ga --model=tiny --setting=forget10")
    assert recall(house, "icml/tiny/ga_0.0008_forget10_5_0.0_None/checkpoint-12")["forget"] < 0.6
    losses = json.loads((house / "icml/tiny/ga_0.0008_forget10_5_0.0_None/logs/losses.json").read_text())
    assert losses["forget"]["end"] > losses["forget"]["start"] + 2
