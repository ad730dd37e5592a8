"""What a model knows and gives away: each score's definition, asked of rows and of sets, the fair comparison.

`score_rows` gives all that a row has; `ScoreCallback` the cheap ones inside any `Trainer`.
"""

from unlearn.scores.callback import ScoreCallback
from unlearn.scores.extraction import score_rows

__all__ = ["ScoreCallback", "score_rows"]
