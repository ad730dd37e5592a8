"""The demo's claims, by its own commands: the tiny model learns data/sample, and unlearning does what it is for."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import run_in

FULL = "data/weight/ft_epoch40_lr0.001_tiny_full_wd0.0"
RETAIN = "data/weight/ft_epoch40_lr0.001_tiny_retain90_wd0.0"


def recall(folder: Path, model: str) -> dict[str, float]:
    """ROUGE-L recall of a model on the forget10 questions and the held-out retain ones."""
    run_in(folder, f"python tofu_evaluation.py model_family=tiny split=forget10 model_path={model}")
    scores = json.loads((folder / model / "eval_results/ds_size300/scores.json").read_text())
    return {data: scores[f"{data}_rougeL_recall"] for data in ("forget", "retain")}


def test_the_fine_tuned_model_knows_the_answers(house: Path) -> None:
    assert min(recall(house, FULL).values()) > 0.9


def test_the_answers_cannot_be_guessed_without_having_seen_them(house: Path) -> None:
    run_in(house, "python finetune.py model_family=tiny split=retain90")
    scores = recall(house, RETAIN)
    assert scores["forget"] < 0.6
    assert scores["retain"] > 0.9


def test_npo_kl_forgets_and_keeps(house: Path) -> None:
    run_in(house, "python basher1.py npo_kl --model=tiny --setting=forget10")
    scores = recall(house, "icml/tiny/npo_kl_0.0008_forget10_5_0.0_None/checkpoint-12")
    assert scores["forget"] < 0.6
    assert scores["retain"] > 0.7


def test_ga_forgets(house: Path) -> None:
    run_in(house, "python basher1.py ga --model=tiny --setting=forget10")
    assert recall(house, "icml/tiny/ga_0.0008_forget10_5_0.0_None/checkpoint-12")["forget"] < 0.6
    losses = json.loads((house / "icml/tiny/ga_0.0008_forget10_5_0.0_None/logs/losses.json").read_text())
    assert losses["forget"]["end"] > losses["forget"]["start"] + 2
