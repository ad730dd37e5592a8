"""The G-effects of an unlearning run, the short way: takes what basher1.py took, and finds that run's checkpoints.

    python basher2.py ga --model=llama --cuda_id=3 --setting=forget05 --hyper=2 > ga_ge_log.txt
    python basher2.py npo_kl --model=tiny --setting=forget10 tokens=true

Standard output has, for the original model and each checkpoint, `ge u | TOTAL {group: value, ...}` and `ge r | ...`, and
nothing else. Settings of compute_geffect.py (tokens=true, norms=false, retain_holdout=100, ...) are passed on to it.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from app import door
from app.compose import compose, given
from app.fields import flatten
from app.filling import with_family
from app.runs import learning_rate, run_folder
from basher1 import ROOT, choose_device, parse_args, run_settings
from unlearn.io.weights import run_checkpoints

MEASURED = {"retain_holdout", "dtype", "batch_size", "debug"}  # what a run and its measuring may each have of their own


def find_run(run: list[str], overrides: list[str]) -> Path:
    """The folder of the run that forget.py made with these settings; those that measuring may have too, need not be the run's.

    Raises:
        ValueError: there is no such run, or it has no checkpoint; lists those there are.
    """
    known = flatten(compose("forget", run))
    of_run = [word for word in overrides if key(word) in known]
    fewer = [word for word in of_run if key(word) not in MEASURED]
    folders = [folder_of([*run, *words]) for words in (of_run, fewer)]
    if found := [folder for folder in folders if run_checkpoints(folder)]:
        return found[0]
    there = sorted(str(folder) for folder in folders[0].parent.glob("*") if run_checkpoints(folder))
    raise ValueError(f"{folders[0]}: no such run; there are {', '.join(there) or f'none in {folders[0].parent}'}")


def folder_of(overrides: list[str]) -> Path:
    settings, family = with_family(given("forget", [door.quote(word) for word in overrides]))
    lr = learning_rate(settings.lr, family.unlearn_lr, bool(settings.LoRA.r))
    return Path(settings.save_dir or run_folder(settings.model_copy(update={"lr": lr})))


def key(setting: str) -> str:
    return setting.partition("=")[0]


def command(run: Path, overrides: list[str]) -> list[str]:
    """The compute_geffect.py command for that run, with those of the settings that are its own."""
    known = flatten(compose("forget_ge", ["model_family=tiny"]))
    own = [word for word in overrides if key(word) in known]
    return [sys.executable, str(ROOT / "compute_geffect.py"), door.quote(f"model_path_cur={run}"), *own]


def main(argv: list[str]) -> int:
    """Become the compute_geffect.py command that the arguments stand for; returns only what a user got wrong, as code 2."""
    try:
        args = parse_args(argv, "basher2.py", __doc__)
        line = command(find_run(run_settings(args), args.overrides), args.overrides)
        environment = choose_device(args.cuda_id)
    except Exception as error:
        return door.report(error, "forget_ge")
    print(shlex.join([*(f"{key}={value}" for key, value in environment.items()), *line]), file=sys.stderr, flush=True)
    os.execve(line[0], line, os.environ | environment)  # in this very process: signals reach it, its exit code is ours


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
