"""Runs as one table: a line a run and scored step, with its G-effects, its scores, and what a training log has anyway."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import pandas as pd
from pandas import DataFrame

from unlearn.io.rows import read_jsonl
from unlearn.reporting import report_tables
from unlearn.reporting.report_tables import Run
from unlearn.reporting.tables import read

OF_STUDY = {"model_family": "family", "data": "data", "precision": "precision"}  # the same of all runs of a study
SETTINGS = OF_STUDY | {"lr": "lr", "hyper_param": "hyper", "num_epochs": "epochs", "seed": "seed"}
RUN = ["run", "method", *SETTINGS.values()]
SCORES = {
    "forget_loss": "forget_loss",
    "retain_loss": "retain_loss",
    "forget_ps_exact": "forget_ps",
    "retain_ps_exact": "retain_ps",
}
OF_RISK = {"geffect": "e", "cosine": "cos"}
SHORT = {"unlearn": "u", "retain": "r"}


def named(runs: Sequence[Run]) -> list[Run]:
    """The runs, called after method, lr, hyper-parameter, epochs and seed, whatever other runs are beside them.

    Raises:
        ValueError: two are called the same.
    """
    names = [name_of(run) for run in runs]
    for i, name in enumerate(names):
        if (first := names.index(name)) < i:
            others = "a study tells runs apart by method, lr, hyper_param, num_epochs and seed"
            raise ValueError(f"{runs[first].folder} and {runs[i].folder}: both are {name!r}; {others}")
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def name_of(run: Run) -> str:
    of = {name: run.record.get(key) for key, name in SETTINGS.items() if key not in OF_STUDY}
    return ", ".join([run.method or run.name, *(f"{name}={value}" for name, value in of.items() if value is not None)])


def data_of(run: Run) -> str | None:
    """The files of one's own rows, else the split."""
    files = [str(file) for key in ("forget_data", "retain_data") if (file := run.record.get(key)) is not None]
    return "+".join(files) or run.record.get("split")


def check_alike(lines: DataFrame) -> None:
    """Raises ValueError where a table of lines has runs of several families, data or precisions."""
    for name in (name for name in OF_STUDY.values() if name in lines):
        if len(several := sorted(map(str, lines[name].dropna().unique()))) > 1:
            raise ValueError(f"runs of {' and '.join(several)}: a study has one {name}; give another --out for the others")


def lines_of(runs: Iterable[Run]) -> DataFrame:
    """The table of these runs.

    Columns:
        run, method, lr, hyper, epochs, seed: the run (hyper NaN: the method's default).
        family, data, precision: what is the same of all runs of a study (data: the split, or the files of one's own).
        step: at which `eval.every` has scored it.
        forget_loss, retain_loss (nats a token), forget_ps, retain_ps: the scores there.
        e_u, e_r, cos_u, cos_r, norm: the G-effects there, their cosines, and the norm of the objective's gradient.
        update_u, update_r: sum over the steps before of < theta' - theta, V >, V of the last measurement (`geffect.monitor`).
        batch_u, batch_r: mean over the steps before of the cosine of the step's own gradient and V.
        lr_norm: sum over the steps before of learning rate times gradient norm. loss: the last of those steps' training loss.
        NaN where a run lacks the table, or a score is not finite.

    Raises:
        ValueError: none of the runs has scores, or a table is not readable.
    """
    tables = [found for run in runs if (found := of_run(run)) is not None]
    if not tables:
        raise ValueError("none of the runs has a scores.csv with PS of several steps; eval.every=5 of forget.py writes it")
    return pd.concat(tables, ignore_index=True)


def of_run(run: Run) -> DataFrame | None:
    """A run's lines; None where it has no scores."""
    scores = report_tables.scores([run])
    if scores is None or not set(SCORES) <= set(scores):
        return None
    table = scores.rename(columns=SCORES)[["step", *SCORES.values()]].dropna(subset=list(SCORES.values()), how="all")
    for found in (effects(run), monitored(run, table["step"]), logged(run, table["step"])):
        if found is not None:
            table = table.merge(found, on="step", how="left")
    settings = {name: run.record.get(key) for key, name in SETTINGS.items()} | {"data": data_of(run)}
    line = {"run": run.name, "method": run.method or run.name} | settings
    for place, name in enumerate(RUN):
        table.insert(place, name, line[name])
    return table


def effects(run: Run) -> DataFrame | None:
    """Columns step, e_u, e_r, cos_u, cos_r, norm."""
    if (file := run.geffect("steps.csv")) is None:
        return None
    table = read(file)
    found = table[["step"]].drop_duplicates()
    for risk, letter in SHORT.items():
        of_risk = table[table["risk"] == risk].rename(columns={name: f"{short}_{letter}" for name, short in OF_RISK.items()})
        columns = ["step", *(f"{short}_{letter}" for short in OF_RISK.values())]
        if risk == "unlearn" and "objective_norm" in table:
            columns.append("objective_norm")
        found = found.merge(of_risk[columns], on="step", how="left")
    return found.rename(columns={"objective_norm": "norm"})


def monitored(run: Run, steps: Sequence[int]) -> DataFrame | None:
    """Columns step, update_u, update_r, batch_u, batch_r at these steps, of the lines before each."""
    if (file := run.geffect("monitor.csv")) is None:
        return None
    table = read(file)
    lines = []
    for step in steps:
        before = table[table["step"] < step].groupby("risk")
        updates = before["update"].sum()
        line = {f"update_{letter}": updates.get(risk, 0.0) for risk, letter in SHORT.items()}
        if "cosine" in table:
            cosines = before["cosine"].mean()
            line |= {f"batch_{letter}": cosines.get(risk) for risk, letter in SHORT.items()}
        lines.append({"step": step} | line)
    return DataFrame(lines).astype(float).astype({"step": int})


def logged(run: Run, steps: Sequence[int]) -> DataFrame | None:
    """Columns step, lr_norm, loss at these steps, of the training log's lines up to each."""
    if not (file := run.folder / "logs" / "train.jsonl").exists():
        return None
    log = DataFrame(read_jsonl(file))
    if not {"step", "learning_rate", "grad_norm", "loss"} <= set(log):
        return None
    moved = (log["learning_rate"] * log["grad_norm"]).where(log["step"].notna(), 0.0)
    lines = []
    for step in steps:
        before = log["step"] <= step
        last = log.loc[before, "loss"]
        lines.append({"step": step, "lr_norm": moved[before].sum(), "loss": last.iloc[-1] if len(last) else None})
    return DataFrame(lines).astype(float).astype({"step": int})
