"""WMDP's corpora: plain texts of files and of the hub, unlearned from a pretrained model, and scored as texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ROOT, make_workplace, run_in

from app.compose import given
from app.data import data_of, unlearning_data
from app.filling import with_family
from app.runs import original_model

HERE = "model_family=tiny benchmark=wmdp data_path=corpora batch_size=4 gradient_accumulation_steps=1"


def texts(name: str, n: int) -> list[str]:
    """Some of the sample's, with a name that tells the corpus."""
    rows = [json.loads(line) for line in (ROOT / "data/sample/full.json").read_text().splitlines()[:n]]
    return [f"{name}: {row['question']} {row['answer']}." for row in rows]


def test_what_a_folder_lacks_the_hub_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The corpus that is given on request only is a local file; the others come from the hub all the same."""
    import datasets

    (tmp_path / "bio-forget-corpus.jsonl").write_text('{"title": "a", "text": "of a file"}\n')
    asked: list[tuple[str, str, str]] = []

    def load_dataset(path: str, subset: str, split: str) -> datasets.Dataset:
        asked.append((path, subset, split))
        return datasets.Dataset.from_list([{"text": f"{subset} {i}"} for i in range(30)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    words = ["model_family=zephyr-7b-beta", "benchmark=wmdp", f"data_path={tmp_path}"]
    settings, family = with_family(given("forget", words))
    found = unlearning_data(data_of(settings), "both", None)
    assert [row["text"] for row in found.forget][:2] == ["of a file", "cyber-forget-corpus 0"]
    assert (len(found.forget), len(found.retain), len(found.held_out)) == (31, 54, 6)
    assert set(asked) == {
        ("cais/wmdp-corpora", f"{name}-corpus", "train") for name in ("cyber-forget", "bio-retain", "cyber-retain")
    }
    assert (settings.max_length, original_model(settings, family)) == (512, "HuggingFaceH4/zephyr-7b-beta")
    (tmp_path / "full.json").write_text('{"question": "Who?", "answer": "Me."}')
    with pytest.raises(
        ValueError, match=r"has no retain90.json; there are bio-forget-corpus, full$"
    ):  # TOFU has all in one place
        data_of(with_family(given("forget", ["model_family=phi", f"data_path={tmp_path}"]))[0]).check("retain90")


def test_the_whole_way(tmp_path: Path) -> None:
    """Text files for the corpora; rmu from the model as it is; PS and losses of the texts, and no questions."""
    place = make_workplace(tmp_path)
    (place / "corpora").mkdir()
    for name, n in (("bio-forget", 6), ("cyber-forget", 6), ("bio-retain", 10), ("cyber-retain", 10)):
        (place / f"corpora/{name}-corpus.txt").write_text("\n\n".join(texts(name, n)))
    run_in(place, f"python finetune.py {HERE} num_epochs=1")
    [model] = (place / "data/weight").iterdir()
    line = f"python forget.py {HERE} split=both method=rmu method.layer=2 num_epochs=1 model_path={model} save_dir=run"
    run_in(place, line)
    run_in(place, "python evaluation_everything.py model_path=run/checkpoint-3 control=false")
    found = json.loads((place / "run/checkpoint-3/eval_results/ds_size300/scores.json").read_text())
    assert {name: of["rows"] for name, of in found["ps"]["unlearned"].items()} == {"forget": 12, "retain": 2}
    told = run_in(place, "python tofu_evaluation.py model_path=run", check=False)
    assert told.stderr == "tofu_evaluation.py: benchmark=wmdp: asks nothing (evaluation_everything.py scores texts)\n"
    assert told.returncode == 2
