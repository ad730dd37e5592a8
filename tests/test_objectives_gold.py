"""The objectives and retain terms against reference values of another implementation: loss, gradient, both G-effects.

In transformers' own arithmetic, norms in float32 included: so they were made.
"""

from __future__ import annotations

import functools
import json
from functools import partial
from typing import Any

import pytest
import torch
from conftest import SHARED
from safetensors.torch import load_file
from test_objectives import GOLD, count, gold_model, gold_rows, loss_and_gradient, needs_gold
from torch import Tensor

from unlearn import objectives
from unlearn.objectives import Loss, Objective, mean_nll
from unlearn.objectives.rows import Row, forget_batch
from unlearn.objectives.tokens import IGNORE, Layer, token_outputs

FILE = SHARED / "gold" / "objectives2" / "expected.json"
EXPECTED: dict[str, Any] = json.loads(FILE.read_text()) if FILE.is_file() else {"cases": {}}


def objective_of(case: str) -> tuple[Objective, bool, Layer]:
    """The function with its numbers, whether it is of the retain rows, and the layers, by the case's name."""
    name, _, numbers = (part.strip() for part in case.partition("|"))
    first, *kind = name.split()
    layer: Layer = [2, 3] if first == "circuit_breakers" else 2 if numbers.startswith("layer") else None
    values = [float(word.strip(",")) for word in numbers.split() if word.strip(",").replace(".", "").isdecimal()]
    keys = {
        "simnpo": ("beta", "gamma"),
        "satimp": ("beta1", "beta2"),
        "ipo": ("tau",),
        "ceu": ("n",),
        "rmu": ("_", "c"),
        "adaptive_rmu": ("_", "k"),
        "circuit_breakers": ("_", "__"),
        "hidden": ("_",),
    }.get(first, ("beta",) * len(values))
    hyper: dict[str, Any] = {key: x for key, x in zip(keys, values, strict=True) if not key.startswith("_")}
    hyper |= {"direction": kind[0]} if first == "me" else {"divergence": kind[0]} if first == "flat" else {}
    hyper |= {"normalize": True} if first == "rmu" else {}
    retain = "retain" in kind
    of_retain = {"jensun": "jensun_retain", "circuit_breakers": "circuit_breakers_retain"}
    function = getattr(objectives, of_retain.get(first, first) if retain else first)
    return partial(function, **hyper), retain, layer


def as_rows(name: str) -> list[Row]:
    """Up to the last label: the end-of-sequence token stands behind the attention mask there, and nothing sees it."""
    batch = gold_rows(name)
    length = [1 + int((labels != IGNORE).nonzero().max()) for labels in batch["labels"]]
    return [{key: batch[key][i, :n] for key in ("input_ids", "labels")} for i, n in enumerate(length)]


def rows_of(name: str) -> list[Row]:
    """With their losses under the reference, and the `idk` rows beside them as second answers, one by one."""

    def with_nll(row: Row) -> Row:
        with torch.no_grad():
            return row | {"ref_nll": token_outputs(gold_model("oracle"), forget_batch([row], [], 0)).nll}

    return [with_nll(row) | {"second": with_nll(second)} for row, second in zip(as_rows(name), as_rows("idk"), strict=True)]


@functools.cache
def risk_gradient(name: str) -> Tensor:
    rows = as_rows(name)
    batch = forget_batch(rows, [], 0) | {"forget_counts": count(gold_rows(name)["labels"])}
    model = gold_model("theta")
    return loss_and_gradient(lambda: Loss(mean_nll)(model, batch)["objective"], model)[1]


@needs_gold
@pytest.mark.skipif(not FILE.is_file(), reason=f"no reference values: {FILE} is not there")
@pytest.mark.parametrize("case", EXPECTED["cases"])
def test_reference_values(case: str) -> None:
    objective, retain, layer = objective_of(case)
    noise = load_file(GOLD / "rmu_noise.safetensors")["rmu_noise"].flatten()[:64].double()
    refusal = torch.tensor(EXPECTED["refusal_tokens"])
    own, term = (mean_nll, objective) if retain else (objective, None)
    loss = Loss(own, term, layer=layer, noise=noise, reference=gold_model("oracle"), refusal=refusal)
    rows = rows_of("retain" if retain else "forget")
    batch = forget_batch([], rows, 0) if retain else forget_batch(rows, [], 0)
    numbers = count(gold_rows("retain" if retain else "forget")["labels"])
    batch |= {"forget_counts": numbers, "retain_counts": numbers}
    model = gold_model("theta")
    value, gradient = loss_and_gradient(lambda: loss(model, batch)["retain" if retain else "objective"], model)
    found = {"loss": value, "grad_norm": gradient.norm().item()}
    found |= {key: (gradient @ risk_gradient(name)).item() for key, name in (("e_u", "forget"), ("e_r", "retain"))}
    assert found == pytest.approx(EXPECTED["cases"][case], rel=1e-9)
