"""Where to tap: the modules that are called with trained parameters, and how their outputs are laid out.

Letters: B rows, T positions, D directions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_flatten
from transformers.pytorch_utils import Conv1D

from unlearn.geffect.risks import Directions
from unlearn.geffect.tangents import PaddingHeld, along_each
from unlearn.models.sharding import blocks, whole
from unlearn.objectives.tokens import token_outputs
from unlearn.passes.batches import Batch


@dataclass(frozen=True)
class Axes:
    """How an output is laid out: the axis that its rows lie along, and the one that its positions do, perhaps the same.

    The rows' may hold something else beside (heads, experts): within the rows, or around them (`outer`).
    """

    rows: int | None = None
    positions: int | None = None
    outer: bool = False

    def split(self, x: Tensor, n: int, width: int) -> Tensor | None:
        """An output of n rows as (n, positions, all else), 1 position where it has no axis of them; None if it can't be."""
        if self.rows is None:
            return x.reshape(1, 1, -1) if n == 1 else None
        flat = self.positions == self.rows
        parts = (n, width) if flat else (n, 1)
        if x.shape[self.rows] % math.prod(parts):
            return None
        x = x.unflatten(self.rows, (-1, *parts) if self.outer else (*parts, -1))  # two axes more
        x = x.movedim(self.rows + self.outer, 0)
        if self.positions is None or flat:
            x = x.movedim(self.rows + self.outer + 1, 1)
        else:
            x = x.movedim(self.positions + (2 if self.positions > self.rows else 1), 1)
        return x.reshape(*x.shape[:2], -1)


@dataclass(eq=False)
class Site:
    """A module that is called, and the trained parameters that only it uses: its own, and those of modules never called.

    Attributes:
        layer: a block's index, or `embed` (before the blocks), `norm` (after them), `lm_head`.
        names: of its parameters within it -> within the model.
        linear: in its parameters taken together, so that its change along V is itself with V in their place.
        axes: of each of its outputs.
    """

    name: str
    module: nn.Module
    layer: str
    names: dict[str, str]
    linear: bool = False
    axes: list[Axes] = field(default_factory=list)

    @cached_property
    def bare(self) -> nn.Module:
        return _Bare(self.module)

    def call(self, own: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """Its floating-point outputs with these values for its parameters."""
        named = {f"module.{name}": value for name, value in own.items()}
        return floats(functional_call(self.bare, named, args, kwargs, tie_weights=False))  # no other site's use of them

    def along(self, directions: Directions) -> dict[str, Tensor]:
        """Its V, (D, *shape) each, all parts of it: in shards, it is gathered here and no longer than it is used."""
        where = {name: self.module.get_parameter(name).device for name in self.names}
        return {name: whole(directions[full].to(where[name], non_blocking=True)) for name, full in self.names.items()}

    def changes(self, v: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The change of each of its outputs along the directions `v`, (D, *the output's shape)."""
        if self.linear and type(self.module) is nn.Linear and known_linear(self) and len(args) == 1 and not kwargs:
            bias = v["bias"].flatten() if "bias" in v else None
            n = len(v["weight"])
            return [F.linear(args[0], v["weight"].flatten(0, 1), bias).unflatten(-1, (n, -1)).movedim(-2, 0)]
        if self.linear:
            with PaddingHeld(zero=True):
                each = [self.call(dict(zip(v, w, strict=True)), args, kwargs) for w in zip(*v.values(), strict=True)]
            return [torch.stack(outputs) for outputs in zip(*each, strict=True)]
        own = {name: self.module.get_parameter(name).detach() for name in self.names}
        v = {name: x.to(own[name].dtype) for name, x in v.items()}
        _, changes = along_each(lambda w: self.call(w, args, kwargs), own, v)
        return list(changes)


class _Bare(nn.Module):
    """A module without its hooks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.forward(*args, **kwargs)


def floats(output: Any) -> list[Tensor]:
    """The floating-point tensors of a module's inputs or outputs, however nested."""
    return [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor) and leaf.is_floating_point()]


@torch.no_grad()
def find_sites(model: nn.Module, parameters: Mapping[str, nn.Parameter], directions: Directions, batch: Batch) -> list[Site]:
    """The sites of all trained parameters, in the order in which they are called; no architecture is named.

    One row of `batch` is run through the model to see what is called, what is linear in its parameters, and how its
    outputs are laid out.
    """
    row = {key: batch[key][:1] for key in ("input_ids", "attention_mask", "labels")}
    called = _called(model, row)
    names = {module: name for name, module in model.named_modules()}
    own: dict[nn.Module, dict[str, str]] = {module: {} for module in called}
    full = {parameter: name for name, parameter in parameters.items()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter in full:
            owner, inner = _called_owner(name, model, own)
            own[owner][inner] = full[parameter]
    layers = _layers(model, called, names)
    sites = {m: Site(names[m], m, layers[m], own[m]) for m in called if own[m]}
    doubtful = _aliases(sites)

    def test(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        if module in sites:
            doubtful[module] -= {name for name in doubtful[module] if _uses(sites[module], name, args, kwargs)}
            sites[module].linear = is_linear(sites[module], args, kwargs)

    _watch(model, row, test)
    for module, unused in doubtful.items():
        for name in unused:
            del sites[module].names[name]
    sites = {module: site for module, site in sites.items() if site.names}
    _find_axes(model, sites, row)
    return list(sites.values())


def _called(model: nn.Module, row: Mapping[str, Tensor]) -> list[nn.Module]:
    """The modules that are called, in the order of their calls' ends; those that can be called again by themselves.

    That is not so where a module above puts others in its parameters' place while it runs (peft's, around fused experts).
    """
    replaced: dict[nn.Module, int] = {}

    def count(module: nn.Module) -> int:
        return sum(parametrize.is_parametrized(inner) for inner in module.modules())

    order = _watch(model, row, lambda module, *_: replaced.setdefault(module, count(module)))
    return [module for module in dict.fromkeys(order) if replaced[module] == count(module)]


def _aliases(sites: Mapping[nn.Module, Site]) -> dict[nn.Module, set[str]]:
    """For each module the names of parameters that a site inside it has too: perhaps only that one uses them (BERT's heads)."""
    found: dict[nn.Module, set[str]] = {}
    for module, site in sites.items():
        inside = {
            full for inner in module.modules() if inner is not module and inner in sites for full in sites[inner].names.values()
        }
        found[module] = {name for name, full in site.names.items() if full in inside}
    return found


def _uses(site: Site, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the site's output depends on a parameter by this name."""
    other = 1 + 2 * site.module.get_parameter(name).detach()
    return any(
        not torch.equal(x, y) for x, y in zip(site.call({}, args, kwargs), site.call({name: other}, args, kwargs), strict=True)
    )


def _called_owner(name: str, model: nn.Module, called: Mapping[nn.Module, Any]) -> tuple[nn.Module, str]:
    """The nearest module above a parameter that is called, and the parameter's name within it."""
    parts = name.split(".")
    for n in range(len(parts) - 1, -1, -1):
        module = model.get_submodule(".".join(parts[:n]))
        if module in called:
            return module, ".".join(parts[n:])
    raise AssertionError(f"{name}: the model itself is not called")


def _watch(model: nn.Module, row: Mapping[str, Tensor], look: Callable[..., Any]) -> list[nn.Module]:
    """Run the model on a row, `look` at each call of a module; returns the modules in the order of their calls' ends."""
    order: list[nn.Module] = []
    busy = False

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        nonlocal busy
        if not busy:
            busy = True
            order.append(module)
            look(module, args, kwargs, output)
            busy = False

    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in model.modules()]
    try:
        token_outputs(model, row)
    finally:
        for handle in handles:
            handle.remove()
    return order


def _find_axes(model: nn.Module, sites: Mapping[nn.Module, Site], row: Mapping[str, Tensor]) -> None:
    """Note how the sites' outputs are laid out, by what changes with one row more, and with one token less."""
    twice = {key: x.repeat(2, 1) for key, x in row.items()}
    less = {key: x[:, 1:] for key, x in row.items()}
    shapes = [_outputs(model, sites, rows, "meta") for rows in (row, twice, less)]
    for module, site in sites.items():
        calls = [
            [_axes(*of_output) for of_output in zip(*of_call, strict=True)]
            for of_call in zip(*(found[module] for found in shapes), strict=False)
        ]
        unknown = [Axes()] * len(shapes[0][module][0])
        site.axes = (
            calls[0] if calls and calls.count(calls[0]) == len(calls) else unknown
        )  # called in two ways: neither is safe
    doubtful = {m: s for m, s in sites.items() if s.layer != "lm_head" and _is_folded(s.axes, shapes[1][m][0])}
    if doubtful:
        other = {**twice, "input_ids": torch.cat([row["input_ids"], row["input_ids"].roll(1, dims=1)])}
        same, changed = (_outputs(model, doubtful, rows) for rows in (twice, other))
        for module, site in doubtful.items():
            found = zip(site.axes, same[module][0], changed[module][0], strict=True)
            site.axes = [_order(axes, a, b, row["labels"].shape[1]) for axes, a, b in found]


def _outputs(
    model: nn.Module, sites: Mapping[nn.Module, Site], rows: Mapping[str, Tensor], device: str | None = None
) -> dict[nn.Module, list[list[Tensor]]]:
    """The sites' outputs, call by call; on the device `meta` only their shapes."""
    found: dict[nn.Module, list[list[Tensor]]] = {module: [] for module in sites}

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if module in found:
            found[module].append([x.to(device or x.device) for x in floats(output)])

    _watch(model, rows, look)
    return found


def _is_folded(layout: Sequence[Axes], of_two: Sequence[Tensor]) -> bool:
    """Whether an axis of the outputs of two rows holds more than the rows."""
    return any(axes.rows is not None and x.shape[axes.rows] > 2 for axes, x in zip(layout, of_two, strict=True))


def _order(axes: Axes, same: Tensor, changed: Tensor, width: int) -> Axes:
    """The reading of an axis under which the first row's output stays as it was when the second row changes, if one does."""
    for reading in (replace(axes, outer=outer) for outer in (False, True)):
        a, b = reading.split(same, 2, width), reading.split(changed, 2, width)
        if a is not None and b is not None and (a[0] - b[0]).norm() <= 1e-3 * a[0].norm():
            return reading
    return Axes()


def _axes(usual: Tensor, more: Tensor, less: Tensor) -> Axes:
    """By sizes alone: of an output of one row, of two rows, and of one token less."""
    rows = 0 if more.shape[0] == 1 else None  # shared by all rows, positions for example, or (1, M, vocabulary)
    differs = [_differs(usual.shape, other.shape) for other in (more, less)]
    return Axes(rows if differs[0] is None else differs[0], differs[1])


def _differs(a: torch.Size, b: torch.Size) -> int | None:
    """The first axis that differs in size."""
    return next((i for i, (m, n) in enumerate(zip(a, b, strict=True)) if m != n), None) if len(a) == len(b) else None


def known_linear(site: Site) -> bool:
    """Whether the module is of a kind that is linear in its parameters, all of them trained: most weights are of these."""
    module = site.module
    if type(module) not in (nn.Linear, nn.Embedding, Conv1D) or "forward" in vars(module):
        return False
    return getattr(module, "max_norm", None) is None and {name for name, _ in module.named_parameters()} == site.names.keys()


def is_linear(site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the site's output is linear in its parameters: doubles with them, exactly, and adds up as they do."""
    if known_linear(site):
        return True
    like = {name: site.module.get_parameter(name).detach() for name in site.names}
    generator = torch.Generator(next(iter(like.values())).device).manual_seed(0)  # V itself may be 0, now
    v, w = ({name: torch.empty_like(x).normal_(generator=generator) for name, x in like.items()} for _ in range(2))
    of_v, of_w = site.call(v, args, kwargs), site.call(w, args, kwargs)
    doubled = site.call({name: 2 * v[name] for name in v}, args, kwargs)
    both = site.call({name: v[name] + w[name] for name in v}, args, kwargs)
    doubles = all(torch.equal(two, 2 * one) for one, two in zip(of_v, doubled, strict=True))
    adds = all((s - x - y).norm() <= 0.02 * (x.norm() + y.norm()) for x, y, s in zip(of_v, of_w, both, strict=True))
    return doubles and adds


def _layers(model: Any, called: Sequence[nn.Module], names: Mapping[nn.Module, str]) -> dict[nn.Module, str]:
    """Each module's layer: its block's index, or by whether it is called before or after the blocks, or the output head."""
    within = {inner: str(i) for i, block in enumerate(blocks(model)) for inner in block.modules()}
    head = set(model.get_output_embeddings().modules())
    first = next((i for i, module in enumerate(called) if module in within), len(called))
    layers = {}
    for i, module in enumerate(called):
        outside = "lm_head" if module in head else "embed" if i < first else "norm"
        layers[module] = within.get(module, outside)
    return layers
