"""Files and folders that are whole or absent, whatever stops the process that writes them. Imports no torch."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

SAMPLES = 256  # of a file's bytes in its fingerprint
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


def base_of(folder: str | Path) -> str | None:
    """The model that an adapter's folder is added to, a folder or a hub name; None where the folder holds no adapter."""
    file = Path(folder, "adapter_config.json")
    if not file.exists() or Path(folder, "config.json").exists():  # a whole model may have one embedded
        return None
    try:
        return str(json.loads(file.read_text())["base_model_name_or_path"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: names no base model ({error!r})") from error


def fingerprint(folder: Path) -> str:
    """What tells a checkpoint's weights from others, read in a moment: its files' sizes, and samples of their bytes."""
    digest = hashlib.sha256()
    if (base := base_of(folder)) is not None:
        digest.update((fingerprint(Path(base)) if Path(base).is_dir() else base).encode())
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as opened:
            for i in range(SAMPLES):
                opened.seek(size * i // SAMPLES)
                digest.update(opened.read(4096))
    return digest.hexdigest()[:16]


def count_numbers(file: Path) -> int:
    """How many numbers a safetensors file holds, by its header.

    Raises:
        ValueError: the file is shorter or longer than its header says, or has none.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if not 8 < 8 + length <= size:
            raise ValueError(f"{file}: torn ({size} bytes, which is less than its header)")
        try:
            header = json.loads(opened.read(length))
            tensors = [tensor for name, tensor in header.items() if name != "__metadata__"]
            end = 8 + length + max((tensor["data_offsets"][1] for tensor in tensors), default=0)
            numbers = sum(prod(tensor["shape"]) for tensor in tensors)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{file}: not a safetensors file (its header is not JSON, or not of tensors)") from error
    if end != size:
        raise ValueError(f"{file}: torn ({size} of {end} bytes)")
    return numbers


def count_parameters(folder: Path) -> int:
    """How many parameters a checkpoint's safetensors files hold.

    Raises:
        ValueError: there is no such file, one is torn, or one that the index names is not there.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index}: not an index of safetensors files ({error!r})") from error
    else:
        files = sorted(folder.glob("*.safetensors"))
    if missing := [file.name for file in files if not file.exists()]:
        raise ValueError(f"{folder}: its index names {', '.join(missing)}, which is not there")
    if not files:
        raise ValueError(f"{folder}: no safetensors file")
    return sum(map(count_numbers, files))
