"""A sweep's folder: how each of its jobs ended, and the summary of all."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from app.checks import check_folder
from unlearn.io.rows import write_json
from utils import is_main_process


def open_sweep(overrides: list[str], output_dir: str) -> Path:
    """The folder of a sweep's summary, told by its script and its settings: the same call again has the same one."""

    def given(key: str) -> list[str]:
        return [word.partition("=")[2].strip("'\"") for word in overrides if word.startswith(f"{key}=")]

    digest = hashlib.sha256("\n".join(sorted(overrides)).encode()).hexdigest()[:8]
    where = Path([output_dir, *given("output_dir")][-1], "sweeps", f"{Path(sys.argv[0]).stem}_{digest}")
    folder = Path([str(where), *given("hydra.sweep.dir")][-1])
    check_folder(folder, "output_dir")
    for file in (folder / "jobs").glob("*.json"):  # of an earlier call
        file.unlink()
    if not given("hydra.sweep.dir"):
        sys.argv.append(f"hydra.sweep.dir='{folder}'")
    return folder


@contextmanager
def noted() -> Iterator[dict[str, Any]]:
    """Around a job of a sweep: how it ends stands in the sweep's folder; the note has `folder` and `error`."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    note: dict[str, Any] = {"folder": None, "error": ""}
    job = HydraConfig.get()
    if job.mode != RunMode.MULTIRUN or not is_main_process():
        yield note
        return

    def write(status: str) -> None:
        record = {"settings": list(job.overrides.task), "status": status, **note}
        write_json(Path(job.sweep.dir, "jobs", f"{job.job.num}.json"), record)

    write("did not end")
    yield note
    write("failed" if note["error"] else "done")


def close_sweep(sweep: Path, tell: Callable[[str], None]) -> bool:
    """Summarise the sweep, and say which of its jobs failed; returns whether any did."""
    if not is_main_process() or not (sweep / "jobs").is_dir():
        return False
    from unlearn.reporting.sweeps import summarise, told

    table = summarise(sweep)
    failures = told(table)
    for line in failures:
        tell(line)
    tell(f"{len(table) - len(failures)} of {len(table)} jobs are done; the summary is {sweep / 'summary.csv'}")
    return bool(failures)
