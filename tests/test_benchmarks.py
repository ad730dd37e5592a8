"""The benchmarks as commands, on the tiny model: that their numbers are what they say; not how fast anything is."""

from __future__ import annotations

import importlib
import json
import math
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
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


# ---- the G-effect ----

ROWS = 6  # of each kind: two batches of the published procedure
EFFECTS = "--data=data/sample --family=tiny --split=forget05 --matrix=256 --forget=6 --retain=6"


@pytest.fixture(scope="module")
def measured(young: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """The page, and all the numbers."""
    out = tmp_path_factory.mktemp("benchmarks") / "geffect.md"
    options = f"{EFFECTS} --rounds=2 --padded_rows=2 --no_memory --threads=1"
    done = run_in(ROOT, f"python benchmarks/geffect.py --model={young} {options} --out={out}")
    assert done.stdout.strip() == out.read_text().strip()
    return out.read_text(), json.loads(out.with_suffix(".json").read_text())


def test_the_page_has_every_case_and_target(measured: tuple[str, dict[str, Any]]) -> None:
    page, numbers = measured
    for case in ("a", "a_norms", "b", "c", "d", "e", "e_padded", "c x 20", "c x 20, one V"):
        assert f"\n| {case} | " in page
    assert "e_padded ran on 2 + 2 rows" in page
    assert len(numbers["targets"]) == 8
    assert all(("met" if target["met"] else "missed") in page for target in numbers["targets"])
    assert numbers["surroundings"]["command"] in page


def test_the_exact_ways_agree_and_the_average_does_not(measured: tuple[str, dict[str, Any]]) -> None:
    numbers = measured[1]
    assert numbers["largest_difference"] < 1e-3
    effects = {name: case["effects"] for name, case in numbers["cases"].items()}
    for name in ("a", "a_norms", "b", "d"):
        assert effects[name] == pytest.approx(effects["c"], rel=1e-3)
    assert effects["c"][0] < 0  # ascent on the rows to forget
    assert max(numbers["differences"]["e"]) > 1e-3


def test_derived_seconds_are_those_of_c(measured: tuple[str, dict[str, Any]]) -> None:
    cases, seconds = measured[1]["cases"], measured[1]["seconds"]
    parts = cases["c"]["parts"]
    assert seconds["c20"]["values"] == pytest.approx([20 * (part["V"] + part["rest"]) for part in parts])
    assert seconds["c20_shared"]["values"] == pytest.approx([part["V"] + 20 * part["rest"] for part in parts])
    assert measured[1]["of_c"]["c20"]["values"] == pytest.approx([20, 20])
    for other in ("e", "e_padded"):
        pairs = zip(seconds[other]["values"], seconds["a"]["values"], strict=True)
        assert measured[1][f"faster_than_{other}"]["a"]["values"] == pytest.approx([theirs / a for theirs, a in pairs])


def test_every_product_of_a_measurement_is_counted(measured: tuple[str, dict[str, Any]], young: Path) -> None:
    """FLOPs a weight and token: 6 for a gradient; 4 + 2 x 2 for the tap, and 2 more with norms; 2 + 4 x 2 for the sweep.

    Attention's are, for each 2 T^2 d of a row and layer: 6 for a gradient and for the tap, whose directions do not pass
    through it, and 2 + 4 x 2 for the sweep. The tap also multiplies outputs' changes and gradients, 2 for each of both.
    """
    config = json.loads((young / "config.json").read_text())
    layers, d, wide = config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"] * config["head_dim"]
    inside, head = layers * (4 * d * heads + 3 * d * wide), d * config["vocab_size"]
    parts = measured[1]["tokens"]

    def passes(name: str, weights: int, attention: int) -> int:
        padded, labels = parts[name]["with_padding"], parts[name]["labels"]
        return weights * (inside * padded + head * labels) + attention * 2 * padded * (padded // ROWS) * layers * heads

    v = passes("forget", 6, 6) + passes("retain", 6, 6)
    outputs = layers * (3 * heads + 2 * d + 2 * wide + 2 * d) + 2 * d  # of linear layers, norms and the embedding
    products = 2 * 2 * (outputs * parts["forget"]["with_padding"] + config["vocab_size"] * parts["forget"]["labels"])
    flops = {name: case["flops"] for name, case in measured[1]["cases"].items()}
    assert flops["c"] == v + passes("forget", 6, 6)
    tapped = v + passes("forget", 8, 6) + products
    assert flops["a"] == pytest.approx(tapped, rel=1e-3)
    assert flops["a_norms"] == pytest.approx(v + passes("forget", 10, 6) + products, rel=1e-3)
    assert flops["b"] == pytest.approx(v + passes("forget", 10, 10), rel=1e-3)


def test_memory_is_of_the_case_alone(young: Path) -> None:
    """The plain way holds V, which is twice the weights, and grad L, beside activations and what the allocator keeps."""
    command = f"python benchmarks/geffect.py --model={young} {EFFECTS} --dtype=bfloat16 --peak=c"
    taken = int(run_in(ROOT, command).stdout)
    weights = (young / "model.safetensors").stat().st_size
    assert 2 * weights < taken < 100 * weights


def test_too_many_rows_are_refused(young: Path) -> None:
    failed = run_in(ROOT, f"python benchmarks/geffect.py --model={young} {EFFECTS} --retain=400", check=False)
    assert failed.returncode == 2
    assert "--retain=400: there are 40 such rows" in failed.stderr.splitlines()[-1]


# ---- sweeps ----


def test_a_sweeps_cost_is_beside_one_objectives_and_the_plain_way(young: Path, tmp_path: Path) -> None:
    """All that the page is to show is there; on so small a model its ratios say nothing."""
    out, words = tmp_path / "all.md", "model_family=tiny split=forget05 batch_size=2"
    run_in(ROOT, f"python benchmarks/geffect_all.py --rows=3 --rounds=1 --out={out} {words} model_path={young}")
    page, numbers = out.read_text(), json.loads(out.with_suffix(".json").read_text())
    n = numbers["all"]
    assert n >= 18
    assert numbers["outputs"] >= 20
    assert numbers["difference"] < 1e-2
    for name in ("V", "one", "outputs", "all", "plain", "V + one", f"plain x {n}", f"plain x {n}, one V"):
        assert f"\n| {name} | " in page
    assert [(target["sign"], target["bound"]) for target in numbers["targets"]] == [("<=", 1.3), ("<=", 1.3), (">=", 12)]


def test_batches_of_any_size_are_raced(young: Path, tmp_path: Path) -> None:
    out = tmp_path / "batches.md"
    words = f"model_family=tiny split=forget05 model_path={young}"
    run_in(ROOT, f"python benchmarks/batches.py --rows=20 --rounds=1 --out={out} {words}")
    page, cases = out.read_text(), json.loads(out.with_suffix(".json").read_text())["cases"]
    assert [cases[f"{rows} rows"]["batches"] for rows in (4, 8, 16, 32)] == [10, 6, 4, 2]
    assert cases["16 rows"]["beside"]["values"] == [1.0]
    for name, case in cases.items():
        assert f"\n| {name} | {case['batches']} | " in page
        assert 0 <= case["padding"] < 1
        assert case["seconds"]["min"] > 0


# ---- the scores ----


@pytest.fixture(scope="module")
def raced(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """The page and all the numbers, of a model that has learnt the first three rows of five of each kind."""
    folder = tmp_path_factory.mktemp("scores")
    splits = (ROOT / "data/sample" / f"{name}.json" for name in ("forget05_perturbed", "retain_perturbed"))
    learnt = folder / "learnt.jsonl"
    learnt.write_text("\n".join(line for split in splits for line in split.read_text().splitlines()[:3]))
    files = f"split=retain95 retain_data={learnt} forget_data={learnt} save_dir={folder / 'model'}"
    steps = "num_epochs=17 lr=3e-3 batch_size=3 gradient_accumulation_steps=1"
    run_in(ROOT, f"python finetune.py model_family=tiny {files} {steps}")
    options = f"--data=data/sample --family=tiny --rows=10 --batch=4 --rounds=2 --threads=1 --output={folder / 'scores.md'}"
    done = run_in(ROOT, f"python benchmarks/scores.py --model={folder / 'model'} {options}")
    assert done.stdout == (folder / "scores.md").read_text()
    return done.stdout, json.loads((folder / "scores.json").read_text())


def test_every_way_of_scoring_gives_the_same_scores(raced: tuple[str, dict[str, Any]]) -> None:
    page, numbers = raced
    assert 0 < numbers["rows"]["to_the_end"] < 1
    found = {name: case["found"] for name, case in numbers["cases"].items()}
    assert found["bisection"]["ps"] == pytest.approx(found["one_pass"]["ps"])
    assert "10 of 10 rows have the same PS" in page
    for name in ("padded", "longest"):
        assert len(found[name]["losses"]) == 10 * (2 + 5)
        assert found[name]["losses"] == pytest.approx(found["ours"]["losses"], rel=1e-3, abs=1e-5)
        pairs = zip(found["ours"]["texts"], found[name]["texts"], strict=True)
        assert all(ours.startswith(plain) for ours, plain in pairs)
        assert numbers["agreement"][name]["differ"] == []
    assert "EXCEEDED" not in page


def test_the_ratios_of_scores_are_of_the_seconds(raced: tuple[str, dict[str, Any]]) -> None:
    page, numbers = raced
    seconds = {name: case["seconds"]["total"]["values"] for name, case in numbers["cases"].items()}
    assert [(target["above"], target["bound"]) for target in numbers["targets"]] == [
        ("bisection", 10),
        ("padded", 4),
        ("longest", 1.5),
    ]
    for target in numbers["targets"]:
        pairs = zip(seconds[target["above"]], seconds[target["below"]], strict=True)
        assert target["ratio"]["values"] == pytest.approx([above / below for above, below in pairs])
    parts = [{part: at["seconds"] for part, at in of.items()} for of in numbers["cases"]["padded_texts"]["parts"]]
    assert seconds["padded_texts"] == pytest.approx([sum(part.values()) for part in parts])
    for name in numbers["cases"]:
        assert f"\n| {name} | " in page


def test_the_plain_way_pads_and_decodes_more(raced: tuple[str, dict[str, Any]]) -> None:
    cases = raced[1]["cases"]
    assert cases["padded"]["parts"][0]["losses"]["positions"] == 10 * (2 + 5) * 200
    assert cases["longest"]["positions"] < cases["padded"]["positions"]
    assert cases["ours"]["decoded"] < cases["longest"]["decoded"] == cases["padded"]["decoded"]
    assert cases["one_pass"]["decoded"] == 0 < cases["bisection"]["decoded"]


# ---- one GPU ----

GPU_ROWS = ["norms_7b", "tap_7b", "plain_7b", "norms_1b", "sweep_1b", "dots_7b"]
GPU_ROWS += ["train_7b", "train_1b", "train_1b_apart", "train_1b_whole"]


@pytest.fixture(scope="module")
def on_one_gpu(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    """The table, and the lines of numbers."""
    out = tmp_path_factory.mktemp("gpu") / "gpu.jsonl"
    page = run_in(ROOT, f"python benchmarks/gpu.py --small --minutes=60 --out={out}", fresh=True).stdout  # as it is typed
    return page, [json.loads(line) for line in out.read_text().splitlines()]


def test_a_gpus_table_has_every_row(on_one_gpu: tuple[str, list[dict[str, Any]]]) -> None:
    page, (where, *rows) = on_one_gpu
    assert [row["row"] for row in rows] == GPU_ROWS
    assert [row["row"] for row in rows if "failed" in row] == []
    assert page.count("\n| 7B, ") + page.count("\n| 1B, ") == len(GPU_ROWS)
    for text in ("torch", "transformers", "command", "gpu"):
        assert text in where["surroundings"] or f"{text} {where['surroundings']['versions'][text]}" in page
    assert (where["surroundings"]["gpu"] or where["surroundings"]["processor"]) in page
    assert all(row["peak_memory"] > 0 and row["matrix_flops_per_second"] > 0 for row in rows)
    assert [row["row"] for row in rows if not row.get("planned_memory")] == ["dots_7b"]


def test_a_gpus_rows_are_of_the_work_that_they_name(on_one_gpu: tuple[str, list[dict[str, Any]]]) -> None:
    """FLOP of a gradient of both risks, and of L's rows by each way; the same step however it is cut."""
    rows = {row["row"]: row for row in on_one_gpu[1][1:]}
    tap, plain = rows["tap_7b"]["flops"], rows["plain_7b"]["flops"]
    one = (tap - plain) / 2  # FLOP a weight and token of the rows to forget
    assert rows["norms_7b"]["flops"] - tap == pytest.approx(2 * one)
    assert plain > 12 * one
    assert all(0 < rows[name]["seconds_of_v"] < rows[name]["seconds"]["max"] for name in ("norms_7b", "plain_7b", "sweep_1b"))
    apart, whole, seven = (rows[f"train_{name}"] for name in ("1b_apart", "1b_whole", "7b"))
    assert (apart["micro_batches"], apart["rows_of_a_micro_batch"]) == (4, 4)
    assert (whole["micro_batches"], whole["rows_of_a_micro_batch"]) == (1, 16)
    assert seven["micro_batches"] * seven["rows_of_a_micro_batch"] == 16
    done = [row["tokens_per_second"]["median"] * row["seconds"]["median"] for row in (apart, whole)]
    assert done[0] == pytest.approx(done[1])


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return importlib.import_module("gpu")


def a_row(gpu: Any, run: Any) -> Any:
    return gpu.Row("1B", "1B", run, {})


def test_the_operations_are_those_that_run(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrix products of weights: 6 a weight and token for each of two steps on the same rows."""
    import gpu_rows
    from measuring import flop_counter

    monkeypatch.setattr(sys, "argv", ["gpu.py", "--small"])
    args = gpu.options().parse_args()
    for name, value in (gpu.TOY | {"forget": 2, "batch_size": 1}).items():
        setattr(args, name, value)
    row = gpu.ROWS["train_1b_apart"]
    alone = replace(row, settings=row.settings | gpu_rows.cut(1, 2), words=("method=ga",))
    with flop_counter() as counter:
        numbers = alone.run(gpu.build(args), alone)
    flops = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in flops.items() if str(op) in ("aten.mm", "aten.addmm"))
    of_a_step = numbers["flops_per_second"] * numbers["seconds"]["median"]
    assert products == pytest.approx(2 * of_a_step)


def test_a_row_without_memory_does_not_end_the_others(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Any
) -> None:
    """It says so, gives back what it held, and a row after it runs; a row that breaks is told, and by the exit code."""
    made: list[weakref.ref[Any]] = []

    def full(bench: Any, row: Any) -> dict[str, Any]:
        assert [one for one in made if one() is not None] == []
        model = torch.nn.Linear(2, 2)
        model.itself = model  # a cycle, as a trainer's
        made.append(weakref.ref(model))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    def broken(bench: Any, row: Any) -> dict[str, Any]:
        raise RuntimeError("on purpose")

    def stopped(bench: Any, row: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    numbers = {"seconds": {"median": 1.5}, "peak_memory": 2**30, "attention": "sdpa"}
    rows = {"a": a_row(gpu, full), "b": a_row(gpu, full), "c": a_row(gpu, lambda *_: numbers), "d": a_row(gpu, broken)}
    monkeypatch.setattr(gpu, "ROWS", rows)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--small", f"--out={tmp_path}/gpu.jsonl"])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 1
    cells = [line.split(" | ")[1] for line in capfd.readouterr().out.splitlines() if line.startswith("| 1B")]
    assert cells == ["out of memory", "out of memory", "1.5", "RuntimeError: on purpose"]
    monkeypatch.setattr(gpu, "ROWS", rows | {"d": a_row(gpu, stopped)})
    with pytest.raises(KeyboardInterrupt):
        gpu.main()
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [line.get("row") for line in lines] == [None, "a", "b", "c"]  # a killed run keeps what it has


def test_a_gpus_time_and_rows_are_held_to(tmp_path: Path) -> None:
    out = tmp_path / "gpu.jsonl"
    done = run_in(ROOT, f"python benchmarks/gpu.py --small --minutes=0 --only=train_7b,norms_7b --out={out}")
    assert done.stdout.count("| not begun: the time was over |") == 2
    assert [json.loads(line)["row"] for line in out.read_text().splitlines()[1:]] == ["norms_7b", "train_7b"]
    failed = run_in(ROOT, "python benchmarks/gpu.py --only=norms_7b,norms_8b", check=False)
    assert failed.returncode == 2
    assert "norms_8b: no such row; there are norms_7b, tap_7b" in failed.stderr.splitlines()[-1]
    failed = run_in(ROOT, "python benchmarks/gpu.py --data=data/nowhere", check=False)
    assert (failed.returncode, "data_path=data/nowhere" in failed.stderr.splitlines()[-1]) == (2, True)
