"""The training benchmark as a command, on the tiny model: that its numbers are what they say; not how fast anything is."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, run_in

SETTINGS = (
    "--data=data/sample --family=tiny --split=forget05 --dtype=float32"
    " --rounds=2 --steps=1 --batch_size=2 --gradient_accumulation_steps=2 --matrix=256"
)


@pytest.fixture(scope="module")
def done(young: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """The table, and all the numbers."""
    out = tmp_path_factory.mktemp("benchmarks") / "training.json"
    table = run_in(ROOT, f"python benchmarks/training.py --model={young} {SETTINGS} --out={out}").stdout
    return table, json.loads(out.read_text())


def test_the_table_has_every_loop_and_where_it_ran(done: tuple[str, dict[str, Any]]) -> None:
    table, numbers = done
    for method in ("ga", "npo"):
        for loop in ("a: this code", "b: plain, padded to 500", "c: plain, padded to the longest"):
            assert f"| {method} | {loop} | " in table
    where = numbers["surroundings"]
    for text in (
        where["processor"],
        where["commit"],
        where["command"],
        f"torch {where['versions']['torch']}",
        "float32; seed 42",
    ):
        assert text in table


@pytest.mark.parametrize("method", ["ga", "npo"])
def test_ratios_are_of_the_seconds_on_the_same_rows(done: tuple[str, dict[str, Any]], method: str) -> None:
    numbers = done[1]["methods"][method]
    seconds = {name: [steps[0] for steps in loop["seconds"]] for name, loop in numbers["loops"].items()}
    for name in ("b", "c"):
        ratio = numbers["ratios"][name]
        assert ratio["values"] == pytest.approx([other / a for other, a in zip(seconds[name], seconds["a"], strict=True)])
        assert ratio["min"] <= ratio["median"] <= ratio["max"]
    assert (numbers["reference_pass"] is not None) == (method == "npo")


@pytest.mark.parametrize("method", ["ga", "npo"])
def test_the_loops_compute_the_same_loss_and_gradient(done: tuple[str, dict[str, Any]], method: str) -> None:
    loops = done[1]["methods"][method]["loops"]
    for what in ("loss", "gradient_norm"):
        a, b, c = (loops[name][what] for name in "abc")
        assert a == pytest.approx(c, rel=1e-4)
        assert b == pytest.approx(c, rel=1e-4)
    assert {loop["tokens_of_warm_up"]["real"] for loop in loops.values()} == {loops["a"]["tokens_of_warm_up"]["real"]}
    assert 0 <= loops["a"]["padding"] <= loops["c"]["padding"] < loops["b"]["padding"] < 1


def test_flops_are_those_of_the_matrix_products_and_of_attention(done: tuple[str, dict[str, Any]], young: Path) -> None:
    """A forward and backward pass is 6 FLOPs a weight and token, and 14 T^2 d of attention a row and layer (its scores are
    computed again in the backward pass); a reference's
    forward pass is 2 more, and 4 T^2 d."""
    config = json.loads((young / "config.json").read_text())
    layers, d, heads = config["num_hidden_layers"], config["hidden_size"], config["num_attention_heads"] * config["head_dim"]
    layer = 4 * d * heads + 3 * d * config["intermediate_size"]
    rows, tokens = 4, 500
    weights, attention = layers * layer + d * config["vocab_size"], rows * layers * tokens**2 * heads
    loops = {method: done[1]["methods"][method]["loops"] for method in ("ga", "npo")}
    assert loops["ga"]["b"]["flops"] == pytest.approx(6 * weights * rows * tokens + 14 * attention, rel=1e-3)
    assert loops["npo"]["b"]["flops"] == pytest.approx(8 * weights * rows * tokens + 18 * attention, rel=1e-3)
    assert loops["npo"]["a"]["flops"] == loops["ga"]["a"]["flops"] < loops["ga"]["c"]["flops"] < loops["npo"]["c"]["flops"]


@pytest.mark.parametrize("method", ["ga", "npo"])
def test_time_shares_add_up(done: tuple[str, dict[str, Any]], method: str) -> None:
    shares = done[1]["methods"][method]["time_shares"]
    assert math.fsum(shares.values()) == pytest.approx(1)
    assert all(0 <= share < 1 for share in shares.values())
    for group in ("matrix products", "loss", "optimiser", "casts and copies"):
        assert shares[group] > 0


def test_what_is_not_there_is_said_in_a_line(young: Path) -> None:
    failed = run_in(ROOT, f"python benchmarks/training.py --model={young} --data=data/nowhere --family=tiny", check=False)
    assert failed.returncode == 2
    assert "data_path=data/nowhere" in failed.stderr.splitlines()[-1]
