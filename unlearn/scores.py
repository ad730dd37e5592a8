"""What a model knows of some rows: the loss of each answer's tokens, and how much of each answer it says.

Rows are dictionaries of `input_ids` and `labels`, each (T,), labels `IGNORE` on the prompt. With several processes the
batches are split over them, and every process gets all results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unlearn.rows import Row
from unlearn.tokens import IGNORE, token_outputs

Collate = Callable[[Sequence[Row]], dict[str, Tensor]]


def token_nlls(
    model: PreTrainedModel, rows: Sequence[Row], collate: Collate, bf16: bool, batch_size: int = 16, what: str = "losses"
) -> list[Tensor]:
    """For each row the nats of its label tokens, (label tokens,) float32 on the CPU, under teacher forcing in eval mode."""

    def measure(batch_rows: list[Row]) -> list[Tensor]:
        batch = {key: value.to(model.device) for key, value in collate(batch_rows).items()}
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            tokens = token_outputs(model, batch)
        sizes = torch.bincount(tokens.row, minlength=tokens.n_rows).tolist()
        return list(tokens.nll.cpu().split(sizes))

    return _over_rows(model, rows, measure, batch_size, what)


def token_mean(nlls: Sequence[Tensor]) -> float:
    """The mean over all tokens of all rows, in nats."""
    return torch.cat(list(nlls)).double().mean().item()


def greedy_answers(
    model: PreTrainedModel,
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    bf16: bool,
    max_length: int = 200,
    batch_size: int = 16,
) -> list[str]:
    """What the model answers to each row's prompt by greedy decoding, prompt and answer `max_length` tokens at most."""

    def answer(batch_rows: list[Row]) -> list[str]:
        prompts = [row["input_ids"][row["labels"] == IGNORE] for row in batch_rows]
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), pad)
        mask = torch.zeros(len(prompts), width, dtype=torch.long)
        for i, prompt in enumerate(prompts):  # padded on the left, where generation does not look
            ids[i, width - len(prompt) :] = prompt
            mask[i, width - len(prompt) :] = 1
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            out = model.generate(  # type: ignore[operator]
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                do_sample=False,
                max_length=max(max_length, width + 1),
                pad_token_id=pad,
                eos_token_id=tokenizer.eos_token_id,
            )
        return tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)

    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return _over_rows(model, rows, answer, batch_size, "answers")


def rouge_l_recalls(answers: Sequence[str], truths: Sequence[str]) -> list[float]:
    """For each row ROUGE-L recall with stemming: the share of the true answer that the longest common subsequence covers."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return [scorer.score(truth, answer)["rougeL"].recall for answer, truth in zip(answers, truths, strict=True)]


@torch.no_grad()
def _over_rows(
    model: PreTrainedModel, rows: Sequence[Row], measure: Callable[[list[Row]], list[Any]], batch_size: int, what: str
) -> list[Any]:
    """`measure` on batches of rows of like length, this process's share of them; the results of all, in the rows' order."""
    state = PartialState()
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    training = model.training
    model.eval()
    found: list[tuple[int, Any]] = []
    for batch in tqdm(
        batches[state.process_index :: state.num_processes], desc=what, disable=not state.is_main_process, leave=False
    ):
        found += zip(batch, measure([rows[i] for i in batch]), strict=True)
    model.train(training)
    everywhere = dict(gather_object(found))
    return [everywhere[i] for i in range(len(rows))]
