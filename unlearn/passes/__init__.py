"""Passes over whole sets of rows: batches split over processes, teacher forcing, greedy decoding."""

from unlearn.passes.decoding import decode, greedy_answers
from unlearn.passes.forcing import Forced, Pass, teacher_force, token_nlls

__all__ = ["Forced", "Pass", "decode", "greedy_answers", "teacher_force", "token_nlls"]
