"""A sweep's summary: one table and one figure of all its jobs, those that failed included.

Each job notes how it ended in `<sweep>/jobs/<number>.json`; what it left in its run's folder (losses, G-effects, scores) is
read from there whenever the summary is made, so a run that is measured later has its numbers in the next one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from unlearn.io.files import write_whole
from unlearn.reporting import style

DONE = "done"
FORGET, RETAIN = "forget_loss_end", "retain_loss_end"


def summarise(sweep: Path) -> pd.DataFrame:
    """Write `summary.csv`, a line a job in their order, and draw it; returns the table, empty where no job has begun."""
    files = sorted((sweep / "jobs").glob("*.json"), key=lambda file: int(file.stem))
    table = pd.DataFrame([line_of(int(file.stem), json.loads(file.read_text())) for file in files])
    if len(table):
        write_whole(sweep / "summary.csv", table.to_csv(index=False, lineterminator="\n"))
        if (figure := draw(table)) is not None:
            style.save(figure, sweep / "summary")
    return table


def line_of(number: int, record: Mapping[str, Any]) -> dict[str, Any]:
    """A job's line: its settings, how it ended, and the numbers of its run."""
    settings = dict(setting.split("=", 1) for setting in record["settings"] if "=" in setting)
    line = {"job": number} | settings | {name: record[name] for name in ("status", "folder", "error")}
    if record["status"] == DONE and record["folder"] is not None:
        try:
            line |= numbers_of(Path(record["folder"]))
        except (ValueError, KeyError, IndexError, TypeError) as error:  # a table that something else has written over
            line["error"] = f"its numbers are not readable ({error!r})"
    return line


def numbers_of(run: Path) -> dict[str, Any]:
    """What a run's folder says: losses at its start and end, G-effects first and last, the scores of its last step."""
    found: dict[str, Any] = {}
    losses = run / "logs" / "losses.json"
    if losses.exists():
        for name, value in json.loads(losses.read_text()).items():
            found |= {f"{name}_loss_{when}": value[when] for when in value} if isinstance(value, dict) else {name: value}
    steps = run / "geffect" / "steps.csv"
    if steps.exists():
        for risk, table in pd.read_csv(steps).groupby("risk", sort=False):
            for when, row in (("first", table.iloc[0]), ("last", table.iloc[-1])):
                found |= {f"geffect_{risk}_{when}": row["geffect"], f"cosine_{risk}_{when}": row["cosine"]}
    scores = run / "scores.csv"
    if scores.exists():
        last = pd.read_csv(scores).iloc[-1].drop("step").dropna()
        found |= {name: value for name, value in last.items() if not isinstance(value, str)}
    return found


def draw(table: pd.DataFrame) -> Figure | None:
    """Each finished job's forget loss against its retain loss, in the colour of its method; None where there are none."""
    if not {FORGET, RETAIN} <= set(table.columns):
        return None
    points = table[table["status"] == DONE].dropna(subset=[FORGET, RETAIN])
    method = points["method"] if "method" in points else pd.Series("", index=points.index)
    figure = style.new_figure(3.0, style.WIDE / 2 + 1)
    axes = figure.subplots()
    for i, (name, group) in enumerate(points.groupby(method, sort=False)):
        axes.scatter(group[RETAIN], group[FORGET], s=24, color=f"C{i}", label=str(name) or None, zorder=2)
        for _, row in group.iterrows():
            axes.annotate(str(row["job"]), (row[RETAIN], row[FORGET]), xytext=(3, 3), textcoords="offset points", fontsize=6)
    for axis, values in ((axes.xaxis, points[RETAIN]), (axes.yaxis, points[FORGET])):
        style.fit_scale(axis, values.to_numpy())
    axes.set(xlabel="held-out retain loss after (nats/token)", ylabel="forget loss after (nats/token)")
    if method.any():
        axes.legend(frameon=False, fontsize=7, loc="best")
    return figure


def told(table: pd.DataFrame) -> list[str]:
    """What to say of the jobs that did not end well."""
    bad = table[table["status"] != DONE] if len(table) else table
    return [f"job {row['job']} {row['status']}: {row['error']}".rstrip(": ") for _, row in bad.iterrows()]
