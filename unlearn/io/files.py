"""Files and folders that are whole or absent, whatever stops the process that writes them. Imports no torch."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from math import prod
from pathlib import Path

CHUNK = 2**24  # bytes of a file that are hashed at a time, several side by side
# What a model's output depends on: how texts become tokens, and the weights and the configuration.
TOKENIZER = ("tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt")
PARTS = ("*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json", *TOKENIZER)
SAMPLES = 256  # of a file's bytes in the fingerprint that earlier versions noted
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
        base = str(json.loads(file.read_text())["base_model_name_or_path"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: names no base model ({error!r})") from error
    if Path(base).resolve() == Path(folder).resolve():
        raise ValueError(f"{file}: names its own folder as the base model")
    return base


def lacks_tokenizer(path: str) -> bool:
    """Whether the path is a folder without one."""
    return Path(path).is_dir() and not any(Path(path).glob("tokenizer*"))


def fingerprint(folder: Path, parts: Sequence[str] = PARTS) -> str:
    """What tells a checkpoint from others: a hash of all bytes that its output depends on, in whatever folder they are."""
    digest = hashlib.sha256()
    if (base := base_of(folder)) is not None:
        digest.update((fingerprint(Path(base)) if Path(base).is_dir() else base).encode())
    for file in sorted({file for part in parts for file in folder.glob(part) if file.is_file()}):
        digest.update(f"{file.name} {hash_file(file)}\n".encode())
    digest.update(f"ends with {_ends_with(folder / 'generation_config.json')}".encode())
    return digest.hexdigest()


def _ends_with(file: Path) -> str:
    """What a generation_config.json ends texts with; the rest of it is not used."""
    try:
        return str(json.loads(file.read_text()).get("eos_token_id"))
    except (OSError, ValueError, AttributeError):  # transformers does without it, too
        return "None"


def hash_file(file: Path) -> str:
    """Of all its bytes; a file that this process has read, and that has not been written since, is not read again."""
    state = file.stat()
    return _hash_chunks(file.resolve(), state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino)


@cache
def _hash_chunks(file: Path, size: int, *_: int) -> str:
    """The hash of the chunks' hashes: threads share the work."""

    def hash_chunk(start: int) -> bytes:
        with file.open("rb") as opened:
            opened.seek(start)
            return hashlib.sha256(opened.read(CHUNK)).digest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return hashlib.sha256(b"".join(threads.map(hash_chunk, range(0, size, CHUNK)))).hexdigest()


def sampled(folder: Path) -> str:
    """The fingerprint that earlier versions noted: the weights' sizes, and samples of their bytes."""
    digest = hashlib.sha256()
    if (base := base_of(folder)) is not None:
        digest.update((sampled(Path(base)) if Path(base).is_dir() else base).encode())
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as opened:
            for i in range(SAMPLES):
                opened.seek(size * i // SAMPLES)
                digest.update(opened.read(4096))
    return digest.hexdigest()[:16]


def is_noted(folder: Path, noted: str) -> bool:
    """Whether the checkpoint is the one that a fingerprint, perhaps of an earlier version, was taken of."""
    return noted == (sampled(folder) if re.fullmatch("[0-9a-f]{16}", noted) else fingerprint(folder))


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
