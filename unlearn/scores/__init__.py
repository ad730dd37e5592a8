"""What a model knows and gives away: each score's definition, asked of rows and of sets, the fair comparison.

`score_rows` gives all that a row has; `ScoreCallback` the cheap ones inside any `Trainer`. Both are imported when they are
asked for: definitions, each a pure function here too (`scores.ps_exact`), and logs need no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unlearn.scores.callback import ScoreCallback
    from unlearn.scores.extraction import score_rows

__all__ = ["ScoreCallback", "score_rows"]
WHERE = {"ScoreCallback": "callback", "score_rows": "extraction"}


def __getattr__(name: str) -> Any:
    found = None if name.startswith("_") else import_module(f"{__name__}.{WHERE.get(name, 'definitions')}")
    if not hasattr(found, name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(found, name)
