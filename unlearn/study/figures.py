"""The figures of a study: trajectories, layers, what is foretold, and facts beside the rest."""

from __future__ import annotations

from itertools import cycle

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from pandas import DataFrame, Series

from unlearn.reporting.robustness_figure import places
from unlearn.reporting.style import (
    HEAT,
    PALETTE,
    SHAPES,
    SYMBOLS,
    UNIT,
    WIDE,
    colour_bar,
    evenly,
    fit_scale,
    legend_above,
    new_figure,
    step_axis,
    zero_line,
)
from unlearn.study.rows import n_of

PANELS = {
    "e_u": "$e_u$ ((nats/token)²)",
    "e_r": "$e_r$ ((nats/token)²)",
    "cos_u": "cosine of both (unlearn risk)",
    "cos_r": "cosine of both (retain risk)",
    "forget_ps": "forget PS",
    "retain_ps": "held-out retain PS",
}
FORETOLD = {
    "forget_rise_end": "forget loss\nstill to rise",
    "retain_rise_end": "retain loss\nstill to rise",
    "forget_ps_stopped": "forget PS\nwhere stopped",
    "retain_ps_end": "retain PS\nat the end",
    "price": "price",
}
ATTACKS = {"relearn": "trained again on the forget rows", "quantize": "quantised"}


def trajectories(lines: DataFrame) -> Figure | None:
    """G-effects, cosines and PS over the steps, a line a run, a colour a method; None where there are no G-effects."""
    there = [name for name in PANELS if name in lines and lines[name].notna().any()]
    if "e_u" not in there:
        return None
    figure = new_figure(7.0)
    styles = ((colour, *way) for way in zip(SHAPES, cycle(("-", "--", ":")), strict=False) for colour in PALETTE)
    looks = dict(zip(lines["run"].unique(), cycle(styles), strict=False))
    names = _labels(lines)
    for axes, name in zip(figure.subplots(3, 2).flat, there, strict=False):
        for run, line in lines.groupby("run", sort=False):
            colour, mark, way = looks[run]
            line = line.dropna(subset=[name])
            axes.plot(line["step"], line[name], way, color=colour, marker=mark, markersize=2.5, linewidth=0.9, label=names[run])
        if name.startswith("e_"):
            fit_scale(axes.yaxis, lines[name].dropna())
        if not name.endswith("ps"):
            zero_line(axes)
        step_axis(axes)
        axes.set_ylabel(PANELS[name])
    legend_above(figure, 6)
    return figure


def _labels(lines: DataFrame) -> dict[str, str]:
    """Each run by its method, and where that has several by what differs between those: rate, hyper-parameter, epochs, seed."""
    found = {}
    for method, runs in lines.drop_duplicates("run").groupby("method", sort=False):
        differ = [name for name in ("lr", "hyper", "epochs", "seed") if name in runs and runs[name].nunique(dropna=False) > 1]
        for _, line in runs.iterrows():
            of = [_of_setting(name, line[name]) for name in differ]
            found[line["run"]] = " ".join([method, *(text for text in of if text)])
    return found


def _of_setting(name: str, value: float) -> str:
    """A setting in a label: a rate as it stands, others with their name; empty for the default."""
    return "" if np.isnan(value) else f"{value:g}" if name == "lr" else f"{name} {value:g}"


def layers(table: DataFrame) -> Figure | None:
    """Each layer's share of the last step's |G-effects|, a row a method; None where there are none.

    Args:
        table: columns run, method, risk, layer, step, geffect.
    """
    if not len(table):
        return None
    last = table[table["step"] == table.groupby("run")["step"].transform("max")]
    order = list(dict.fromkeys(table["layer"].astype(str)))
    figure = new_figure(1.6 + 0.17 * last["run"].nunique(), WIDE)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, risk in zip(panels, SYMBOLS, strict=True):
        of_risk = last[last["risk"] == risk]
        grid = of_risk.assign(layer=of_risk["layer"].astype(str)).pivot_table(index="run", columns="layer", values="geffect")
        grid = grid.reindex(index=last["run"].unique(), columns=order)
        share = grid.div(grid.abs().sum(axis=1), axis=0)
        axes.imshow(share, cmap=HEAT, norm=Normalize(-0.25, 0.25), aspect="auto")
        axes.set_title(f"{SYMBOLS[risk]}: each layer's share")
        axes.set_yticks(range(len(grid)), [last[last["run"] == run]["method"].iloc[0] for run in grid.index])
        places = np.unique(np.linspace(0, len(order) - 1, 9).round().astype(int))
        axes.set_xticks(places, [order[place] for place in places], rotation=60)
    colour_bar(figure, Normalize(-0.25, 0.25), "share of the sum of |parts|", across=True, ax=list(panels), shrink=0.4)
    return figure


def seeds(table: DataFrame) -> Figure | None:
    """Forget PS where stopped, retain PS there and price: mean and standard deviation over the seeds, a line a method.

    Args:
        table: one of `rates.over_seeds`.
    """
    if not len(table):
        return None
    table = table.sort_values("forget_ps", ascending=False, kind="stable").reset_index(drop=True)
    figure = new_figure(0.8 + 0.2 * len(table), WIDE)
    panels = figure.subplots(1, 3, sharey=True)
    titles = {"forget_ps": "forget PS where stopped", "retain_ps": "held-out retain PS there", "price": "price (nats/token)"}
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        axes.errorbar(table[name], table.index, xerr=table[f"{name}_sd"], fmt="o", markersize=3, linewidth=0.9, capsize=2)
        axes.set_xlabel(title)
        axes.locator_params(axis="x", nbins=4)
        axes.margins(y=0.5 / len(table))
    panels[0].set_yticks(table.index, [_of_group(line) for _, line in table.iterrows()])
    return figure


def _of_group(line: Series) -> str:
    return f"{line['method']} {line['lr']:g}" + ("" if np.isnan(line["hyper"]) else f", {line['hyper']:g}")


def attacks(table: DataFrame) -> Figure | None:
    """Forget PS of each run, trained again and quantised; dashed the retain model. None where there is neither.

    Args:
        table: columns run, method, model, attack, setting, forget_ps_exact.
    """
    ways = [way for way in ATTACKS if (table["attack"] == way).any()]
    if not ways or "forget_ps_exact" not in table:
        return None
    figure = new_figure(2.6)
    names = _labels(table)
    looks = dict(zip(names, cycle(zip(PALETTE, SHAPES, strict=False)), strict=False))
    for axes, way in zip(figure.subplots(1, len(ways), squeeze=False, sharey=True)[0], ways, strict=True):
        at = places(way, table[table["attack"] == way]["setting"])
        for (run, model), of in table[table["attack"] == way].groupby(["run", "model"], sort=False):
            colour, mark = looks[run]
            unlearned = {"color": colour, "marker": mark, "label": names[run]}
            retain = {"color": "0.3", "linestyle": "--", "label": "retain model"}
            of_model = unlearned if model == "unlearned" else retain
            of = of.assign(place=of["setting"].map(at)).sort_values("place")
            axes.plot(of["place"], of["forget_ps_exact"], markersize=2.5, linewidth=0.9, **of_model)
        axes.set_xticks(list(at.values()), list(at))
        axes.set_title(ATTACKS[way])
    figure.axes[0].set_ylabel("forget PS")
    legend_above(figure, 7)
    return figure


def prediction(table: DataFrame) -> Figure | None:
    """Rank correlations as heat maps, predictor by step, an outcome each; a number is bold where its interval leaves out 0."""
    if not len(table):
        return None
    predictors = list(dict.fromkeys(table["predictor"]))
    figure = new_figure(0.9 + 0.19 * len(predictors))
    panels = figure.subplots(1, len(FORETOLD), sharey=True)
    for axes, (outcome, title) in zip(panels, FORETOLD.items(), strict=True):
        of = table[table["outcome"] == outcome]
        grid = of.pivot(index="predictor", columns="step", values="rho").reindex(predictors)
        axes.imshow(grid, cmap=HEAT, norm=Normalize(-1, 1), aspect="auto")
        for _, line in of.iterrows():
            place = (list(grid.columns).index(line["step"]), predictors.index(line["predictor"]))
            sure = line["low"] > 0 or line["high"] < 0
            colour = "white" if abs(line["rho"]) > 0.6 else "black"
            text = f"{line['rho']:.2f}"
            size = min(6, 24 / grid.shape[1])
            axes.text(*place, text, ha="center", va="center", fontsize=size, weight="bold" if sure else "normal", color=colour)
        axes.set_xticks(range(grid.shape[1]), [str(step) for step in grid.columns])
        axes.set(title=title, xlabel="step")
        axes.set_yticks(range(len(predictors)), predictors)
    return figure


def words(table: DataFrame) -> Figure | None:
    """|token e_u| and |token e_r| of facts, own words and the rest, as boxes, a panel a step."""
    steps = sorted(table["step"].unique())
    figure = new_figure(1.3 + 1.5 * len(steps))
    for row, step in zip(np.atleast_2d(figure.subplots(len(steps), 2, squeeze=False)), steps, strict=True):
        for axes, name in zip(row, ("e_u", "e_r"), strict=True):
            at = table[table["step"] == step]
            kinds = list(dict.fromkeys(table["kind"]))
            values = [at[at["kind"] == kind][name].abs().replace(0, np.nan).dropna() for kind in kinds]
            axes.boxplot(values, tick_labels=kinds, orientation="horizontal", showfliers=False, widths=0.6)
            axes.set_xscale("log")
            axes.set(title=f"step {step}", xlabel=f"|{SYMBOLS['unlearn' if name == 'e_u' else 'retain']}| of a token")
    return figure


def rows(table: DataFrame) -> Figure:
    """Each row's e_r beside its loss, a panel a step, four at most; a cross for the tenth that hurts most.

    Args:
        table: one of `rows.of_rows`.
    """
    steps = evenly(table["step"].unique(), 4)
    figure = new_figure(2.4)
    for axes, step in zip(figure.subplots(1, len(steps), squeeze=False)[0], steps, strict=True):
        at = table[table["step"] == step].sort_values("e_r")
        most = (np.arange(len(at)) < n_of(0.1, len(at))) & (at["e_r"] < 0).to_numpy()
        looks = (("o", PALETTE[0], "a row to forget"), ("X", PALETTE[1], "the tenth that hurts most"))
        for part, (mark, colour, name) in zip((at[~most], at[most]), looks, strict=True):
            axes.plot(part["loss"], part["e_r"], mark, color=colour, markersize=3, linestyle="none", label=name)
        fit_scale(axes.yaxis, at["e_r"])
        axes.set(title=f"step {step}", xlabel="loss (nats/token)")
        axes.locator_params(axis="x", nbins=3)
        zero_line(axes)
    figure.axes[0].set_ylabel(f"{SYMBOLS['retain']} of a row {UNIT}")
    legend_above(figure, 2)
    return figure
