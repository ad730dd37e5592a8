"""Measuring G-effects at a model's present weights: the passes of `.risks`, `.tap` and `.tangents` made into tables.

Three ways to the same numbers (N parameters, D = 2 risks; FLOP a token of L's rows, beside 6N a token of each risk's rows):

    plain   (`instances=False`)   6N            totals and layers: a dot product for each tensor
    tapped  (`unlearn.geffect.tap`)       4N + 2ND      layers x instances, positions; 2N more with norms
    forward (`unlearn.geffect.tangents`)  2N + 4ND      tokens, and every objective of a sweep from the one pass
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pandas as pd
import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedModel

from unlearn.geffect.agreement import Agreement
from unlearn.geffect.parts import (
    RISKS,
    by_module,
    by_position,
    by_site,
    cosine,
    instance_table,
    steps_table,
    sums_of,
    sweep_table,
    token_rows,
    token_table,
)
from unlearn.geffect.risks import (
    Directions,
    Parts,
    add_gradient,
    each_gradient,
    gradients_into,
    put_back,
    summed,
    wide,
)
from unlearn.geffect.sharing import shares_of
from unlearn.geffect.sites import Site, find_sites
from unlearn.geffect.tables import Tables
from unlearn.geffect.tangents import token_tangents
from unlearn.geffect.tap import Tap, narrowest
from unlearn.geffect.target import Target, Wanted, check_labels
from unlearn.models import sharding
from unlearn.models.evaluating import evaluating
from unlearn.models.sharding import is_sharded
from unlearn.models.vectors import Vectors, dot, dots, read_all, squares, trainable
from unlearn.objectives.functions import mean_nll
from unlearn.objectives.loss import Loss
from unlearn.objectives.rows import Row, collate, seconds
from unlearn.passes.batches import Batch, anew, on, over_processes, set_batches
from unlearn.passes.sizes import Budget, Size

Combine = Callable[[Vectors, Vectors], Iterator[tuple[str, Tensor]]]  # a step, tensor by tensor, of two gradients
RISK = Loss(objective=mean_nll)  # R: the token-mean cross-entropy of a whole set
PARTS = {"layers", "instances", "positions", "tokens"}  # the tables that add up to the totals
ENOUGH = 8  # tokens of a row that the modules are looked at with


@dataclass
class Meter:
    """Measures the G-effects of a target at the model's present weights, as often as they change.

    Attributes:
        risks: the rows of each risk, of `RISKS`.
        pad: the token id that batches are padded with.
        sweep: more targets by (method, hyper-parameter), for the totals of each.
        bf16: run the model under bfloat16 autocast (but never the forward-mode pass).
        batch_size: rows of a batch at most; None, with no `tokens_per_batch`: 16 on a CPU.
        tokens_per_batch: tokens of a batch at most, its padding counted; None: on a GPU what its free memory holds.
        decode: token id to text, for the table of tokens.
        offload: keep the risks' gradients V in CPU memory, from where each module's is fetched when it is needed.
        rule: what makes the step of the objective's and the retain term's gradients, where that is not their sum; `steps` then
            has `rule_geffect` too.
    """

    model: PreTrainedModel
    target: Target
    risks: Mapping[str, Sequence[Row]]
    pad: int
    wanted: Wanted = Wanted()
    sweep: Mapping[tuple[str, float | None], Target] = field(default_factory=dict)
    bf16: bool = False
    batch_size: int | None = None
    decode: Callable[[int], str] = str
    offload: bool = False
    tokens_per_batch: int | None = None
    rule: Combine | None = None

    def __post_init__(self) -> None:
        if self.wanted.positions and not self.wanted.instances:
            raise ValueError("positions: only with instances")
        if is_sharded(self.model) and self.wanted.instances and not self.wanted.norms:
            raise ValueError(
                "norms=false: with a model in shards the gradient is formed anyway; norms=true, or instances=false"
            )
        targets = (self.target, *self.sweep.values())
        if any(map(seconds, self.target.forget)) and (self.wanted.tokens or self.wanted.positions):
            raise ValueError("tokens and positions: not of an objective with second answers, which have tokens of their own")
        if any((t.loss.retain is not None) != bool(t.retain) for t in targets):
            raise ValueError("a retain term needs rows beside those to forget, and rows beside them a retain term")
        check_labels(targets, self.risks)
        self.parameters = trainable(self.model)
        if not self.parameters:
            raise ValueError(f"{type(self.model).__name__}: no parameter of it requires a gradient")
        self.sharded = is_sharded(self.model)
        if self.sharded and (self.wanted.tokens or self.sweep):
            raise ValueError(
                "tokens and sweeps are one forward-mode pass, which a model in shards can't make (parallel=ddp can)"
            )
        self.budget = Budget(self.model, self.bf16, Size(self.batch_size, self.tokens_per_batch))
        self.sites: list[Site] = []
        self.directions: Directions = {}

    def measure(self) -> Tables:
        """The tables `steps` and `layers` of the present weights, and what else is wanted; columns as in docs/geffect.md.

        Raises:
            FloatingPointError: an effect is not finite.
            ValueError: a module's output does not tell instances apart.
        """
        with put_back(self.model), self.trained(True), self._references():
            values = self.risk_gradients()
            if not self.sites:
                self.check = Agreement(self.model, self._precision())
                sites = self._find_sites()
                if self.wanted.instances and not self.wanted.norms:
                    self._check_one_row(sites)
                self.sites = sites
            tables = self.tapped() if self.wanted.instances else self.plain()
            tables["steps"] = tables["steps"].assign(risk_value=[values[risk] for risk in RISKS], update_effect=math.nan)
            if self.rule is not None:
                tables["steps"] = tables["steps"].assign(rule_geffect=self._ruled(self.rule))
            if self.wanted.tokens:
                tables["tokens"] = self.by_token()
            if self.sweep:
                tables["sweep"] = self.swept(tables["steps"])
        for name in PARTS & tables.keys():
            self.check.parts(name, tables[name], tables["steps"])
        return tables

    def start_update(self) -> None:
        """Note the weights as they are now, before an update, along the risks' gradients measured last."""
        self._before = self._dots(self.parameters)

    def update_effect(self) -> Tables:
        """< theta' - theta, V >, theta' the present weights, theta those at `start_update`: the tables `totals` and `updates`.

        To first order, how much each risk has changed by the update, in nats per token.
        """
        after = self._dots(self.parameters)
        moved = {name: [b - a for a, b in zip(self._before[name], after[name], strict=True)] for name in after}
        totals = pd.DataFrame({"risk": RISKS, "update_effect": sums_of(moved)})
        return {"totals": totals, "updates": by_module(self.sites, moved, "update_effect")}

    def risk_values(self) -> list[float]:
        """Both risks at the present weights, in nats per token."""

        def run(batches: Iterator[Batch]) -> Parts:
            parts = Parts()
            with torch.no_grad(), evaluating(self.model):
                for batch in batches:
                    with self._autocast():
                        parts.add(RISK(self.model, batch))
            return parts

        found = [anew(self.budget, "losses", f"{risk} risk", (self.risks[risk], []), self.pad, run) for risk in RISKS]
        return [parts.total(self.model.device)["objective"] for parts in found]

    # ---- the passes ----

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16)

    @contextmanager
    def trained(self, train: bool) -> Iterator[None]:
        """With the measured parameters' gradients on or off, whatever a trainer has frozen since; and back."""
        before = {name: p.requires_grad for name, p in self.parameters.items()}
        for p in self.parameters.values():
            p.requires_grad_(train)
        try:
            yield
        finally:
            for name, p in self.parameters.items():
                p.requires_grad_(before[name])

    @contextmanager
    def _references(self) -> Iterator[None]:
        """The losses' reference models as they are measured, too."""
        models = (target.loss.reference for target in (self.target, *self.sweep.values()))
        with ExitStack() as stack:
            for reference in {id(model): model for model in models if model is not None and model is not self.model}.values():
                stack.enter_context(evaluating(reference, checkpointing=False))
            yield

    def risk_gradients(self) -> dict[str, float]:
        """Fill `directions` with the gradients V of the risks, in the weights' precision; returns the risks' values."""
        if not self.directions:
            of = self.parameters.items()
            self.directions = {name: sharding.zeros(p, (len(RISKS),), p.dtype, self.offload) for name, p in of}
        return {risk: self._risk_gradient(d, risk) for d, risk in enumerate(RISKS)}

    def _risk_gradient(self, d: int, risk: str) -> float:
        """Fill the d-th direction; the sum that it is made in, of half-precision or offloaded weights, is gone after."""
        into = {name: v[d] for name, v in self.directions.items()}
        given = Target(RISK, self.risks[risk]), f"gradient of the {risk} risk"
        if not self.offload and all(v.dtype == wide(v.dtype) for v in into.values()):
            return self._sum_up(*given, into)["objective"]
        with summed(self.parameters) as sums:
            value = self._sum_up(*given, sums)["objective"]
            for name, v in into.items():
                v.copy_(sums[name])
        return value

    def _sum_up(self, target: Target, what: str, sums: Vectors) -> dict[str, float]:
        """Put the gradient of a loss over its whole set into `sums`; returns the loss's parts."""

        def run(batches: Iterator[Batch]) -> dict[str, float]:
            for v in sums.values():
                v.zero_()
            return add_gradient(self.model, self.parameters, target.loss, batches, self.bf16, sums)

        return anew(self.budget, "gradients", what, (target.forget, target.retain), self.pad, run)

    def _precision(self) -> torch.dtype:
        """The least that a gradient passes; transformers' norms and softmax drop to float32 inside a float64 model."""
        [batch, *_] = set_batches(self.risks["unlearn"][:1], [], 1, self.pad, equally_many=True)
        with evaluating(self.model, checkpointing=False), self._autocast():
            return narrowest(RISK(self.model, on(batch, self.model.device))["objective"])

    def _find_sites(self) -> list[Site]:
        rows = self.risks["unlearn"]
        enough = [row for row in rows if len(row["input_ids"]) >= ENOUGH] or rows[:1]
        row = collate([min(enough, key=lambda row: len(row["input_ids"]))], self.pad)
        with evaluating(self.model), self._autocast():
            return find_sites(self.model, self.parameters, self.directions, on(row, self.model.device))

    def _check_one_row(self, sites: list[Site]) -> None:
        """Where no gradient of the whole loss is formed, the tap is checked once, on a row."""
        sums = torch.zeros((3, len(RISKS)), dtype=torch.float64, device=self.model.device)  # with V, and both squared

        def take(name: str, gradient: Tensor) -> None:
            v, own = self.directions[name], dot(gradient, gradient)
            sums.add_(torch.stack([dots(gradient, v), own.expand(len(v)), squares(v, sums.device)]))

        for batch in set_batches(self.target.forget[:1], [], 1, self.pad, equally_many=self.sharded):
            tap = Tap(sites, self.directions, 1)
            with evaluating(self.model), each_gradient(self.parameters, take):
                self._backward(tap, on(batch, self.model.device))
            products, *norms = sums.tolist()
            scale = [math.sqrt(g * v) for g, v in zip(*norms, strict=True)]
            self.check.tap(tap.effects.sum((0, 1)).tolist(), products, scale)

    def _backward(self, tap: Tap, batch: Batch) -> None:
        with tap.batch(batch):
            with self._autocast():
                loss: Any = sum(self.target.loss(self.model, batch).values())
            if loss.requires_grad:  # one on a layer's output may depend on nothing that is trained
                loss.backward()

    def tapped(self) -> Tables:
        """Layer x instance (x position), by the tapped backward pass; with norms, the whole gradient beside it."""
        forget, retain = self.target.forget, self.target.retain
        tap = Tap(self.sites, self.directions, len(forget) + len(retain))
        if self.wanted.positions:
            answers = [*forget, *retain, *(second for row in retain for second in seconds(row))]
            tap.count_positions(max(len(row["input_ids"]) for row in answers))
        with summed(self.parameters if self.wanted.norms else {}) as sums:

            def run(batches: Iterator[Batch]) -> None:
                for x in [*tap.tables(), *sums.values()]:
                    x.zero_()
                measured = self.parameters if self.wanted.norms else {}
                with self.trained(self.wanted.norms), evaluating(self.model), gradients_into(sums, measured):
                    for batch in batches:
                        self._backward(tap, batch)

            anew(self.budget, "gradients", "G-effects", (forget, retain), self.pad, run)
            over_processes([*tap.tables(), *sums.values()])
            by_instance = tap.effects.sum(1)  # (rows, D)
            totals = by_instance.sum(0).tolist()
            tables = {"steps": steps_table(totals, self._norm(sums), self.risk_norms())}
            if sums:
                scale = list(tables["steps"]["objective_norm"] * tables["steps"]["risk_norm"])
                self.check.tap(totals, sums_of(self._dots(sums)), scale)
        tables["layers"] = by_site(self.sites, tap.effects.sum(0).tolist())
        tables["instances"] = instance_table(by_instance, len(forget))
        if tap.positions is not None:
            tables["positions"] = by_position(tap, forget, bool(retain))
        return tables

    def plain(self) -> Tables:
        """Totals and layers by a dot product for each tensor; the uses of tied weights are not told apart."""
        with summed(self.parameters) as sums:
            self._sum_up(self.target, "G-effects", sums)
            products = self._dots(sums)
            steps = steps_table(sums_of(products), self._norm(sums), self.risk_norms())
            return {"steps": steps, "layers": by_module(self.sites, products, "geffect")}

    def _ruled(self, rule: Combine) -> list[float]:
        """<d, V>, d being what the rule makes of the two gradients over their whole sets; for a moving average stands g_r."""
        with summed(self.parameters) as forget, summed(self.parameters) as retain:
            self._sum_up(replace(self.target, retain=()), "gradient of the objective", forget)
            self._sum_up(replace(self.target, forget=()), "gradient of the retain term", retain)
            found = read_all([dots(d, self.directions[name]) for name, d in rule(forget, retain)], self.sharded)
        return [math.fsum(found[d :: len(RISKS)]) for d in range(len(RISKS))]

    def _shares(self, targets: Sequence[Target]) -> Iterator[tuple[int, Batch, Tensor, Tensor]]:
        """For each target and batch of it: the target's number, the batch, the tokens' losses (M,), their shares (D, M).

        Each distinct row passes once.
        """
        tangents = partial(token_tangents, self.model, self.parameters, self.directions)
        return shares_of(targets, tangents, self.budget, self.pad)

    def swept(self, steps: pd.DataFrame | None = None) -> pd.DataFrame:
        """The totals of each target of the sweep; those of `target`, from the same passes, must be the ones in `steps`."""
        targets = [*self.sweep.values(), self.target]
        totals = torch.zeros((len(targets), len(RISKS)), dtype=torch.float64, device=self.model.device)
        with evaluating(self.model, checkpointing=False):
            for i, _, _, shares in self._shares(targets):
                totals[i] += shares.sum(1)
        over_processes([totals])
        if steps is not None:
            own = pd.DataFrame({"risk": RISKS, "geffect": totals[-1].tolist()})
            self.check.parts("forward-mode pass", own, steps)
        table = sweep_table(list(self.sweep), totals[:-1].tolist())
        return self._with_cosines(table) if self.wanted.sweep_norms else table

    def _with_cosines(self, sweep: pd.DataFrame) -> pd.DataFrame:
        """The sweep's table with the norm of each objective's gradient, a backward pass for each, and so the cosines."""
        norms: list[float] = []
        for (method, _), target in self.sweep.items():
            with summed(self.parameters) as sums:
                self._sum_up(target, f"gradient of {method}", sums)
                norms += [self._norm(sums)] * len(RISKS)
        columns = zip(sweep["geffect"], norms, self.risk_norms() * len(self.sweep), strict=True)
        return sweep.assign(cosine=[cosine(*numbers) for numbers in columns], objective_norm=norms)

    def by_token(self) -> pd.DataFrame:
        """Each label token's share; all that the retain rows add is one more row, with neither row nor position."""
        found: list[tuple[Any, ...]] = []
        kept = torch.zeros(len(RISKS), dtype=torch.float64, device=self.model.device)
        with evaluating(self.model, checkpointing=False):
            for _, batch, nll, shares in self._shares([self.target]):
                if batch["n_forget"]:
                    found += token_rows(batch, nll, shares)
                else:
                    kept += shares.sum(1)
        over_processes([kept])
        return token_table(sorted(gather_object(found)), kept.tolist() if self.target.retain else None, self.decode)

    # ---- the tables ----

    def _dots(self, vectors: Mapping[str, Tensor]) -> dict[str, list[float]]:
        """For each parameter its inner product with each V."""
        found = iter(read_all([dots(x, self.directions[name]) for name, x in vectors.items()], self.sharded))
        return {name: [next(found) for _ in RISKS] for name in vectors}

    def risk_norms(self) -> list[float]:
        """The norm of each V."""
        found = read_all([squares(v, self.model.device) for v in self.directions.values()], self.sharded)
        return [math.sqrt(math.fsum(found[d :: len(RISKS)])) for d in range(len(RISKS))]

    def _norm(self, gradient: Vectors) -> float:
        squared = read_all([dot(g, g) for g in gradient.values()], self.sharded)
        return math.sqrt(math.fsum(squared)) if squared else math.nan
