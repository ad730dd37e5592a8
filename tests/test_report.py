"""The report: one page that asks for nothing, shows what the tables say, and says what is not there."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, run_in
from made_runs import HOSTILE, make_attacks, make_data, make_run
from test_figures import BLOCKS, ROWS, STEPS, make_tables, write

import report
from app.reporting import find_runs, unique
from unlearn.reporting import report_tables
from unlearn.reporting.report_page import MOST, as_json, columns, of_steps
from unlearn.reporting.report_panels import Figure, ends, power, scaled
from unlearn.reporting.report_sections import sections
from unlearn.study.claims import one_step

ALL = ["losses", "geffects", "layers", "instances", "tokens", "objectives", "scores", "fair", "attacks", "inside"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("report")
    data = make_data(place / "data")
    return [make_run(place / "npo", data), make_run(place / "ga", data, "ga", seed=1)]


@pytest.fixture(scope="module")
def made(folders: list[Path]) -> Path:
    return report.run([str(folder) for folder in folders], folders[0].parent / "both.html")


class Elements(HTMLParser):
    """Every element with its attributes, and what stands in each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script" and self.scripts:
            self.scripts[-1] += data


def data_of(file: Path) -> dict[str, Any]:
    return dict(json.loads(Elements(file.read_text()).scripts[0]))


# ---- the page, read ----


def test_the_page_is_whole_and_asks_for_nothing(made: Path) -> None:
    page = Elements(made.read_text())
    assert made.stat().st_size < MOST
    outside = [
        (tag, at) for tag, at in page.found for key in ("src", "href", "action", "data") if (at.get(key) or "#")[0] != "#"
    ]
    assert outside == [("link", {"rel": "icon", "href": "data:,"})]
    assert "@import" not in made.read_text()
    assert not re.search(r"url\((?!data:)", Elements(made.read_text()).scripts[2])
    policy = next(at["content"] for tag, at in page.found if tag == "meta" and at.get("http-equiv"))
    assert (policy or "").startswith("default-src 'none';")
    assert [at["id"] for tag, at in page.found if tag == "section"] == ["run", *ALL]


def test_texts_that_would_end_a_script_stay_texts(made: Path, folders: list[Path]) -> None:
    """A row's own </script> ends none: the page has its three scripts, and the row is in the data as it was."""
    page = Elements(made.read_text())
    assert len(page.scripts) == 3
    assert "alert(1)" not in [script.strip() for script in page.scripts]
    found = json.loads(page.scripts[0])
    texts = [[HOSTILE, "A <i>writer</i>."], *([f"Where was author {i} born?", f"In town {i}."] for i in range(1, ROWS))]
    assert found["texts"] == [{str(i): both for i, both in enumerate(texts)}]
    assert found["textOf"] == {"npo_kl": 0, "ga_kl": 0}  # once for both
    for text in ("</script>", "<!--", "\u2028", "&lt;", "]]>"):
        assert json.loads(as_json(text)) == text
        assert not re.search("[<>&\u2028]", as_json(text))


def test_a_run_s_name_is_escaped(folders: list[Path], tmp_path: Path) -> None:
    shutil.copytree(folders[0] / "geffect", tmp_path / "a<u>&c/geffect")
    file = report.run([str(tmp_path / "a<u>&c")])
    assert file == tmp_path / "a<u>&c/report.html"
    assert "<u>" not in file.read_text().partition('<script type="application/json"')[0]
    assert data_of(file)["runs"] == ["a<u>&c"]


def test_the_tables_are_the_runs(made: Path, folders: list[Path]) -> None:
    """Independent of how the page cuts them: the CSV's numbers, to six digits."""
    found = data_of(made)["tables"]
    steps = pd.read_csv(folders[1] / "geffect/steps.csv")
    theirs = [value for run, value in zip(found["steps"]["run"]["at"], found["steps"]["geffect"], strict=True) if run == 1]
    np.testing.assert_allclose(theirs, steps["geffect"], rtol=1e-5)
    layers = pd.read_csv(folders[0] / "geffect/layers.csv").groupby(["risk", "layer", "step"])["geffect"].sum()
    of = found["layers"]
    names = {key: np.array(of[key]["names"])[of[key]["at"]] for key in ("run", "risk", "layer")}
    here = names["run"] == "npo_kl"
    index = list(zip(names["risk"][here], names["layer"][here], np.array(of["step"])[here], strict=True))
    np.testing.assert_allclose(np.array(of["geffect"])[here], layers.loc[index], rtol=1e-5)
    assert sum(here) == len(layers)


def test_tokens_have_both_risks_beside_each_other(folders: list[Path]) -> None:
    table, said = report_tables.tokens(find_runs([str(folders[0])]))
    assert table is not None
    assert said == ""
    whole = make_tables()["tokens.parquet"]
    keys = ["step", "row", "position"]
    for risk in ("unlearn", "retain"):
        mine = whole[whole["risk"] == risk].set_index(keys)["geffect"].sort_index()
        np.testing.assert_array_equal(table.set_index(keys)[risk].sort_index(), mine)


def test_runs_beside_each_other_show_the_same_rows(monkeypatch: pytest.MonkeyPatch, folders: list[Path]) -> None:
    """The largest of both together, by an obvious count."""
    monkeypatch.setattr(report_tables, "POINTS", 100)
    table, _ = report_tables.tokens(find_runs([str(folder) for folder in folders]))
    assert table is not None
    rows = {name: set(of["row"]) for name, of in table.groupby("run")}
    assert rows["npo_kl"] == rows["ga_kl"]
    assert 0 < len(rows["npo_kl"]) < ROWS
    whole = make_tables()["tokens.parquet"]
    size = (
        whole[(whole["risk"] == "retain") & whole["step"].isin([0, 15])]
        .groupby("row")["geffect"]
        .apply(lambda e: e.abs().max())
    )
    assert rows["npo_kl"] == set(size.nlargest(len(rows["npo_kl"])).index)


def test_big_tables_are_cut_and_the_page_says_so(folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_tables, "POINTS", 15)
    runs = find_runs([str(folders[0])])
    instances, said = report_tables.instances(runs)
    assert instances is not None
    assert said == "npo_kl: 2 of 4 steps, evenly apart, to keep the page small."
    assert list(instances["step"].unique()) == [0, 15]
    assert len(instances) == 2 * ROWS
    tokens, said = report_tables.tokens(runs)
    assert tokens is not None
    assert list(tokens["step"].unique()) == [0, 15]  # the first and the last
    assert said.startswith("npo_kl: ")
    assert f"of {ROWS} rows" in said
    monkeypatch.setattr("unlearn.reporting.report_page.MOST", 1000)
    with pytest.raises(ValueError, match="the run's report has 1.* MB without its rows' texts, and 0 is the most; its largest"):
        report.run([str(folders[0])], tmp_path / "x.html")
    with pytest.raises(ValueError, match="the report of 2 runs has 1.* MB without .*, and 0 is the most; give fewer"):
        report.run([str(folder) for folder in folders], tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_four_hundred_rows_and_thirteen_steps_fit(folders: list[Path], tmp_path: Path) -> None:
    """Three runs of TOFU's forget10, 30 layers and 100 tokens a row: below the limit."""
    rng = np.random.default_rng(0)
    for name in "abc":
        folder = tmp_path / name / "geffect"
        folder.mkdir(parents=True)
        index = pd.MultiIndex.from_product([range(0, 65, 5), ["unlearn", "retain"], range(400)], names=["step", "risk", "row"])
        pd.DataFrame({"geffect": rng.normal(size=len(index))}, index).to_csv(folder / "instances.csv")
        modules = [range(0, 65, 5), ["unlearn", "retain"], range(30), ["q", "k", "v", "o", "up", "down"]]
        index = pd.MultiIndex.from_product(modules, names=["step", "risk", "layer", "module"])
        pd.DataFrame({"geffect": rng.normal(size=len(index))}, index).to_csv(folder / "layers.csv")
        index = pd.MultiIndex.from_product(
            [[0, 60], ["unlearn", "retain"], range(400), range(100)], names=["step", "risk", "row", "position"]
        )
        tokens = pd.DataFrame(
            {"token": " word", "loss": rng.normal(size=len(index)), "geffect": rng.normal(size=len(index))}, index
        )
        tokens.reset_index().to_parquet(folder / "tokens.parquet")
    file = report.run([str(tmp_path / name) for name in "abc"], tmp_path / "large.html")
    assert file.stat().st_size < MOST
    assert "of 400 rows" in file.read_text()


@pytest.mark.parametrize(
    ("left_out", "section", "command"),
    [
        ("geffect", "geffects", "compute_geffect.py model_path_cur={}"),
        ("geffect/tokens.parquet", "tokens", "compute_geffect.py model_path_cur={} tokens=true"),
        ("scores.csv", "scores", "tofu_evaluation.py model_path={} retain_path=RETAIN"),
        ("robustness.csv", "attacks", "robustness.py model_path={} retain_path=RETAIN"),
        ("checkpoint-12", "fair", "evaluation_everything.py model_path={} retain_path=RETAIN"),
        ("layers.csv", "inside", "evaluation_everything.py model_path={} representation=true"),
        ("logs", "losses", None),
    ],
)
def test_what_is_missing_is_said(folders: list[Path], tmp_path: Path, left_out: str, section: str, command: str | None) -> None:
    run = tmp_path / "run"
    shutil.copytree(folders[0], run)
    shutil.rmtree(run / left_out) if (run / left_out).is_dir() else (run / left_out).unlink()
    text = report.run([str(run)]).read_text()
    part = text.partition(f'<section id="{section}">')[2].partition("</section>")[0]
    assert "<figure" not in part
    assert "Not there" in part
    assert command is None or f"python {command.format(run)}" in part
    both = sections(find_runs([str(folders[1]), str(run)]))
    assert [one.missing for one in both if one.name == section] == [["npo_kl"]]
    assert all(one.figures for one in both)  # of the other run


def test_runs_have_names_of_their_own(folders: list[Path], tmp_path: Path) -> None:
    assert [run.name for run in find_runs([str(folder) for folder in folders])] == ["npo_kl", "ga_kl"]
    others = [make_run(tmp_path / f"seed{seed}", folders[0].parent / "data", seed=seed) for seed in (1, 2)]
    assert [run.name for run in find_runs([str(folder) for folder in others])] == ["npo_kl, seed=1", "npo_kl, seed=2"]
    shutil.copytree(folders[0], tmp_path / "again")
    assert [run.name for run in find_runs([str(folders[0]), str(tmp_path / "again")])] == ["npo", "again"]
    assert unique([["a", "x"], ["a", "y"], ["b"]]) == ["x", "y", "b"]


def test_texts_are_of_the_rows_that_the_run_had(folders: list[Path], tmp_path: Path) -> None:
    """Other rows under the same name are not shown as its own; nor is a hub asked for any."""
    data = make_data(tmp_path / "data")
    run = make_run(tmp_path / "run", data)
    assert find_runs([str(run)])[0].texts is not None
    file = data / "forget10.json"
    file.write_text(file.read_text().replace("author 3", "author 4"))
    assert find_runs([str(run)])[0].no_texts == f"its data are not what they were ({file})"
    file.unlink()
    assert find_runs([str(run)])[0].no_texts == f"its data are not at hand ({file})"
    assert f"its data are not at hand ({file})" in report.run([str(run)]).read_text()


def test_a_folder_of_tables_alone_will_do(tmp_path: Path) -> None:
    """As results/ has them: without config.yaml, and not in geffect/."""
    out = tmp_path / "wga.html"
    report.run([str(ROOT / "results/geffect_smollm2-135m")], out)
    found = data_of(out)
    assert {panel["table"] for panel in found["panels"].values()} == {"steps", "prediction", "layers"}
    assert set(found["tables"]["steps"]["run"]["names"]) == {"geffect_smollm2-135m"}


def test_a_run_s_other_measurements_are_no_part_of_it(folders: list[Path], tmp_path: Path) -> None:
    """compute_geffect.py's save_dir may lie in the run's folder: that is a folder of tables of its own."""
    run = shutil.copytree(folders[0], tmp_path / "run")
    shutil.copytree(folders[0] / "geffect", run / "more/geffect")
    assert [one.folder for one in find_runs([str(run / "more"), str(run / "more/geffect")])] == [
        run / "more",
        run / "more/geffect",
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "nowhere: no such folder; give a run's folder, such as forget.py makes"),
        (["."], ".: not a run's folder; looked for config.yaml, logs/train.jsonl, scores.csv"),
        (["RUN/geffect"], "{run}/geffect: is a part of a run; give the run's folder, {run}"),
        (["RUN/checkpoint-12"], "{run}/checkpoint-12: is a part of a run; give the run's folder, {run}"),
        (["RUN/../tuned"], "{run}/../tuned: no unlearning run (a fine-tuned model?): names no method; give a run's folder"),
        (["RUN", "RUN/../npo"], "{run}/../npo: is given twice"),
        (["RUN", "--out=x.pdf"], "--out=x.pdf: needs to end in .html; usage: report.py RUN [RUN ...]"),
        (["RUN", "--color"], "unrecognized arguments: --color; usage: report.py"),
        ([], "the following arguments are required: RUN; usage: report.py"),
    ],
)
def test_refusals(words: list[str], said: str, folders: list[Path], tmp_path: Path) -> None:
    run = str(folders[0])
    tuned = folders[0].parent / "tuned/logs"
    tuned.mkdir(parents=True, exist_ok=True)
    (tuned / "train.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    (tuned.parent / "config.yaml").write_text("settings: {model_family: tiny, lr: 0.001}\n")
    done = run_in(
        tmp_path, " ".join(["python", str(ROOT / "report.py"), *(word.replace("RUN", run) for word in words)]), check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"report.py: {said.format(run=run)}")


def test_one_risk_alone_is_no_error(tmp_path: Path) -> None:
    """Points need both; the others show the one that is there."""
    write(tmp_path / "run/geffect", make_tables(risks=("unlearn",)))
    text = report.run([str(tmp_path / "run")]).read_text()
    assert text.count("Its tables hold nothing to draw.") == 2  # instances and objectives
    assert {panel["where"].get("risk", "unlearn") for panel in data_of(tmp_path / "run/report.html")["panels"].values()} == {
        "unlearn"
    }


def test_a_broken_table_is_named(folders: list[Path], tmp_path: Path) -> None:
    shutil.copytree(folders[0], tmp_path / "run")
    (tmp_path / "run/geffect/steps.csv").write_text("step,risk\n1,unlearn\n")
    assert report.main([str(tmp_path / "run")]) == 2
    make_attacks().drop(columns="setting").to_csv(tmp_path / "run/robustness.csv", index=False)
    with pytest.raises(ValueError, match="steps.csv: not a table to draw from"):
        report.run([str(tmp_path / "run")])


# ---- numbers as axes ----


def test_axes_hold_their_values() -> None:
    for values in ([1, 2, 3], [-5, 1e-3, 4e3], [0.0], [7.0, 7.0], [1e-8, 1], [-3, -2], [float("nan"), 2.0], []):
        finite = [value for value in values if value == value]
        low, high = scaled(values)["scale"]["domain"]
        assert low < high
        assert all(low <= value <= high for value in finite)
    assert scaled([1.0, 2.0], across=0)["scale"]["domain"][0] <= 0
    assert ends(np.array([0.2, 1.0]))[0] == 0
    assert [power(value) for value in (0, 1000, -0.01)] == ["0", "10³", "−10⁻²"]


def test_columns_are_what_the_page_reads() -> None:
    table = pd.DataFrame({"run": ["a", None, "a"], "step": [0, 1, 2], "e": [1 / 3, float("inf"), 4.0]})
    assert columns(table) == {"run": {"names": ["a"], "at": [0, -1, 0]}, "step": [0, 1, 2], "e": [0.333333, None, 4]}


# ---- nothing is left out without a word ----


def figures_of(folders: list[Path]) -> dict[str, Figure]:
    return {figure.name: figure for section in sections(find_runs(list(map(str, folders)))) for figure in section.figures}


def told(figure: Figure) -> str:
    return " ".join(figure.notes)


@pytest.fixture
def run(folders: list[Path], tmp_path: Path) -> Path:
    """A copy of a run, to change."""
    return Path(shutil.copytree(folders[0], tmp_path / "run"))


def change(file: Path, column: str, value: float, step: int | None = None) -> int:
    """Put a value into a column of a table, of one step or of its first line; returns how many lines that are."""
    table = pd.read_csv(file)
    at = table["step"] == step if step is not None else table.index == 0
    table.loc[at, column] = value
    table.to_csv(file, index=False)
    return int(at.sum())


def test_steps_at_which_nothing_moved_foretell_nothing(run: Path) -> None:
    """By hand: of three steps that moved weights two signs are right, and a guess that all rise is right as often."""
    lines = [(0, "unlearn", 0.0, 0.0), (1, "unlearn", 0.2, 0.1), (2, "unlearn", -0.2, 0.3), (3, "unlearn", 0.1, 0.2)]
    lines += [(1, "retain", 0.1, -0.1), (2, "retain", -0.1, -0.2)]
    table = pd.DataFrame(lines, columns=["step", "risk", "update_effect", "risk_change"]).assign(minus_lr_geffect=1.0)
    table.to_csv(run / "geffect/prediction.csv", index=False)
    found = told(figures_of([run])["prediction"])
    assert "Forget rows: the sign agrees in 2 of 3 cases; in 3 of them the risk rose." in found
    assert "1 of 6 cases are left out: there nothing moved." in found
    assert "Held-out retain rows: the sign agrees in 1 of 2 cases; in 0 of them the risk rose." in found
    signs = one_step(table.assign(run="a")).query("predictor == 'update_effect'")
    assert list(signs["signs"]) == pytest.approx([2 / 3, 1 / 2])  # as the study counts


def test_an_attack_at_an_earlier_checkpoint_is_shown(run: Path) -> None:
    lines = make_attacks()
    lines.loc[lines["attack"] != "quantize", "step"] = 10
    lines.loc[lines["attack"] == "quantize", "step"] = 20
    again = lines[lines["attack"] == "prefix"].assign(step=5)
    later = lines[(lines["attack"] == "paraphrase") & (lines["model"] == "unlearned")].assign(step=20)
    pd.concat([lines, again, later]).to_csv(run / "robustness.csv", index=False)
    found = figures_of([run])
    assert {"relearn", "quantize", "sample", "asked"} <= set(found)
    assert told(found["relearn"]).startswith("npo_kl at step 10. Scored on 8 rows.")
    assert told(found["quantize"]).startswith("npo_kl at step 20.")
    assert told(found["asked"]).startswith(
        "npo_kl: prefix, unlearned at step 10; prefix, retain at step 10; paraphrase, retain at step 10;"
        " paraphrase, unlearned at step 20 (not shown: steps 5, 10)."
    )
    table = report_tables.attacks(find_runs([str(run)]))
    assert table is not None
    assert list(table.columns) == ["run", *lines.columns]  # as the study's tables have them


def test_a_long_log_is_cut_and_its_losses_counted(run: Path) -> None:
    log = [{"step": i, "loss": None if i in (3, 7) else 1.0, "grad_norm": 1.0} for i in range(1, 1001)]
    log[99] |= {"e_u": 1.0}
    (run / "logs/train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    rng = np.random.default_rng(0)
    steps = [(step, risk, *rng.normal(size=2)) for step in range(1000) for risk in ("unlearn", "retain")]
    monitor = pd.DataFrame(steps, columns=["step", "risk", "gradient", "update"])
    monitor.to_csv(run / "geffect/monitor.csv", index=False)
    found = figures_of([run])
    cut = "npo_kl: 400 of 1000 steps, evenly apart, to keep the page small."
    assert found["log"].notes == [cut, "2 of 1000 values of Loss are not finite, and are not drawn."]
    assert found["log"].table["step"].nunique() == 400
    assert found["monitor"].notes == [cut]
    assert len(found["monitor"].table) == 800


def test_what_is_not_finite_is_counted_everywhere(run: Path) -> None:
    scored = run / "checkpoint-12/eval_results/ds_size300/control.csv"
    scored.write_text(scored.read_text().replace("0.25,0.75", "0.25,inf"))
    change(run / "geffect/monitor.csv", "update", np.nan)
    change(run / "scores.csv", "forget_rouge", np.inf)
    change(run / "scores.csv", "retain_loss", np.inf, 0)
    change(run / "robustness.csv", "forget_rouge", np.nan)
    change(run / "geffect/sweep.csv", "geffect", np.inf, 15)
    change(run / "geffect/steps.csv", "risk_value", np.inf)
    change(run / "layers.csv", "cka", np.nan)
    tokens = pd.read_parquet(run / "geffect/tokens.parquet")
    tokens.loc[(tokens["row"] == 0) & (tokens["step"] == 0), "geffect"] = np.inf
    tokens.to_parquet(run / "geffect/tokens.parquet")
    found = figures_of([run])
    assert "1 of 30 values are not finite, and are not drawn." in told(found["monitor"])
    assert "npo_kl: 2 values are not finite, and are not drawn." in told(found["scores"])
    assert "1 of 5 values of forget PS are not finite, and are not drawn." in told(found["control"])
    assert "1 of 6 values of forget_rouge are not finite, and are not drawn." in told(found["relearn"])
    assert "4 of 4 values are not finite, and are not drawn." in told(found["objectives"])
    assert "1 of 8 values of risk_value are not finite, and are not drawn." in told(found["steps"])
    assert "1 of 8 values are not finite, and are not drawn." in told(found["inside"])
    assert "5 of 420 values are not finite, and are not drawn. Their tokens are grey" in told(found["tokens"])


def test_which_checkpoint_it_is_of_is_said(run: Path) -> None:
    shutil.copytree(run / "checkpoint-12", run / "checkpoint-6")
    inside = pd.read_csv(run / "layers.csv")
    pd.concat([inside.assign(step=6), inside]).to_csv(run / "layers.csv", index=False)
    found = figures_of([run])
    assert "npo_kl at step 12 (not shown: step 6)." in told(found["control"])
    assert "npo_kl at step 12 (not shown: step 6)." in told(found["inside"])
    assert "Also in layers.csv, and not drawn: retain beside original." in told(found["inside"])
    assert "npo_kl at step 15 (not shown: steps 0, 5, 10)." in told(found["objectives"])


def test_bars_that_differ_are_not_drawn_and_said(folders: list[Path], run: Path) -> None:
    (run / "checkpoint-12/eval_results/ds_size300/scores.json").write_text('{"control": {"bar": 0.7, "weight": 0.5}}')
    assert "no line across" in told(figures_of([run, folders[1]])["control"])


def test_texts_are_of_the_rows_that_are_shown(run: Path) -> None:
    for name in ("instances.csv", "tokens.parquet"):
        (run / "geffect" / name).unlink()
    table = make_tables()["instances.csv"]
    table[table["row"].isin(["1", "3", "retain"])].to_csv(run / "geffect/instances.csv", index=False)
    found = data_of(report.run([str(run)]))
    assert found["texts"] == [{str(i): [f"Where was author {i} born?", f"In town {i}."] for i in (1, 3)}]


def test_long_texts_are_cut_before_a_run_is_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_data(tmp_path / "data")
    rows = [{"question": "q" * 3000, "answer": "a" * 90} for _ in range(ROWS)]
    (data / "forget10.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = make_run(tmp_path / "long", data)
    file = report.run([str(folder)])
    assert "Texts are cut to 400 letters." in file.read_text()
    monkeypatch.setattr("unlearn.reporting.report_page.MOST", file.stat().st_size - 300)
    report.run([str(folder)])
    assert "Texts are cut to 100 letters, to keep the page small." in file.read_text()
    assert data_of(file)["texts"][0]["0"] == ["q" * 99 + "…", "a" * 90]
    monkeypatch.setattr("unlearn.reporting.report_page.MOST", file.stat().st_size - 2 * 190 * ROWS // 3)
    monkeypatch.setattr("unlearn.reporting.report_page.LETTERS", (400, 100, 0))
    report.run([str(folder)])
    assert "Texts are left out, to keep the page small." in file.read_text()
    assert data_of(file)["textOf"] == {}


def test_scores_of_lm_eval_and_all_others_are_drawn(run: Path) -> None:
    scores = pd.read_csv(run / "scores.csv").assign(
        wmdp_bio_acc=[0.6, 0.5, 0.4, 0.3],
        retain_model_wmdp_bio_acc=[np.nan, 0.25, 0.25, 0.25],
        wikitext_word_perplexity=12.0,
        forget_extraction_strength=0.5,
        houses_rouge=0.5,
        auc_gradnorm=0.6,
        strange=1.0,
    )
    scores.to_csv(run / "scores.csv", index=False)
    found = figures_of([run])
    titles = [panel.title for panel in found["harness"].panels]
    assert titles == ["wmdp_bio_acc", "wikitext_word_perplexity"]
    table = found["harness"].table
    ordered = scores.sort_values("step")
    assert list(table[table["model"] == "unlearned"]["wmdp_bio_acc"]) == list(ordered["wmdp_bio_acc"])
    assert list(table[table["model"] == "retain"]["wmdp_bio_acc"]) == [0.25] * 3
    drawn = {panel.spec["layer"][-1]["encoding"]["y"]["field"] for panel in found["scores"].panels}
    assert {"privleak", "forget_extraction_strength", "houses_rouge", "auc_gradnorm"} <= drawn
    assert "Also in scores.csv, and not drawn: strange." in told(found["scores"])


def test_the_summary_tells_the_step_of_an_earlier_score() -> None:
    table = pd.DataFrame({"step": [0, 5, 10], "rouge": [1.0, 0.5, np.nan], "ps": [0.9, 0.8, 0.1]})
    assert of_steps(table, "ps") == "0.9 → 0.1"
    assert of_steps(table, "rouge") == "1 → 0.5 (step 5)"


def test_a_gradient_rule_s_step_is_drawn(run: Path) -> None:
    table = pd.read_csv(run / "geffect/steps.csv")
    table.assign(rule_geffect=table["geffect"]).to_csv(run / "geffect/steps.csv", index=False)
    fields = [panel.spec["layer"][-1]["encoding"]["y"]["field"] for panel in figures_of([run])["steps"].panels]
    assert fields.count("rule_geffect") == 2


# ---- the page, in a browser ----


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no chromium here")
    with pytest.importorskip("playwright.sync_api").sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(params=[(1280, "light"), (420, "dark")], ids=["wide", "narrow"])
def opened(browser: Any, made: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page as drawn; at the end, that it asked for nothing and complained of nothing."""
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    page = context.new_page()
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(made.as_uri())
    drawn(page)
    yield page
    assert said == []
    assert [url for url in asked if not url.startswith("blob:")] == [made.as_uri()]
    context.close()


def test_what_is_not_finite_is_grey_or_left_out_and_counted(browser: Any, folders: list[Path], tmp_path: Path) -> None:
    shutil.copytree(folders[0] / "geffect", tmp_path / "run/geffect")
    for name, value in (("layers.csv", "inf"), ("instances.csv", ""), ("steps.csv", "-inf"), ("prediction.csv", "")):
        file = tmp_path / "run/geffect" / name
        table = pd.read_csv(file, dtype=str, keep_default_na=False)
        column = "update_effect" if name == "prediction.csv" else "geffect"
        table.loc[table["step"] == table["step"].iloc[0], column] = value
        table.to_csv(file, index=False)
    tokens = pd.read_parquet(tmp_path / "run/geffect/tokens.parquet")
    tokens.loc[tokens["row"] == 0, "geffect"] = float("nan")
    tokens.to_parquet(tmp_path / "run/geffect/tokens.parquet")
    file = report.run([str(tmp_path / "run")])
    layers = 2 * (BLOCKS + 3)
    assert (
        f"{layers} of {layers * len(STEPS)} values are not finite, and are not drawn. Their cells are grey." in file.read_text()
    )
    assert f"{ROWS} of {ROWS * len(STEPS)} values are not finite" in file.read_text()
    said: list[str] = []
    page = browser.new_page()
    page.on("console", lambda message: said.append(message.text))
    page.goto(file.as_uri())
    drawn(page)
    fills = page.evaluate(
        "[...document.querySelectorAll('#layers-0 .mark-rect path')].map((path) => path.getAttribute('fill'))"
    )
    assert len(fills) == layers // 2 * len(STEPS)
    assert fills.count("#b5b5b0") == layers // 2
    page.select_option("select.step", "0")
    page.wait_for_function("!document.querySelector('#instances-0 .mark-symbol path')")
    assert "not finite" in str(page.get_attribute("#tokens-shown .text span", "title"))
    assert said == []
    page.close()


def test_a_step_that_a_run_was_not_measured_at_is_said(browser: Any, folders: list[Path], run: Path) -> None:
    """Runs measured at steps 0 to 15, and at 0 and 20: at each choice a panel has its points or says why not."""
    table = make_tables()["instances.csv"].query("step in (0, 15)")
    table.assign(step=table["step"].replace(15, 20)).to_csv(run / "geffect/instances.csv", index=False)
    page = browser.new_page()
    page.goto(report.run([str(folders[0]), str(run)], run / "both.html").as_uri())
    drawn(page)

    def shown(step: str) -> list[tuple[int, bool]]:
        page.select_option("#figure-instances select.step", step)
        page.evaluate("Promise.all([...views.values()].map((view) => view.view.runAsync())).then(() => null)")
        panels = [page.locator(f"#instances-{i}") for i in range(2)]
        words = f"not measured at step {step}"
        return [(one.locator(".mark-symbol path").count(), words in one.text_content()) for one in panels]

    assert shown("20") == [(0, True), (ROWS, False)]
    assert shown("15") == [(ROWS, False), (0, True)]
    assert shown("0") == [(ROWS, False), (ROWS, False)]
    page.close()


def drawn(page: Any) -> None:
    page.wait_for_selector("html[data-drawn]", timeout=60_000)


def test_every_figure_is_drawn(opened: Any, made: Path) -> None:
    panels = data_of(made)["panels"]
    assert int(opened.get_attribute("html", "data-drawn")) == len(panels) > 50
    marks = opened.evaluate(
        """() => [...document.querySelectorAll('.plot')].map((plot) =>
            [plot.id, plot.querySelectorAll('svg .mark-symbol path, svg .mark-rect path, svg .mark-line path').length])"""
    )
    assert [name for name, _ in marks] == list(panels)
    assert [name for name, count in marks if not count] == []
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert opened.evaluate(
        "[...document.querySelectorAll('.plot svg')].every((svg) => svg.clientWidth <= svg.parentNode.clientWidth + 1)"
    )


def test_hover_tells_the_row(opened: Any) -> None:
    points = opened.locator("#instances-0 svg .mark-symbol path")
    assert points.count() == ROWS
    told = []
    for i in range(ROWS):
        points.nth(i).scroll_into_view_if_needed()
        points.nth(i).hover(force=True)
        opened.wait_for_selector("#vg-tooltip-element.visible")
        told.append(opened.inner_text("#vg-tooltip-element"))
    assert any(HOSTILE in text for text in told)  # as a text
    assert any("Where was author 3 born?" in text and "In town 3." in text for text in told)


def test_another_step_moves_the_points(opened: Any) -> None:
    def places() -> list[str]:
        return list(
            opened.evaluate(
                "[...document.querySelectorAll('#instances-0 .mark-symbol path')].map((p) => p.getAttribute('transform'))"
            )
        )

    before = places()
    opened.select_option("select.step", "0")
    opened.wait_for_function(
        "(was) => document.querySelector('#instances-0 .mark-symbol path').getAttribute('transform') !== was", arg=before[0]
    )
    assert len(places()) == len(before) == ROWS


def test_another_row_changes_the_tokens(opened: Any) -> None:
    def shown() -> tuple[str, int]:
        return opened.inner_text("#tokens-shown"), opened.locator("#tokens-shown .tokens:first-child .text span").count()

    text, count = shown()
    assert HOSTILE in text
    assert count == 5
    opened.select_option("#tokens-row", "3")
    text, count = shown()
    assert "Where was author 3 born?" in text
    assert count == 20
    assert opened.locator("#tokens-shown .tokens").count() == 2  # a block a run
    colour = "[...document.querySelectorAll('#tokens-shown .text span')].map((span) => span.style.background).join()"
    before = opened.evaluate(colour)
    opened.select_option("#tokens-value", "unlearn")
    assert opened.evaluate(colour) != before


def test_the_table_is_downloaded(opened: Any, folders: list[Path], tmp_path: Path) -> None:
    with opened.expect_download() as waiting:
        opened.click("#figure-steps button.csv")
    waiting.value.save_as(tmp_path / "steps.csv")
    assert waiting.value.suggested_filename == "steps.csv"
    table = pd.read_csv(tmp_path / "steps.csv")
    mine = pd.read_csv(folders[0] / "geffect/steps.csv")
    np.testing.assert_allclose(table[table["run"] == "npo_kl"]["geffect"], mine["geffect"], rtol=1e-5)


def test_dark_and_light(opened: Any) -> None:
    """Both by what the reader's system says, and by the button; lines keep their run's colour."""

    def paper() -> str:
        return str(opened.evaluate("getComputedStyle(document.body).backgroundColor"))

    first = paper()
    opened.click("#theme")
    drawn(opened)
    assert {first, paper()} == {"rgb(253, 253, 251)", "rgb(23, 25, 28)"}
    lines = "[...document.querySelectorAll('#steps-0 .mark-line path')].map((path) => path.getAttribute('stroke'))"
    runs = "[0, 1].map((i) => getComputedStyle(document.documentElement).getPropertyValue(`--run${i}`))"
    assert sorted(opened.evaluate(lines)) == sorted(opened.evaluate(runs))
