"""The command line of a script that has flags of its own and no settings: errors in a line, and what they end with."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn


def parser(description: str | None, usage: str, abbreviated: bool = False) -> argparse.ArgumentParser:
    """A parser that raises ValueError, with the usage behind it, for what a user got wrong.

    Args:
        abbreviated: flags may be shortened as far as they are told apart.
    """

    def refuse(message: str) -> NoReturn:
        raise ValueError(f"{message}; usage: {usage}")

    as_typed = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(description=description, formatter_class=as_typed, usage=usage, allow_abbrev=abbreviated)
    made.error = refuse  # type: ignore[method-assign]
    return made


def exit_code(script: str, work: Callable[[], object]) -> int:
    """Do the work; 2 for what can be mended on the command line, 1 for what went wrong on the way, each told in a line."""
    try:
        work()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"{script}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0
