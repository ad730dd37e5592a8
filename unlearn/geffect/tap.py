"""The tapped backward pass: a loss's gradient in the directions V, for every instance and module, without forming it.

For a module with parameters w, output y = f(x; w) and the loss's gradient b = dL/dy at it, an instance's share of
<grad_w L, V> is the sum over its positions of b . (df/dw V): the output's change along V is formed where the gradient
passes, and no weight's gradient ever is. It costs 4 FLOP a parameter and token, and 2 more for each direction.

Letters: B rows, T positions, M label tokens of the batch, D directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from unlearn.geffect.risks import Directions, wide
from unlearn.geffect.sites import Axes, Site
from unlearn.objectives.tokens import label_positions_of
from unlearn.passes.batches import Batch

# ---- where to tap ----


# ---- the tap ----


class Tap:
    """Accumulates e[instance, site, direction], and, where asked, e[instance, position, the site's layer, direction].

    `batch` runs a backward pass under it. An instance is a number of the batch's `index`.
    """

    def __init__(self, sites: list[Site], directions: Directions, instances: int) -> None:
        self.sites, self.directions, self.busy = sites, directions, False
        n, device = len(next(iter(directions.values()))), next(sites[0].module.parameters()).device
        self.effects = torch.zeros((instances, len(sites), n), dtype=torch.float64, device=device)
        self.layers = list(dict.fromkeys(site.layer for site in sites))
        self.layer_of = [self.layers.index(site.layer) for site in sites]
        self.positions: Tensor | None = None  # (instances, T, layers, D)

    def count_positions(self, length: int) -> None:
        """Keep effects by position too, for rows of at most `length` tokens."""
        n, _, d = self.effects.shape
        self.positions = self.effects.new_zeros((n, length, len(self.layers), d))

    def fetched(self, number: int) -> dict[str, Tensor]:
        return self.sites[number].along(self.directions)

    def tables(self) -> list[Tensor]:
        return [self.effects] if self.positions is None else [self.effects, self.positions]

    @contextmanager
    def batch(self, batch: Batch) -> Iterator[None]:
        """Tap what is run inside: a forward pass of these rows and its backward pass."""
        at = label_positions_of(batch)
        width = batch["labels"].shape[1]
        self._batch = {"index": batch["index"], "at": at, "row": at // width, "position": at % width}
        self._width = width
        self.anchor = torch.zeros((), device=at.device, requires_grad=True)
        self._shared = ""
        handles = [
            site.module.register_forward_hook(self._hook(number, site), with_kwargs=True)
            for number, site in enumerate(self.sites)
        ]
        try:
            yield
        except RuntimeError as error:
            if not self._shared or isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(
                f"{self._shared}: all rows share its output, which can't be taken apart (instances=false does without)"
            ) from error
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, number: int, site: Site) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if self.busy:
                return output
            leaves, structure = tree_flatten(output)
            inputs, how = tree_flatten((args, kwargs))
            out = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
            into = [i for i, leaf in enumerate(inputs) if isinstance(leaf, Tensor)]
            call = _Call(self, number, site, inputs, into, how, len(out))
            spread = [self._spread(leaves[i], site, axes) for i, axes in zip(out, site.axes, strict=True)]
            tapped = _Identity.apply(call, self.anchor, *spread, *(inputs[i] for i in into))
            for i, leaf in zip(out, tapped, strict=True):
                leaves[i] = leaf
            for i in into:
                inputs[i] = None  # what `ctx` keeps, gradient checkpointing can free
            return tree_unflatten(leaves, structure)

        return hook

    def _spread(self, output: Tensor, site: Site, axes: Axes) -> Tensor:
        """An output that all rows share (of positions, say) once for each row, that their gradients come apart."""
        n = len(self._batch["index"])
        shared = site.layer != "lm_head" and axes.rows == 0 and output.shape[0] == 1
        if not shared or n == 1:
            return output
        self._shared = site.name
        return output.expand(n, *output.shape[1:])

    def add(self, call: _Call, args: tuple[Any, ...], kwargs: dict[str, Any], grads: Sequence[Tensor | None]) -> None:
        """Add b . (change along V) of one call of a site, for each instance and direction."""
        changes = call.site.changes(self.fetched(call.number), args, kwargs)
        for change, grad, axes in zip(changes, grads, call.site.axes, strict=True):
            if grad is not None:
                self._add(call.number, change, grad, axes)

    def _add(self, number: int, changes: Tensor, grad: Tensor, axes: Axes) -> None:
        """Of one output: its changes, (D, *shape), or shared by the rows, and its gradient."""
        site, rows = self.sites[number], self._batch["index"]
        if site.layer == "lm_head" and changes.shape[1] == 1:  # (1, M, vocabulary); one after the other, for they are large
            at, position = rows[self._batch["row"]], self._batch["position"]
            products = torch.cat([row_products(change[0].unsqueeze(1), grad[0]) for change in changes], dim=1)
            self._note(number, at, products, lambda positions: positions.index_put_((at, position), products, accumulate=True))
            return
        n, width = len(rows), self._width
        b = axes.split(grad, n, width)  # (n, T or 1, k)
        a = [x for change in changes if (x := axes.split(change.expand_as(grad), n, width)) is not None]
        if b is None:
            shape = tuple(grad.shape)
            raise ValueError(f"{site.name}: its output {shape} does not tell {n} rows apart (instances=false does without)")
        if self.positions is not None and b.shape[1] < width:
            raise ValueError(
                f"{site.name}: its output {tuple(grad.shape)} does not tell positions apart (positions=false does without)"
            )
        products = row_products(torch.stack(a, 2).flatten(0, 1), b.flatten(0, 1)).view(*b.shape[:2], -1)  # (n, T or 1, D)
        # a convolution's may have more at the end
        self._note(
            number, rows, products.sum(1), lambda positions: positions[:, :width].index_add_(0, rows, products[:, :width])
        )

    def _note(self, number: int, rows: Tensor, products: Tensor, by_position: Callable[[Tensor], Any]) -> None:
        self.effects[:, number].index_add_(0, rows, products)
        if self.positions is not None:
            by_position(self.positions[:, :, self.layer_of[number]])


def row_products(a: Tensor, b: Tensor) -> Tensor:
    """(n, D, k), (n, k) -> (n, D) float64: the inner products of rows, in float32 or wider, under autocast too."""
    kind = wide(b.dtype)
    with torch.autocast(b.device.type, enabled=False):
        return torch.bmm(a.to(kind), b.to(kind).unsqueeze(2)).squeeze(2).double()


@dataclass
class _Call:
    """One call of a site: how its inputs go together again."""

    tap: Tap
    number: int
    site: Site
    inputs: list[Any]
    tensors: list[int]
    structure: Any
    outputs: int


def narrowest(loss: Tensor) -> torch.dtype:
    """Of the floating-point types that a loss's gradient passes on its way back, that of the least precision.

    transformers' norms, softmax and state spaces drop to float32 inside a float64 model.
    """
    found, seen, left = {loss.dtype}, set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found |= {kind for meta in node._input_metadata if (kind := meta.dtype).is_floating_point}
            left += [inner for inner, _ in node.next_functions]
    return max(found, key=lambda kind: torch.finfo(kind).eps)


class _Identity(torch.autograd.Function):
    """Passes a module's outputs through; on the way back their gradient goes to the tap, with the module's inputs."""

    @staticmethod
    def forward(ctx: Any, call: _Call, anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs, inputs = tensors[: call.outputs], tensors[call.outputs :]
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        device = anchor.device.type
        ctx.autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        return tuple(output.data for output in outputs)  # no views: models may change a module's output in place

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        call: _Call = ctx.call
        leaves = list(call.inputs)
        for i, tensor in zip(call.tensors, ctx.saved_tensors, strict=True):
            leaves[i] = tensor
        args, kwargs = tree_unflatten(leaves, call.structure)
        enabled, dtype = ctx.autocast
        call.tap.busy = True
        try:
            with torch.no_grad(), torch.autocast(call.tap.anchor.device.type, dtype, enabled=enabled, cache_enabled=False):
                call.tap.add(call, args, kwargs, grads)
        finally:
            call.tap.busy = False
        return (None, None, *grads, *(None for _ in call.tensors))
