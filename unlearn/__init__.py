"""Objectives of LLM unlearning, and what training them and measuring them needs.

A room imports those before it, and itself, only: io < models < objectives < passes < training, geffect, scores < attacks;
reporting stands on io alone, and study on that and on scores' definitions. No room knows YAML, a data set or a script.
"""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

MOVED = {  # what stood on one floor, for scripts written then
    **{name: f"io.{name}" for name in ("files", "signals")},
    **{name: f"models.{name}" for name in ("adapters", "checkpoints", "evaluating", "plan", "sharding")},
    **{name: f"objectives.{name}" for name in ("loss", "rows", "tokens")},
    **{name: f"passes.{name}" for name in ("decoding", "forcing")},
    **{name: f"geffect.{name}" for name in ("meter", "risks", "tables", "tangents", "tap")},
    **{name: f"scores.{name}" for name in ("asking", "control", "extraction", "tofu")},
    **{name: f"reporting.{name}" for name in ("figures", "score_figures", "sweeps")},
    "results": "scores.callback",
}


class _Moved(MetaPathFinder, Loader):
    """Finds a module by its old name, and says its new one."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name.startswith("unlearn.") and name[8:] in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        new = f"unlearn.{MOVED[module.__name__[8:]]}"
        warnings.warn(f"{module.__name__} is {new} now", DeprecationWarning, stacklevel=2)
        sys.modules[module.__name__] = import_module(new)

    def get_code(self, name: str) -> Any:
        """For `python -m`."""
        new = f"unlearn.{MOVED[name[8:]]}"
        spec: Any = find_spec(new)
        return spec.loader.get_code(new)


sys.meta_path.append(_Moved())
