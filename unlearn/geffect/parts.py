"""The tables of a measurement, made of its numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
from torch import Tensor

from unlearn.geffect.sites import Site
from unlearn.geffect.tap import Tap
from unlearn.objectives.rows import Row
from unlearn.objectives.tokens import label_positions
from unlearn.passes.batches import Batch

RISKS = ("unlearn", "retain")


def token_rows(batch: Batch, nll: Tensor, shares: Tensor) -> list[tuple[Any, ...]]:
    at, width = label_positions(batch["labels"]), batch["labels"].shape[1]
    columns = [batch["index"][at // width], at % width + 1, batch["labels"].flatten()[at + 1], nll, *shares]
    return list(zip(*(column.tolist() for column in columns), strict=True))


def instance_table(effects: Tensor, n: int) -> pd.DataFrame:
    """The forget rows' effects, and where there are retain rows, one more row for all that they add."""
    rows: list[tuple[Any, list[float]]] = list(enumerate(effects[:n].tolist()))
    rows += [("retain", effects[n:].sum(0).tolist())] if len(effects) > n else []
    columns = ["risk", "row", "geffect"]
    return pd.DataFrame([(risk, row, e[d]) for d, risk in enumerate(RISKS) for row, e in rows], columns=columns)


def by_site(sites: Sequence[Site], effects: Sequence[Sequence[float]]) -> pd.DataFrame:
    rows = [
        (risk, site.layer, site.name, values[d])
        for site, values in zip(sites, effects, strict=True)
        for d, risk in enumerate(RISKS)
    ]
    return pd.DataFrame(rows, columns=["risk", "layer", "module", "geffect"])


def by_module(sites: Sequence[Site], values: Mapping[str, list[float]], column: str) -> pd.DataFrame:
    """Numbers of parameters as numbers of modules; tied weights are counted at their first use."""
    owners = {name: site for site in reversed(sites) for name in site.names.values()}
    found = {id(site): [0.0] * len(RISKS) for site in sites if site in owners.values()}
    for name, numbers in values.items():
        found[id(owners[name])] = [a + b for a, b in zip(found[id(owners[name])], numbers, strict=True)]
    there = [site for site in sites if id(site) in found]
    rows = [(risk, s.layer, s.name, found[id(s)][d]) for s in there for d, risk in enumerate(RISKS)]
    return pd.DataFrame(rows, columns=["risk", "layer", "module", column])


def sums_of(values: Mapping[str, list[float]]) -> list[float]:
    return [math.fsum(numbers[d] for numbers in values.values()) for d in range(len(RISKS))]


def steps_table(totals: Sequence[float], norm: float, risk_norms: Sequence[float]) -> pd.DataFrame:
    """Raises FloatingPointError where a total is not finite."""
    check_finite(totals)
    cosines = [cosine(e, norm, r) for e, r in zip(totals, risk_norms, strict=True)]
    columns = {"risk": RISKS, "geffect": totals, "cosine": cosines, "objective_norm": norm, "risk_norm": risk_norms}
    return pd.DataFrame(columns)


def sweep_table(names: Sequence[tuple[str, float | None]], totals: Sequence[Sequence[float]]) -> pd.DataFrame:
    """Of each objective's totals (D,). Raises FloatingPointError where one is not finite."""
    pairs = zip(names, totals, strict=True)
    rows = [(risk, *name, e) for name, effects in pairs for risk, e in zip(RISKS, effects, strict=True)]
    check_finite([row[-1] for row in rows])
    return pd.DataFrame(rows, columns=["risk", "method", "hyper_param", "geffect"])


def foretelling(steps: pd.DataFrame) -> pd.Series[float]:
    """The G-effects of the direction that training follows: of the rule's step where there is one, else of the loss."""
    return steps["rule_geffect"].fillna(steps["geffect"]) if "rule_geffect" in steps else steps["geffect"]


def cosine(product: float, *norms: float) -> float:
    """Of two vectors, from their inner product and their norms; not a number where one of these is 0."""
    scale = math.prod(norms)
    return product / scale if scale else math.nan


def check_finite(values: Sequence[float]) -> None:
    if not all(map(math.isfinite, values)):
        raise FloatingPointError(f"the G-effects {', '.join(map(str, values))} are not finite")


def by_position(tap: Tap, forget: Sequence[Row], with_retain: bool) -> pd.DataFrame:
    """By row, position and layer; all that the retain rows add is one more row for each layer, without a position."""
    assert tap.positions is not None
    rows: list[tuple[Any, ...]] = []
    for i, row in enumerate(forget):
        for position, layers in enumerate(tap.positions[i, : len(row["input_ids"])].tolist()):
            rows += [(i, position, layer, *e) for layer, e in zip(tap.layers, layers, strict=True)]
    if with_retain:
        rest = tap.positions[len(forget) :].sum((0, 1)).tolist()
        rows += [(pd.NA, pd.NA, layer, *e) for layer, e in zip(tap.layers, rest, strict=True)]
    table = pd.DataFrame(rows, columns=["row", "position", "layer", *RISKS]).astype({"row": "Int64", "position": "Int64"})
    return _long(table)


def token_table(found: Sequence[tuple[Any, ...]], kept: Sequence[float] | None, decode: Callable[[int], str]) -> pd.DataFrame:
    """Of `token_rows` in order; `kept`, all that the retain rows add, is one more row, with neither row nor position."""
    columns = ["row", "position", "token_id", "loss", *RISKS]
    table = pd.DataFrame(found, columns=columns).astype(dict.fromkeys(columns[:3], "Int64"))
    if kept is not None:
        last = {"row": pd.NA, "position": pd.NA, "token_id": pd.NA, "loss": math.nan}
        rest = pd.DataFrame([last | dict(zip(RISKS, kept, strict=True))])
        table = pd.concat([table, rest.astype(table.dtypes)], ignore_index=True)
    texts = {i: decode(int(i)) for i in table["token_id"].dropna().unique()}
    table.insert(3, "token", ["" if i is pd.NA else texts[i] for i in table["token_id"]])
    return _long(table)


def _long(table: pd.DataFrame) -> pd.DataFrame:
    """A column for each risk to a row for each."""
    long = [table.drop(columns=list(RISKS)).assign(risk=risk, geffect=table[risk]) for risk in RISKS]
    return pd.concat(long, ignore_index=True)[["risk", *table.columns.drop(list(RISKS)), "geffect"]]
