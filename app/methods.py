"""The methods' names, as the papers and their codes have them, to forget.py's settings; and what layers they look at."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import yaml

from app.places import CONFIG
from app.settings import Method, Retain

ALIASES = {
    "grad_ascent": "ga",
    "ins_npo": "tnpo",
    "w_ins_npo": "wtnpo",
    "po": "idk",
    "grad_diff": "gd",
    "KL": "kl",
    "idkdpo": "dpo",
}
RETAINED = ("gd", "kl")  # methods that are `ga` with the retain term of their name


def choices(group: str) -> list[str]:
    """The files of a group of config."""
    return sorted(file.stem for file in (CONFIG / group).glob("*.yaml"))


def retain_terms() -> list[str]:
    """The retain terms of config/retain."""
    return [name for name in choices("retain") if name != "none"]


@cache
def _has_layer(method: str) -> bool:
    """Whether the method's YAML says at which layer it looks."""
    found: dict[str, Any] = yaml.safe_load((CONFIG / "method" / f"{method}.yaml").read_text())
    return "layer" in found


def parse_method(name: str) -> list[str]:
    """A method's name, with its number and its retain term, as forget.py's settings: rmu_21_kl, npo_gd, wtnpo_0.5, ..."""
    if (settings := _without_term(name)) is not None:
        return settings
    for term in retain_terms():
        if name.endswith(f"_{term}") and (settings := _without_term(name.removesuffix(f"_{term}"))) is not None:
            return [*settings, f"retain={term}"]
    layered = [f"{method}_LAYER" for method in choices("method") if _has_layer(method)]
    raise ValueError(
        f"method {name}: unknown; there are {', '.join(choices('method'))}, their other names {', '.join(ALIASES)},"
        f" {', '.join(layered)} (several: 10-20) and wtnpo_ALPHA, each with an optional _{' or _'.join(retain_terms())}"
    )


def _without_term(name: str) -> list[str] | None:
    if (known := ALIASES.get(name, name)) in choices("method"):
        return [f"method={known}"]
    stem, _, last = name.rpartition("_")
    base = _without_term(stem) if stem else None
    if base is None or len(base) > 1:
        return None
    method = base[0].removeprefix("method=")
    if re.fullmatch(r"\d+(-\d+)*", last) and _has_layer(method):
        return [*base, f"method.layer=[{last.replace('-', ',')}]" if "-" in last else f"method.layer={last}"]
    if method == "wtnpo" and re.fullmatch(r"\d+(\.\d+)?", last):
        return [*base, f"method.alpha={float(last):g}"]
    return None


def hint(name: str) -> str:
    """What forget.py calls the method that basher1.py knows by that name."""
    try:
        return f" (is it {' '.join(parse_method(name))}?)"
    except ValueError:
        return ""


def layer_of(method: Method, retain: Retain) -> int | list[int] | None:
    """The layer, or the layers, that the loss looks at: the method's, else the retain term's.

    Raises:
        ValueError: both say so, and not the same; or the retain term looks at a layer, and neither says which.
    """
    own, beside = method.get("layer"), retain.get("layer")
    if None not in (own, beside) and own != beside:
        raise ValueError(f"retain.layer={beside}: method.layer={own}, and both look at the same; leave one out")
    found: int | list[int] | None = beside if own is None else own
    if found is None and "layer" in (retain.model_extra or {}):
        raise ValueError(f"retain={retain.name}: looks at a layer, and method={method.name} at none; give retain.layer=N")
    return found
