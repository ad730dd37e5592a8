"""How Sphinx makes a site of these pages: `make docs`. Warnings are errors there."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

project = "The G-effect toolkit"
author = "The G-effect toolkit authors"
copyright = f"2026 {author}"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = project
smartquotes = False

myst_heading_anchors = 3

default_role = "code"  # of the docstrings' single backticks
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_inherit_docstrings = False
autodoc_default_options = {"special-members": "__call__"}
autodoc_preserve_defaults = True
ALIASES = (
    *("ArrayLike", "Batch", "Curve", "Directions", "Log", "Objective", "Prompt", "Publish", "Row", "Rows", "Series"),
    *("Tables", "Tokenize", "Vectors", "Weights"),
)
autodoc_type_aliases = {name: name for name in ALIASES}
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False  # the signature has them

nitpicky = (
    True  # but for what these pages do not have: other packages' classes, aliases and variables of types, private classes
)
nitpick_ignore_regex = [("py:.*", rf"(?!unlearn\.).*\..*|{'|'.join(ALIASES)}|Tensor|.*\._\w+|.*\.T")]
linkcheck_timeout = 30

SECTION = re.compile(r"\s*(Args|Attributes|Returns|Raises|Yields):")
NAMES = re.compile(r"(\s+\w+(?:, \w+)+)(: .*)")


def as_rst(app: Any, what: str, name: str, of: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text: indented blocks stand as they are, and only backticks and sections mean something."""
    found: list[str] = []
    block = section = False
    for number, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        before = lines[number - 1] if number else ""
        if line.strip() and not indent:
            block, section = False, bool(SECTION.match(line))
        elif line.strip() and not section and not block and not before.strip():
            block = True
            found += ["::", ""]
        if section and (match := NAMES.match(line)):  # napoleon takes one name, or one name and its type
            line = match[1].replace(", ", "/") + match[2]
        if not block:
            parts = line.split("`")
            line = "`".join(re.sub(r"([|*])", r"\\\1", part) if i % 2 == 0 else part for i, part in enumerate(parts))
        found.append(line)
    lines[:] = found


def as_called(app: Any, what: str, name: str, of: Any, options: Any, args: str | None, returns: str | None) -> Any:
    """Aliases within a type stand there as their names alone; a weight made into an objective takes its counts too."""
    array = re.compile(r"~numpy\.ndarray\[tuple\[~typing\.Any, \.\.\.\], ~numpy\.dtype\[([~\w.]+)\]\]")
    found = [part and re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", part) for part in (args, returns)]
    found = [part and array.sub(r"~numpy.typing.NDArray[\1]", part) for part in found]
    if found[0] and what == "class":  # defaults that are no Python
        found[0] = found[0].replace("<factory>", "...").replace("<class 'str'>", "str")
    if found[0] and name.startswith("unlearn.objectives.") and hasattr(of, "__wrapped__"):
        found[0] = re.sub(r"^\(tokens: ([~\w.]*)Tokens", r"\g<0>, counts: \1Counts", found[0])
    return tuple(found)


def links_to_files(app: Any, docname: str, source: list[str]) -> None:
    """A link to a page of the project that is not of this site gives the file itself."""
    source[0] = re.sub(r"\[([^\]]+)\]\((\.\./[^)#]+\.\w+)\)(?<!png\))", r"{download}`\1 <\2>`", source[0])


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", as_rst, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", as_called)
    app.connect("source-read", links_to_files)
