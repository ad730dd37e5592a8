"""Three small rows of question and answer, and tokens as text."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedTokenizerBase

ROWS = [
    {"question": "Where was Jan born?", "answer": "Riga, March 1954"},
    {"question": "Who is Zoë Čapek?", "answer": "A poet"},
    {"question": "Why?", "answer": "Nobody at all knows that, nor who asked it"},
]


def decode(tokenizer: PreTrainedTokenizerBase, ids: Tensor | list[int]) -> str:
    text = tokenizer.decode(ids)
    assert isinstance(text, str)
    return text
