"""The G-effects and one step of training of every objective in two processes, for test_all_objectives.py; prints JSON.

torchrun --nproc_per_node=2 all_in_two_processes.py FOLDER weights|adapters

For each case how far e (plain and in forward mode) and the step are from those of the plain gradient, relative to it.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from accelerate import PartialState
from slow_geffect import PAD, RISK_ROWS
from test_all_objectives import CASES, target_of, trained_gradient
from torch import Tensor

from dataloader import StepBatches
from unlearn.geffect.meter import Meter
from unlearn.geffect.target import Target, Wanted
from unlearn.objectives.functions import mean_nll
from unlearn.objectives.loss import Loss
from unlearn.objectives.rows import counts, forget_batch
from unlearn.training.trainer import Settings, train
from utils import device

ONE_STEP = Settings(1, 0, lr=1.0, gradient_accumulation_steps=1, seed=0, bf16=False, save_steps=9, optim="sgd")


def flat(vectors: dict[str, Tensor]) -> Tensor:
    return torch.cat([v.detach().flatten() for v in vectors.values()])


def plain_gradient(model: Any, target: Target) -> Tensor:
    """Of the whole sets in one batch, in this process."""
    model.zero_grad()
    batch = forget_batch([*target.forget], [*target.retain], PAD)
    numbers = {"forget_counts": counts(target.forget), "retain_counts": counts(target.retain)}
    sum(target.loss(model, batch | numbers).values()).backward()  # type: ignore[union-attr]
    of = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return flat(of)


def compare(method: str, term: str | None, lora: bool, folder: Path) -> list[float]:
    model, target = target_of(method, term, lora, kind="phi")  # a float64 model that is one throughout
    v, g = [plain_gradient(model, Target(Loss(mean_nll), rows)) for rows in RISK_ROWS.values()], plain_gradient(model, target)
    tables = Meter(model, target, RISK_ROWS, PAD, Wanted(instances=False), {("same", None): target}, batch_size=2).measure()
    found = []
    for name in ("steps", "sweep"):
        pairs = zip(tables[name]["geffect"], v, strict=True)
        found.append(max((abs(e - g @ of) / (g.norm() * of.norm())).item() for e, of in pairs))

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    four = Target(target.loss, target.forget[:4], target.retain)
    want, before = flat(trained_gradient(model, four, 4)), flat(trained)
    batches = StepBatches([*four.forget], [*four.retain], 1, 2, PartialState().num_processes, 0, PAD)
    lr = (1 / want.abs().max()).item()  # so that the step is large beside the weights' rounding
    train(model, target.loss, batches, replace(ONE_STEP, lr=lr), folder)
    made = before - flat(trained)
    return [*found, (made - lr * want).abs().max().item()]


def main(folder: Path, trained: str) -> None:
    device()
    found: dict[str, Any] = {}
    for method, term in CASES:
        name = f"{method} {term}"
        found[name] = compare(method, term, trained == "adapters", folder / name)
    state = PartialState()
    if state.is_main_process:
        print(json.dumps(found))
    state.wait_for_everyone()  # who ends first closes the connections that the other's gloo thread still listens on
    state.destroy_process_group()


main(Path(sys.argv[1]), sys.argv[2])
