"""The ways to G-effects that geffect.py compares; its words say what each is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from measuring import all_nlls, attention, now, padded
from torch import Tensor
from transformers import PreTrainedModel

import utils
from unlearn.geffect.meter import Meter
from unlearn.geffect.parts import RISKS
from unlearn.geffect.target import Target, Wanted
from unlearn.objectives.functions import Objective, mean_nll, npo, tnpo, wga, wtnpo
from unlearn.objectives.loss import Loss
from unlearn.objectives.rows import Row, counts
from unlearn.objectives.tokens import IGNORE, Counts, Tokens, token_outputs

Vectors = dict[str, Tensor]  # one for each parameter

OBJECTIVE = partial(wga, alpha=1.0)
SWEEP: dict[tuple[str, float | None], Objective] = {
    **{("wga", alpha): partial(wga, alpha=alpha) for alpha in (1.0, 2.0, 5.0, 7.0)},
    **{("npo", beta): partial(npo, beta=beta) for beta in (0.05, 0.1, 0.5, 1.0)},
    **{("tnpo", beta): partial(tnpo, beta=beta) for beta in (1.0, 2.0, 4.0, 8.0)},
    **{("wtnpo", beta): partial(wtnpo, beta=beta, alpha=1.5) for beta in (1.0, 2.0, 4.0, 8.0)},
    **{("wtnpo_0.5", beta): partial(wtnpo, beta=beta, alpha=0.5) for beta in (1.0, 2.0, 4.0, 8.0)},
}
PUBLISHED_BATCH, PUBLISHED_NEW = 4, 0.4  # rows; the share of the new gradient in a moving average
EXACT = ("a", "a_norms", "b", "c", "d")
DERIVED = {"c20": f"c x {len(SWEEP)}", "c20_shared": f"c x {len(SWEEP)}, one V"}


@dataclass
class Bench:
    """A model at the weights that are measured, its rows, and how to run it; `reference` losses are in the rows to forget.

    `drawn` are the rows to forget in the published procedure's order, and those to keep beside them.
    """

    model: PreTrainedModel
    forget: list[Row]
    retain: list[Row]
    drawn: tuple[list[Row], list[Row]]
    meter: Meter
    pad: int
    pad_to: int
    batch_size: int
    bf16: bool
    padded_rows: int
    published_attention: str

    def autocast(self) -> torch.autocast:
        return torch.autocast(utils.device().type, torch.bfloat16, enabled=self.bf16)


@dataclass
class Found:
    """(e_u, e_r), and the seconds of V and of the rest where they come apart."""

    effects: list[float]
    parts: dict[str, float] = field(default_factory=dict)


# ---- this engine ----


def engine(bench: Bench, norms: bool) -> Found:
    """Layers x instances: all of `Meter.measure`."""
    bench.meter.wanted, bench.meter.sweep = Wanted(norms=norms), {}
    return Found(bench.meter.measure()["steps"]["geffect"].tolist())


def sweep(bench: Bench) -> Found:
    """V and the forward-mode pass, which `Meter.measure` runs too, without its pass for one target by instance."""
    meter = bench.meter
    meter.sweep = {name: Target(Loss(objective), bench.forget) for name, objective in SWEEP.items()}
    with meter.trained(True):
        began = now()
        meter.risk_gradients()
        between = now()
        table = meter.swept()
        parts = {"V": between - began, "rest": now() - between}
    entry = table[(table["method"] == "wga") & (table["hyper_param"] == 1.0)]
    return Found(entry.set_index("risk")["geffect"].loc[list(RISKS)].tolist(), parts)


# ---- the plain way ----


def plain(bench: Bench) -> Found:
    """Three passes, each over all its rows, and a dot for each tensor."""
    began = now()
    v = risk_gradients(bench)
    between = now()
    g = gradient(bench, bench.forget, OBJECTIVE)
    return Found(dots(g, v), {"V": between - began, "rest": now() - between})


def plain_by_instance(bench: Bench) -> Found:
    """As `plain`, but grad L row by row: its dots are the row's share of the effects."""
    began = now()
    v = risk_gradients(bench)
    between = now()
    whole = Counts(*counts(bench.forget))
    shares = []
    for row in bench.forget:
        backward(bench, [row], OBJECTIVE, whole)
        shares.append(dots(take_gradient(bench.model), v))
    return Found([sum(share) for share in zip(*shares, strict=True)], {"V": between - began, "rest": now() - between})


def risk_gradients(bench: Bench) -> list[Vectors]:
    return [gradient(bench, rows, mean_nll) for rows in (bench.forget, bench.retain)]


def gradient(bench: Bench, rows: list[Row], objective: Objective) -> Vectors:
    """Of an objective over all the rows, in batches of rows of like length."""
    ordered = sorted(rows, key=lambda row: -len(row["input_ids"]))
    for start in range(0, len(rows), bench.batch_size):
        backward(bench, ordered[start : start + bench.batch_size], objective, Counts(*counts(rows)))
    return take_gradient(bench.model)


def backward(bench: Bench, rows: list[Row], objective: Objective, whole: Counts) -> None:
    """Add the rows' share of an objective's gradient to `.grad`; the logits are those of label positions."""
    with bench.autocast():
        loss = objective(token_outputs(bench.model, padded(rows, None, bench.pad)), whole)
    loss.backward()


def take_gradient(model: PreTrainedModel) -> Vectors:
    """What is in `.grad`, which is empty after."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def dots(g: Vectors, directions: Sequence[Vectors]) -> list[float]:
    return [sum(torch.dot(g[name].flatten(), v[name].flatten()).item() for name in g) for v in directions]


# ---- the published procedure ----


def published(bench: Bench, rows: int, pad_to: int | None) -> Found:
    """Moving averages of the gradients of small batches, over the first `rows` of the drawn ones; see geffect.py."""
    averages: dict[str, Vectors] = {"unlearn": {}, "objective": {}, "retain": {}}
    with attention(bench.model, bench.published_attention):
        for start in range(0, rows, PUBLISHED_BATCH):
            parts = (part[start : min(start + PUBLISHED_BATCH, rows)] for part in bench.drawn)
            forget, retain = (padded(part, pad_to, bench.pad) for part in parts)
            steps = (("unlearn", forget, mean_nll), ("objective", forget, OBJECTIVE), ("retain", retain, mean_nll))
            for name, batch, objective in steps:
                batch_loss(bench, batch, objective).backward()
                average(averages[name], take_gradient(bench.model))
            (batch_loss(bench, forget, mean_nll) * 0).backward()
            bench.model.zero_grad(set_to_none=True)
    return Found(dots(averages["objective"], [averages[risk] for risk in RISKS]))


def batch_loss(bench: Bench, batch: dict[str, Tensor], objective: Objective) -> Tensor:
    """An objective as the batch's own mean, from the logits of all positions."""
    logits, labels, nll = all_nlls(bench.model, batch, bench.bf16)
    at = labels.flatten() != IGNORE
    row = at.nonzero().squeeze(1) // labels.shape[1]
    tokens = Tokens(nll=nll[at], row=row, n_rows=len(labels), logits=logits[at])
    return objective(tokens, Counts(len(row), len(labels)))


def average(averages: Vectors, new: Vectors) -> None:
    for name, value in new.items():
        if name in averages:
            averages[name].lerp_(value, PUBLISHED_NEW)
        else:
            averages[name] = value


# ---- the cases ----


@dataclass(frozen=True)
class Case:
    text: str
    run: Callable[[Bench], Found]


CASES = {
    "a": Case("this engine, layers x instances", lambda bench: engine(bench, norms=False)),
    "a_norms": Case("this engine, with norms", lambda bench: engine(bench, norms=True)),
    "b": Case(f"this engine's sweep, {len(SWEEP)} objectives", sweep),
    "c": Case("plain, totals", plain),
    "d": Case("plain, by instance", plain_by_instance),
    "e": Case("published, padded to the longest", lambda bench: published(bench, len(bench.forget), None)),
    "e_padded": Case("published, padded to 500", lambda bench: published(bench, bench.padded_rows, bench.pad_to)),
}
