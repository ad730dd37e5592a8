"""Attacks on weights: trained again, quantised."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from app.attack_settings import Robustness
from app.attack_tables import SCORES, Result
from app.attack_work import Part, Work, by_bitsandbytes, of_sets, told_of
from app.compose import given
from app.data import Data, Rows, check_rows, data_of
from app.families import Family
from app.settings import Finetune

WARM_UP = 5  # one of so many steps, as of finetune.py's five passes the first

# ---- trained again ----


def relearned_rows(settings: Robustness) -> Rows:
    """The rows of `relearn`, their share drawn.

    Raises:
        ValueError: relearn.data is neither a file of rows nor a set of the benchmark's.
    """
    data, name = data_of(settings), settings.relearn.data
    if name is None:
        rows = [row for one in data.benchmark.unlearn[settings.split].forget for row in data.rows(one)]
    else:
        rows = rows_of_file(data, name) if Path(name).is_file() else rows_of_set(data, name)
    n = max(1, round(settings.relearn.share * len(rows)))
    drawn = range(n) if n == len(rows) else sorted(random.Random(f"relearn {settings.seed}").sample(range(len(rows)), n))
    return [rows[i] for i in drawn]


def rows_of_file(data: Data, name: str) -> Rows:
    """A local file's rows, whose texts are called as the data's own are. Raises ValueError where they are none."""
    own = replace(data, benchmark=data.benchmark.model_copy(update={"read": None}), forget_data=name)
    check_rows(f"relearn.data={name}", Path(name), data=own)
    return own.rows("forget_data")


def rows_of_set(data: Data, name: str) -> Rows:
    """The rows of a set of the benchmark's. Raises ValueError where there is none of that name, or its rows are none."""
    if not data.has(name):
        there = ", ".join(data.names())
        raise ValueError(f"relearn.data={name}: no such file, and no set of benchmark={data.benchmark.name}; there are {there}")
    try:
        data.check(name)
        return data.rows(name)
    except ValueError as error:
        raise ValueError(f"relearn.data={name}: {error}") from error


def training(settings: Robustness, family: Family) -> Finetune:
    """The settings of a fine-tuning as finetune.py has them, with those of `relearn`."""
    own = settings.relearn
    shared = Finetune.model_fields.keys() & Robustness.model_fields.keys() - {"save_dir", "output_dir", "split"}
    usual: Finetune = given("finetune")
    more = {key: getattr(settings, key) for key in shared}
    more |= {"lr": float(own.lr or family.finetune_lr), "optim": own.optim, "batch_size": own.batch_size}
    more |= {"gradient_accumulation_steps": own.gradient_accumulation_steps, "num_epochs": 1}
    return usual.model_copy(update=more | {"gradient_checkpointing": family.gradient_checkpointing})


def relearn(work: Work, path: str, part: Part) -> list[Result]:
    """The scores before, at a few steps of a fine-tuning and after it."""
    from unlearn.attacks import measured_steps
    from utils import processes

    own, rows = work.settings.relearn, relearned_rows(work.settings)
    per_epoch = max(1, len(rows) // (own.batch_size * own.gradient_accumulation_steps * processes()))
    steps = own.steps or per_epoch
    at = measured_steps(steps, own.every)
    found = {0: part("plain", lambda: work.plain_both(path))}
    if not all(part.has(f"step_{step}") for step in at):
        train_again(work, path, part, rows, (steps, per_epoch), at)
    for step in at:
        found[step] = part(f"step_{step}", partial(not_measured, step))
    return [
        Result(f"step {step}", of_sets(scores), told_of(scores, f"step {step}"), len(scores["forget"]))
        for step, scores in found.items()
    ]


def not_measured(step: int) -> None:
    raise AssertionError(f"step {step} was passed over")


def train_again(work: Work, path: str, part: Part, rows: Rows, steps: tuple[int, int], at: Sequence[int]) -> None:
    """Fine-tune the model of that path, by the one training path, and score it after the steps `at`.

    Args:
        steps: of the training, and of one pass over its rows.
    """
    from app.building import cut_as_run, how_to_train, step_batches
    from unlearn.attacks import AtSteps
    from unlearn.objectives import Loss, mean_nll
    from unlearn.training import train

    how = work.models.at(path)
    tokenized = work.models.tokenize(rows)
    cut = cut_as_run(training(work.settings, work.family), work.family, how.model)
    batches = step_batches(cut, tokenized, [], steps[0], work.models.tokenizer)
    settings = how_to_train(cut, work.family, *steps)
    settings = replace(settings, warmup_steps=min(settings.warmup_steps, steps[0] // WARM_UP), save_steps=steps[0])
    work.models.mixed(lambda model: None)  # from here on its weights are of no path

    def measure(step: int) -> None:
        part(f"step_{step}", lambda: work.both(how, f"{Path(path).name}, relearned {step} steps"))

    train(how.model, Loss(mean_nll), batches, settings, part.folder, callbacks=[AtSteps(at, measure)])
    how.model.zero_grad()


def compared(unlearned: Sequence[Result], retain: Sequence[Result]) -> list[Result]:
    """The unlearned model's results with R of every forget score, against the retain model's after the same steps."""
    from unlearn.attacks import resistance_to_relearning

    def r(at: int, score: str) -> float:
        key = f"forget_{score}"
        return resistance_to_relearning(*(of[i].values.get(key, float("nan")) for of in (unlearned, retain) for i in (0, at)))

    rest = [
        one._replace(values=one.values | {f"R_{score}": r(at, score) for score in SCORES})
        for at, one in enumerate(unlearned[1:], start=1)
    ]
    return [unlearned[0], *rest]


# ---- quantised ----


def quantize(work: Work, path: str, part: Part) -> list[Result]:
    """The scores as the model is, and with its linear weights in each number of bits."""
    from unlearn.attacks import resistance_to_quantization

    plain = part("plain", lambda: work.plain_both(path))
    before = of_sets(plain)
    results = [Result("as it is", before, told_of(plain, "as it is"), len(plain["forget"]))]
    for bits in work.settings.quantize.bits:
        found = part(f"bits_{bits}", partial(quantized, work, path, bits))
        values, setting = of_sets(found), f"{bits} bits"
        q = {
            f"Q_{score}": resistance_to_quantization(before[key], values[key])
            for score in SCORES
            if (key := f"forget_{score}") in values
        }
        results.append(Result(setting, values | q, told_of(found, setting), len(found["forget"])))
    return results


def quantized(work: Work, path: str, bits: int) -> dict[str, Rows]:
    from unlearn.attacks.quantization import load_by_bitsandbytes, quantize

    what, how = f"{Path(path).name}, {bits} bits", work.models.at(path)
    if by_bitsandbytes(work.settings):
        model = load_by_bitsandbytes(path, bits, how.model.device)
        return work.both(replace(how, model=model, bf16=False), what)
    return work.both(work.models.mixed(lambda model: quantize(model, bits)), what)
