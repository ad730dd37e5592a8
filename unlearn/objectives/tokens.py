"""One forward pass over a batch, and the label tokens' numbers that every objective is a function of.

Letters: B rows, T positions, M label tokens of the batch (in row-major order), V vocabulary, d hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlearn.models.evaluating import unwrap

IGNORE = -100  # the label of a token that carries no loss


@dataclass(frozen=True)
class Counts:
    """How many label tokens and rows the whole step (or the whole set) has, over all micro-batches and processes."""

    tokens: int
    rows: int


@dataclass(frozen=True)
class Tokens:
    """The label tokens of some rows under the model, with what an objective asked for beside.

    Attributes:
        nll: (M,) nats, l_t = -log p(y_t | y_<t, x; theta), float32 or wider.
        row: (M,) which of the `n_rows` rows each token belongs to.
        logits: (M, V), float32 or wider.
        hidden: (M, d) output of the chosen layer at the position that predicts the token, or None.
        ref_nll: (M,) nats, l_t under the reference model, or None.
        ref_logits: (M, V) of the reference model, or None.
        noise: (d,) the run's fixed random vector, uniform on [0, 1), or None.
        second: the tokens of the same rows' second answers, or None.
    """

    nll: Tensor
    row: Tensor
    n_rows: int
    logits: Tensor
    hidden: Tensor | None = None
    ref_nll: Tensor | None = None
    ref_logits: Tensor | None = None
    noise: Tensor | None = None
    second: Tokens | None = None

    def sum_rows(self, values: Tensor) -> Tensor:
        """(M,) -> (n_rows,): the sum of `values` over each row's tokens."""
        return values.new_zeros(self.n_rows).index_add(0, self.row, values)

    def split(self, n: int) -> tuple[Tokens, Tokens]:
        """The tokens of the first `n` rows, and those of the rest."""
        m = int((self.row < n).sum())
        first = {f.name: _cut(getattr(self, f.name), slice(None, m)) for f in fields(self)}
        rest = {f.name: _cut(getattr(self, f.name), slice(m, None)) for f in fields(self)}
        rest["row"] = rest["row"] - n
        whole = {"noise": self.noise}  # the run's, not a token's
        return Tokens(**first | whole | {"n_rows": n}), Tokens(**rest | whole | {"n_rows": self.n_rows - n})


def _cut(value: Any, part: slice) -> Any:
    return value[part] if isinstance(value, Tensor) else value


def label_positions(labels: Tensor) -> Tensor:
    """(B, T) labels -> (M,) indices into B * T of the positions that predict a label token."""
    predicts = F.pad(labels[:, 1:] != IGNORE, (0, 1))  # position t predicts token t + 1
    return predicts.flatten().nonzero().squeeze(1)


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


def token_outputs(model: nn.Module, batch: Mapping[str, Any], layer: int | None = None) -> Tokens:
    """Run `model` on a padded batch and return its label tokens' numbers.

    Args:
        model: a causal LM of transformers, possibly wrapped by DistributedDataParallel.
        batch: `input_ids`, `attention_mask` and `labels`, each (B, T); labels not shifted, `IGNORE` where no loss is.
        layer: also record the output of this layer: 0 the embeddings, the model's depth after the final norm.

    Raises:
        ValueError: the model has no layer of that number.
    """
    depth = unwrap(model).config.get_text_config().num_hidden_layers
    if layer is not None and not 0 <= layer <= depth:
        raise ValueError(f"layer {layer}: the model has layers 0 (its embeddings) to {depth} (after its final norm)")
    labels = batch["labels"]
    at = label_positions(labels)
    with head_at(model, at, labels.shape[1]):
        out = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            use_cache=False,
            output_hidden_states=layer is not None,
        )
    logits = widen(out.logits.squeeze(0))  # (M, V)
    return Tokens(
        nll=F.cross_entropy(logits, labels.flatten()[at + 1], reduction="none"),
        row=at // labels.shape[1],
        n_rows=labels.shape[0],
        logits=logits,
        hidden=None if layer is None else widen(at_positions(out.hidden_states[layer], at, labels.shape[1])),
    )


def widen(x: Tensor) -> Tensor:
    """At least float32: a loss is never computed from half-precision logits."""
    return x if x.dtype == torch.float64 else x.float()
