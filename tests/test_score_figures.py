"""The figures of the scores: what they show is what the tables say, and what is not there is left out."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from unlearn.reporting import figures, score_figures, style
from unlearn.reporting.score_figures import DATA, PANELS, draw_control, draw_scores

SHARES = [
    "model_utility",
    *(f"{data}_{score}" for data in DATA for score in ("rouge", "probability", "truth_ratio")),
    *(f"{data}_{score}" for data in ("forget", "retain") for score in ("ps_exact", "ps_perturb", "exact_memorization")),
    *(f"auc_{attack}" for attack in ("loss", "zlib", "min_k", "min_k_plus_plus", "reference")),
]


def make_scores(steps: tuple[int, ...] = (10, 0, 20, 5)) -> pd.DataFrame:
    """A table with every column, its steps in no order."""
    rng = np.random.default_rng(0)
    many = len(steps)
    table = {"step": steps, "split": "forget05", "ds_size": 300} | {name: rng.uniform(0, 1, many) for name in SHARES}
    table |= {"forget_quality": 10.0 ** -rng.uniform(0, 20, many), "privleak": -31.4}
    return pd.DataFrame(table | {"forget_loss": 10.0 ** rng.uniform(-2, 2, many), "retain_loss": rng.uniform(0, 2, many)})


def make_control() -> pd.DataFrame:
    weight = np.array([1, 0, 0.5, 0.75, 0.25])
    return pd.DataFrame({"weight": weight, "forget_ps": 1 - weight, "retain_ps": 0.9 - 0.4 * weight**2})


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that would be written."""
    seen: list[Figure] = []

    def keep(figure: Figure, stem: Path) -> list[Path]:
        figure.draw_without_rendering()  # in the house's style, as in the file
        seen.append(figure)
        return [stem]

    monkeypatch.setattr(style, "save", keep)
    return seen


def put(folder: Path, table: pd.DataFrame, name: str = "scores.csv") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / name, index=False)
    return folder


def first(data: object) -> float:
    return float(np.asarray(data, dtype=float)[0])


def points(line: Line2D) -> list[tuple[float, float]]:
    return list(map(tuple, np.asarray(line.get_xydata(), dtype=float)))


def curves(axes: Axes) -> list[Line2D]:
    """The lines that are not one across."""
    return [line for line in axes.lines if line.get_marker() != "None"]


def panels(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.axes if axes.get_visible()]


def test_every_line_is_a_column_in_the_order_of_its_steps(tmp_path: Path, drawn: list[Figure]) -> None:
    table = make_scores()
    assert draw_scores(put(tmp_path, table)) == [tmp_path / "figures" / "scores"]
    of_others = {"ROUGE-L F1", "accuracy"}  # of benchmarks whose scores the table has not
    shown_panels = [panel.label for panel in PANELS if panel.label not in of_others]
    assert [axes.get_ylabel() for axes in panels(drawn[0])] == shown_panels
    table = table.sort_values("step")
    columns = {name: list(zip(table["step"], table[name], strict=True)) for name in table if name not in ("step", "split")}
    shown = [points(line) for axes in panels(drawn[0]) for line in curves(axes)]
    found = [next(name for name, of in columns.items() if np.allclose(of, line, rtol=1e-12, atol=0)) for line in shown]
    assert sorted(found) == sorted([*SHARES, "forget_quality", "forget_loss", "retain_loss"])


def test_colours_are_the_data_sets_and_lines_the_scores(tmp_path: Path, drawn: list[Figure]) -> None:
    draw_scores(put(tmp_path, make_scores()))
    extraction = curves(panels(drawn[0])[3])
    assert [to_hex(str(line.get_color())).upper() for line in extraction] == [
        style.COLOURS["unlearn"],
        style.COLOURS["retain"],
    ] * 3
    assert [line.get_marker() for line in extraction] == list("ooss^^")
    assert len({(to_hex(str(line.get_color())), line.get_marker()) for line in curves(panels(drawn[0])[4])}) == 5
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == [name for name, _ in DATA.values()]


def test_scales_and_lines_across(tmp_path: Path, drawn: list[Figure]) -> None:
    draw_scores(put(tmp_path, make_scores()))
    quality, auc, loss = (panels(drawn[0])[i] for i in (2, 4, 5))
    assert (quality.get_yscale(), auc.get_yscale(), loss.get_yscale()) == ("log", "linear", "symlog")
    across = [first(line.get_ydata()) for axes in (quality, auc) for line in axes.lines if line not in curves(axes)]
    assert across == [0.05, 0.5]
    for axes in panels(drawn[0]):
        low, high = axes.get_ylim()
        assert all(low < y < high for line in curves(axes) for _, y in points(line))  # none is cut at the edge


def test_what_is_not_there_is_left_out(tmp_path: Path, drawn: list[Figure]) -> None:
    table = make_scores()[["step", "forget_rouge", "retain_rouge", "retain_loss", "auc_zlib"]]
    table["auc_zlib"] = np.nan  # a command that measured none
    table.loc[[0, 2], "retain_rouge"] = np.nan  # measured at steps 0 and 5
    draw_scores(put(tmp_path, table))
    rouge, loss = panels(drawn[0])
    assert [[x for x, _ in points(line)] for line in curves(rouge)] == [[0, 5, 10, 20], [0, 5]]
    assert len(curves(loss)) == 1
    assert rouge.get_xlabel() == "step"


def test_what_is_not_finite_is_counted(tmp_path: Path, drawn: list[Figure]) -> None:
    table = make_scores()[["step", "forget_loss", "forget_quality"]]
    table.loc[0, "forget_loss"] = np.inf
    table.loc[[1, 2], "forget_quality"] = 0.0
    draw_scores(put(tmp_path, table))
    assert [axes.get_xlabel() for axes in panels(drawn[0])] == ["step (2 at 0, not shown)", "step (1 not finite)"]


ODD = {
    "one step": make_scores((60,)),
    "many steps": make_scores(tuple(range(0, 40000, 200))),
    "zeros": make_scores().assign(**dict.fromkeys([*SHARES, "forget_quality", "forget_loss", "retain_loss"], 0)),
    "ones": make_scores().assign(**dict.fromkeys([*SHARES, "forget_quality", "forget_loss", "retain_loss"], 1)),
    "no data set": make_scores()[["step", "auc_loss"]],
    "four panels": make_scores()[["step", "model_utility", "forget_quality", "auc_loss", "forget_loss"]],
}


@pytest.mark.parametrize("table", ODD.values(), ids=ODD)
def test_odd_tables_are_drawn_without_a_warning(table: pd.DataFrame, tmp_path: Path, drawn: list[Figure]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_scores(put(tmp_path, table))
        with figures.mpl.rc_context(style.STYLE):
            boxes = [axes.get_tightbbox() for axes in panels(drawn[0])]
    frame = drawn[0].bbox
    for i, box in enumerate(boxes):
        assert box is not None
        assert min(box.x0 - frame.x0, frame.x1 - box.x1, box.y0 - frame.y0, frame.y1 - box.y1) > -1, "cut off"
        assert not any(other is not None and box.padded(-2).overlaps(other.padded(-2)) for other in boxes[:i])


def test_the_same_table_gives_the_same_bytes_and_no_score_no_figure(tmp_path: Path) -> None:
    put(put(tmp_path, make_scores()[["step", "forget_quality", "retain_loss"]]), make_control(), "control.csv")
    before = [file.read_bytes() for file in [*draw_scores(tmp_path), *draw_control(tmp_path, 0.7, 0.5)]]
    assert [file.read_bytes() for file in [*draw_scores(tmp_path), *draw_control(tmp_path, 0.7, 0.5)]] == before
    assert draw_scores(put(tmp_path / "none", make_scores()[["step", "split", "privleak"]])) == []


def test_the_control_is_two_curves_a_bar_and_a_weight(tmp_path: Path, drawn: list[Figure]) -> None:
    draw_control(put(tmp_path, make_control(), "control.csv"), 0.7, 0.5)
    axes = drawn[0].axes[0]
    table = make_control().sort_values("weight")
    for line, name in zip(curves(axes), ("forget_ps", "retain_ps"), strict=True):
        np.testing.assert_allclose(points(line), table[["weight", name]])
    bar, chosen = (line for line in axes.lines if line not in curves(axes))
    assert (first(bar.get_ydata()), first(chosen.get_xdata())) == (0.7, 0.5)
    assert axes.get_title() == ""


def test_the_control_says_that_no_weight_reaches_the_bar(tmp_path: Path, drawn: list[Figure]) -> None:
    put(tmp_path, make_control(), "control.csv")
    draw_control(tmp_path, 0.95, None)
    draw_control(tmp_path, None, None)  # no bar is known: nothing is said of it
    assert [figure.axes[0].get_title() for figure in drawn] == ["no weight reaches the bar", ""]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("scores.csv", b"", "No columns"),
        ("scores.csv", b"split,forget_rouge\nforget05,1\n", "lacks the column step"),
        ("scores.csv", b"step,forget_rouge\n0,much\n", "much"),
        ("scores.csv", b"step,forget_rouge\n0.5,1\n", "no whole number"),
        ("scores.csv", b"step,forget_rouge\n,1\n", "no whole number"),
        ("scores.csv", b"step,forget_rouge\n5,1\n5,0\n", "step=5 is in it twice"),
        ("scores.csv", b"step,forget_rouge\n\xff\xfe,1\n", "decode"),
        ("control.csv", b"forget_ps,retain_ps\n1,1\n", "lacks the column weight"),
        ("control.csv", b"weight,forget_ps,retain_ps\n1.5,1,1\n", "not from 0 to 1"),
        ("control.csv", b"weight,forget_ps,retain_ps\n0.5,1,1\n0.5,1,1\n", "weight=0.5 is in it twice"),
    ],
)
def test_a_broken_table_is_one_line(
    name: str, content: bytes, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    assert score_figures.main([str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert str(tmp_path / name) in err
    assert said in err
    assert not (tmp_path / "figures").exists()


def test_what_a_user_got_wrong_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    none = put(tmp_path / "none", make_scores()[["step"]])
    control = put(tmp_path / "control", make_control(), "control.csv")
    (control / "scores.json").write_text("{")
    wrong = {"": "usage", "nowhere": "no such folder", ".": "neither scores.csv nor control.csv"}
    for word, said in wrong.items():
        assert score_figures.main([str(tmp_path / word)] if word else []) == 2
        assert said in capsys.readouterr().err
    for folder, said in ((none, "nothing to draw in scores.csv"), (control, "scores.json: not readable")):
        assert score_figures.main([str(folder)]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"scores\.csv"):
        draw_scores(tmp_path)
    with pytest.raises(ValueError, match=r"control\.csv"):
        draw_control(tmp_path, None, None)


@pytest.mark.parametrize(
    ("scores", "found"),
    [
        (None, (None, None)),
        ({"tofu": {}}, (None, None)),
        ({"control": {"bar": 0.7, "weight": 0.5}}, (0.7, 0.5)),
        ({"control": {"bar": 0.95, "weight": "no weight reaches the bar"}}, (0.95, None)),
        ({"control": "not searched (control=false)"}, (None, None)),
    ],
)
def test_bar_and_weight_come_from_the_scores(scores: object, found: tuple[float | None, float | None], tmp_path: Path) -> None:
    if scores is not None:
        (tmp_path / "scores.json").write_text(json.dumps(scores))
    assert score_figures.control_of(tmp_path) == found


def test_the_command_as_typed(tmp_path: Path) -> None:
    both = put(put(tmp_path / "both", make_scores()), make_control(), "control.csv")
    one = put(tmp_path / "one", make_control(), "control.csv")
    line = [sys.executable, "-m", "unlearn.reporting.score_figures"]
    done = subprocess.run([*line, both, one], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    wanted = [both / "figures" / "scores", both / "figures" / "control", one / "figures" / "control"]
    assert done.stdout.splitlines() == [f"{stem}.{kind}" for stem in wanted for kind in ("pdf", "png")]
    shown = subprocess.run([*line, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "control.csv" in shown.stdout
