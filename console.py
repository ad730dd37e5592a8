"""The scripts' work as one command, where the package is installed and there is no clone.

    geffect finetune model_family=tiny
    geffect forget model_family=phi split=forget05 method=npo retain=kl
    torchrun --nproc_per_node=2 "$(which geffect)" forget model_family=phi split=forget05 method=npo

`geffect COMMAND ...` is `python COMMAND.py ...`, with the same words behind it.
"""

from __future__ import annotations

import ast
import difflib
import runpy
import sys
from pathlib import Path

HOME = Path(__file__).resolve().parent  # the clone; in an installed package a folder that looks like it
NOT_COMMANDS = ("dataloader", "console", "utils")


def commands() -> dict[str, str]:
    """What each script says first of itself, by its name."""
    scripts = (file for file in sorted(HOME.glob("*.py")) if file.stem not in NOT_COMMANDS)
    return {script.stem: (ast.get_docstring(ast.parse(script.read_text())) or "").partition("\n")[0] for script in scripts}


def usage() -> str:
    about = commands()
    width = max(map(len, about))
    lines = [f"    {name:{width}}  {what}" for name, what in about.items()]
    return "\n".join([*(__doc__ or "").splitlines(), "", *lines, "", "geffect COMMAND --help lists its settings."])


def main() -> None:
    """Run the command that the first word names. Ends the process with code 2 where there is none of that name."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("--help", "-h"):
        return print(usage())
    if name not in (known := commands()):
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" (is it {near[0]}?)" if near else ""
        print(f"geffect: {name}: unknown; there are {', '.join(known)}{hint}", file=sys.stderr)
        sys.exit(2)
    script = str(HOME / f"{name}.py")
    sys.argv = [script, *sys.argv[2:]]
    sys.path.insert(0, str(HOME))
    sys.path.append(str(Path.cwd()))  # for a function of one's own that a YAML names
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
