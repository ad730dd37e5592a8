"""A third benchmark, of plain texts too, and an objective with two answers: a YAML and a function each, in a copy."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT, run_in

BENCHMARK = """# Made-up texts.
name: toys
data_path: toys
read: {_target_: toys.rows, _partial_: true}
finetune: {full: [go, stay], kept: [stay]}
unlearn: {gone: {forget: [go], retain: [stay], unseen: new}}
held_out: {share: 0.25}
asked: {retain: held_out, forget: go}
"""
ROWS = """
def rows(data_path, name):
    n = {"go": 8, "stay": 16, "new": 4}[name]
    return [{"question": f"What is {name} {i}?", "answer": f"It is {i * i}."} for i in range(n)]
"""
TEXTS = """
def rows(data_path, name):
    n = {"go": 8, "stay": 16, "new": 4}[name]
    return [{"text": f"There once was a {name} of the number {i}, and it was {i * i}."} for i in range(n)]
"""
METHOD = """# Prefer the second answer.
name: prefer
answers: forget
second: idk
objective: {_target_: toys.prefer, _partial_: true, beta: "${hyper:0.5}"}
"""
OBJECTIVE = """
from torch.nn.functional import logsigmoid
from unlearn.objectives import needs

@needs("second")
def prefer(tokens, counts, beta):
    margin = tokens.second.sum_rows(tokens.second.nll) - tokens.sum_rows(tokens.nll)
    return -logsigmoid(-beta * margin).sum() / counts.rows
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of it, to be added to."""
    for name in ("app", "unlearn", "config", "data"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "weight"))
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", ["questions", pytest.param("texts", marks=pytest.mark.slow)])
def test_a_third_benchmark_is_a_yaml_and_a_function(project: Path, kind: str) -> None:
    """Fine-tuned, unlearned, measured and scored as the others are."""
    (project / "config/benchmark/toys.yaml").write_text(BENCHMARK)
    (project / "toys.py").write_text(ROWS if kind == "questions" else TEXTS)
    run = project / "icml/tiny/ga_0.0008_gone_1_0.0_None_batch_size=1_benchmark=toys"
    run_in(project, "python finetune.py model_family=tiny benchmark=toys num_epochs=2 batch_size=1 save_dir=model")
    line = "python forget.py model_family=tiny benchmark=toys split=gone batch_size=1 num_epochs=1 model_path=model"
    done = run_in(project, f"{line} retain=gd save_dir={run}")
    assert "2 steps in" in done.stderr
    run_in(project, f"python compute_geffect.py model_path_cur={run}")
    assert len(pd.read_csv(run / "geffect/instances.csv").query("step == 0 and risk == 'retain'")) == 8 + 1
    run_in(project, f"python evaluation_everything.py model_path={run} control=false")
    scores = json.loads((run / "checkpoint-2/eval_results/ds_size300/scores.json").read_text())
    assert (scores["ps"]["unlearned"]["forget"]["rows"], scores["ps"]["unlearned"]["retain"]["rows"]) == (8, 4)
    assert scores["privacy"]["rows"] == {"forget": 8, "holdout": 4}
    if kind == "questions":
        run_in(project, f"python tofu_evaluation.py model_path={run}/checkpoint-2 generation.max_new_tokens=9")
        scores = json.loads((run / "checkpoint-2/eval_results/ds_size300/scores.json").read_text())
        assert (scores["tofu"]["forget"]["rows"], scores["tofu"]["retain"]["rows"]) == (8, 4)
    else:
        told = run_in(project, f"python tofu_evaluation.py model_path={run}/checkpoint-2", check=False)
        assert told.stderr.splitlines()[-1].endswith("have no question (evaluation_everything.py scores texts)")
        told = run_in(project, f"{line} method=idk", check=False)
        assert 'split go, row 1: has no question that "I don\'t know" could answer' in told.stderr
    wrong = run_in(project, f"{line} split=forget10", check=False)
    assert wrong.stderr.endswith("split=forget10: to unlearn is one of gone\n")


def test_the_page_as_it_stands(project: Path) -> None:
    """What the docs say of a new benchmark, word for word: its files written, its commands run."""
    text = (ROOT / "docs/extending.md").read_text()
    section = text[text.index("## A benchmark\n") : text.index("## A data set\n")]
    for name, content in re.findall(r"^```(?:python|yaml)\n# (\S+)\n(.*?)^```$", section, re.DOTALL | re.MULTILINE):
        (project / name).write_text(content)
    run_in(project, "python make_people.py")
    [commands] = re.findall(r"^```sh\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    for command in commands.splitlines():
        run_in(project, command)
    table = pd.read_csv(project / "run/scores.csv").set_index("step")
    assert {"houses", "forget_rouge", "forget_ps_exact", "auc_min_k"} < set(table)
    last = project / f"run/checkpoint-{table.index[-1]}/eval_results/ds_size300"
    said = pd.read_csv(last / "houses_rows.csv")
    assert len(said) == 8
    found = json.loads((last / "scores.json").read_text())
    assert found["definitions"]["houses"] == "How often the greedy answer names the right house."
    assert found["own"]["houses"] == table["houses"].iloc[-1]
    assert (project / "run/geffect/figures/steps.png").exists()
    yaml = project / "config/benchmark/people.yaml"
    right = yaml.read_text()
    for part, other, why in (
        ("people.houses", "people.hauses", "own.houses.score: people.hauses: no function that can be imported"),
        (
            "{rows: go}",
            "{row: go}",
            "own.houses.score: people.houses: missing a required argument: 'rows'; its sets are row",
        ),
    ):
        yaml.write_text(right.replace(part, other))
        refused = run_in(project, "python tofu_evaluation.py model_path=run save_dir=again", check=False)
        assert refused.returncode == 2
        assert refused.stderr.splitlines()[-1].startswith(f"tofu_evaluation.py: benchmark=people: {why}"), refused.stderr
    yaml.write_text(right.replace("full: [all], ", ""))
    refused = run_in(project, "python finetune.py model_family=tiny benchmark=people split=kept", check=False)
    assert (refused.returncode, "people.yaml lacks finetune.full: all rows" in refused.stderr) == (2, True)


def test_an_objective_with_two_answers_is_a_yaml_and_a_function(project: Path, young: Path) -> None:
    """Trained, measured in two ways, and swept beside another; its YAML does not repeat what it needs."""
    (project / "config/method/prefer.yaml").write_text(METHOD)
    (project / "toys.py").write_text(OBJECTIVE)
    line = f"python basher1.py prefer_gd --model=tiny --setting=forget01 --hyper=2 model_path={young} num_epochs=4"
    run_in(project, line)
    [run] = (project / "icml/tiny").iterdir()
    assert run.name == "prefer_gd_0.0008_forget01_4_0.0_2"
    command = f"python compute_geffect.py model_path_cur={run} dtype=float64 retain_holdout=6"
    run_in(project, f"{command} sweep=[prefer:2,npo:0.5]")
    run_in(project, f"{command} instances=false save_dir=plain")
    one, other = (pd.read_csv(folder / "geffect/steps.csv") for folder in (run, project / "plain"))
    assert one["geffect"].tolist() == pytest.approx(other["geffect"].tolist(), rel=1e-7)
    by_row = pd.read_csv(run / "geffect/instances.csv").query("step == 0").groupby("risk", sort=False)["geffect"].sum()
    assert by_row.tolist() == pytest.approx(one.query("step == 0")["geffect"].tolist(), rel=1e-7)
    told = run_in(project, f"{command} tokens=true save_dir=tokens", check=False)
    assert "tokens and positions: not of an objective with second answers" in told.stderr
    file = project / "config/method/prefer.yaml"
    file.write_text(METHOD.replace("second: idk\n", ""))
    told = run_in(project, f"{line} save_dir=other", check=False)
    assert (
        "method=prefer: its objective needs second answers: its YAML has `second: idk`, or a column of the rows" in told.stderr
    )
