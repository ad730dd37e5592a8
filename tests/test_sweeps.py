"""A sweep that fails in part: the others finish, the summary names what failed, a second call runs what is missing."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from conftest import make_workplace, run_in

from unlearn.reporting.sweeps import draw, summarise

SWEEP = (
    "python forget.py -m model_family=tiny split=forget01 method=ga,wga hyper_param=1,2 seed=1 batch_size=2"
    " gradient_accumulation_steps=2 num_epochs=1 retain_holdout=4 model_path={}"
    " eval.every=1 geffect.every=1 geffect.instances=false"
)
BLOCKED = "icml/tiny/wga_0.0008_forget01_1_0.0_1_batch_size=2_gradient_accumulation_steps=2_retain_holdout=4_seed=1"


@pytest.fixture(scope="module")
def swept(young: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, list[str]]:
    """Four jobs, one of which finds a file where its folder should go; then the same call without the file."""
    place = make_workplace(tmp_path_factory.mktemp("sweep"))
    (place / BLOCKED).parent.mkdir(parents=True)
    (place / BLOCKED).touch()
    first = run_in(place, SWEEP.format(young), check=False)
    assert first.returncode == 2
    summary = next(place.glob("icml/sweeps/*/summary.csv")).read_text()
    (place / BLOCKED).unlink()
    second = run_in(place, SWEEP.format(young))
    return place, summary, [first.stderr, second.stderr]


def test_the_others_finish_and_the_summary_names_the_failed_one(swept: tuple[Path, str, list[str]], tmp_path: Path) -> None:
    _, summary, (first, _) = swept
    (tmp_path / "summary.csv").write_text(summary)
    table = pd.read_csv(tmp_path / "summary.csv", dtype={"hyper_param": str})
    assert list(table["status"]) == ["done", "done", "failed", "done"]
    failed = table.iloc[2]
    assert (failed["method"], failed["hyper_param"]) == ("wga", "1")
    assert "is a file" in failed["error"]
    assert pd.isna(failed["forget_loss_end"])
    assert "Traceback" not in first
    assert "job 2 failed: save_dir=" in first
    assert "3 of 4 jobs are done; the summary is icml/sweeps/forget_" in first


def test_a_second_call_runs_what_is_missing(swept: tuple[Path, str, list[str]]) -> None:
    place, _, (_, second) = swept
    assert second.count("is done already") == 3
    assert second.count("1 steps in") == 1
    assert "4 of 4 jobs are done" in second
    [folder] = (place / "icml/sweeps").iterdir()
    assert sorted(file.name for file in folder.iterdir()) == [
        "jobs",
        "multirun.yaml",
        "summary.csv",
        "summary.pdf",
        "summary.png",
    ]
    assert sorted(file.name for file in (place / "icml").iterdir()) == ["sweeps", "tiny"]


def test_the_summary_has_losses_g_effects_and_scores(swept: tuple[Path, str, list[str]]) -> None:
    place, _, _ = swept
    table = pd.read_csv(next(place.glob("icml/sweeps/*/summary.csv")))
    for _, row in table.iterrows():
        run = place / row["folder"]
        steps = pd.read_csv(run / "geffect/steps.csv").set_index(["step", "risk"])["geffect"]
        assert row["geffect_retain_first"] == pytest.approx(steps[0, "retain"])
        assert row["geffect_unlearn_last"] == pytest.approx(steps[1, "unlearn"])
        scores = pd.read_csv(run / "scores.csv").set_index("step")
        assert row["forget_ps_exact"] == pytest.approx(scores.loc[1, "forget_ps_exact"])
    assert table[["forget_loss_end", "retain_loss_end"]].notna().all(axis=None)


def test_a_job_that_was_killed_is_told(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    record = '{"settings": ["method=ga"], "status": "did not end", "folder": null, "error": ""}'
    (tmp_path / "jobs/0.json").write_text(record)
    table = summarise(tmp_path)
    assert list(table["status"]) == ["did not end"]
    assert draw(table) is None
    assert not len(summarise(tmp_path / "none"))
