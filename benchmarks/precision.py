"""How far bfloat16 is from float32: one model's G-effects with float32 weights, under autocast, and with bfloat16 weights.

    python benchmarks/precision.py model_family=smollm2-135m model_path_cur=RUN/checkpoint-20 data_path=../shared/tofu_1000

Takes what compute_geffect.py takes. Prints a table in markdown: the errors of totals, layers and instances, relative to the
largest of their kind in float32 (the tapped pass); and the tapped pass beside the plain way, both in float32.
"""

from __future__ import annotations

import sys
import time

import pandas as pd
from pages import table

import compute_geffect
from app.compose import given
from app.door import quote
from app.families import Family
from app.measuring import build_meter
from app.settings import GEffects
from unlearn.geffect.meter import Meter
from unlearn.geffect.tables import Tables
from unlearn.geffect.target import Wanted
from unlearn.models.checkpoints import load_weights

WAYS = {
    "float32": ["dtype=float32"],
    "bfloat16 autocast": ["dtype=bfloat16"],
    "bfloat16 weights": ["dtype=bfloat16", "weights=bfloat16"],
}


def configured(words: list[str], way: str) -> tuple[GEffects, Family]:
    words = [quote(word) for word in words]
    return compute_geffect.prepare(given("forget_ge", [*words, *WAYS[way], "save_dir=unused"]))


def measured(words: list[str], way: str) -> tuple[Tables, Meter]:
    settings, family = configured(words, way)
    meter = build_meter(settings, family)
    load_weights(meter.model, str(settings.model_path_cur))
    began = time.time()
    tables = meter.measure()
    print(f"{way}: {time.time() - began:.0f} s", file=sys.stderr)
    return tables, meter


def plain_totals(meter: Meter) -> list[float]:
    """By one gradient of the whole loss and a dot product for each tensor, in a pass of its own with the same V."""
    meter.wanted = Wanted(instances=False)
    with meter.trained(True):
        return list(meter.plain()["steps"]["geffect"])


def errors(found: Tables, exact: Tables) -> dict[str, list[float]]:
    """For each risk, the largest errors of totals, layers and instances over the largest value, and how instances correlate."""
    rows: dict[str, list[float]] = {}
    for risk in ("unlearn", "retain"):
        numbers = []
        for name in ("steps", "layers", "instances"):
            a, b = (_of(tables[name], name, risk) for tables in (found, exact))
            numbers.append(float((a - b).abs().max() / b.abs().max()))
        numbers.append(float(a.corr(b)))
        rows[risk] = numbers
    return rows


def _of(table: pd.DataFrame, name: str, risk: str) -> pd.Series:
    table = table[table["risk"] == risk]
    return table.groupby("layer", sort=False)["geffect"].sum() if name == "layers" else table["geffect"].reset_index(drop=True)


def main(words: list[str]) -> None:
    exact, meter = measured(words, "float32")
    pairs = zip("ur", exact["steps"]["geffect"], plain_totals(meter), strict=True)
    del meter
    rows = ([f"e_{name}", f"{t:.8g}", f"{p:.8g}", f"{abs(t / p - 1):.1e}"] for name, t, p in pairs)
    print(*table("| e | tapped, float32 | plain, float32 | relative difference |", rows), "", sep="\n", flush=True)
    risks = (
        [way, risk, *(f"{error:.2%}" for error in worst), f"{correlation:.4f}"]
        for way in list(WAYS)[1:]
        for risk, (*worst, correlation) in errors(measured(words, way)[0], exact).items()
    )
    for line in table("| | risk | total | worst layer | worst instance | correlation over instances |", risks):
        print(line, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
