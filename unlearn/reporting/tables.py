"""The tables of a G-effect folder as figures need them: read, checked, and cut to what is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from pandas import DataFrame


class Columns(NamedTuple):
    """What a table needs to have: `keys` name a line of it (no two lines share them), `values` are what was measured."""

    keys: tuple[str, ...]
    values: tuple[str, ...]
    texts: tuple[str, ...] = ("risk", "layer", "module", "method", "token")  # the others are numbers
    optional: tuple[str, ...] = ()  # values that a table may lack


TABLES = {
    "steps.csv": Columns(("step", "risk"), ("geffect", "cosine", "risk_value"), optional=("rule_geffect", "objective_norm")),
    "layers.csv": Columns(("step", "risk", "layer", "module"), ("geffect",)),
    "updates.csv": Columns(("step", "risk", "layer", "module"), ("update_effect",)),
    "instances.csv": Columns(("step", "risk", "row"), ("geffect",), ("risk", "row")),
    "tokens.parquet": Columns(("step", "risk", "row", "position"), ("token", "loss", "geffect")),
    "monitor.csv": Columns(("step", "risk"), ("gradient", "update"), optional=("cosine",)),
    "prediction.csv": Columns(("step", "risk"), ("minus_lr_geffect", "update_effect", "risk_change")),
    "sweep.csv": Columns(("step", "risk", "method", "hyper_param"), ("geffect",), optional=("cosine",)),
}


WHOLE = {"step", "row", "position"}  # whole numbers, unless the table has them as text


RISKS = {"unlearn": "unlearn risk (forget rows)", "retain": "retain risk (held-out rows)"}


def tables_folder(folder: Path) -> Path:
    """The folder that holds the tables: this one, or `geffect/` in it. Raises ValueError where neither does."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    for place in (folder, folder / "geffect"):
        if any((place / name).exists() for name in TABLES):
            return place
    raise ValueError(f"{folder}: no table of the G-effect there, nor in its geffect/; looked for {', '.join(TABLES)}")


def read(file: Path) -> DataFrame:
    """A table with its numbers as numbers, NaN where a value is empty or not finite.

    Raises:
        ValueError: it is not readable, lacks a column, or holds what it cannot hold.
    """
    if (columns := TABLES.get(file.name)) is None:
        raise ValueError(f"{file}: is not called as a table of the G-effect is: {', '.join(TABLES)}")
    wanted = list(dict.fromkeys(columns.keys + columns.values))
    try:
        table = pd.read_parquet(file) if file.suffix == ".parquet" else pd.read_csv(file, dtype=str, keep_default_na=False)
        if lacking := [name for name in wanted if name not in table.columns]:
            raise ValueError(f"it lacks the columns {', '.join(lacking)}")
        if file.name == "tokens.parquet":
            table = table.dropna(subset=["row"])  # what the retain rows add is no text of a forget row
        wanted += [name for name in columns.optional if name in table.columns]
        return checked(table[wanted].copy(), columns)
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"{file}: not a table to draw from ({' '.join(str(error).split())})") from error


def checked(table: DataFrame, columns: Columns) -> DataFrame:
    """The table with its numbers as numbers. Raises ValueError for a value that cannot be, and for a line given twice."""
    for name in table.columns:
        if name in columns.texts:
            table[name] = table[name].fillna("").astype(str)
            continue
        numbers = pd.to_numeric(table[name]).astype(float)
        table[name] = numbers.where(np.isfinite(numbers))
        if name in WHOLE:
            if not (table[name] % 1 == 0).all():
                raise ValueError(f"a {name} in it is no whole number")
            table[name] = table[name].astype(int)
    if strange := sorted(set(table["risk"]) - set(RISKS)):
        raise ValueError(f"risk={strange[0]!r} in it is neither of {', '.join(RISKS)}")
    if "row" in columns.texts and not table["row"].str.fullmatch("retain|[0-9]+").all():
        raise ValueError("a row in it is neither a number nor 'retain'")
    if (twice := table.duplicated(list(columns.keys))).any():
        line = table.loc[twice, list(columns.keys)].iloc[0]
        raise ValueError(f"{', '.join(f'{key}={value}' for key, value in line.items())} is in it twice")
    return table


def check_choice(tables: dict[str, DataFrame], rows: Sequence[int] | None, step: int | None) -> None:
    """Raises ValueError where the tokens or the sweep lack the wanted step, or the tokens lack a wanted row."""
    for name in ("tokens.parquet", "sweep.csv"):
        if step is not None and name in tables and step not in set(tables[name]["step"]):
            raise ValueError(f"step {step} is not in {name}, which has {abbreviated(tables[name]['step'])}")
    if step is not None and not {"tokens.parquet", "sweep.csv"} & set(tables):
        raise ValueError(f"step {step} is wanted, but there is neither tokens.parquet nor sweep.csv to draw it from")
    if rows is None:
        return
    if "tokens.parquet" not in tables:
        raise ValueError(f"the tokens of rows {abbreviated(rows)} are wanted, but there is no tokens.parquet")
    there = token_lines(tables["tokens.parquet"], step)["row"]
    if strange := sorted(set(rows) - set(there)):
        raise ValueError(f"row {strange[0]} is not in tokens.parquet, which has {abbreviated(there)}")


def abbreviated(numbers: Iterable[int]) -> str:
    """The numbers in order, ranges as 0-19, and of many the first and the last ones."""
    ranges: list[list[int]] = []
    for number in sorted(map(int, set(numbers))):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    texts = [f"{first}-{last}" if last > first else f"{first}" for first, last in ranges]
    return ", ".join(texts if len(texts) <= 12 else [*texts[:9], "...", *texts[-2:]]) or "none"


def risks_of(table: DataFrame) -> list[str]:
    """The risks that the table has, the one to forget first."""
    return [risk for risk in RISKS if len(table) and (table["risk"] == risk).any()]


def by_risk(table: DataFrame, value: str, index: str) -> DataFrame:
    """One line for each `index` (in order), one column for each risk; NaN where there is no value."""
    return table.pivot(index=index, columns="risk", values=value).reindex(columns=risks_of(table))


def at_step(table: DataFrame, step: int | None) -> DataFrame:
    """The table's lines of one step, the last where it is None."""
    return table[table["step"] == (table["step"].max() if step is None else step)]


def token_lines(table: DataFrame, step: int | None) -> DataFrame:
    """The tokens' shares of e_r at one step; of e_u where there is no e_r."""
    lines = at_step(table, step)
    return lines[lines["risk"] == (risks_of(lines) or [""])[-1]]


def layer_order(layers: Iterable[str]) -> list[str]:
    """Layers as the model runs them: embed, blocks by number, norm, lm_head; a name unknown here before the last two."""

    def place(layer: str) -> tuple[int, int, str]:
        if layer.isdecimal():
            return 1, int(layer), layer
        return {"embed": 0, "norm": 3, "lm_head": 4}.get(layer, 2), 0, layer

    return sorted(set(layers), key=place)


def layer_grid(table: DataFrame, value: str, risk: str) -> DataFrame:
    """(layers in order, steps) sums over each layer's modules, NaN where one of them is not finite, or there is none."""
    lines = table[table["risk"] == risk].fillna({value: inf})  # a sum would pass over NaN
    grid = lines.groupby(["layer", "step"])[value].sum().unstack("step")
    order = layer_order(table["layer"])
    return grid.reindex(index=order, columns=sorted(table["step"].unique())).replace([inf, -inf], np.nan)


def instance_points(table: DataFrame, step: int) -> DataFrame:
    """(rows, 2) e_u and e_r of each forget row at a step; what the retain term adds is no row."""
    lines = table[(table["step"] == step) & (table["row"] != "retain")]
    points = by_risk(lines, "geffect", "row")
    return points.sort_index(key=lambda rows: rows.astype(int))


def largest_rows(table: DataFrame, most: int) -> list[int]:
    """The rows whose tokens add up to the largest |e|, the largest first; what is not finite counts as nothing."""
    shares = table.groupby("row")["geffect"].sum().abs()
    return [int(row) for row in shares.sort_values(ascending=False, kind="stable").index[:most]]
