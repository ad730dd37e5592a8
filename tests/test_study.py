"""The study's tables: against scipy and slow versions on runs that are made up, and on real ones of the tiny model."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, make_workplace, run_in
from scipy.stats import spearmanr

import study
from app import studying
from app.compose import given
from app.measuring import entries
from app.reporting import find_runs
from unlearn.reporting.robustness_figure import places
from unlearn.study import claims, figures, ordering, prediction, rates, rows, words
from unlearn.study.runs import named


def lines(runs: int = 8, steps: int = 4, seed: int = 0) -> pd.DataFrame:
    """Runs whose PS fall, the retain PS slower, and whose e_u at every step is minus what the forget loss will rise by."""
    draw = np.random.default_rng(seed)
    found = []
    for i in range(runs):
        rise = np.sort(draw.uniform(size=steps))
        for step in range(steps):
            found.append(
                {
                    **{"run": f"run{i}", "method": f"m{i // 2}", "lr": [1e-5, 3e-5][i % 2], "seed": 1, "hyper": np.nan},
                    **{"epochs": 1, "step": 5 * step, "forget_loss": rise[step], "retain_loss": rise[step] / 9},
                    **{"forget_ps": 1 - rise[step], "retain_ps": 1 - rise[step] ** (1 + i)},
                    **{"e_u": rise[step] - rise[-1], "e_r": draw.normal(), "lr_norm": draw.uniform()},
                }
            )
    return pd.DataFrame(found)


def test_a_run_is_stopped_where_it_forgets_most_and_still_keeps() -> None:
    table = lines()
    found = rates.stopped(table).set_index("run")
    for run, of in table.groupby("run"):
        kept = [line for _, line in of.iterrows() if line["retain_ps"] >= 0.9 * of["retain_ps"].iloc[0]]
        assert found.loc[run, "forget_ps"] == min(line["forget_ps"] for line in kept)
        assert found.loc[run, "forget_ps_end"] == of["forget_ps"].iloc[-1]
    chosen = rates.best(rates.stopped(table)).set_index("method")
    for method, of in rates.stopped(table).groupby("method"):
        assert chosen.loc[method, "forget_ps"] == of["forget_ps"].min()


def test_the_price_is_what_keeping_costs_at_equal_forgetting() -> None:
    table = pd.DataFrame({"step": [0, 5, 10, 15], "forget_loss": [0.1, 0.2, 1.0, 0.3], "retain_loss": [0.5, 0.6, 1.0, 2.0]})
    table["forget_ps"] = [1, 0.9, 0.1, 0]
    found = rates.price(table)  # at a forget loss of 0.6
    assert found == pytest.approx({"price": 0.1 + 0.5 * 0.4, "price_ps": 0.5, "price_span": 0.8}, rel=1e-12)
    assert rates.price(table.sample(frac=1, random_state=0)) == found
    assert np.isnan(list(rates.price(table, rise=1.0).values())).all()


def test_a_run_that_diverges_ends_where_it_ends() -> None:
    """A score that is not finite is none: it does not end the run before it."""
    table = lines(1).assign(forget_loss=[0.1, 0.9, np.nan, np.nan], retain_ps=[1, 0.95, 0, 0], forget_ps=[1, 0.5, 0.2, 0.1])
    found = rates.stopped(table).iloc[0]
    assert found[["step", "forget_ps", "forget_ps_end", "retain_ps_end"]].tolist() == [5, 0.5, 0.1, 0]
    known = prediction.table(table, rates.stopped(table))
    assert known["forget_rise_end"].isna().all()
    assert (known["retain_ps_end"] == 0).all()
    with pytest.raises(ValueError, match="run0: no retain PS at step 0, its first"):
        rates.stopped(table.assign(retain_ps=np.nan))


def test_means_and_deviations_over_seeds() -> None:
    ends = rates.stopped(lines(6)).assign(method="m", lr=[1e-5, 3e-5, 3e-5, 3e-5, 3e-5, 3e-5], hyper=[np.nan] * 4 + [2.0] * 2)
    found = rates.over_seeds(ends, fewest=2).set_index("hyper")
    assert found["seeds"].tolist() == [2, 3]
    for hyper, of in {np.nan: ends[1:4], 2.0: ends[4:]}.items():
        line = found[found.index.isna()].iloc[0] if np.isnan(hyper) else found.loc[hyper]
        for name in rates.ENDS:
            assert line[name] == pytest.approx(np.mean(of[name]), rel=1e-12, nan_ok=True)
            assert line[f"{name}_sd"] == pytest.approx(np.std(of[name], ddof=1), rel=1e-12, nan_ok=True)
    assert len(rates.over_seeds(ends)) == 3


def test_depth_adds_up_by_thirds() -> None:
    layer = ["embed", *map(str, range(6)), "norm"]
    table = pd.DataFrame({"run": "a", "risk": "retain", "layer": layer, "step": 0, "geffect": [99, 1, -2, 3, 4, -5, 5, 99]})
    line = claims.by_depth(table).iloc[0]
    assert [line[name] for name in claims.THIRDS] == [3 / 20, 7 / 20, 10 / 20]


def test_e_r_that_falls_with_e_u() -> None:
    table = lines(2).assign(e_r=lambda table: table["e_u"] / 10 + 0.01)
    found = claims.together(table)
    assert found["rho"].tolist() == [1, 1]
    assert np.isinf(found["ratio_last"]).all()  # e_u is 0 there
    assert (found["keeps"] == table.groupby("run")["e_r"].agg(lambda values: (values >= 0).mean()).to_numpy()).all()


def test_one_step() -> None:
    table = pd.DataFrame({"risk": "unlearn", "minus_lr_geffect": [1.0, -1, 2, 0], "update_effect": [2.0, 1, 4, 0]})
    found = claims.one_step(table.assign(risk_change=[1.0, 0.5, 3, 7])).set_index("predictor")
    assert found.loc["update_effect"].tolist() == ["unlearn", 3, 1.0, 1.0, 1.0, 0.5]
    assert found.loc["minus_lr_geffect", ["signs", "rho"]].tolist() == [2 / 3, 1.0]
    lacking = claims.one_step(table.assign(risk_change=[1.0, np.nan, -3, 7])).set_index("predictor").loc["update_effect"]
    assert lacking[["steps", "rose", "signs"]].tolist() == [2, 0.5, 0.5]


def test_a_run_that_keeps_nothing_is_stopped_before_it_begins() -> None:
    table = lines(1)
    table.loc[1:, "retain_ps"] = 0.0
    assert rates.stopped(table)["step"].tolist() == [0]


def test_ranks_are_scipys() -> None:
    draw = np.random.default_rng(1)
    x, y = draw.integers(4, size=(2, 6, 20)).astype(float)
    for a, b in zip(x, y, strict=True):
        assert prediction.spearman(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)
    assert np.isnan(prediction.spearman(np.ones(5), np.arange(5.0)))


@pytest.mark.parametrize("groups", [range(12), ["b", "a", "a", "c", "d", "b", "b", "e", "f", "a", "d", "c"]])
def test_intervals_are_a_loops(groups: Sequence[Any]) -> None:
    """Each draw has all members of its groups."""
    draw = np.random.default_rng(2)
    x, y = draw.integers(6, size=(2, 12)).astype(float)
    names = list(dict.fromkeys(groups))
    again = np.random.default_rng(prediction.SEED)
    rhos = []
    for drawn in again.integers(len(names), size=(prediction.RESAMPLES, len(names))):
        places = [i for group in drawn for i in range(12) if groups[i] == names[group]]
        if len(set(x[places])) > 1 and len(set(y[places])) > 1:
            rhos.append(spearmanr(x[places], y[places]).statistic)
    found = prediction.interval(x, y, groups)
    assert (found["low"], found["high"]) == pytest.approx(tuple(np.percentile(rhos, [2.5, 97.5])), abs=1e-12)
    assert found["rho"] == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)


def test_what_foretells_exactly_has_a_rho_of_1() -> None:
    table = lines()
    known = prediction.table(table, rates.stopped(table))
    assert known["step"].max() == 10  # nothing follows the last
    found = prediction.correlations(known).set_index(["step", "predictor", "outcome"])
    for step in (0, 5, 10):
        line = found.loc[(step, "e_u", "forget_rise_end")]
        assert (line["rho"], line["low"], line["high"], line["kind"], line["runs"]) == (-1, -1, -1, "G-effect", 8)
    at_0 = known[known["step"] == 0].set_index("run")
    ends = table[table["step"] == 15].set_index("run")
    assert (at_0["forget_rise_end"] == ends["forget_loss"] - table[table["step"] == 0].set_index("run")["forget_loss"]).all()
    assert "forget_rise" not in found.loc[0].index.get_level_values("predictor")  # 0 in all
    assert set(found["kind"]) == {"G-effect", "rival"}


def test_each_rates_runs_are_also_told_alone() -> None:
    few, five = lines(8), lines(5, seed=1).assign(lr=1e-4)  # four at each of two rates, too few to be told of
    table = pd.concat([few, five.assign(run="other " + five["run"])], ignore_index=True)
    known = prediction.table(table, rates.stopped(table))
    of_one = known[known["lr"] == 1e-4]
    found = prediction.by_rate(known)
    assert list(found["lr"].unique()) == ["all", "0.0001"]
    for name, runs in (("all", known), ("0.0001", of_one)):
        told = found[found["lr"] == name].drop(columns="lr").reset_index(drop=True)
        pd.testing.assert_frame_equal(told, prediction.correlations(runs))
    assert set(prediction.by_rate(of_one)["lr"]) == {"all"}


def test_what_has_come_is_not_foretold() -> None:
    table = lines(1, steps=5).assign(forget_loss=[0, 0.2, 0.6, 0.4, 0.9], retain_ps=[1, 1, 1, 0.95, 0.5])
    table["forget_ps"] = [1, 0.8, 0.4, 0.2, 0.1]  # stopped at step 15
    known = prediction.table(table, rates.stopped(table)).set_index("step")
    assert known["price"].notna().tolist() == [True, True, False, False]
    assert known["forget_ps_stopped"].notna().tolist() == [True, True, True, False]


def test_a_start_is_that_of_the_same_objective() -> None:
    table = lines(4)
    table.loc[table["run"].isin(["run1", "run3"]), "e_u"] = np.nan
    found = prediction.with_starts(table)
    at_0 = found[found["step"] == 0].set_index("run")["e_u"]
    assert at_0["run1"] == at_0["run0"] != at_0["run2"] == at_0["run3"]
    assert found[found["step"] > 0]["e_u"].isna().sum() == table[table["step"] > 0]["e_u"].isna().sum()


def test_at_step_0_runs_count_whose_start_is_anothers() -> None:
    """What is the same for all there, as sums over the steps before, leaves none of them out."""
    table = lines().assign(update_u=lambda table: table["step"] * table["e_u"])
    table.loc[table["run"].isin(["run1", "run3"]), ["e_u", "update_u"]] = np.nan
    found = prediction.correlations(prediction.table(table, rates.stopped(table)))
    runs = found[found["outcome"] == "forget_ps_end"].groupby("step")["runs"].unique()
    assert {step: list(counts) for step, counts in runs.items()} == {0: [8], 5: [6], 10: [6]}
    assert "update_u" not in set(found[found["step"] == 0]["predictor"])


def test_predictions_are_written_and_drawn(tmp_path: Path) -> None:
    lines().to_csv(tmp_path / "lines.csv", index=False)
    assert study.main(["predict", "--out", str(tmp_path)]) == 0
    found = pd.read_csv(tmp_path / "prediction.csv")
    assert found.loc[found["predictor"] == "e_u", "rho"].min() == -1
    assert (tmp_path / "prediction.png").stat().st_size > 10_000


def test_a_sweeps_points_meet_the_runs_of_their_objective() -> None:
    ends = rates.stopped(lines())
    at = {"step": 0, "method": ["m0", "m1", "m2", "m3"] * 2, "hyper_param": np.nan, "risk": ["unlearn"] * 4 + ["retain"] * 4}
    points = pd.DataFrame(at | {"geffect": [-4.0, -3.0, -2.0, -1.0, 1.0, 2.0, 3.0, 4.0]})
    found = ordering.beside(points, ends).set_index("method")
    for method, of in ends.groupby("method"):
        assert found.loc[method, "forget_ps"] == of["forget_ps"].min()
    assert found["ratio"].tolist() == [1 / 4, 2 / 3, 3 / 2, 4]
    with pytest.raises(ValueError, match="m0 has two points at step 0; give one sweep of each step"):
        ordering.beside(pd.concat([points, points.assign(geffect=1.0)]), ends)
    own = ends.assign(hyper=[0.5, np.nan] * 4)
    assert len(ordering.beside(points, own)) == 4
    assert (ordering.beside(points, own).set_index("method")["forget_ps"] == own[1::2].set_index("method")["forget_ps"]).all()


def test_facts_are_what_no_wrong_answer_has() -> None:
    tokens = ["Ann", " Lee", "'s", " father", " was", " a", " flor", "ist", " in", " Oslo", "."]
    kinds = words.kinds(
        tokens,
        "Who was Ann Lee's father?",
        "Ann Lee's father worked as a florist, of Oslo.",
        ["Ann Lee's father was a painter in Rome.", "Ann Lee's father was a farmer in Bonn."],
    )
    facts = {token for token, kind in zip(tokens, kinds, strict=True) if kind == words.FACT}
    assert facts == {" flor", "ist", " Oslo"}
    assert words.kinds([" born"], "", "He came from Oslo", ["from Rome"]) == [words.OWN]


def test_told_apart() -> None:
    table = pd.DataFrame({"step": 0, "kind": ["fact", "fact", "rest", "rest", "own"], "e_r": [-3.0, 2.0, 1.0, -2.0, 99.0]})
    line = words.told_apart(table, ["e_r"]).iloc[0]
    assert (line["auc"], line["facts"], line["rest"], line["share"]) == (3.5 / 4, 2, 2, 5 / 8)


def test_rows_that_hurt() -> None:
    """Two tokens a row at two steps: row i has e_r = -(i + 1) at the first, the other way round at the second."""
    line = [
        (step, row, 0.5 * row, -row, -(row + 1) / 2 if step == 0 else -(10 - row) / 2) for step in (0, 5) for row in range(10)
    ]
    tokens = pd.DataFrame(2 * line, columns=["step", "row", "loss", "e_u", "e_r"])
    table = rows.of_rows(tokens)
    assert list(table["row"]) == [*range(9, -1, -1), *range(10)]
    first = table.iloc[0]
    assert (first["tokens"], first["loss"], first["e_u"], first["e_r"], first["share"]) == (2, 4.5, -18, -10, 10 / 55)
    found = rows.alike(table).set_index(["step", "beside"])  # all are as long
    expected = {(0, "loss"): 1, (0, "-e_u"): 1, (5, "loss"): -1, (5, "-e_u"): -1, (5, "-e_r at the start"): -1}
    assert found["rho"].to_dict() == pytest.approx(expected)
    told = {"step": 0, "rows": 10, "hurt": 10, "share_0.1": 10 / 55, "share_0.2": 19 / 55, "share_0.5": 40 / 55}
    assert rows.shares(table).iloc[0].to_dict() == pytest.approx(told)


def test_rows_that_help_have_no_share() -> None:
    tokens = pd.DataFrame({"step": 0, "row": range(4), "loss": 1.0, "e_u": 0.0, "e_r": [3.0, -1.0, 9.0, -3.0]})
    table = rows.of_rows(tokens)
    assert list(table["row"]) == [3, 1, 0, 2]
    assert list(table["share"]) == [0.75, 0.25, 0, 0]
    assert rows.shares(table).iloc[0].tolist() == [0, 4, 2, 0.75, 0.75, 1]
    [axes] = figures.rows(table).axes
    assert [np.asarray(line.get_ydata()).tolist() for line in axes.lines[:2]] == [[-1, 3, 9], [-3]]
    assert (rows.of_rows(tokens.assign(e_r=1.0))["share"] == 0).all()


def test_the_commands_of_make_study_fit() -> None:
    told = ["make", "-n", "study", "SETTINGS=model_path=FULL data_path=DATA", "RETAIN_MODEL=MODEL"]
    text = subprocess.run(told, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    of_commands = {"compute_geffect": "forget_ge", "robustness": "robustness", "evaluation_everything": "eval_everything"}
    for script, config in of_commands.items():
        (words,) = re.findall(rf"{script}\.py (.*?)(?: \|\||$)", text, re.MULTILINE)
        settings = given(config, words.split())
        if config == "forget_ge":
            assert {"ga", "rmu_5", "npo:0.1"} < set(entries(settings))
    for experiment in re.findall(r"[a-z]+", re.findall(r"for experiment in (.*?) method", text)[0].replace('"', "")):
        assert (ROOT / f"config/experiment/{experiment}.yaml").exists()


def test_attacks_stand_in_their_order_and_runs_by_what_differs() -> None:
    of = {"run": ["a"] * 2 + ["b"] * 3, "method": "npo", "lr": 3e-5, "model": "unlearned", "attack": "relearn", "epochs": 5}
    table = pd.DataFrame(of | {"seed": [1] * 2 + [2] * 3, "hyper": [np.nan] * 2 + [0.1] * 3})
    table["setting"] = ["step 0", "step 10", "step 0", "step 2", "step 10"]
    bits = pd.DataFrame({"setting": ["4 bits", "as it is", "8 bits"]})["setting"]
    assert places("quantize", bits) == {"as it is": 0, "8 bits": 1, "4 bits": 2}
    figure = figures.attacks(table.assign(forget_ps_exact=[0.1, 0.2, 0.3, 0.4, 0.5]))
    assert figure is not None
    [axes] = figure.axes
    assert [np.asarray(line.get_xdata()).tolist() for line in axes.lines] == [[0, 10], [0, 2, 10]]
    assert [line.get_label() for line in axes.lines] == ["npo seed 1", "npo hyper 0.1 seed 2"]


# ---- real runs ----


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, young: Path) -> Path:
    """Runs of the tiny model by the study's own settings, fewer, with G-effects; and a study of them."""
    folder = make_workplace(tmp_path_factory.mktemp("study"))
    tiny = f"model_family=tiny model_path={young} split=forget05 retain_holdout=8"
    tiny += " num_epochs=1 batch_size=8 save_steps=2 eval.every=2"
    run_in(folder, f"python forget.py -m +experiment=trajectories {tiny} geffect.every=2 method=npo,wga lr=3e-5")
    run_in(folder, f"python forget.py -m +experiment=rates {tiny} method=npo lr=1e-3")
    return folder


def test_the_studys_commands(place: Path) -> None:
    runs = [run.name for run in sorted((place / "icml/study/tiny").iterdir()) if (run / "scores.csv").exists()]
    assert len(runs) == 3
    run_in(place, f"python study.py runs {' '.join(f'icml/study/tiny/{run}' for run in runs)} --out out")
    table = pd.read_csv(place / "out/lines.csv")
    assert set(table["method"]) == {"npo", "wga"}
    assert {"trajectories.png", "layers.png", "rates.csv"} <= {file.name for file in (place / "out").iterdir()}
    for run, of in table.groupby("run"):
        folder = next(place / "icml/study/tiny" / name for name in runs if study_name(place, name) == run)
        steps = pd.read_csv(folder / "geffect/steps.csv") if (folder / "geffect/steps.csv").exists() else None
        scores = pd.read_csv(folder / "scores.csv")
        assert of["forget_ps"].tolist() == pytest.approx(scores["forget_ps_exact"].tolist(), rel=1e-5)
        if steps is not None:
            assert of["e_r"].tolist() == pytest.approx(steps[steps["risk"] == "retain"]["geffect"].tolist(), rel=1e-5)
            monitor = pd.read_csv(folder / "geffect/monitor.csv")
            before = monitor[(monitor["risk"] == "unlearn") & (monitor["step"] < 2)]
            assert of[of["step"] == 2]["update_u"].item() == pytest.approx(before["update"].sum(), rel=1e-5)
        log = [json.loads(line) for line in (folder / "logs/train.jsonl").open()]
        moved = sum(line["learning_rate"] * line["grad_norm"] for line in log if line["step"] <= 2)
        assert of[of["step"] == 2]["lr_norm"].item() == pytest.approx(moved, rel=1e-5)
    few = run_in(place, "python study.py predict --out out", check=False)
    assert (few.returncode, few.stderr) == (2, "study.py: 3 runs: a rank correlation is told of at least 5\n")


def study_name(place: Path, folder: str) -> str:
    """What the study calls the run in that folder."""
    return named(find_runs([f"{place}/icml/study/tiny/{folder}"]))[0].name


def test_runs_are_added_one_after_another(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studying, "draw", lambda *_: None)
    runs = sorted(str(file.parent) for file in (place / "icml/study/tiny").glob("*/scores.csv"))
    studying.runs(runs, place / "at_once")
    for run in reversed([*runs, runs[0]]):
        studying.runs([run], place / "in_turn")
    for file in (place / "at_once").glob("*.csv"):
        assert file.read_text() == (place / "in_turn" / file.name).read_text()
    assert set(pd.read_csv(place / "in_turn/lines.csv").value_counts("run")) == {2}


def test_a_study_is_of_one_split(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(place / "icml", place / "others")
    run = next((place / "others/study/tiny").glob("npo_3e-05*"))
    for file in run.rglob("config.yaml"):
        file.write_text(file.read_text().replace("split: forget05", "split: forget10"))
    first = next((place / "icml/study/tiny").glob("wga_3e-05*"))
    monkeypatch.setattr(studying, "draw", lambda *_: None)
    studying.runs([str(first)], place / "of_one")
    before = (place / "of_one/lines.csv").read_text()
    with pytest.raises(ValueError, match="runs of forget05 and forget10: a study has one data; give another --out"):
        studying.runs([str(run)], place / "of_one")
    assert (place / "of_one/lines.csv").read_text() == before
    with pytest.raises(ValueError, match="both are 'wga, lr=3e-05, epochs=1, seed=42'"):
        studying.runs([str(first), f"{place}/others/study/tiny/{first.name}"], place / "of_one")


def test_attacks_and_the_fair_comparison_of_runs(place: Path) -> None:
    run = next((place / "icml/study/tiny").glob("wga_3e-05*"))
    attacked = place / "attacked" / run.name
    shutil.copytree(run, attacked)
    lines = [
        f"{step},{model},{attack},{setting},{0.1 * number}"
        for step in (2, 4)
        for model in ("unlearned", "retain")
        for attack, settings in {"relearn": ("step 0", "step 1"), "quantize": ("as it is", "8 bits")}.items()
        for number, setting in enumerate(settings)
    ]
    (attacked / "robustness.csv").write_text("\n".join(["step,model,attack,setting,forget_ps_exact", *lines]) + "\n")
    scored = attacked / "checkpoint-4/eval_results/ds_size300"
    scored.mkdir(parents=True)
    (scored / "control.csv").write_text("weight,forget_ps,retain_ps\n0.0,0.9,0.95\n1.0,0.3,0.85\n")
    studying.runs([str(attacked)], place / "of_attacks")
    table = pd.read_csv(place / "of_attacks/attacks.csv")
    assert (len(table), set(table["step"]), set(table["run"])) == (8, {4}, {"wga, lr=3e-05, epochs=1, seed=42"})
    assert pd.read_csv(place / "of_attacks/fair.csv")["step"].tolist() == [4]
    of = table.assign(method="wga", lr=3e-5)
    figure = figures.attacks(of)
    assert figure is not None
    assert [len(axes.lines) for axes in figure.axes] == [2, 2]
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"wga", "retain model"}
    bare = place / "attacked/bare"
    shutil.copytree(attacked, bare)
    (bare / "robustness.csv").unlink()
    studying.runs([str(bare)], place / "of_attacks")
    assert not list((place / "of_attacks").glob("attacks.*"))
    assert figures.attacks(of[of["attack"] == "none"]) is None


def test_order_words_and_rows(place: Path) -> None:
    run = next((place / "icml/study/tiny").glob("npo_3e-05*"))
    run_in(place, f"python compute_geffect.py model_path_cur={run} sweep=[npo,wga] tokens=true instances=false save_dir=more")
    runs = " ".join(str(folder.parent) for folder in (place / "icml/study/tiny").glob("*/scores.csv"))
    run_in(place, f"python study.py runs {runs} --out out2")
    few = run_in(place, "python study.py order more/geffect/sweep.csv --out out2", check=False)
    assert "2 objectives of the sweep were run" in few.stderr
    points = pd.read_csv(place / "out2/order_points.csv")
    assert set(points["method"]) == {"npo", "wga"}
    (place / "more/config.yaml").write_text((run / "config.yaml").read_text())
    run_in(place, "python study.py words more --out out2")
    table = pd.read_csv(place / "out2/words.csv")
    assert {"e_u", "e_r", "wga", "tnpo", "satimp"} <= set(table["value"])
    tokens = pd.read_parquet(place / "more/geffect/tokens.parquet")
    assert (table["facts"] + table["rest"] <= len(tokens)).all()
    tnpo = table[(table["value"] == "tnpo") & (table["step"] == 0)].iloc[0]
    assert (tnpo["auc"], tnpo["mean_fact"]) == (0.5, pytest.approx(1.0, rel=1e-9))  # the model is its own reference
    run_in(place, "python study.py rows more --out out2")
    of = pd.read_csv(place / "out2/rows.csv").groupby("step")["e_r"].sum()
    total = pd.read_csv(place / "more/geffect/steps.csv").query("risk == 'retain'").set_index("step")["geffect"]
    np.testing.assert_allclose(of, total, rtol=1e-5)
    assert (place / "out2/rows.png").exists()
    shutil.copytree(place / "more", place / "again")
    again = run_in(place, "python study.py rows more again --out out3", check=False)
    assert "more and again: both have step 0; give each step once" in again.stderr


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("order nothere.csv --out tests", "nothere.csv: is not called as a table of the G-effect is: "),
        ("other --out x", "invalid choice: 'other'"),
        ("runs --out x", "runs: needs RUN, the folder of a run; usage"),
        ("predict RUN --out x", "predict: reads the tables in --out, and takes no RUN; usage"),
        ("predict --out nowhere", "nowhere/lines.csv: no such file; `study.py runs"),
        ("runs nowhere --out x", "nowhere: no such folder"),
    ],
)
def test_what_can_not_be(words: str, line: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert study.main(words.split()) == 2
    assert line in capsys.readouterr().err


def test_the_words_of_help(capsys: pytest.CaptureFixture[str]) -> None:
    done = run_in(ROOT, "python study.py --help")
    assert "runs RUN" in done.stdout
