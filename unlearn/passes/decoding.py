"""Decoding, batched by length, with the model's cache; a row leaves the batch when it ends, where the cache allows it.

Each token is the argmax, or drawn, whatever the model's generation config says: of that only the end-of-sequence tokens
count. Where teacher forcing has said how far greedy decoding follows the true answer, a row is decoded only from where it
leaves it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from unlearn.models.adapters import has_virtual_tokens
from unlearn.models.evaluating import unwrap
from unlearn.objectives.rows import Row
from unlearn.objectives.tokens import head_at, widen
from unlearn.passes.forcing import Forced, Pass, attends_alone, has_cache, over_batches, prompt_length
from unlearn.passes.sizes import Size, cut

MAX_LENGTH = 200  # prompt and answer, in tokens, as TOFU has it
CACHES = ("past_key_values", "cache_params")  # what models call it (RWKV's `state` is wrong for more than a row)
Choose = Callable[[Tensor, Sequence[int], int], Tensor]  # (B, V) logits, which rows they are of, how many tokens they have


def greedy_answers(
    how: Pass,
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    drafts: Sequence[Forced] | None = None,
    max_length: int | None = MAX_LENGTH,
    max_new_tokens: int | None = None,
    what: str = "answers",
) -> list[str]:
    """What the model answers to each row's prompt, stripped.

    Args:
        drafts: what teacher forcing said of the rows' true answers; the texts are the same without.
        max_length: of prompt and answer together, in tokens (one token is always decoded); None: as `max_new_tokens` says.
        max_new_tokens: of the answer; None: as `max_length` says.
    """
    most = [n for n in (max_length, positions_of(how.model)) if n is not None]  # prompt and answer
    limits = [_limit(prompt_length(row), most, max_new_tokens) for row in rows]
    stops = stop_tokens(how.model, how.eos)
    starts = [followed(draft) for draft in drafts] if drafts is not None else [[] for _ in rows]
    done = [len(start) >= n or stops & set(start) for start, n in zip(starts, limits, strict=True)]
    todo = [i for i, whole in enumerate(done) if not whole]
    prefixes = [torch.cat([rows[i]["input_ids"][: prompt_length(rows[i])], torch.tensor(starts[i]).long()]) for i in todo]
    rest = decode(how, prefixes, [limits[i] - len(starts[i]) for i in todo], what)
    for i, tokens in zip(todo, rest, strict=True):
        starts[i] = starts[i] + tokens
    cut = [_until(start[:n], stops) for start, n in zip(starts, limits, strict=True)]
    return [text.strip() for text in tokenizer.batch_decode(cut, skip_special_tokens=True)]


@dataclass(frozen=True)
class Sampling:
    """What draws a row's tokens: the same ones in any batch, to rounding, for each row has its own numbers.

    Attributes:
        numbers: (rows, tokens) in [0, 1), float64, on the CPU: a token each.
        temperature: logits are divided by it.
        top_k: only so many of the likeliest tokens are drawn from; None: all.
        top_p: only the fewest of these that have this share of their probability between them.
    """

    numbers: Tensor
    temperature: float
    top_k: int | None
    top_p: float = 1

    def __call__(self, logits: Tensor, rows: Sequence[int], step: int) -> Tensor:
        """(B,) the tokens behind the first `step` of those rows."""
        best = widen(logits).topk(min(self.top_k or logits.shape[-1], logits.shape[-1]))
        sums = (best.values.cpu().double() / self.temperature).softmax(-1).cumsum(-1)
        whole = sums[:, -1:]
        if self.top_p < 1:
            whole = sums.gather(1, torch.searchsorted(sums, self.top_p * whole))
        drawn = self.numbers[list(rows), step, None] * whole
        place = torch.searchsorted(sums, drawn, right=True).clamp(max=sums.shape[1] - 1)
        return best.indices.gather(1, place.to(logits.device)).squeeze(1)


def sampled_answers(
    how: Pass,
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    generator: torch.Generator,
    temperature: float = 1,
    top_k: int | None = 50,
    max_new_tokens: int = MAX_LENGTH,
    what: str = "answers",
    top_p: float = 1,
) -> list[str]:
    """What the model answers to each row's prompt, drawn token by token, stripped; every process has all of them.

    Args:
        generator: of the CPU, the same on every process.
        temperature, top_k, top_p: see `Sampling`.
        max_new_tokens: of an answer.
    """
    numbers = torch.rand(len(rows), max_new_tokens, generator=generator, dtype=torch.float64)
    most = [n for n in (positions_of(how.model),) if n is not None]
    limits = [_limit(prompt_length(row), most, max_new_tokens) for row in rows]
    prefixes = [row["input_ids"][: prompt_length(row)] for row in rows]
    found = decode(how, prefixes, limits, what, Sampling(numbers, temperature, top_k, top_p))
    stops = stop_tokens(how.model, how.eos)
    texts = tokenizer.batch_decode([_until(tokens, stops) for tokens in found], skip_special_tokens=True)
    return [text.strip() for text in texts]


def likeliest(logits: Tensor, rows: Sequence[int], step: int) -> Tensor:
    """(B,) the argmax of (B, V) logits."""
    return logits.argmax(-1)


def followed(draft: Forced) -> list[int]:
    """The tokens of greedy decoding that teacher forcing tells: those of the answer, and the one that leaves it."""
    return [*draft.labels[: draft.followed].tolist(), *draft.predicted[draft.followed : draft.followed + 1].tolist()]


def decode(
    how: Pass,
    prefixes: Sequence[Tensor],
    limits: Sequence[int],
    what: str = "decoding",
    choose: Choose = likeliest,
) -> list[list[int]]:
    """The tokens that decoding puts behind each prefix, `limits` of them at most; none after one that ends a text.

    Args:
        choose: what makes tokens of logits.
    """
    if not prefixes:
        return []
    order = sorted(range(len(prefixes)), key=lambda i: -len(prefixes[i]))
    stops = stop_tokens(how.model, how.eos)
    with how.evaluating():
        padded = attends_alone(how.model)
        one = _decode_batch if padded else partial(_decode_as_one, cached=has_cache(how.model))
        widths = [len(prefix) + limit for prefix, limit in zip(prefixes, limits, strict=True)]  # that the cache may come to

        def measure(batch: list[int]) -> list[list[int]]:
            def of_batch(logits: Tensor, rows: Sequence[int], step: int) -> Tensor:
                return choose(logits, [batch[row] for row in rows], step)

            return one(how, [prefixes[i] for i in batch], [limits[i] for i in batch], stops, of_batch)

        def planned(numbers: list[int], size: Size) -> list[list[int]]:
            """In one batch only prefixes of one length, where they are not padded."""
            groups = [numbers] if padded else [list(same) for _, same in groupby(numbers, key=lambda i: len(prefixes[i]))]
            return [batch for group in groups for batch in cut(group, widths, size)]

        found = over_batches(how, "decoding", [[i] for i in order], widths, planned, measure, what)
    return [found[i] for i in range(len(prefixes))]


def stop_tokens(model: PreTrainedModel, eos: int) -> set[int]:
    """What ends a text: the tokenizer's end-of-sequence token, and those of the model's generation config."""
    config = getattr(unwrap(model), "generation_config", None)
    more = getattr(config, "eos_token_id", None)
    return {eos, *(more if isinstance(more, list) else [more] if more is not None else [])}


def positions_of(model: PreTrainedModel) -> int | None:
    """How many tokens the model has positions for, where it says so."""
    positions: int | None = getattr(unwrap(model).config.get_text_config(), "max_position_embeddings", None)
    return positions


def _limit(prompt: int, most: Sequence[int], max_new_tokens: int | None) -> int:
    bounds = [length - prompt for length in most]
    bounds += [max_new_tokens] if max_new_tokens is not None else []
    return max(1, min(bounds, default=MAX_LENGTH))


def _until(tokens: list[int], stops: set[int]) -> list[int]:
    return next((tokens[:i] for i, token in enumerate(tokens) if token in stops), tokens)


def _pad_left(how: Pass, prefixes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(B, T) ids and mask; padding on the left, where generation does not look."""
    width = max(map(len, prefixes))
    ids = torch.full((len(prefixes), width), how.pad)
    mask = torch.zeros(len(prefixes), width, dtype=torch.long)
    for i, prefix in enumerate(prefixes):
        ids[i, width - len(prefix) :] = prefix
        mask[i, width - len(prefix) :] = 1
    return ids.to(how.model.device), mask.to(how.model.device)


def _decode_batch(
    how: Pass, prefixes: Sequence[Tensor], limits: Sequence[int], stops: set[int], choose: Choose
) -> list[list[int]]:
    model = unwrap(how.model)
    ids, mask = _pad_left(how, prefixes)
    positioned = "position_ids" in inspect.signature(model.forward).parameters
    found: list[list[int]] = [[] for _ in prefixes]
    alive = list(range(len(prefixes)))
    cache = DynamicCache()
    while alive:
        last = torch.arange(1, len(alive) + 1, device=ids.device) * ids.shape[1] - 1
        where = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]} if positioned else {}
        with head_at(model, last, ids.shape[1]):
            out = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **where)
        tokens = choose(out.logits.squeeze(0), alive, len(found[alive[0]]))  # (rows that are left,)
        for row, token in zip(alive, tokens.tolist(), strict=True):
            found[row].append(token)
        stay = [i for i, row in enumerate(alive) if found[row][-1] not in stops and len(found[row]) < limits[row]]
        if len(stay) < len(alive):
            kept = torch.tensor(stay, device=ids.device, dtype=torch.long)
            alive, tokens, mask = [alive[i] for i in stay], tokens[kept], mask[kept]
            cache.batch_select_indices(kept)
        ids = tokens[:, None]
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
    return found


def _decode_as_one(
    how: Pass, prefixes: Sequence[Tensor], limits: Sequence[int], stops: set[int], choose: Choose, cached: bool
) -> list[list[int]]:
    """The same for a model that keeps more than keys and values, or nothing: no padding, and no row leaves.

    The cache goes back in under the name that it comes out by; without one every step is a pass over all that there is.
    """
    model = unwrap(how.model)
    ids = torch.stack(list(prefixes)).to(how.model.device)
    positioned = "position_ids" in inspect.signature(model.forward).parameters
    found: list[list[int]] = [[] for _ in prefixes]
    cache: dict[str, Any] = {}
    while not all(len(row) >= n or stops & set(row) for row, n in zip(found, limits, strict=True)):
        last = torch.arange(1, len(ids) + 1, device=ids.device) * ids.shape[1] - 1
        width = len(prefixes[0]) + len(found[0])
        where = {"position_ids": torch.arange(width, device=ids.device)[-ids.shape[1] :].expand_as(ids)} if positioned else {}
        with head_at(model, last, ids.shape[1]):
            out = model(input_ids=ids, use_cache=cached, **where, **cache)
        tokens = choose(out.logits.squeeze(0), range(len(found)), len(found[0]))  # (rows,)
        for row, token in zip(found, tokens.tolist(), strict=True):
            row.append(token)
        cache = {name: out[name] for name in CACHES if out.get(name) is not None and not has_virtual_tokens(model)}
        ids = tokens[:, None] if cache else torch.cat([ids, tokens[:, None]], dim=1)
    rows = [row[:n] for row, n in zip(found, limits, strict=True)]
    return [[*(cut := _until(row, stops)), *row[len(cut) : len(cut) + 1]] for row in rows]
