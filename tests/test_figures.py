"""The figures of a G-effect folder: what they show is what the tables say, whatever the tables hold."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from matplotlib.colors import Normalize, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from unlearn.reporting import figures, style
from unlearn.reporting import tables as plotted
from unlearn.reporting.token_figure import visible, wrap

BLOCKS, ROWS, STEPS = 3, 6, (0, 5, 10, 15)
WORDS = [" The", " author", "\n", "  ", " $x^", "é", " 北京", "\x00", "\ufffd", "a_{1", " مر", " 🙂"]
ALL = ["steps", "layers", "updates", "instances", "tokens", "prediction", "sweep", "objectives", "objectives_steps"]


def frame(columns: str, lines: list[tuple[object, ...]]) -> pd.DataFrame:
    return pd.DataFrame(lines, columns=columns.split(","))


def make_tables(steps: tuple[int, ...] = STEPS, risks: tuple[str, ...] = ("unlearn", "retain")) -> dict[str, pd.DataFrame]:
    """Tables as a measurement writes them: values of both signs from 1e-3 to 1e4."""
    rng = np.random.default_rng(0)

    def draw() -> float:
        return float(rng.choice([-1, 1]) * 10 ** rng.uniform(-3, 4))

    pairs = [(step, risk) for step in steps for risk in risks]
    before_last = [pair for pair in pairs if pair[0] != steps[-1]]
    modules = [("embed", "w"), *((str(i), m) for i in range(BLOCKS) for m in ("q", "mlp")), ("norm", "w"), ("lm_head", "w")]
    rows = [*map(str, range(ROWS)), "retain"]
    sweep = [("wga", "5"), ("wga", "1"), ("npo", "0.5"), ("idk", "")]
    tokens = [(row, at) for row in range(ROWS) for at in range(9, 9 + 5 * (row + 1))]
    tables = {
        "steps.csv": frame(
            "step,risk,geffect,cosine,objective_norm,risk_norm,risk_value,update_effect",
            [(*pair, draw(), 0.1, 1.0, 1.0, 2.0 + i, "" if pair not in before_last else 0.1) for i, pair in enumerate(pairs)],
        ),
        "layers.csv": frame("step,risk,layer,module,geffect", [(*pair, *m, draw()) for pair in pairs for m in modules]),
        "updates.csv": frame("step,risk,layer,module,update_effect", [(*p, *m, draw()) for p in before_last for m in modules]),
        "instances.csv": frame("step,risk,row,geffect", [(*pair, row, draw()) for pair in pairs for row in rows]),
        "prediction.csv": frame(
            "step,next_step,risk,minus_lr_geffect,update_effect,risk_change",
            [(step, step + 5, risk, draw(), draw(), draw()) for step, risk in before_last],
        ),
        "sweep.csv": frame("step,risk,method,hyper_param,geffect", [(*pair, *m, draw()) for pair in pairs for m in sweep]),
        "tokens.parquet": frame(
            "step,risk,row,position,token_id,token,loss,geffect",
            [(*pair, *at, 7, str(rng.choice(WORDS)), 1.0, draw()) for pair in pairs for at in tokens],
        ),
    }
    return {name: table for name, table in tables.items() if len(table)}


def write(folder: Path, tables: dict[str, pd.DataFrame]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        table.to_parquet(folder / name) if name.endswith("parquet") else table.to_csv(folder / name, index=False)
    return folder


def figures_of(folder: Path, **choice: object) -> dict[str, Figure]:
    tables = {name: plotted.read(folder / name) for name in plotted.TABLES if (folder / name).exists()}
    return figures.make_figures(tables, **choice)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("run") / "geffect", make_tables())


@pytest.fixture(scope="module")
def drawn(folder: Path) -> dict[str, Figure]:
    return figures_of(folder)


def names(files: list[Path]) -> list[str]:
    return list(dict.fromkeys(file.stem for file in files))


def data(line: Line2D, axis: str) -> np.ndarray:
    return np.asarray(line.get_xdata() if axis == "x" else line.get_ydata(), dtype=float)


# ---- numbers ----


@pytest.mark.parametrize(
    ("values", "linear"),
    [
        ([], None),
        ([0.0, 0.0], None),
        ([np.nan, np.inf], None),
        ([3.0], None),
        ([-1.0, 2.0, 99.0], None),
        ([0.0, 0.02, -30.0], 0.01),
        ([1e-9, 1e-9, 1e3], 1e-3),  # six decades at most
        ([np.nan, 5.0, -5000.0], 1.0),
    ],
)
def test_a_scale_is_symlog_only_where_values_span_decades(values: list[float], linear: float | None) -> None:
    found = style.linear_range(values)
    assert found == (None if linear is None else pytest.approx(linear))
    norm = style.colour_norm(values)
    assert isinstance(norm, SymLogNorm) == (linear is not None)
    assert norm.vmin == -norm.vmax  # type: ignore[operator]
    assert norm(0.0) == pytest.approx(0.5)


@pytest.mark.parametrize("decades", range(2, 8))
@pytest.mark.parametrize("per_side", [2, 3, 4])
def test_symlog_ticks_are_few_symmetric_and_in_range(decades: int, per_side: int) -> None:
    ticks = style.symlog_ticks(1e-3, 2 * 10.0 ** (decades - 3), per_side)
    assert ticks == sorted(ticks)
    assert ticks == [-tick for tick in reversed(ticks)]
    assert 3 <= len(ticks) <= 2 * per_side + 1
    assert max(ticks) == pytest.approx(10.0 ** (decades - 3))
    assert min(tick for tick in ticks if tick > 0) >= 0.99e-3


def test_powers_of_ten_are_written_as_text() -> None:
    assert [style.power_text(value) for value in (-1e-12, -1.0, 0.0, 1.0, 10.0, 1e3)] == [
        "\N{MINUS SIGN}10⁻¹²",
        "\N{MINUS SIGN}1",
        "0",
        "1",
        "10¹",
        "10³",
    ]


def test_numbers_beside_an_axis_are_matplotlibs_as_text() -> None:
    with figures.mpl.rc_context(style.STYLE):
        figure = style.new_figure(2)
        for axes, height in zip(figure.subplots(1, 3), (0.5, 3e6, 2e-7), strict=True):
            axes.set(ylim=(-height, height), yticks=[-height, 0, height])
        figure.draw_without_rendering()
        before = [[text.get_text() for text in axes.get_yticklabels()] for axes in figure.axes]
        scales = [axes.yaxis.get_offset_text().get_text() for axes in figure.axes]
        style.lay_out(figure)
        figure.draw_without_rendering()
    after = [[text.get_text() for text in axes.get_yticklabels()] for axes in figure.axes]
    assert [[f"$\\mathdefault{{{text}}}$" for text in texts] for texts in after] == before
    assert [axes.yaxis.get_offset_text().get_text() for axes in figure.axes] == scales
    assert scales[0] == ""
    assert "10" in scales[1]


def test_layers_come_in_the_models_order() -> None:
    shuffled = ["lm_head", "10", "norm", "2", "embed", "other", "0"]
    assert plotted.layer_order(shuffled) == ["embed", "0", "2", "10", "other", "norm", "lm_head"]


def test_a_layer_is_the_sum_of_its_modules(folder: Path) -> None:
    table = plotted.read(folder / "layers.csv")
    grid = plotted.layer_grid(table, "geffect", "retain")
    assert list(grid.index) == ["embed", "0", "1", "2", "norm", "lm_head"]
    assert list(grid.columns) == list(STEPS)
    for layer in grid.index:
        for step in grid.columns:
            here = (table["risk"] == "retain") & (table["layer"] == layer) & (table["step"] == step)
            assert grid.loc[layer, step] == pytest.approx(sum(table.loc[here, "geffect"]))


def test_a_module_that_is_not_finite_makes_its_layer_so(tmp_path: Path) -> None:
    table = make_tables()["layers.csv"]
    table.loc[(table["layer"] == "1") & (table["module"] == "q") & (table["step"] == 5), "geffect"] = -np.inf
    write(tmp_path, {"layers.csv": table})
    grid = plotted.layer_grid(plotted.read(tmp_path / "layers.csv"), "geffect", "unlearn")
    assert grid.isna().sum().sum() == 1
    assert np.isnan(grid.loc["1", 5])


def test_evenly_takes_the_first_and_the_last() -> None:
    assert style.evenly([20, 0, 10], 6) == [0, 10, 20]
    assert style.evenly(range(14), 6) == [0, 3, 5, 8, 10, 13]
    assert style.evenly([7], 6) == [7]


def test_the_rows_drawn_are_those_with_the_largest_share(folder: Path) -> None:
    lines = plotted.token_lines(plotted.read(folder / "tokens.parquet"), None)
    assert set(lines["step"]) == {STEPS[-1]}
    assert set(lines["risk"]) == {"retain"}
    sums = {row: abs(sum(lines.loc[lines["row"] == row, "geffect"])) for row in range(ROWS)}
    assert plotted.largest_rows(lines, 4) == sorted(sums, key=lambda row: -sums[row])[:4]


@pytest.mark.parametrize(
    ("token", "text"),
    [
        (" The", " The"),
        ("x", "x"),
        ("  x", "··x"),
        (" ", "·"),
        ("", "∅"),
        ("a\n", "a↵"),
        (" 北", r" \u5317"),
        ("\x00", r"\x00"),
        ("\u200b", r"\u200b"),
        ("$", "$"),
    ],
)
def test_tokens_are_visible(token: str, text: str) -> None:
    assert visible(token) == text


def test_wrapping_keeps_every_letter_within_the_width() -> None:
    rng = np.random.default_rng(1)
    texts = ["abcdefghijklmnopqrstuvwxyz"[:n] for n in rng.integers(1, 26, size=200)]
    pieces = wrap(texts, 10)
    for i, text in enumerate(texts):
        assert "".join(piece.text for piece in pieces if piece.token == i) == text
    assert max(piece.column + len(piece.text) for piece in pieces) <= 10
    places = [(piece.line, piece.column + k) for piece in pieces for k in range(len(piece.text))]
    assert len(set(places)) == len(places)
    assert places == sorted(places)


def test_numbers_are_abbreviated() -> None:
    assert plotted.abbreviated([3, 1, 2, 9]) == "1-3, 9"
    assert plotted.abbreviated(range(0, 100, 2)) == "0, 2, 4, 6, 8, 10, 12, 14, 16, ..., 96, 98"
    assert plotted.abbreviated([]) == "none"


# ---- figures ----


def test_every_figure_is_drawn(drawn: dict[str, Figure]) -> None:
    assert list(drawn) == ALL


def test_lines_are_the_table(folder: Path, drawn: dict[str, Figure]) -> None:
    table = pd.read_csv(folder / "steps.csv")
    geffect, risk_value, cosine = drawn["steps"].axes
    for axes, value in ((geffect, "geffect"), (risk_value, "risk_value"), (cosine, "cosine")):
        for line, risk in zip(axes.lines, ("unlearn", "retain"), strict=False):
            assert list(data(line, "x")) == list(STEPS)
            np.testing.assert_allclose(data(line, "y"), table.loc[table["risk"] == risk, value])
    assert geffect.get_yscale() == "symlog"
    assert risk_value.get_yscale() == cosine.get_yscale() == "linear"
    assert "nats/token" in geffect.get_ylabel()


def test_the_heat_map_adds_up_to_the_table(folder: Path, drawn: dict[str, Figure]) -> None:
    table = pd.read_csv(folder / "layers.csv")
    for axes, risk in zip(drawn["layers"].axes, ("unlearn", "retain"), strict=False):
        cells = axes.collections[0].get_array()
        assert cells is not None
        assert cells.shape == (BLOCKS + 3, len(STEPS))
        totals = table[table["risk"] == risk].groupby("step")["geffect"].sum()
        np.testing.assert_allclose(cells.sum(axis=0), totals)
        heights = axes.get_yticks()
        assert list(heights) == sorted(heights)
    assert [text.get_text() for text in drawn["layers"].axes[0].get_yticklabels()] == [
        "embed",
        "0",
        "1",
        "2",
        "norm",
        "lm_head",
    ]


def test_points_are_the_rows(folder: Path, drawn: dict[str, Figure]) -> None:
    table = pd.read_csv(folder / "instances.csv", dtype={"row": str})
    panels = [axes for axes in drawn["instances"].axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == [f"step {step}" for step in STEPS]
    for axes, step in zip(panels, STEPS, strict=True):
        here = table[(table["step"] == step) & (table["row"] != "retain")]
        wanted = [here.loc[here["risk"] == risk, "geffect"] for risk in ("unlearn", "retain")]
        points = np.asarray(axes.collections[0].get_offsets())
        np.testing.assert_allclose(points, np.stack(wanted, axis=1))
        assert axes.get_xscale() == "symlog"
        (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
        assert ((points > (left, low)) & (points < (right, high))).all()  # none is cut at the edge


def test_tokens_show_the_rows_asked_for(folder: Path) -> None:
    figure = figures_of(folder, rows=[2, 0], step=5)["tokens"]
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert [text.split(":")[0] for text in texts if text.startswith("row ")] == ["row 2", "row 0"]
    table = pd.read_parquet(folder / "tokens.parquet")
    here = table[(table["step"] == 5) & (table["risk"] == "retain")]
    tokens = [token for row in (2, 0) for token in here.loc[here["row"] == row, "token"]]
    assert [text for text in texts if not text.startswith("row ")] == list(map(visible, tokens))
    assert "step 5" in figure.axes[1].get_xlabel()


def test_prediction_and_measurement_are_the_table(folder: Path, drawn: dict[str, Figure]) -> None:
    table = pd.read_csv(folder / "prediction.csv")
    axes = drawn["prediction"].axes
    for above, below, risk in ((axes[0], axes[2], "unlearn"), (axes[1], axes[3], "retain")):
        here = table[table["risk"] == risk]
        for line, value in zip(above.lines, ("risk_change", "update_effect", "minus_lr_geffect"), strict=False):
            np.testing.assert_allclose(data(line, "y"), here[value])
        np.testing.assert_allclose(
            np.asarray(below.collections[0].get_offsets(), dtype=float), here[["update_effect", "risk_change"]]
        )
        np.testing.assert_array_equal(data(below.lines[0], "x"), data(below.lines[0], "y"))  # the diagonal


def points_of(line: Any) -> list[list[float]]:
    return line.get_xydata().tolist()


def test_every_objective_is_a_point_with_its_name(drawn: dict[str, Figure], folder: Path) -> None:
    [axes] = drawn["objectives"].axes
    last = pd.read_csv(folder / "sweep.csv").query("step == step.max()")
    points = {tuple(point) for line in axes.lines if line.get_marker() not in ("", "None") for point in points_of(line)}
    of_risk = (last[last["risk"] == risk].sort_values(["method", "hyper_param"])["geffect"] for risk in ("unlearn", "retain"))
    assert points == set(zip(*of_risk, strict=True))
    assert {text.get_text() for text in axes.texts} == {"wga 5", "wga 1", "npo 0.5", "idk"}
    texts: list[Any] = list(axes.texts)
    for text in texts:
        method, _, number = text.get_text().partition(" ")
        row = last[
            (last["method"] == method) & (last["hyper_param"].eq(float(number)) if number else last["hyper_param"].isna())
        ]
        assert text.xy == tuple(row.set_index("risk").loc[["unlearn", "retain"], "geffect"])
    upper: Any = axes.patches[0]  # the quarter in which the unlearn risk rises and the retain risk does not
    assert upper.get_x() <= 0
    assert (upper.get_x() + upper.get_width(), upper.get_y()) == (0, 0)
    assert upper.get_height() >= 0


def test_cosines_are_drawn_of_the_objectives_that_have_them(folder: Path, tmp_path: Path) -> None:
    table = pd.read_csv(folder / "sweep.csv")
    assert "objectives_cosines" not in figures_of(folder)
    table["cosine"] = np.where(table["method"] == "wga", np.linspace(-1, 1, len(table)), np.nan)
    [axes] = figures_of(write(tmp_path, {"sweep.csv": table}))["objectives_cosines"].axes
    assert {text.get_text() for text in axes.texts} == {"wga 5", "wga 1"}
    last = table.query("step == step.max() and method == 'wga'").sort_values("hyper_param")
    points = {tuple(point) for line in axes.lines if line.get_marker() not in ("", "None") for point in points_of(line)}
    assert points == set(zip(*(last[last["risk"] == risk]["cosine"] for risk in ("unlearn", "retain")), strict=True))


def test_objectives_over_the_steps(drawn: dict[str, Figure], folder: Path) -> None:
    table = pd.read_csv(folder / "sweep.csv")
    for axes, risk in zip(drawn["objectives_steps"].axes, ("unlearn", "retain"), strict=True):
        shown = [points_of(line) for line in axes.lines if line.get_marker() not in ("", "None")]
        assert sum(map(len, shown)) == len(table[table["risk"] == risk])
        assert {text.get_text() for text in axes.texts} == {"wga 5", "wga 1", "npo 0.5", "idk"}


def test_a_sweep_is_a_line_a_method(drawn: dict[str, Figure]) -> None:
    lines = {str(line.get_label()): line for line in drawn["sweep"].axes[0].lines}
    assert list(data(lines["wga"], "x")) == [1, 5]
    assert {"wga", "npo", "idk (default)"} <= set(lines)
    assert {text.get_text() for text in drawn["sweep"].legends[0].get_texts()} == {"wga", "npo", "idk (default)"}


# ---- files ----


def test_both_files_have_one_layout(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    laid_out: list[Figure] = []
    execute = ConstrainedLayoutEngine.execute

    def count(engine: ConstrainedLayoutEngine, figure: Figure) -> None:
        laid_out.append(figure)
        execute(engine, figure)

    monkeypatch.setattr(ConstrainedLayoutEngine, "execute", count)
    with figures.mpl.rc_context(style.STYLE):
        pdf, _ = style.save(figure := figures_of(folder)["instances"], tmp_path / "it")
    assert laid_out == [figure]
    streams = re.findall(rb"stream\r?\n(.*?)\r?\nendstream", pdf.read_bytes(), re.DOTALL)
    fonts = [data for data in map(zlib.decompress, streams) if data[:4] == b"\0\1\0\0"]
    assert len(fonts) == 2  # upright, and slanted for e_u and e_r


def test_the_command_writes_whole_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert figures.main([str(folder.parent), "--rows", "3,1", "--step", "10"]) == 0  # a run's folder
    out, err = capsys.readouterr()
    assert err == ""
    files = list(map(Path, out.splitlines()))
    assert files == [folder / "figures" / f"{name}.{kind}" for name in ALL for kind in ("pdf", "png")]
    assert sorted((folder / "figures").iterdir()) == sorted(files)  # nothing beside them
    for file in files:
        start, end = (b"%PDF", b"%%EOF\n") if file.suffix == ".pdf" else (b"\x89PNG", b"IEND\xaeB`\x82")
        content = file.read_bytes()
        assert content.startswith(start)
        assert content.endswith(end)


def test_drawing_again_gives_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path, {name: make_tables()[name] for name in ("steps.csv", "layers.csv")})
    first = {file: file.read_bytes() for file in figures.draw(tmp_path)}
    again = figures.draw(tmp_path)
    assert again == list(first)
    assert {file: file.read_bytes() for file in again} == first


def test_a_figure_that_cannot_be_written_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"steps.csv": make_tables()["steps.csv"]})
    before = {file: file.read_bytes() for file in figures.draw(tmp_path)}

    def fail(file: Path, data: bytes) -> None:
        file.write_text("half")
        raise OSError("no room")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="no room"):
        figures.draw(tmp_path)
    assert {file: file.read_bytes() for file in (tmp_path / "figures").iterdir()} == before


def changed(tables: dict[str, pd.DataFrame], value: float, every: int = 1) -> dict[str, pd.DataFrame]:
    """The tables with one value in place of every so many of what was measured."""
    out = {}
    for name, table in tables.items():
        out[name] = table.copy()
        for column in set(plotted.TABLES[name].values) - {"token"}:
            out[name].loc[::every, column] = value
    return out


OF_BOTH_RISKS = ("instances", "objectives", "objectives_steps")


def has_table(name: str, tables: dict[str, pd.DataFrame]) -> bool:
    file = "sweep" if name.startswith("objectives") else name
    there = {f"{file}.csv", f"{file}.parquet"} & set(tables)
    return bool(there) and (name != "objectives_steps" or tables["sweep.csv"]["step"].nunique() > 1)


ODD = {
    "one step": make_tables(steps=(10,)),
    "one risk": make_tables(risks=("retain",)),
    "the other risk": make_tables(risks=("unlearn",)),
    "zeros": changed(make_tables(), 0.0),
    "all NaN": changed(make_tables(), np.nan),
    "all inf": changed(make_tables(), np.inf),
    "some NaN": changed(make_tables(), np.nan, 5),
    "some -inf": changed(make_tables(), -np.inf, 3),
    "huge": changed(make_tables(), 1e76, 7),
    "equal": changed(make_tables(), -2.5),
    "one block": {"layers.csv": make_tables()["layers.csv"].query("layer == '0'")},
}


@pytest.mark.parametrize("tables", ODD.values(), ids=ODD)
def test_odd_tables_are_drawn_without_a_warning(tables: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    write(tmp_path, tables)
    with warnings.catch_warnings(), figures.mpl.rc_context(style.STYLE):
        warnings.simplefilter("error")
        drawn = figures_of(tmp_path)
        for figure in drawn.values():
            figure.draw_without_rendering()
    risks = {risk for table in tables.values() for risk in table["risk"]}
    assert list(drawn) == [name for name in ALL if has_table(name, tables) and (name not in OF_BOTH_RISKS or len(risks) == 2)]


def test_what_is_not_finite_is_said(tmp_path: Path) -> None:
    write(tmp_path, changed(make_tables(), np.nan, 5))
    drawn = figures_of(tmp_path)
    assert any("not finite)" in axes.get_title() for axes in drawn["instances"].axes)
    assert "grey: no finite value" in drawn["layers"].axes[0].get_title()
    assert "not finite" in drawn["steps"].axes[0].get_title()


def test_without_cosines_there_is_no_panel_for_them(tmp_path: Path) -> None:
    table = make_tables()["steps.csv"].assign(cosine="", objective_norm="", risk_norm="")
    assert len(figures_of(write(tmp_path, {"steps.csv": table}))["steps"].axes) == 2


def test_values_within_two_decades_are_drawn_linearly(tmp_path: Path) -> None:
    tables = make_tables()
    table = tables["instances.csv"].assign(geffect=np.random.default_rng(2).uniform(1, 50, len(tables["instances.csv"])))
    layers = tables["layers.csv"].assign(geffect=2.0)
    drawn = figures_of(write(tmp_path, {"instances.csv": table, "layers.csv": layers}))
    assert drawn["instances"].axes[0].get_xscale() == "linear"
    assert type(drawn["layers"].axes[0].collections[0].norm) is Normalize


@pytest.mark.parametrize(("blocks", "steps"), [(2, 1), (80, 60)])
def test_names_of_layers_and_steps_do_not_overlap(blocks: int, steps: int, tmp_path: Path) -> None:
    layers = ["embed", *map(str, range(blocks)), "norm", "lm_head"]
    lines: list[tuple[object, ...]] = [(20 * step, "retain", layer, "w", 1.0) for step in range(steps) for layer in layers]
    write(tmp_path, {"layers.csv": frame("step,risk,layer,module,geffect", lines)})
    with figures.mpl.rc_context(style.STYLE):
        axes = (figure := figures_of(tmp_path)["layers"]).axes[0]
        figure.draw_without_rendering()
        for labels, side in ((axes.get_yticklabels(), "y"), (axes.get_xticklabels(), "x")):
            boxes = [label.get_window_extent() for label in labels]
            ends = [(getattr(box, side + "0"), getattr(box, side + "1")) for box in boxes]
            assert all(end <= start + 2 for (_, end), (start, _) in zip(ends, ends[1:], strict=False))  # two pixels of 100


# ---- errors ----


def test_a_wanted_row_or_step_that_is_not_there(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"row 77 is not in tokens.parquet, which has 0-5$"):
        figures.draw(folder, rows=[1, 77])
    with pytest.raises(ValueError, match=r"step 7 is not in tokens.parquet, which has 0, 5, 10, 15$"):
        figures.draw(folder, step=7)
    write(tmp_path, {"steps.csv": make_tables()["steps.csv"]})
    with pytest.raises(ValueError, match="no tokens.parquet"):
        figures.draw(tmp_path, rows=[1])
    with pytest.raises(ValueError, match="neither tokens.parquet nor sweep.csv"):
        figures.draw(tmp_path, step=5)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("steps.csv", b"", "No columns"),
        ("steps.csv", b"step,risk,geffect\n0,retain,1\n", "lacks the columns cosine, risk_value"),
        ("instances.csv", b"step,risk,row,geffect\n0,retain,1,abc\n", "abc"),
        ("instances.csv", b"step,risk,row,geffect\n0,retain,1,1\n0,reta", "risk='reta'"),
        ("instances.csv", b"step,risk,row,geffect\n0,retain,1,1\n0,retain,1,2\n", "row=1 is in it twice"),
        ("instances.csv", b"step,risk,row,geffect\n0,retain,one,1\n", "neither a number nor 'retain'"),
        ("instances.csv", b"step,risk,row,geffect\n0.5,retain,1,1\n", "step in it is no whole number"),
        ("instances.csv", b"step,risk,row,geffect\n\xff\xfe,retain,1,1\n", "decode"),
        ("tokens.parquet", b"PAR1 torn", "arquet"),
    ],
)
def test_a_broken_table_is_named(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="not a table to draw from") as caught:
        figures.draw(tmp_path)
    assert str(tmp_path / name) in str(caught.value)
    assert said in str(caught.value)
    assert not (tmp_path / "figures").exists()


def test_tables_without_lines_give_no_figure(tmp_path: Path) -> None:
    write(tmp_path, {name: table.iloc[:0] for name, table in make_tables().items()})
    assert figures.draw(tmp_path) == []
    assert figures.draw(write(tmp_path / "some", {"instances.csv": make_tables(risks=("retain",))["instances.csv"]})) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "usage"),
        (["{}/nowhere"], "nowhere: no such folder"),
        (["{}"], "no table of the G-effect"),
        (["{}/geffect", "--rows", "x"], "'x' is not a list of rows"),
        (["{}/geffect", "--rows", "99"], "row 99 is not in tokens.parquet, which has 0-5"),
        (["{}/geffect", "--step", "3"], "step 3 is not in"),
        (["{}/geffect", "--step", "ten"], "invalid int"),
        (["{}/header"], "hold nothing to draw"),
    ],
)
def test_what_a_user_got_wrong_is_one_line(
    words: list[str], said: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "geffect").symlink_to(folder) if len(words) > 1 else None
    write(tmp_path / "header", {"steps.csv": make_tables()["steps.csv"].iloc[:0]})
    assert figures.main([word.format(tmp_path) for word in words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert said in err


def test_the_command_as_typed_writes_nothing_to_stderr(tmp_path: Path) -> None:
    write(tmp_path, {name: make_tables()[name] for name in ("tokens.parquet", "instances.csv")})
    line = [sys.executable, "-m", "unlearn.reporting.figures"]
    done = subprocess.run([*line, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert names(list(map(Path, done.stdout.splitlines()))) == ["instances", "tokens"]
    shown = subprocess.run([*line, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--rows" in shown.stdout
