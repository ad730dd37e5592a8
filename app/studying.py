"""From runs' folders to the tables of a study: lines of runs, rates, predictions, words; each written with its figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure
from pandas import DataFrame

from app.data import set_with_perturbed
from app.reporting import data_in, find_runs, record_in
from unlearn.io.files import write_whole
from unlearn.reporting import report_tables, style
from unlearn.reporting.report_tables import Run
from unlearn.study import claims, figures, ordering, prediction, rates, rows, words
from unlearn.study.runs import RUN, check_alike, lines_of, named

WEIGHTED = ("wga", "tnpo", "satimp")  # whose weights of tokens are compared with their G-effects
DIGITS = "%.6g"
TEXTS = {"layer": str, "setting": str}  # columns that may look like numbers


def write_table(out: Path, name: str, table: DataFrame) -> DataFrame:
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / f"{name}.csv", table.to_csv(index=False, lineterminator="\n", float_format=DIGITS))
    print(out / f"{name}.csv")
    return table


def beside(out: Path, name: str, runs: Sequence[Run], table: DataFrame | None) -> DataFrame:
    """These runs' lines and those of other runs that the table in `out` has, by run; nothing where there is neither."""
    table = DataFrame(columns=["run"]) if table is None else table
    if (file := out / f"{name}.csv").exists():
        there = pd.read_csv(file, dtype=TEXTS)
        given = there["run"].isin([run.name for run in runs])
        for run in there["run"][given].unique():
            print(f"{file}: {run}: in place of what was there")
        others = there[~given]
        table = pd.concat([others, table], ignore_index=True) if len(table) else others
    return table.sort_values("run", kind="stable")


def put(out: Path, name: str, table: DataFrame) -> DataFrame:
    """The table, written and read back, so that what is made of it does not depend on which runs were added when."""
    if not len(table):
        for suffix in (".csv", ".png", ".pdf"):  # of runs that have come again without it
            (out / f"{name}{suffix}").unlink(missing_ok=True)
        return table
    write_table(out, name, table)
    return pd.read_csv(out / f"{name}.csv", dtype=TEXTS)


def add_to(out: Path, name: str, runs: Sequence[Run], table: DataFrame | None) -> DataFrame:
    return put(out, name, beside(out, name, runs, table))


def draw(out: Path, name: str, drawing: Callable[[DataFrame], Figure | None], table: DataFrame) -> None:
    with mpl.rc_context(style.STYLE):
        if (figure := drawing(table)) is not None:
            print(style.save(figure, out / name)[-1])


def read_table(folder: Path, name: str) -> DataFrame:
    """A table that `study.py runs` has written. Raises ValueError where it has not."""
    file = folder / f"{name}.csv"
    if not file.exists():
        raise ValueError(f"{file}: no such file; `study.py runs RUN ... --out {folder}` writes it")
    return pd.read_csv(file)


def runs(folders: Sequence[str], out: Path) -> None:
    """Tables of these runs and those that `out` has; trajectories of each method's best, of those with G-effects.

    Raises:
        ValueError: a folder is no run's, two runs differ in nothing that a study tells apart, or all are not of one family,
            data and precision.
    """
    found = named(find_runs(folders))
    of_found = lines_of(found)
    for run in found:
        if run.name not in set(of_found["run"]):
            print(f"{run.folder}: no scores.csv with losses and PS of the forget and the held-out rows: it has no lines")
    lines = beside(out, "lines", found, of_found)
    check_alike(lines)
    lines = put(out, "lines", lines)
    stopped = write_table(out, "rates", rates.stopped(lines))
    draw(out, "seeds", figures.seeds, write_table(out, "seeds", rates.over_seeds(stopped, fewest=2)))
    write_claims(found, out, lines)
    draw_geffects(found, out, lines, stopped)
    add_to(out, "fair", found, report_tables.control(found)[1])
    if len(attacks := add_to(out, "attacks", found, report_tables.attacks(found))):
        draw(out, "attacks", figures.attacks, lines[RUN].drop_duplicates().merge(attacks, on="run"))


def write_claims(found: Sequence[Run], out: Path, lines: DataFrame) -> None:
    if "e_u" in lines:
        write_table(out, "together", claims.together(lines))
    if len(foretold := add_to(out, "foretold", found, report_tables.geffects(found, "prediction.csv"))):
        write_table(out, "one_step", claims.one_step(foretold))


def draw_geffects(found: Sequence[Run], out: Path, lines: DataFrame, stopped: DataFrame) -> None:
    """Trajectories and layers of each method's best run, of those whose G-effects were measured."""
    measured = lines.dropna(subset=["e_u"])["run"] if "e_u" in lines else lines["run"]
    kept = lines[lines["run"].isin(rates.best(stopped[stopped["run"].isin(measured)])["run"])]
    draw(out, "trajectories", figures.trajectories, kept)
    if len(layers := add_to(out, "layers", found, report_tables.layers(found))):
        write_table(out, "depth", claims.by_depth(layers))
        draw(out, "layers", figures.layers, layers.merge(kept[["run", "method"]].drop_duplicates(), on="run"))


def predict(out: Path) -> None:
    """prediction.csv: rank correlations of what is known at each step with what comes, of all runs and of each rate's."""
    lines = read_table(out, "lines")
    known = prediction.table(lines, rates.stopped(lines))
    table = write_table(out, "prediction", prediction.by_rate(known))
    draw(out, "prediction", figures.prediction, table[table["lr"] == "all"])


def order(sweeps: Sequence[str], out: Path) -> None:
    """order.csv: do the points of sweeps, of one step or more each, stand in the order of the runs that followed them?"""
    points = pd.concat([report_tables.read(Path(sweep)) for sweep in sweeps], ignore_index=True)
    stopped = rates.stopped(read_table(out, "lines"))
    write_table(out, "order_points", ordering.beside(points, stopped))
    write_table(out, "order", ordering.compared(points, stopped))


def tell_words(folders: Sequence[str], out: Path) -> None:
    """words.csv: how well |e_u|, |e_r| of tokens, and objectives' weights, tell facts from the rest.

    Args:
        folders: of one run's G-effects at one step or more each.

    Raises:
        ValueError: that of `tokens_of`, or the run's rows have no wrong answers.
    """
    found = find_runs(folders)
    table = with_weights(with_kinds(found[0], tokens_of(found)))
    columns = [name for name in ("e_u", "e_r", "loss", *WEIGHTED) if name in table]
    write_table(out, "words", words.told_apart(table, columns))
    draw(out, "words", figures.words, table)


def tell_rows(folders: Sequence[str], out: Path) -> None:
    """rows.csv, shares.csv, alike.csv: which rows hurt what is to be kept at each step, how unevenly, what goes with it.

    Args:
        folders: of one run's G-effects at one step or more each.

    Raises:
        ValueError: that of `tokens_of`.
    """
    found = find_runs(folders)
    table = rows.of_rows(tokens_of(found))
    if (texts := found[0].texts) is not None:
        table = table.assign(question=[texts[row][0] for row in table["row"]])
    write_table(out, "rows", table)
    write_table(out, "shares", rows.shares(table))
    write_table(out, "alike", rows.alike(table))
    draw(out, "rows", figures.rows, table)


def tokens_of(runs: Sequence[Run]) -> DataFrame:
    """Columns step, row, position, token, loss, e_u, e_r, of one run's folders.

    Raises:
        ValueError: a folder has no tokens.parquet, two have the same step, or they are of several methods.
    """
    of_step: dict[int, Run] = {}
    found = []
    if len(methods := sorted({run.method for run in runs if run.method is not None})) > 1:
        raise ValueError(f"folders of {' and '.join(methods)}: give those of one run")
    for run in runs:
        if (file := run.geffect("tokens.parquet")) is None:
            raise ValueError(f"{run.folder}: no tokens.parquet; tokens=true of compute_geffect.py writes it")
        table = report_tables.shares(report_tables.read(file)).rename(columns={"unlearn": "e_u", "retain": "e_r"})
        for step in map(int, table["step"].unique()):
            if step in of_step:
                raise ValueError(f"{of_step[step].folder} and {run.folder}: both have step {step}; give each step once")
            of_step[step] = run
        found.append(table)
    return pd.concat(found, ignore_index=True)


def with_kinds(run: Run, table: DataFrame) -> DataFrame:
    """The tokens with their `kind`. Raises ValueError where the run's rows have no wrong answers."""
    settings = record_in(run.folder)["settings"]
    data, split = data_in(settings), settings["split"]
    rows = [row for name in data.benchmark.unlearn[split].forget for row in data.rows(name)]
    beside = set_with_perturbed(data, split, "forget", rows)
    if not all({"perturbed_answer", "paraphrased_answer"} <= row.keys() for row in beside):
        rows_of = settings.get("forget_data") or split
        raise ValueError(
            f"{run.folder}: the rows of {rows_of} have no perturbed and paraphrased answers, which tell facts apart"
        )
    found = []
    for (_, row), tokens in table.groupby(["step", "row"], sort=False):
        tokens = tokens.sort_values("position")
        of = beside[int(row)]
        kinds = words.kinds(list(tokens["token"]), of["question"], of["paraphrased_answer"], of["perturbed_answer"])
        found.append(tokens.assign(kind=kinds))
    return pd.concat(found, ignore_index=True)


def with_weights(table: DataFrame) -> DataFrame:
    """The tokens with each objective's weight, -M times the derivative by the token's loss.

    Left out where step 0, whose losses are the reference's, is not among them: those that look at the reference.
    """
    import torch
    from hydra.utils import instantiate

    from app.compose import group
    from unlearn.objectives.needs import needs_of
    from unlearn.objectives.tokens import Counts, Tokens

    first = table[table["step"] == 0][["row", "position", "loss"]].rename(columns={"loss": "ref"})
    table = table.merge(first, on=["row", "position"], how="left")
    loss, ref = (torch.tensor(table[name].to_numpy(), dtype=torch.float64) for name in ("loss", "ref"))
    for name in WEIGHTED:
        objective = instantiate(group("method", name)["objective"])
        if "ref_nll" in needs_of(objective) and not len(first):
            continue
        nll = loss.clone().requires_grad_()
        tokens = Tokens(nll=nll, row=torch.zeros(len(loss), dtype=torch.long), n_rows=1, logits=None, ref_nll=ref)  # type: ignore[arg-type]
        (gradient,) = torch.autograd.grad(objective(tokens, Counts(tokens=len(loss), rows=1)), nll)
        table[name] = (-len(loss) * gradient).numpy()
    return table
