"""The forward-mode pass: how every label token's outputs change along the directions V, and from it many objectives at once.

One forward pass carries the outputs' tangents (their change along each V). An objective is a function of the outputs, so
its G-effect is its gradient with respect to them times the tangents: a small contraction for each objective and
hyper-parameter. The pass costs 2 FLOP a parameter and token, and 4 more for each direction. Of the distributions over the
vocabulary it gives statistics; the logits and their tangents only where an objective reads them themselves.

Letters: M label tokens of the batch, D directions, V vocabulary, d hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from unlearn.geffect.risks import Directions
from unlearn.objectives.loss import Loss
from unlearn.objectives.statistics import STATISTICS, along
from unlearn.objectives.tokens import Layer, Tokens, label_positions_of, layers_of, outputs_at, pick
from unlearn.passes.batches import Batch

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Dual:
    """A batch's label tokens and the tangents of their outputs, (D, M, ...) each.

    `hidden` is that of `layers`, (M, L, d), where there are any.
    """

    tokens: Tokens
    tangents: dict[str, Tensor]
    layers: tuple[int, ...] = ()

    def at(self, layer: Layer) -> Dual:
        """With the output of that layer alone, or of those, as a loss that looks at it has it."""
        found: dict[str, Any] = {name: getattr(self.tokens, name) for name in ("hidden", "ref_hidden")}
        if layer is None:
            tangents = {name: x for name, x in self.tangents.items() if name != "hidden"}
            return Dual(replace(self.tokens, hidden=None, ref_hidden=None), tangents)
        picked: dict[str, Any] = {name: pick(x, self.layers, layer) for name, x in found.items() if x is not None}
        changes = {name: pick(x, self.layers, layer, dim=2) for name, x in self.tangents.items() if name == "hidden"}
        return Dual(replace(self.tokens, **picked), self.tangents | changes)


class _Outputs(nn.Module):
    """The label tokens' outputs as a module's, so that its parameters can be replaced by dual numbers."""

    def __init__(self, model: nn.Module, batch: Batch, layers: tuple[int, ...]) -> None:
        super().__init__()
        self.model, self.batch, self.layers = model, batch, layers

    def forward(self) -> dict[str, Tensor]:
        logits, hidden = outputs_at(self.model, self.batch, label_positions_of(self.batch), self.layers or None)
        return {"logits": logits} if hidden is None else {"logits": logits, "hidden": hidden}


@torch.no_grad()  # not inference_mode: tangents silently vanish there
def token_tangents(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    directions: Directions,
    batch: Batch,
    layer: Layer = None,
    wanted: frozenset[str] = frozenset(),
    given: Mapping[str, Tensor] | None = None,
) -> Dual:
    """Run the model on a batch, in its weights' precision, with the tangents along each direction.

    The directions share the pass's primal part (`vmap` over `jvp`), but where an operation can't: then each has its own.

    Args:
        wanted: beside losses and the layers' outputs: `logits`, `STATISTICS`, and what of `given` the tokens are to keep.
        given: what statistics are made of beside logits, and what does not change: `refusal`, `ref_logits`, `ref_hidden`.
    """
    layers, given = layers_of(layer), given or {}
    outputs = _Outputs(model, batch, layers)
    weights = {f"model.{name}": p.detach() for name, p in parameters.items()}
    v = {name: directions[name.removeprefix("model.")].to(w) for name, w in weights.items()}

    def run(w: Weights) -> dict[str, Tensor]:
        return functional_call(outputs, w, ())

    with torch.autocast(batch["labels"].device.type, enabled=False):
        found, tangents = along_each(run, weights, v)
    labels = batch["labels"]
    at = label_positions_of(batch)
    row, label = at // labels.shape[1], labels.flatten()[at + 1]
    tokens = Tokens(row=row, n_rows=len(labels), label=label, nll=at.new_empty(0), **found | given)
    values, changes = along(tokens, sorted(wanted & STATISTICS.keys()), tangents["logits"])
    dropped: dict[str, Any] = {name: None for name in ("logits", *given) if name not in wanted}
    if "logits" in dropped:
        del tangents["logits"]
    return Dual(replace(tokens, **values | dropped), tangents | changes, layers)


def along_each(f: Callable[[Weights], Any], w: Weights, v: Weights) -> tuple[Any, Any]:
    """f(w), and its changes along the stacked directions v, (D, ...). Attention takes the path that has a forward mode.

    A path that an operation keeps from being differentiated twice may be dropped without an error: compare with the total.
    """

    def along(v: Weights) -> tuple[Any, Any]:
        value, change = jvp(f, (w,), (v,))  # type: ignore[misc]
        return value, change

    with sdpa_kernel(SDPBackend.MATH), PaddingHeld():
        try:
            return vmap(along, out_dims=(None, 0))(v)  # type: ignore[arg-type]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # an operation without a forward mode, or one that `vmap` can't take apart
            return by_transposes(f, w, v)


@torch.enable_grad()
def by_transposes(f: Callable[[Weights], Any], w: Weights, v: Weights) -> tuple[Any, Any]:
    """The same by backward passes alone: J^T u is linear in u, and its transpose takes v to J v. It needs more memory."""
    w = {name: x.detach().requires_grad_() for name, x in w.items()}
    outputs, structure = tree_flatten(f(w))
    changing = [y for y in outputs if y.requires_grad]
    u = [torch.zeros_like(y, requires_grad=True) for y in changing]
    pulled = torch.autograd.grad(changing, list(w.values()), u, create_graph=True, allow_unused=True)
    used = {name: x for name, x in zip(w, pulled, strict=True) if x is not None}
    n = len(next(iter(v.values())))
    each = [torch.autograd.grad(list(used.values()), u, [v[x][d] for x in used], retain_graph=True) for d in range(n)]
    found = iter(map(torch.stack, zip(*each, strict=True)))
    changes = [next(found) if y.requires_grad else y.new_zeros((n, *y.shape)) for y in outputs]
    return tree_unflatten([y.detach() for y in outputs], structure), tree_unflatten(changes, structure)


class PaddingHeld(TorchFunctionMode):
    """While entered, what is looked up at an embedding's `padding_idx` has no tangent, as it has no gradient.

    Forward mode would let it change. It is held where it is looked up: what a module makes of it has a tangent, and so has a
    head that is tied to the embedding. `zero`: it is 0, as where V is looked up in the weights' place.
    """

    def __init__(self, zero: bool = False) -> None:
        super().__init__()
        self.zero = zero

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is not F.embedding:
            return output
        given = inspect.signature(F.embedding).bind(*args, **kwargs).arguments
        padding = given.get("padding_idx")
        if padding is None:
            return output
        where = (given["input"] == padding % len(given["weight"])).unsqueeze(-1)
        return torch.where(where, torch.zeros_like(output) if self.zero else output.detach(), output)


def contract(loss: Loss, dual: Dual, batch: Mapping[str, Any]) -> Tensor:
    """Each label token's share of the loss's G-effects, (D, M) float64.

    The share is what the token's own outputs contribute: w_t J_t for an objective that weighs token losses.
    """
    dual = dual.at(loss.layer if set(layers_of(loss.layer)) <= set(dual.layers) else None)
    leaves = {name: getattr(dual.tokens, name).detach().requires_grad_() for name in dual.tangents}
    with torch.enable_grad():
        parts = loss.of_tokens(replace(dual.tokens, **leaves), batch)
        grads = torch.autograd.grad(sum(parts.values()), list(leaves.values()), allow_unused=True)  # type: ignore[arg-type]
    shares = torch.zeros(dual.tangents["nll"].shape, dtype=torch.float64, device=dual.tokens.nll.device)
    for name, grad in zip(leaves, grads, strict=True):
        if grad is not None:
            products = grad * dual.tangents[name]  # (D, M) or (D, M, ...)
            shares += products.flatten(2).sum(2) if products.dim() > 2 else products
    return shares
