"""One forward pass over a batch, and the label tokens' numbers that every objective is a function of.

Letters: B rows, T positions, M label tokens of the batch (in row-major order), V vocabulary, d hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlearn.models.evaluating import unwrap

IGNORE = -100  # the label of a token that carries no loss
Layer = int | Sequence[int] | None  # whose output is recorded: 0 the embeddings, the model's depth after its final norm


@dataclass(frozen=True)
class Counts:
    """How many label tokens and rows the whole step (or the whole set) has, over all micro-batches and processes."""

    tokens: int
    rows: int

    def without(self, n: int) -> float:
        """The label tokens without the first `n` of each row; of endless rows (`passes.batches.NO_WEIGHT`) endless ones."""
        return self.tokens - n * self.rows if math.isfinite(self.tokens) else self.tokens


@dataclass(frozen=True)
class Tokens:
    """The label tokens of some rows under the model, with what an objective asked for beside.

    Attributes:
        nll: (M,) nats, l_t = -log p(y_t | y_<t, x; theta), float32 or wider.
        row: (M,) which of the `n_rows` rows each token belongs to.
        logits: (M, V), float32 or wider; None in a forward-mode pass that no objective reads them of.
        hidden: (M, d) output of the chosen layer at the position that predicts the token, (M, L, d) of several, or None.
        ref_nll: (M,) nats, l_t under the reference model, or None.
        ref_logits: (M, V) of the reference model, or None.
        ref_hidden: as `hidden`, of the reference model, or None.
        noise: (d,) the run's fixed random vector, uniform on [0, 1), or None.
        refusal: (k,) token ids of the run's refusal, or None.
        second: the tokens of the same rows' second answers, as many rows, or None.
        label: (M,) the token ids y_t.
        from_uniform, to_uniform, spread, rest, refusal_nll, ref_kl, ref_js, ref_rest, ref_odds: (M,) as `.statistics` has
            them where they were formed, else None; an objective reads them by `needed`.
    """

    nll: Tensor
    row: Tensor
    n_rows: int
    logits: Tensor
    hidden: Tensor | None = None
    ref_nll: Tensor | None = None
    ref_logits: Tensor | None = None
    ref_hidden: Tensor | None = None
    noise: Tensor | None = None
    refusal: Tensor | None = None
    second: Tokens | None = None
    label: Tensor | None = None
    from_uniform: Tensor | None = None
    to_uniform: Tensor | None = None
    spread: Tensor | None = None
    rest: Tensor | None = None
    refusal_nll: Tensor | None = None
    ref_kl: Tensor | None = None
    ref_js: Tensor | None = None
    ref_rest: Tensor | None = None
    ref_odds: Tensor | None = None

    def sum_rows(self, values: Tensor) -> Tensor:
        """(M,) -> (n_rows,): the sum of `values` over each row's tokens."""
        return values.new_zeros(self.n_rows).index_add(0, self.row, values)

    def mean_rows(self, values: Tensor) -> Tensor:
        """(M,) -> (n_rows,): the mean of `values` over each row's tokens."""
        return self.sum_rows(values) / self.row_lengths()

    def row_lengths(self) -> Tensor:
        """(n_rows,) how many label tokens each row has."""
        return torch.bincount(self.row, minlength=self.n_rows)

    def place(self) -> Tensor:
        """(M,) how many label tokens of its row stand before each."""
        return torch.arange(len(self.row), device=self.row.device) - torch.searchsorted(self.row, self.row)

    def split(self, n: int, m: int | None = None) -> tuple[Tokens, Tokens]:
        """The tokens of the first `n` rows, and those of the rest.

        Args:
            m: how many those rows have; None: they are counted, for which a GPU is waited for.
        """
        m = int((self.row < n).sum()) if m is None else m
        size = len(self.row)  # all of them are not cut out: a slice's gradient is a copy with zeros around
        first = self if m == size else self.at(slice(None, m))
        rest = self if m == 0 else self.at(slice(m, None))
        return replace(first, n_rows=n), replace(rest, row=rest.row - n, n_rows=self.n_rows - n)

    def take(self, rows: Tensor) -> Tokens:
        """The tokens of those rows, (n,), in that order; a row may be there more than once."""
        row, at = (rows.unsqueeze(1) == self.row).nonzero(as_tuple=True)
        return replace(self.at(at), row=row, n_rows=len(rows))

    def at(self, part: slice | Tensor) -> Tokens:
        """Those tokens, of the same rows."""
        of_run = ("noise", "refusal")  # not a token's
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in of_run}
        found: dict[str, Any] = {name: x[part] for name, x in values.items() if isinstance(x, Tensor)}
        return replace(self, **found)


def label_positions(labels: Tensor) -> Tensor:
    """(B, T) labels -> (M,) indices into B * T of the positions that predict a label token."""
    predicts = F.pad(labels[:, 1:] != IGNORE, (0, 1))  # position t predicts token t + 1
    return predicts.flatten().nonzero().squeeze(1)


def label_positions_of(batch: Mapping[str, Any]) -> Tensor:
    """The same of a batch, which may know them as `at`: a GPU is waited for to find them."""
    return batch["at"] if "at" in batch else label_positions(batch["labels"])


@contextmanager
def head_at(model: nn.Module, positions: Tensor, width: int) -> Iterator[None]:
    """Form logits at `positions` (indices into B * T) only: the output head sees (1, M, d) in place of (B, T, d).

    Args:
        width: T.
    """

    def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (at_positions(args[0], positions, width).unsqueeze(0), *args[1:])

    handles = [unwrap(model).get_output_embeddings().register_forward_pre_hook(select)]
    if getattr(unwrap(model), "dtype", None) == torch.float64:
        handles += [m.register_forward_pre_hook(_bound_mask, with_kwargs=True) for m in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _bound_mask(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Change, in place, an attention mask's least float64 to the least float32: transformers' softmax is in float32.

    There it would be minus infinity, and a padding token that sees padding alone not a number, nor then the tokens after it.
    """
    least = torch.finfo(torch.float32).min
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim() == 4 and x.dtype == torch.float64]
    for mask in tensors:
        if not mask.requires_grad and mask.numel() and mask.min() < least:
            mask.clamp_(min=least)


def at_positions(hidden: Tensor, positions: Tensor, width: int) -> Tensor:
    """(B, T, d) -> (M, d) at `positions`, indices into B * T; virtual tokens before the T (prompt tuning) are passed over."""
    return hidden[:, -width:].flatten(0, 1)[positions]


def layers_of(layer: Layer) -> tuple[int, ...]:
    """The numbers of one layer, of several, or of none."""
    return () if layer is None else (layer,) if isinstance(layer, int) else tuple(layer)


def pick(hidden: Tensor | None, layers: Sequence[int], layer: Layer, dim: int = 1) -> Tensor:
    """Of the outputs of `layers`, stacked along `dim`, that of one, without `dim`, or those of several."""
    assert hidden is not None
    if isinstance(layer, int):
        return hidden.select(dim, layers.index(layer))
    return hidden.index_select(dim, torch.tensor([layers.index(one) for one in layers_of(layer)], device=hidden.device))


def token_outputs(model: nn.Module, batch: Mapping[str, Any], layer: Layer = None) -> Tokens:
    """Run `model` on a padded batch and return its label tokens' numbers.

    Args:
        model: a causal LM of transformers, possibly wrapped by DistributedDataParallel.
        batch: `input_ids`, `attention_mask` and `labels`, each (B, T); labels not shifted, `IGNORE` where no loss is.
        layer: also record the output of this layer: 0 the embeddings, the model's depth after the final norm; or of several.

    Raises:
        ValueError: the model has no layer of that number.
    """
    labels = batch["labels"]
    at = label_positions_of(batch)
    logits, hidden = outputs_at(model, batch, at, layer)
    label = labels.flatten()[at + 1]
    return Tokens(nll_of(logits, label), at // labels.shape[1], labels.shape[0], logits, hidden, label=label)


def nll_of(logits: Tensor, label: Tensor) -> Tensor:
    """(M,) nats: -log softmax(logits)[label]."""
    return F.cross_entropy(logits, label, reduction="none")


def outputs_at(
    model: nn.Module, batch: Mapping[str, Any], at: Tensor, layer: Layer = None, head: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Logits (M, V) and the layer's (layers') outputs (M, d) or (M, L, d) at positions of a batch, indices (M,) into B * T.

    Args:
        head: false: no logits are formed, and those returned are (0, V).

    Raises:
        ValueError: the model has no layer of that number.
    """
    depth = unwrap(model).config.get_text_config().num_hidden_layers
    for number in layers_of(layer):
        if not 0 <= number <= depth:
            raise ValueError(f"layer {number}: the model has layers 0 (its embeddings) to {depth} (after its final norm)")
    width = batch["labels"].shape[1]
    with head_at(model, at if head else at[:0], width):
        out = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            use_cache=False,
            output_hidden_states=layer is not None,
        )
    found = [widen(at_positions(out.hidden_states[number], at, width)) for number in layers_of(layer)]
    hidden = None if layer is None else found[0] if isinstance(layer, int) else torch.stack(found, 1)
    return widen(out.logits.squeeze(0)), hidden


def widen(x: Tensor) -> Tensor:
    """At least float32: a loss is never computed from half-precision logits."""
    return x if x.dtype == torch.float64 else x.float()
