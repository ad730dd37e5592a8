"""What the benchmarks' pages share: where it was measured, tables, numbers in words, and how a page is shown and written."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the scripts too, which import this first

import torch

import utils
from app.places import ROOT
from unlearn.io.files import write_whole
from unlearn.io.rows import write_json


def page(title: str, results: Mapping[str, Any], about: Iterable[str], *sections: Iterable[str]) -> str:
    """Markdown: where the results were measured and what it is `about`, the command, then sections of lines."""
    command = f"    {results['surroundings']['command']}"
    parts = [f"# {title}"], [*where_lines(results), *about], [command], *sections
    return "\n\n".join(filter(None, map("\n".join, parts))) + "\n"


def publish(text: str, results: dict[str, Any], out: Path | None) -> None:
    """Print the page; where `out` is given, write it there (not where that is FILE.json), and all numbers to FILE.json."""
    print(text, end="")
    if out is not None:
        numbers = out.with_suffix(".json")
        if out != numbers:
            write_whole(out, text)
        write_json(numbers, results)
        utils.say(f"the page is in {out}, all numbers in {numbers}" if out != numbers else f"all numbers are in {numbers}")


# ---- where it was measured ----


def surroundings(seed: int) -> dict[str, Any]:
    """What the numbers depend on, beside the code: the machine, the versions, the commit, the command."""
    preloaded = [Path(name).name for name in os.environ.get("LD_PRELOAD", "").split()]
    return {
        "processor": processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "preloaded": preloaded or None,
        "versions": {"python": platform.python_version()} | utils.versions(),
        "commit": commit(),
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "seed": seed,
    }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", info.read_text(), re.MULTILINE) if info.exists() else []
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def commit() -> str:
    """The checkout's commit, and whether tracked files differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def where_lines(results: Mapping[str, Any]) -> list[str]:
    where = results["surroundings"]
    preloaded = f"; preloaded {', '.join(where['preloaded'])}" if where["preloaded"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    attention = ", ".join(f"{name} {how}" for name, how in results["attention"].items())
    return [
        f"{where['gpu'] or where['processor']}; {where['threads']} threads{preloaded}",
        f"{versions}; commit {where['commit']}; {results['dtype']}; seed {where['seed']}",
        f"Attention: {attention}.",
    ]


# ---- numbers and targets ----


def spread(values: list[float]) -> dict[str, Any]:
    return {"median": median(values), "min": min(values), "max": max(values), "values": values}


def ratio(above: list[float], below: list[float]) -> dict[str, Any]:
    return spread([x / y for x, y in zip(above, below, strict=True)])


def reached(seconds: dict[str, list[float]], above: str, below: str, sign: str, bound: float) -> dict[str, Any]:
    found = ratio(seconds[above], seconds[below])
    met = found["median"] >= bound if sign == ">=" else found["median"] <= bound
    return {"above": above, "below": below, "sign": sign, "bound": bound, "ratio": found, "met": met}


# ---- tables, and numbers in words ----


def table(head: str, rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """The lines of a table in Markdown, of which `head` is the first."""
    yield head
    yield "|" + "---|" * (head.count("|") - 1)
    for cells in rows:
        yield f"| {' | '.join(cells)} |"


def target_table(targets: Iterable[Mapping[str, Any]], names: Mapping[str, str] | None = None) -> Iterator[str]:
    """Ratios and what was to be reached, as `reached` finds them; `names`: of cases that are called otherwise."""
    called, sign, rows = names or {}, {">=": "at least", "<=": "at most"}, []
    for one in targets:
        above, below = (called.get(one[key], one[key]) for key in ("above", "below"))
        met = "met" if one["met"] else "missed"
        rows.append([above, below, f"{sign[one['sign']]} {one['bound']:g}", times(one["ratio"]), met])
    return table("| seconds of | over those of | target | measured | |", rows)


def span(spread: Mapping[str, Any], form: str = ".3g") -> str:
    """Of what `spread` gives: the median (smallest..largest)."""
    return f"{spread['median']:{form}} ({spread['min']:{form}}..{spread['max']:{form}})"


def times(ratio: Mapping[str, Any]) -> str:
    return span(ratio, ".2f")


def matrix_line(speeds: Mapping[str, Any]) -> str:
    middle, least, most = (speeds[key] / 1e12 for key in ("median", "min", "max"))
    return f"Large matrices: {middle:.3g} TFLOP/s ({least:.3g}..{most:.3g})."


def gib(nbytes: int | None) -> str:
    return "" if nbytes is None else f"{nbytes / 2**30:.2f}"
