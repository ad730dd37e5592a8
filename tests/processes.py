"""Scripts as processes of their own, forked from one that has imported what they will (see `preloaded`): seconds less each."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OURS = {"app", "unlearn", *(file.stem for file in ROOT.glob("*.py"))}
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["preloaded"])


def _start() -> None:
    """The process that forks, which finds `preloaded` by the path alone."""
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), str(ROOT), *([path] if path else [])])
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        os.environ.update({} if path is None else {"PYTHONPATH": path})


def run_script(folder: Path, words: list[str], env: dict[str, str], n: int | None = None) -> subprocess.CompletedProcess[str]:
    """What `subprocess.run([python, *words], cwd=folder, env=env)` gives, both outputs captured.

    Args:
        n: as many processes, as torchrun starts them on one machine: where one fails the others are stopped, and the exit code
            is 1.
    """
    _start()
    ranks: list[dict[str, str]] = [{}]
    if n is not None:
        ranks = of_ranks(n)
    with tempfile.TemporaryDirectory() as said:
        outputs = [Path(said, name) for name in ("stdout", "stderr")]
        started = [FORKS.Process(target=_script, args=(folder, words, env | rank, outputs)) for rank in ranks]
        for process in started:
            process.start()
        running = {process.sentinel: process for process in started}
        while running:
            for sentinel in wait(list(running)):
                ended = running.pop(sentinel)  # type: ignore[arg-type]
                ended.join()
                if ended.exitcode:
                    for other in running.values():
                        other.terminate()
        out, err = (file.read_text() if file.exists() else "" for file in outputs)
    code = started[0].exitcode if n is None else int(any(process.exitcode for process in started))
    assert code is not None
    return subprocess.CompletedProcess(words, code, out, err)


def of_ranks(n: int) -> list[dict[str, str]]:
    """What torchrun tells each process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n)}
    return [shared | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(n)]


def _script(folder: Path, words: list[str], env: dict[str, str], outputs: list[Path]) -> None:
    for stream, file in zip((sys.stdout, sys.stderr), outputs, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    if sys.modules["torch"].cuda._is_in_bad_fork():  # something has started CUDA before: it can't be used here
        os.execve(sys.executable, [sys.executable, *words], env)
    assert "preloaded" in sys.modules
    home = Path(words[0]).resolve().parent
    if home not in (ROOT, ROOT / "tests"):  # it has a project of its own
        for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
            del sys.modules[name]
    sys.argv = list(words)
    sys.path.insert(0, str(home))
    runpy.run_path(words[0], run_name="__main__")
