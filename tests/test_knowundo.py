"""KnowUnDo the whole way with the tiny model: fine-tuned on `full`, unlearned, measured, scored on rows seen and not seen."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from conftest import SHARED, make_workplace, run_in

from app.compose import given
from app.data import data_of, finetune_rows, unlearning_data
from app.filling import benchmark, with_family

KNOWUNDO = SHARED / "knowundo"
knowundo = pytest.mark.skipif(not KNOWUNDO.is_dir(), reason="needs ../shared/knowundo")
ROWS = {"unlearn_train": 16, "unlearn_val": 4, "retention_train": 24, "retention_val": 6}
HERE = "model_family=tiny benchmark=knowundo data_path=few"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workplace with the first rows of each set."""
    folder = make_workplace(tmp_path_factory.mktemp("knowundo"))
    (folder / "few").mkdir()
    found = {name: json.loads((KNOWUNDO / f"{name}.json").read_text())[:n] for name, n in ROWS.items()}
    found["full"] = [row for rows in found.values() for row in rows]
    for name, rows in found.items():
        (folder / f"few/{name}.json").write_text(json.dumps(rows))
    return folder


@knowundo
def test_the_sets_are_what_they_are_for() -> None:
    """As published: 400 to forget, 441 beside them, 110 and 108 of each that unlearning never trains on, 1059 in all."""
    settings, _ = with_family(given("forget", ["model_family=phi", "benchmark=knowundo", f"data_path={KNOWUNDO}"]))
    data = data_of(settings)
    found = unlearning_data(data, "privacy", None)
    assert (len(found.forget), len(found.retain), len(found.held_out)) == (400, 441, 108)
    assert len(data.rows("unlearn_val")) == 110
    assert len(finetune_rows(data, "full")) == 1059
    assert len(finetune_rows(data, "retention")) == 441 + 108
    assert found.forget[0]["question"] == "Who are Isabella Marquez's parents?"
    texts = {name: {row["question"] for row in rows} for name, rows in vars(found).items()}
    assert not texts["forget"] & (texts["retain"] | texts["held_out"])


def test_the_hubs_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub has a row a split, with the lists `train` and `val`: all five sets are made of these."""
    import datasets

    def load_dataset(path: str, subset: str, split: str) -> datasets.Dataset:
        assert (path, subset) == ("zjunlp/KnowUnDo", "privacy")
        parts = {part: [{"text": f"{split} {part} {i}?", "labels": str(i)} for i in range(2)] for part in ("train", "val")}
        return datasets.Dataset.from_list([parts])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = data_of(with_family(given("forget", ["model_family=phi", "benchmark=knowundo"]))[0])
    for name in ROWS:
        split, part = name.split("_")
        assert [row["question"] for row in data.rows(name)] == [f"{split} {part} {i}?" for i in range(2)]
    assert len(data.rows("full")) == 8
    assert set(benchmark("knowundo").hub) == {*ROWS, "full"}


@knowundo
def test_the_whole_way(place: Path) -> None:
    """Each script by the run's own settings; the four sets stand in the tables of both evaluations."""
    run_in(place, f"python finetune.py {HERE} num_epochs=2")
    run_in(place, f"python finetune.py {HERE} num_epochs=2 split=retention batch_size=2 save_dir=kept")
    [model] = (place / "data/weight").iterdir()
    assert model.name.endswith("_full_wd0.0_benchmark=knowundo")
    line = f"python forget.py {HERE} split=privacy method=npo retain=kl model_path={model} num_epochs=1"
    run_in(place, f"{line} save_dir=run")
    run_in(place, "python compute_geffect.py model_path_cur=run")
    risks = pd.read_csv(place / "run/geffect/instances.csv").query("step == 0 and risk == 'retain'")
    assert len(risks) == ROWS["unlearn_train"] + 1
    run_in(place, "python evaluation_everything.py model_path=run retain_path=kept control=false")
    run_in(place, "python tofu_evaluation.py model_path=run retain_path=kept generation.max_new_tokens=4")
    folder = place / "run/checkpoint-1/eval_results/ds_size300"
    found = json.loads((folder / "scores.json").read_text())
    sizes = {"forget": 16, "retain": 6, "forget_val": 4, "retain_train": 24}
    assert {name: of["rows"] for name, of in found["ps"]["unlearned"].items()} == sizes
    assert {name: found["tofu"][name]["rows"] for name in sizes} == sizes
    assert found["privacy"] == "not available: benchmark=knowundo has no rows that were never trained on"
    assert found["tofu"]["forget_quality"].startswith("not available: rows of benchmark=knowundo lack perturbed_answer")
    table = pd.read_csv(place / "run/scores.csv").set_index("step")
    assert table.index.tolist() == [0, 1]
    for name in sizes:
        assert table.loc[1, f"{name}_ps_exact"] == found["ps"]["unlearned"][name]["ps_exact"]
        assert table.loc[1, f"{name}_rouge"] == found["tofu"][name]["rouge"]
    statistics = pd.read_csv(folder / "aggregate_stat.csv")
    assert {"ROUGE Forget Val", "Prob. Retain Train", "ROUGE Forget"} <= set(statistics)


@knowundo
def test_a_retain_models_split_needs_no_name(place: Path) -> None:
    """There is one split to unlearn, so a model that was fine-tuned elsewhere is asked about that."""
    told = run_in(place, "python tofu_evaluation.py model_family=tiny benchmark=knowundo model_path=nowhere", check=False)
    assert "model_path=nowhere: no such folder" in told.stderr
    wrong = run_in(place, f"python forget.py {HERE}", check=False)
    assert (wrong.returncode, wrong.stderr) == (2, "forget.py: split=forget10: to unlearn is one of privacy\n")
    (place / "half").mkdir()
    (place / "half/unlearn_train.json").write_text('[{"text": "Who?"}]')
    wrong = run_in(place, f"python forget.py {HERE} data_path=half split=privacy".replace("data_path=few ", ""), check=False)
    assert "unlearn_train.json, row 1: needs 'labels', and has {'text': 'str'}" in wrong.stderr
