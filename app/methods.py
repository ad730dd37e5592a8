"""The methods' names, as the papers and their codes have them, to forget.py's settings."""

from __future__ import annotations

import re

from app.places import CONFIG

ALIASES = {"grad_ascent": "ga", "ins_npo": "tnpo", "w_ins_npo": "wtnpo", "po": "idk", "grad_diff": "gd", "KL": "kl"}
RETAIN_TERMS = ("gd", "kl")


def choices(group: str) -> list[str]:
    """The files of a group of config."""
    return sorted(file.stem for file in (CONFIG / group).glob("*.yaml"))


def parse_method(name: str) -> list[str]:
    """A method's name, with its number and its retain term, as forget.py's settings: rmu_21_kl, npo_gd, wtnpo_0.5, ..."""
    stem, _, last = name.rpartition("_")
    if (settings := _without_term(name)) is not None:
        return settings
    if last in RETAIN_TERMS and (settings := _without_term(stem)) is not None:
        return [*settings, f"retain={last}"]
    raise ValueError(
        f"method {name}: unknown; there are {', '.join(choices('method'))}, their other names {', '.join(ALIASES)},"
        f" rmu_LAYER and wtnpo_ALPHA, each with an optional _{' or _'.join(RETAIN_TERMS)}"
    )


def _without_term(name: str) -> list[str] | None:
    if (known := ALIASES.get(name, name)) in choices("method"):
        return [f"method={known}"]
    stem, _, last = name.rpartition("_")
    base = _without_term(stem) if stem else None
    if base == ["method=rmu"] and last.isdecimal():
        return ["method=rmu", f"method.layer={last}"]
    if base == ["method=wtnpo"] and re.fullmatch(r"\d+(\.\d+)?", last):
        return ["method=wtnpo", f"method.alpha={float(last):g}"]
    return None


def hint(name: str) -> str:
    """What forget.py calls the method that basher1.py knows by that name."""
    try:
        return f" (is it {' '.join(parse_method(name))}?)"
    except ValueError:
        return ""
