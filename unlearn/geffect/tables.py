"""The tables of a G-effect folder: read, added to step by step, and written whole.

`steps.csv` is written last: a step that stands there stands in the others. A killed run's next start measures the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from accelerate import PartialState

from unlearn.geffect.parts import foretelling
from unlearn.io.files import write_whole, written_beside

Tables = dict[str, pd.DataFrame]
NAMES = ("steps", "layers", "updates", "instances", "prediction", "tokens", "positions", "sweep")
PARQUET = ("tokens", "positions")


class TableFolder:
    """The tables of a folder, the same in every process; the main one writes.

    Attributes:
        tables: by name, each with the column `step` first.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = {name: file_of(folder, name) for name in NAMES}
        self.tables: Tables = {name: read(file) for name, file in files.items() if file.exists()}
        PartialState().wait_for_everyone()  # all have read before one writes

    def steps(self, name: str = "steps") -> set[int]:
        """Which steps the table has."""
        return set(self.tables[name]["step"]) if name in self.tables else set()

    def has(
        self, step: int, names: Sequence[str], sweep: Sequence[tuple[str, float | None]] = (), sweep_norms: bool = False
    ) -> bool:
        """Whether the step stands in all these tables, with all of this sweep (and the norms of its gradients)."""
        if not all(step in self.steps(name) for name in ("steps", *names)):
            return False
        if not sweep:
            return True
        if step not in self.steps("sweep"):
            return False
        table = self.tables["sweep"]
        there = table[table["step"] == step]
        if sweep_norms:
            there = there[there["objective_norm"].notna()] if "objective_norm" in there else there[:0]
        return set(sweep) <= {
            (m, None if pd.isna(h) else h) for m, h in zip(there["method"], there["hyper_param"], strict=True)
        }

    def put(self, step: int, tables: Mapping[str, pd.DataFrame]) -> None:
        """Add a step's rows, in place of those it had, and write the tables, `steps` last."""
        for name in sorted(tables, key=lambda name: name == "steps"):
            rows = tables[name].copy()
            rows.insert(0, "step", step)
            self.replace(name, pd.concat([*self._others(name, step, rows), rows], ignore_index=True))

    def _others(self, name: str, step: int, rows: pd.DataFrame) -> list[pd.DataFrame]:
        """The rows that stay: of other steps, and of a sweep's other objectives."""
        if name not in self.tables:
            return []
        table = self.tables[name]
        stay = table["step"] != step
        if name == "sweep":
            new = pd.MultiIndex.from_frame(rows[["method", "hyper_param"]])
            stay |= ~pd.MultiIndex.from_frame(table[["method", "hyper_param"]]).isin(new)
        return [table[stay]] if stay.any() else []

    def keep(self, last: int) -> None:
        """Forget the steps after `last`: tables of no other steps go, the others are written over when the next is measured."""
        there = list(self.tables)
        self.tables = {name: table[table["step"] <= last] for name, table in self.tables.items() if table["step"].min() <= last}
        if PartialState().is_main_process:
            for name in sorted(set(there) - set(self.tables), key=lambda name: name != "steps"):
                file_of(self.folder, name).unlink()

    def replace(self, name: str, table: pd.DataFrame) -> None:
        """Make this the table, in the order of its steps, and write it."""
        self.tables[name] = table.sort_values("step", kind="stable", ignore_index=True)
        if PartialState().is_main_process:
            write(self.folder, name, self.tables[name])


def file_of(folder: Path, name: str) -> Path:
    return folder / f"{name}.{'parquet' if name in PARQUET else 'csv'}"


def read(file: Path) -> pd.DataFrame:
    """A table as it was written, the numbers to the last bit. Raises ValueError where the file is none."""
    try:
        if file.suffix == ".parquet":
            table = pd.read_parquet(file)
        else:
            table = pd.read_csv(file, dtype={"layer": str, "row": str, "method": str}, float_precision="round_trip")
        if "step" not in table or not pd.api.types.is_integer_dtype(table["step"]):
            raise ValueError("it has no column step of whole numbers")
        return table
    except (ValueError, OSError) as error:
        raise ValueError(f"{file}: not a table ({error})") from error


def write(folder: Path, name: str, table: pd.DataFrame) -> None:
    if name in PARQUET:
        folder.mkdir(parents=True, exist_ok=True)
        with written_beside(file_of(folder, name)) as beside:
            table.to_parquet(beside, index=False)
    else:
        write_whole(file_of(folder, name), table.to_csv(index=False, lineterminator="\n"))


def predictions(steps: pd.DataFrame, order: Sequence[int], lrs: Mapping[int, float]) -> pd.DataFrame:
    """What the G-effects and the updates foretold of the risks' change from each step to the next, and the change.

    Args:
        steps: the table `steps`; where it lacks a step or the next one, nothing is said of it.
        order: the steps of the run's checkpoints, 0 first: the update effect is to the next of them.
        lrs: the learning rate of each training step; -lr e is summed over those between, nan where one is not known.
    """
    rows = []
    for risk, table in steps.assign(foretells=foretelling(steps)).groupby("risk", sort=False):
        measured = {line.step: line for line in table.itertuples()}
        for now, then in zip(order, order[1:], strict=False):
            if now in measured and then in measured:
                lr = sum(lrs.get(step, float("nan")) for step in range(now + 1, then + 1))
                change = measured[then].risk_value - measured[now].risk_value
                rows.append((now, then, risk, -lr * measured[now].foretells, measured[now].update_effect, change))
    return pd.DataFrame(rows, columns=["step", "next_step", "risk", "minus_lr_geffect", "update_effect", "risk_change"])
