"""Teacher forcing: one forward pass over a row, and all that it says of the row's answer.

Rows are dictionaries of `input_ids` and `labels`, each (T,), labels `IGNORE` on the prompt (see `objectives.rows`). A row that
is given twice is passed once, and rows with the same prompt share the prompt's pass: the answers go on from its
key-value cache. With P prompt tokens and answers of A_i, that is P + sum A_i tokens where row by row it is sum (P + A_i). With
several processes the batches are split over them, and every process gets all results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from unlearn.models.adapters import has_virtual_tokens
from unlearn.models.evaluating import evaluating, unwrap
from unlearn.models.sharding import is_sharded
from unlearn.objectives.rows import Row, collate, seconds
from unlearn.objectives.tokens import IGNORE, head_at, token_outputs, widen
from unlearn.passes.batches import others_quiet
from unlearn.passes.sizes import Budget, Kind, Size, cut, each

Prompt = tuple[int, ...]
KEPT = 2  # positions that some models keep for themselves
PADDING = 3  # tokens behind a row
_LOOKED_AT: WeakSet[nn.Module] = WeakSet()  # whose padding was found to change nothing


@dataclass(frozen=True)
class Forced:
    """What one pass says of a row's N label tokens: the answer's T, then end-of-sequence (a row that was cut lacks it).

    Attributes:
        labels: (N,) the tokens.
        nll: (N,) nats, -log p of each.
        predicted: (N,) the model's argmax in each one's place.
        mean, variance: (N,) of log p over the vocabulary under the model's own distribution, or None.
        ends: whether the last label is the end-of-sequence token.
    """

    labels: NDArray[np.int64]
    nll: NDArray[Any]
    predicted: NDArray[np.int64]
    mean: NDArray[Any] | None
    variance: NDArray[Any] | None
    ends: bool

    @property
    def size(self) -> int:
        """T, the answer's tokens."""
        return len(self.labels) - self.ends

    @property
    def loss(self) -> float:
        """The token mean, end-of-sequence counted, in nats."""
        return float(self.nll.astype(np.float64).mean())

    @property
    def right(self) -> NDArray[np.bool_]:
        """(T,) whether the argmax is the answer's token."""
        return (self.labels == self.predicted)[: self.size]

    @property
    def followed(self) -> int:
        """How many label tokens greedy decoding gives, from the first on, before it leaves the answer."""
        wrong = np.flatnonzero(self.labels != self.predicted)
        return int(wrong[0]) if len(wrong) else len(self.labels)


@dataclass(frozen=True)
class Pass:
    """How a model is run over rows: padding and end-of-sequence ids, autocast, and how much at once.

    Attributes:
        batch_size: rows of a batch at most (four times that in decoding); None, with no `tokens_per_batch`: 16 on a CPU.
        tokens_per_batch: tokens of a batch at most, its padding counted (four times that in decoding, with all that is
            decoded counted, too); None: on a GPU what its free memory holds.
        budget: what that came to; halved when memory ran out.
    """

    model: PreTrainedModel
    pad: int
    eos: int
    bf16: bool = False
    batch_size: int | None = None
    tokens_per_batch: int | None = None
    budget: Budget = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        budget = Budget(self.model, self.bf16, Size(self.batch_size, self.tokens_per_batch))
        object.__setattr__(self, "budget", budget)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """In eval mode, without gradients, under autocast where wanted."""
        autocast = torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16)
        with evaluating(self.model, checkpointing=False), torch.no_grad(), autocast:
            yield


def teacher_force(how: Pass, rows: Sequence[Row], moments: bool = False, what: str = "teacher forcing") -> list[Forced]:
    """One `Forced` a row, float32 or wider on the CPU; `moments`: with mean and variance.

    Raises:
        ValueError: a row has no label token, or its first token has a label.
    """
    check_labels(rows, what)
    distinct: dict[tuple[Prompt, Prompt], Row] = {}
    keys = [(tuple(row["input_ids"].tolist()), tuple(row["labels"].tolist())) for row in rows]
    for key, row in zip(keys, rows, strict=True):
        distinct.setdefault(key, row)
    once = list(distinct.values())
    with how.evaluating():
        share = shares_prompts(how.model)
        prompts = [_prompt(row) if share else None for row in once]
        widths = [len(row["input_ids"]) for row in once]
        groups = _groups(once, prompts, range(len(once)))
        planned = partial(_plan, once, prompts)
        found = over_batches(how, "losses", groups, widths, planned, _Measure(how, once, prompts, moments), what)
    place = {key: i for i, key in enumerate(distinct)}
    return [found[place[key]] for key in keys]


def check_labels(rows: Sequence[Row], what: str) -> None:
    """Raises ValueError where a row has no label token, or has its first token for one."""
    for number, row in enumerate(rows, start=1):
        if row["labels"][0] != IGNORE:
            raise ValueError(
                f"{what}: row {number} of {len(rows)}: its first token has a label, and nothing before it to tell it"
            )
        if (row["labels"] == IGNORE).all():
            raise ValueError(f"{what}: row {number} of {len(rows)} has no label token: no answer, and no end of one")


def check_fit(model: PreTrainedModel, rows: Sequence[Row], places: Sequence[str]) -> None:
    """Raises ValueError where the model does not embed a row's token, or has no position for it; `places` names the rows."""
    embedded = len(unwrap(model).get_input_embeddings().weight)
    for place, row in zip(places, rows, strict=True):
        used = torch.cat([row["input_ids"], row["labels"][row["labels"] != IGNORE]])
        if used.is_floating_point():
            raise ValueError(f"{place}: its input_ids or labels are {used.dtype}, and tokens are whole numbers")
        for token in (int(used.min()), int(used.max())):
            if not 0 <= token < embedded:
                raise ValueError(f"{place}: has the token {token}, and the model embeds {embedded}: 0 to {embedded - 1}")
    if rows:
        _check_padding(model, min(rows, key=lambda row: len(row["input_ids"])))
    positions = getattr(unwrap(model).config.get_text_config(), "max_position_embeddings", None)
    length, longest = max(((len(row["input_ids"]), i) for i, row in enumerate(rows)), default=(0, 0))
    if positions is None or positions < 1 or length <= positions - KEPT:
        return
    ids = rows[longest]["input_ids"][None].to(model.device)
    if _runs(model, ids):  # rotary positions go on behind those that a model was made for
        return
    fit = positions if _runs(model, ids[:, :positions]) else positions - KEPT
    raise ValueError(
        f"{places[longest]}: has {length} tokens, and the model positions for {positions}; max_length={fit} cuts rows"
    )


def _runs(model: PreTrainedModel, ids: Tensor) -> bool:
    try:
        with torch.no_grad(), evaluating(model, checkpointing=False):
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except torch.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError):
        return False
    return True


def _check_padding(model: PreTrainedModel, row: Row) -> None:
    """Raises ValueError where what a model says of a row depends on the padding behind it; looks once at a model."""
    if model in _LOOKED_AT:
        return
    n = len(row["input_ids"])
    padding = {"input_ids": torch.full((PADDING,), int(row["input_ids"][-1])), "labels": torch.full((PADDING,), IGNORE)}
    longer = {key: torch.cat([row[key], padding[key]]) for key in padding}
    alone, behind = (collate([one], 0) for one in (row, longer))
    behind["attention_mask"][:, n:] = 0
    with torch.no_grad(), evaluating(model, checkpointing=False):
        nlls = [token_outputs(model, {key: x.to(model.device) for key, x in one.items()}).nll for one in (alone, behind)]
    rounding = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1
    if not (nlls[0] - nlls[1]).norm() <= rounding * nlls[0].norm():
        raise ValueError(
            f"{type(unwrap(model)).__name__}: the padding behind a row changes what the model says of it, so rows can't be"
            " padded to one length; it is not supported"
        )
    _LOOKED_AT.add(model)


def token_nlls(how: Pass, rows: Sequence[Row], what: str = "losses") -> list[Tensor]:
    """For each row the nats of its label tokens, (label tokens,) on the CPU, under teacher forcing in eval mode."""
    return [torch.from_numpy(forced.nll) for forced in teacher_force(how, rows, what=what)]


def with_ref_nll(how: Pass, rows: Sequence[Row], nlls: Sequence[Tensor] | None = None) -> list[Row]:
    """The rows and their second answers with `ref_nll`, the nats of their label tokens under the pass's model.

    Args:
        nlls: of the rows' own answers, where they are known.
    """
    if nlls is None:
        nlls = token_nlls(how, rows, what="reference")
    several = [other for row in rows for other in seconds(row)]
    of_second = iter(token_nlls(how, several, what="reference") if several else [])
    found = []
    for row, nll in zip(rows, nlls, strict=True):
        others = [other | {"ref_nll": next(of_second)} for other in seconds(row)]
        second = {"second": others if isinstance(row["second"], list) else others[0]} if others else {}
        found.append(row | {"ref_nll": nll} | second)
    return found


def token_mean(nlls: Sequence[Tensor]) -> float:
    """The mean over all tokens of all rows, in nats."""
    return torch.cat(list(nlls)).double().mean().item()


def over_batches(
    how: Pass,
    kind: Kind,
    groups: Sequence[Sequence[int]],
    widths: Sequence[int],
    planned: Callable[[list[int], Size], list[list[int]]],
    measure: Callable[[list[int]], Sequence[Any]],
    what: str,
) -> dict[int, Any]:
    """`measure` on this process's share of the row numbers, in batches; the results of all by row number.

    A model in shards is run by all processes together: then each has all rows.

    Args:
        groups: of row numbers, split over the processes as they are, however they are cut then.
        widths: tokens of each row.
        planned: batches of row numbers, as a size holds them.
    """
    state = PartialState()
    together = is_sharded(how.model)
    mine = groups if together else groups[state.process_index :: state.num_processes]
    numbers = [i for group in mine for i in group]
    found: list[tuple[int, Any]] = []
    with tqdm(total=len(numbers), desc=what, leave=False, **others_quiet()) as bar:
        for batch, values in each(how.budget, kind, what, numbers, widths, planned, measure):
            found += zip(batch, values, strict=True)
            bar.update(len(batch))
    return dict(found if together else gather_object(found))


def shares_prompts(model: PreTrainedModel) -> bool:
    """Whether the model's cache is keys and values of every position: then any number of answers can go on from one prompt."""
    kinds = _cache_kinds(model)
    return bool(kinds) and all(kind is DynamicLayer for kind in kinds)


def attends_alone(model: PreTrainedModel) -> bool:
    """Whether the model keeps nothing but keys and values, be it of a window: then a mask hides padding from all of it."""
    kinds = _cache_kinds(model)
    return bool(kinds) and all(kind in (DynamicLayer, DynamicSlidingWindowLayer) for kind in kinds)


def has_cache(model: PreTrainedModel) -> bool:
    """Whether the model runs with a cache: xLSTM's does not fit its own states."""
    return _cache_kinds(model) != []


def _cache_kinds(model: PreTrainedModel) -> list[type]:
    """The classes of the layers of the model's cache; of one that is not made of such layers, its own; of a broken one none."""
    try:
        out = model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device), use_cache=True)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError):
        return []
    cache = out.get("past_key_values")
    own = type(cache) is DynamicCache and not has_virtual_tokens(model)
    return [type(layer) for layer in cache.layers] if own else [type(cache)]


def prompt_length(row: Row) -> int:
    """Tokens before the first label; all of them where there is none."""
    labelled = (row["labels"] != IGNORE).nonzero()
    return int(labelled[0]) if len(labelled) else len(row["labels"])


def _prompt(row: Row) -> Prompt | None:
    """The tokens before the labels; None where not all that comes after them is labelled."""
    start = prompt_length(row)
    return tuple(row["input_ids"][:start].tolist()) if (row["labels"][start:] != IGNORE).all() else None


def _groups(rows: Sequence[Row], prompts: Sequence[Prompt | None], numbers: Iterable[int]) -> list[list[int]]:
    """Row numbers by their prompts: first those that are alone with theirs, by length; then the rest, by prompts' lengths."""
    found: dict[Prompt, list[int]] = {}
    for i in numbers:
        found.setdefault((-1 - i,) if (prompt := prompts[i]) is None else prompt, []).append(i)

    def place(group: list[int]) -> tuple[bool, int, int]:
        longest, prompt = max(len(rows[i]["input_ids"]) for i in group), prompts[group[0]]
        return (False, -longest, 0) if prompt is None or len(group) == 1 else (True, -len(prompt), -longest)

    return sorted(found.values(), key=place)


def _plan(rows: Sequence[Row], prompts: Sequence[Prompt | None], numbers: list[int], size: Size) -> list[list[int]]:
    """Row numbers in batches: those that share a prompt with others, by prompts of one length; and the rest, by length."""
    groups = _groups(rows, prompts, numbers)
    widths = [len(row["input_ids"]) for row in rows]
    batches = cut([group[0] for group in groups if len(group) == 1], widths, size)
    last = None
    for piece in (piece for group in groups if len(group) > 1 for piece in cut(group, widths, size)):
        length = prompt_length(rows[piece[0]])
        if length == last and size.holds(len(batches[-1]) + len(piece), max(widths[i] for i in [*batches[-1], *piece])):
            batches[-1] += piece
        else:
            batches.append(piece)
        last = length
    return batches


class _Measure:
    """A batch's rows to `Forced`: each prompt once where rows share it, else whole rows."""

    def __init__(self, how: Pass, rows: Sequence[Row], prompts: Sequence[Prompt | None], moments: bool) -> None:
        self.how, self.rows, self.prompts, self.moments = how, rows, prompts, moments

    def __call__(self, batch: list[int]) -> list[Forced]:
        rows = [self.rows[i] for i in batch]
        labels = [row["labels"][row["labels"] != IGNORE] for row in rows]
        prompts = [prompt for i in batch if (prompt := self.prompts[i]) is not None]
        distinct = list(dict.fromkeys(prompts))
        if len(prompts) == len(rows) and len(distinct) < len(rows):
            logits = self._going_on(distinct, [distinct.index(prompt) for prompt in prompts], labels)
        else:
            inputs = {key: value.to(self.how.model.device) for key, value in collate(rows, self.how.pad).items()}
            logits = token_outputs(self.how.model, inputs).logits
        return self._of_logits(logits, labels)

    def _going_on(self, prompts: list[Prompt], owner: list[int], labels: list[Tensor]) -> Tensor:
        """(label tokens, V) logits of answers that go on from their prompts, all of one length P: (G, P), then (B, A - 1)."""
        model = unwrap(self.how.model)
        device, length = model.device, len(prompts[0])
        ids = torch.tensor(prompts, device=device)
        with head_at(model, torch.arange(1, len(prompts) + 1, device=device) * length - 1, length):
            out = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
        first = widen(out.logits.squeeze(0))[torch.tensor(owner, device=device)]  # (B, V)
        answers = pad_sequence([label[:-1] for label in labels], batch_first=True, padding_value=self.how.pad).to(device)
        if answers.shape[1] == 0:
            return first
        sizes = torch.tensor([len(label) - 1 for label in labels], device=device)
        real = torch.arange(answers.shape[1], device=device) < sizes[:, None]
        out.past_key_values.batch_select_indices(torch.tensor(owner, device=device))
        mask = torch.cat([real.new_ones(len(labels), length), real], dim=1).long()
        with head_at(model, real.flatten().nonzero().squeeze(1), answers.shape[1]):
            later = model(input_ids=answers, attention_mask=mask, past_key_values=out.past_key_values, use_cache=True).logits
        rest = widen(later.squeeze(0)).split(sizes.tolist())
        return torch.cat([part for one, others in zip(first, rest, strict=True) for part in (one[None], others)])

    def _of_logits(self, logits: Tensor, labels: list[Tensor]) -> list[Forced]:
        wanted = torch.cat(labels).to(logits.device)
        log_p = logits.log_softmax(-1)
        values = [-log_p.gather(1, wanted[:, None]).squeeze(1), logits.argmax(-1)]
        if self.moments:
            p = log_p.exp()
            mean = (p * log_p).nan_to_num(0).sum(-1)  # 0 log 0 = 0
            values += [mean, (p * (log_p - mean[:, None]) ** 2).nan_to_num(0).sum(-1)]
        sizes = [len(label) for label in labels]
        parts = [[part.numpy() for part in value.cpu().split(sizes)] for value in values]
        parts += [[None] * len(labels)] * (4 - len(parts))
        return [
            Forced(label.numpy(), nll, predicted, mean, variance, bool(label[-1] == self.how.eos))
            for label, nll, predicted, mean, variance in zip(labels, *parts, strict=True)
        ]
