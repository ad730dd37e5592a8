"""Files and folders that are whole or absent, whatever stops the process that writes them. Imports no torch."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SEAL = "whole.json"  # written into a folder last of all: the size of each of its files


def write_whole(file: Path, text: str) -> None:
    """Write a file beside its place, then rename it."""
    with written_beside(file) as beside:
        beside.write_text(text, encoding="utf-8")


@contextmanager
def written_beside(file: Path) -> Iterator[Path]:
    """A file to write, renamed into place at the end; what stood there stays until then, and stays if writing fails.

    Raises:
        OSError: it could not be written; names the file, which a full disk's own error does not.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.tmp")
    try:
        yield beside
        beside.replace(file)
    except OSError as error:
        beside.unlink(missing_ok=True)  # a full disk needs the room
        raise OSError(f"{file} could not be written: {error.strerror or error}") from error


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A folder to fill, renamed into place at the end; what stood there stays until then, and stays if filling fails."""
    beside, before = (folder.with_name(f".{folder.name}.{name}") for name in ("tmp", "old"))
    for leftover in (beside, before):
        shutil.rmtree(leftover, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)  # a full disk needs the room
        raise
    if folder.exists():
        folder.rename(before)  # removed in place, it would be torn for a moment
    beside.rename(folder)
    shutil.rmtree(before, ignore_errors=True)


def seal(folder: Path) -> None:
    """Note that the folder is whole: what it holds, and how long each file is."""
    sizes = {str(file.relative_to(folder)): file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file()}
    write_whole(folder / SEAL, json.dumps(sizes, indent=2) + "\n")


def what_is_torn(folder: Path) -> str | None:
    """What a sealed folder lacks, None where it is whole."""
    if not (folder / SEAL).exists():
        return "was not written to its end"
    try:
        sizes = dict(json.loads((folder / SEAL).read_text()))
    except (ValueError, TypeError):  # also a file that a failing machine left empty
        return f"its {SEAL} is not readable"
    for name, size in sizes.items():
        file = folder / name
        there = file.stat().st_size if file.is_file() else 0
        if there != size:
            return f"{name} has {there} of {size} bytes"
    return None


def remove_whole(folder: Path) -> None:
    """Remove a folder so that it is there whole or not at all, and what an interrupted removal has left of it."""
    aside = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder for this process alone; where it dies, the lock goes with it.

    Raises:
        ValueError: another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"{folder}: another process writes there now") from error
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        os.close(opened)
