"""Unlearn with one of the methods, the short way: names the method, the retain term and the run as the papers do.

    python basher1.py ga --model=llama --cuda_id=3 --setting=forget05 --hyper=2
    python basher1.py npo_kl --model=tiny --setting=forget10 seed=1

It prints the forget.py command that it runs, and its exit code is that command's.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

from app import arguments
from app.data import check_split
from app.families import load_family
from app.filling import benchmark
from app.methods import choices, parse_method

ROOT = Path(__file__).resolve().parent
USAGE = "{} METHOD --model=FAMILY --setting=forget01|forget05|forget10 [--hyper=NUMBER] [--cuda_id=GPU] [key=value ...]"


def parse_args(argv: list[str], script: str = "basher1.py", description: str | None = __doc__) -> argparse.Namespace:
    """The arguments of a script that names a run as this one does. Raises ValueError for those that it does not have."""
    parser = arguments.parser(description, USAGE.format(script), abbreviated=True)
    parser.add_argument(
        "method", help="a file of config/method (rmu_LAYER, wtnpo_ALPHA), with an optional _RETAIN, a file of config/retain"
    )
    parser.add_argument("--model", required=True, help="a family of config/model_config.yaml")
    parser.add_argument("--setting", required=True, help="the split to unlearn: forget01, forget05 or forget10")
    parser.add_argument(
        "--hyper", type=float, help="the method's number (for gd and kl the retain term's weight); left out: its default"
    )
    parser.add_argument("--cuda_id", type=int, help="which GPU; left out: what is there")
    args, overrides = parser.parse_known_args(argv)
    if strange := [word for word in overrides if word.startswith("-") or "=" not in word]:
        parser.error(f"{' '.join(strange)}: no such argument")
    args.overrides = overrides
    return args


def choose_device(cuda_id: int | None) -> dict[str, str]:
    """The environment that shows the command one GPU only. Raises ValueError where there are GPUs, but not that one."""
    if cuda_id is None:
        return {}
    import torch

    n = torch.cuda.device_count()
    if n == 0:
        print(f"{Path(sys.argv[0]).name}: --cuda_id={cuda_id}: no GPU here, on the CPU then", file=sys.stderr)
        return {}
    if not 0 <= cuda_id < n:
        raise ValueError(f"--cuda_id={cuda_id}: no such GPU; there are {', '.join(map(str, range(n)))}")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return {"CUDA_VISIBLE_DEVICES": visible.split(",")[cuda_id] if visible else str(cuda_id)}


def run_settings(args: argparse.Namespace) -> list[str]:
    """forget.py's settings that the arguments stand for. Raises ValueError for an unknown method, family or split."""
    load_family(args.model)
    [chosen, *_] = [*(word.partition("=")[2] for word in args.overrides if word.startswith("benchmark=")), "tofu"]
    if chosen not in (there := choices("benchmark")):
        raise ValueError(f"benchmark={chosen}: unknown; there are {', '.join(there)}")
    check_split(benchmark(chosen), "unlearn", args.setting)
    settings = [f"model_family={args.model}", f"split={args.setting}", *parse_method(args.method)]
    if args.hyper is not None:
        settings.append(f"hyper_param={int(args.hyper) if args.hyper.is_integer() else args.hyper}")
    return settings


def command(args: argparse.Namespace) -> list[str]:
    return [sys.executable, str(ROOT / "forget.py"), *run_settings(args), *args.overrides]


def main(argv: list[str]) -> int:
    """Become the forget.py command that the arguments stand for; returns only what a user got wrong, as exit code 2."""
    try:
        args = parse_args(argv)
        line = command(args)
        environment = choose_device(args.cuda_id)
    except ValueError as error:
        print(f"basher1.py: {error}", file=sys.stderr)
        return 2
    print(shlex.join([*(f"{key}={value}" for key, value in environment.items()), *line]), flush=True)
    os.execve(line[0], line, os.environ | environment)  # in this very process: signals reach it, its exit code is ours


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
