"""The two tutorials as they stand: their files written, their commands run, and what they say comes out; the notebook."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT, run_in

NUMBER = r"[-+]?\d+(?:\.\d+)?"
RISKS = ("unlearn", "retain")
SCORES = [f"{data}_{score}" for data in ("forget", "retain") for score in ("loss", "ps_exact")]

pytestmark = pytest.mark.on_cpu


def text_of(page: str) -> str:
    return (ROOT / f"docs/{page}.md").read_text()


def files(page: str) -> dict[str, str]:
    """The files that a page has its reader write: each a block below the line that names it last."""
    block = re.compile(r"`([\w./]+\.\w+)`[^`]*\n\n```(?:json|python|yaml)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    return dict(block.findall(text_of(page)))


def commands(page: str) -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```$", text_of(page), re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def table(page: str, first: str) -> dict[str, list[str]]:
    """The numbers of the page's table with that first heading, by the first cell of each line."""
    [lines] = re.findall(rf"^\| ?{first} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", text_of(page), re.MULTILINE)
    cells = [line.strip("|").split("|") for line in lines.splitlines()]
    return {cell[0].strip(): re.findall(NUMBER, " ".join(cell[1:])) for cell in cells}


def sentence(page: str, told: str) -> list[str]:
    """The numbers that a sentence has at each X."""
    pattern = re.escape(told).replace(r"\ ", r"\s+").replace("X", f"({NUMBER})")
    found = re.search(pattern, text_of(page))
    assert found is not None, told
    return list(found.groups())


def assert_told(told: Iterable[str], found: Iterable[float]) -> None:
    """As rounded there, and 3% for what another processor's float32 makes of a hundred steps."""
    for text, value in zip(told, found, strict=True):
        half = 0.5 * 10.0 ** -len(text.partition(".")[2])
        assert abs(float(text) - value) <= half * 1.001 + 0.03 * abs(value), f"{text} is told, and it is {value}"


def by_risk(file: Path) -> pd.DataFrame:
    """A table of G-effects, by step, with columns (number, risk)."""
    return pd.read_csv(file).pivot(index="step", columns="risk")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project, in which the first page was followed."""
    folder = tmp_path_factory.mktemp("tutorial")
    for name in ("app", "unlearn", "config"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "data").mkdir()
    for file in [*ROOT.glob("*.py"), ROOT / "data/idontknow.jsonl"]:
        shutil.copy(file, folder / file.relative_to(ROOT))
    for name, content in files("tutorial").items():
        (folder / name).write_text(content)
    for command in commands("tutorial"):
        run_in(folder, command)
    return folder


def test_what_the_reader_writes_and_runs() -> None:
    """So that another form of the pages does not leave the tests below with less to do."""
    assert list(files("tutorial")) == ["go.jsonl", "stay.jsonl", "mine.py", "config/method/enough.yaml"]
    assert sum(len(files("tutorial")[name].splitlines()) for name in ("go.jsonl", "stay.jsonl")) == 10
    scripts = [[command.split()[1] for command in commands(page)] for page in ("tutorial", "deciding")]
    assert scripts[0] == ["finetune.py", "forget.py", "compute_geffect.py", "report.py"]
    assert len(scripts[1]) == len(re.findall(r"^python ", text_of("deciding"), re.MULTILINE)) == 8
    assert len(re.findall("^```$", text_of("tutorial"), re.MULTILINE)) == len(files("tutorial")) + len(scripts[0])


def test_the_tutorial(place: Path) -> None:
    run = place / "run/geffect"
    steps = by_risk(run / "steps.csv")
    told = table("tutorial", "step")
    assert [int(step) for step in told] == list(steps.index)
    for step, numbers in told.items():
        names = [(value, risk) for value in ("geffect", "cosine", "risk_value") for risk in RISKS]
        assert_told(numbers, steps.loc[int(step), names])
    losses = json.loads((place / "run/logs/losses.json").read_text())
    ends = [losses[data][end] for data in ("forget", "retain") for end in ("start", "end")]
    assert_told(sentence("tutorial", "of the forget rows X -> X, of the held-out ones X -> X nats"), ends)
    told_of_update = sentence(
        "tutorial",
        "the update effect from step 6 to 8 is X on the forget rows (measured: X) and X on the held-out ones (X)",
    )
    foretold = pd.read_csv(run / "prediction.csv").query("step == 6")[["update_effect", "risk_change"]]
    assert_told(told_of_update, foretold.to_numpy().flatten())
    layers = pd.read_csv(run / "layers.csv").query("step == 4 and risk == 'unlearn'").groupby("layer")["geffect"].sum()
    told_of_layers = sentence("tutorial", "the embeddings have X of the X, the first block X.")
    assert_told(told_of_layers, [layers["embed"], layers.sum(), layers["0"]])
    rows = pd.read_csv(run / "instances.csv").query("risk == 'unlearn'").set_index(["step", "row"])["geffect"]
    told_of_rows = sentence("tutorial", "has X of e_u at step 4, row 3 (the code) X; at")
    assert_told([*told_of_rows, *sentence("tutorial", "adds: X at step 4")], [rows[4, row] for row in ("1", "3", "retain")])
    assert rows[10].drop("retain").idxmin() == "3"
    tokens = pd.read_parquet(run / "tokens.parquet").query("risk == 'unlearn' and loss < 4")
    below = sentence("tutorial", "still pushed: X, X, X, X, X, X at steps")
    assert_told(below, tokens.groupby("step").size())
    assert sorted(tokens.query("step == 10")["token"].str.strip()) == ["", *4 * ["<eos>"], "is", "is"]
    assert {file.stem for file in (run / "figures").glob("*.png")} >= {"steps", "layers", "instances", "tokens", "prediction"}
    assert '<figure id="figure-tokens">' in (place / "run/report.html").read_text()


def test_an_objective_outside_the_project(place: Path, tmp_path: Path) -> None:
    """Its YAML in a folder of the reader's, its function where the command is given; as the installed command runs it."""
    for name in ("go.jsonl", "stay.jsonl", "mine.py"):
        (tmp_path / name).write_text(files("tutorial")[name])
    (tmp_path / "own/method").mkdir(parents=True)
    (tmp_path / "own/method/other.yaml").write_text(
        files("tutorial")["config/method/enough.yaml"].replace("name: enough", "name: other")
    )
    (tmp_path / "geffect.py").symlink_to(ROOT / "console.py")
    data = f"model_family=tiny forget_data=go.jsonl retain_data=stay.jsonl model_path={place / 'model'}"
    line = f"python geffect.py forget --config-dir=own method=other {data} batch_size=4 gradient_accumulation_steps=1"
    run_in(tmp_path, f"{line} num_epochs=1 save_dir=run")
    assert (tmp_path / "run/checkpoint-1").is_dir()


def test_from_a_run_to_a_decision(place: Path) -> None:
    for command in commands("deciding"):
        run_in(place, command)
    swept = pd.read_csv(place / "all/geffect/sweep.csv").set_index(["method", "step", "risk"])["geffect"]
    for method, told in table("deciding", "method").items():
        assert_told(told, [swept[method.strip("`"), step, risk] for step in (0, 2, 4, 10) for risk in RISKS])
    [summary] = (place / "rates/sweeps").glob("*/summary.csv")
    jobs = pd.read_csv(summary).set_index("lr")
    rates = table("deciding", "lr")
    assert_told(rates.pop("before"), jobs[["forget_loss_start", "retain_loss_start"]].iloc[0])
    for rate, told in rates.items():
        assert_told(told, jobs.loc[float(rate), ["forget_loss_end", "retain_loss_end"]])
    scores = pd.read_csv(place / "chosen/scores.csv").set_index("step")
    effects = by_risk(place / "chosen/geffect/steps.csv")["geffect"]
    stop = table("deciding", "step")
    assert [int(step) for step in stop] == list(scores.index)
    for step, told in stop.items():
        assert_told(told, [*scores.loc[int(step), SCORES], *effects.loc[int(step), list(RISKS)]])
    monitor = pd.read_csv(place / "chosen/geffect/monitor.csv").set_index(["step", "risk"])["gradient"]
    assert_told(sentence("deciding", "e_u at X, where at step 2 it was X."), [monitor[3, "unlearn"], monitor[2, "unlearn"]])
    prices = table("deciding", "")
    for run, told in zip(("run", "chosen"), prices.values(), strict=True):
        found = json.loads((place / run / "checkpoint-10/eval_results/ds_size300/scores.json").read_text())
        shown = [found["ps"]["unlearned"][data]["ps_exact"] for data in ("forget", "retain")]
        assert_told(told, [*shown, found["control"]["forget_ps"], found["control"]["weight"]])
    attacked = pd.read_csv(place / "run/checkpoint-10/eval_results/ds_size300/robustness.csv")
    ps = attacked.set_index(["model", "attack", "setting"])["forget_ps_exact"]
    for setting, told in table("deciding", "weights").items():
        attack = "relearn" if "step" in setting else "quantize"
        assert_told(told, [ps[model, attack, setting] for model in ("unlearned", "retain")])
    report = (place / "both.html").read_text()
    assert [name for name in ("scores", "control", "robustness") if name not in report] == []


def test_the_notebook(tmp_path: Path) -> None:
    """As a reader runs it, in the folder beside the library's; no output is kept in it."""
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    (tmp_path / "unlearn").symlink_to(ROOT / "unlearn")
    (tmp_path / "examples").mkdir()
    notebook = nbformat.read(ROOT / "examples/tutorial.ipynb", as_version=4)
    assert [cell["id"] for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count")] == []
    resources = {"metadata": {"path": str(tmp_path / "examples")}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert [output["text"] for output in outputs if output.get("name") == "stderr"] == []
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert sum("text/html" in output.get("data", {}) for output in outputs) == 4
