"""Scripts as processes of their own, forked from one that has imported torch and transformers: seconds less for each."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        *(
            "torch",
            "torch.distributed.fsdp",
            "torch.distributed.tensor",
            "transformers.trainer",
            "transformers.data.data_collator",
        ),
        *("transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto", "peft", "datasets"),
        *("transformers.models.llama.modeling_llama", "matplotlib.pyplot", "pandas", "scipy.stats", "rouge_score.rouge_scorer"),
        *("hydra", "hydra._internal.hydra", "tensorboard"),
    ]
)


def run_script(folder: Path, words: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """What `subprocess.run([python, *words], cwd=folder, env=env)` gives, both outputs captured."""
    with tempfile.TemporaryDirectory() as said:
        outputs = [Path(said, name) for name in ("stdout", "stderr")]
        process = FORKS.Process(target=_script, args=(folder, words, env, outputs))
        process.start()
        process.join()
        out, err = (file.read_text() if file.exists() else "" for file in outputs)
    assert process.exitcode is not None
    return subprocess.CompletedProcess(words, process.exitcode, out, err)


def _script(folder: Path, words: list[str], env: dict[str, str], outputs: list[Path]) -> None:
    for stream, file in zip((sys.stdout, sys.stderr), outputs, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    if sys.modules["torch"].cuda._is_in_bad_fork():  # something has started CUDA before: it can't be used here
        os.execve(sys.executable, [sys.executable, *words], env)
    sys.argv = list(words)
    sys.path.insert(0, str(Path(words[0]).resolve().parent))
    runpy.run_path(words[0], run_name="__main__")
