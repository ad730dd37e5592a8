"""A model on disk: what tells one from others, whether it is whole, and how many numbers it holds. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from unlearn.io.rows import read_object

CHUNK = 2**24  # bytes of a file that are hashed at a time, several side by side


# What a model's output depends on: how texts become tokens, and the weights and the configuration.
TOKENIZER = ("tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt")


PARTS = ("*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json", *TOKENIZER)


SAMPLES = 256  # of a file's bytes in the fingerprint that earlier versions noted


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


# Files with a model's weights, in whatever format, also those put aside; and what else there is of a model but its config.json.
WEIGHTS = r"\.(bin|safetensors|pt|pth|ckpt|h5|msgpack|gguf|npz|onnx|distcp|index\.json)\b|(^|/)adapter_config\.json$"


OF_A_MODEL = WEIGHTS + r"|(^|/)(tokenizer[^/]*|merges\.txt|vocab\.\w+)$"


def is_checkpoint(folder: str | Path) -> bool:
    """Whether the folder has what `from_pretrained` loads, whole."""
    return why_no_checkpoint(Path(folder)) is None


def why_no_checkpoint(folder: Path) -> str | None:
    """What a folder lacks that `from_pretrained` needs, None where it lacks nothing."""
    if not any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
        return "a folder without a checkpoint"
    if not any(folder.glob("*.safetensors")):
        if not (others := other_weights(folder)):
            return "a folder without a checkpoint"
        call = f"AutoModelForCausalLM.from_pretrained('{folder}').save_pretrained(NEW)"
        how = f": {call} writes them (copy the tokenizer's files, too)" if any(name.endswith(".bin") for name in others) else ""
        return f"its weights are {', '.join(others[:3])}, and only safetensors are read{how}"
    try:
        if (config := folder / "config.json").exists() and "model_type" not in read_object(config):
            return f"its {config.name} names no model_type"
        base = base_of(folder)
        if base is not None and Path(base).is_absolute() and (why := why_no_checkpoint(Path(base))):
            return f"an adapter, and its model {base} is not there ({why})"
        count_parameters(folder)
    except ValueError as error:
        return str(error)
    return None


def other_weights(folder: Path, names: str = WEIGHTS) -> list[str]:
    """The files of a folder that hold weights, or name them, in whatever format, a few folders deep."""
    found = [file for pattern in ("*", "*/*", "*/*/*") for file in folder.glob(pattern)]
    files = [str(file.relative_to(folder)) for file in found if not file.is_dir()]
    return sorted(file for file in files if re.search(names, file, re.IGNORECASE))


def step_of(folder: Path) -> int | None:
    """The N of a folder checkpoint-N."""
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if folder.name.startswith("checkpoint-") and number.isdecimal() else None


def run_checkpoints(run: Path) -> list[tuple[int, Path]]:
    """A run's checkpoints that are whole, in the order of their steps."""
    found = [(step, folder) for folder in run.glob("checkpoint-*") if (step := step_of(folder)) is not None]
    return sorted((step, folder) for step, folder in found if is_checkpoint(folder))


def weights_of(path: str) -> str:
    """What tells a model from others: one of a folder by its files' bytes, one of the hub by its name."""
    return fingerprint(Path(path)) if Path(path).is_dir() else path


def is_of(path: str, noted: Any) -> bool:
    """Whether `weights_of(path)` is what was noted, perhaps by an earlier version, if anything was (not None)."""
    return noted is None or (is_noted(Path(path), str(noted)) if Path(path).is_dir() else path == noted)
