"""The forward-mode pass: how every label token's outputs change along the directions V, and from it many objectives at once.

One forward pass carries the outputs' tangents (their change along each V). An objective is a function of the outputs, so
its G-effect is its gradient with respect to them times the tangents: a small contraction for each objective and
hyper-parameter. The pass costs 2 FLOP a parameter and token, and 4 more for each direction.

Letters: M label tokens of the batch, D directions, V vocabulary, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_unflatten

from unlearn.loss import Loss
from unlearn.risks import Batch, Directions
from unlearn.tokens import Tokens, label_positions, token_outputs

Weights = dict[str, Tensor]
OUTPUTS = ("nll", "logits", "hidden")  # of `Tokens`, what the model's weights change


@dataclass(frozen=True)
class Dual:
    """A batch's label tokens and the tangents of their outputs, (D, M, ...) each."""

    tokens: Tokens
    tangents: dict[str, Tensor]


class _Outputs(nn.Module):
    """The label tokens' outputs as a module's, so that its parameters can be replaced by dual numbers."""

    def __init__(self, model: nn.Module, batch: Batch, layer: int | None) -> None:
        super().__init__()
        self.model = model
        self.batch, self.layer = batch, layer

    def forward(self) -> dict[str, Tensor]:
        tokens = token_outputs(self.model, self.batch, self.layer)
        found = {name: getattr(tokens, name) for name in OUTPUTS}
        return {name: value for name, value in found.items() if value is not None}


@torch.no_grad()  # not inference_mode: tangents silently vanish there
def token_tangents(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], directions: Directions, batch: Batch, layer: int | None = None
) -> Dual:
    """Run the model on a batch, in its weights' precision, with the tangents along each direction.

    The directions share the pass's primal part (`vmap` over `jvp`), but where an operation can't: then each has its own.
    """
    outputs = _Outputs(model, batch, layer)
    weights = {f"model.{name}": p.detach() for name, p in parameters.items()}
    v = {name: directions[name.removeprefix("model.")].to(w) for name, w in weights.items()}

    def run(w: Weights) -> dict[str, Tensor]:
        return functional_call(outputs, w, ())

    handles = [m.register_forward_hook(_hold_padding) for m in model.modules() if isinstance(m, nn.Embedding)]
    try:
        found, tangents = along_each(run, weights, v)
    finally:
        for handle in handles:
            handle.remove()
    rows, width = batch["labels"].shape
    tokens = Tokens(row=label_positions(batch["labels"]) // width, n_rows=rows, **found)
    return Dual(tokens, tangents)


def along_each(f: Callable[[Weights], Any], w: Weights, v: Weights) -> tuple[Any, Any]:
    """f(w), and its changes along the stacked directions v, (D, ...). Attention takes the path that has a forward mode."""

    def along(v: Weights) -> tuple[Any, Any]:
        value, change = jvp(f, (w,), (v,))  # type: ignore[misc]
        return value, change

    with sdpa_kernel(SDPBackend.MATH):
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


def padding(module: nn.Module, args: tuple[Any, ...]) -> Tensor | None:
    """(..., 1), where an embedding meets its `padding_idx`: no gradient goes there, though a tied head's goes to that row."""
    if not isinstance(module, nn.Embedding) or module.padding_idx is None:
        return None
    return (args[0] == module.padding_idx).unsqueeze(-1)


def _hold_padding(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """Forward mode would let it change."""
    where = padding(module, args)
    return output if where is None else torch.where(where, output.detach(), output)


def contract(loss: Loss, dual: Dual, batch: Mapping[str, Any]) -> Tensor:
    """Each label token's share of the loss's G-effects, (D, M) float64.

    The share is what the token's own outputs contribute: w_t J_t for an objective that weighs token losses.
    """
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
