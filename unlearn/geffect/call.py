"""The G-effect: the inner product of an unlearning objective's gradient with the gradient of a risk (arXiv 2502.19301).

    e_u = < grad L, grad R(D_u) >     e_r = < grad L, grad R(D_r) >

L is what training minimises, over the whole forget set; R the token-mean cross-entropy over a whole set, D_u the rows to
forget, D_r rows to keep. A step along -grad L changes R by about -eta e: e_u << 0 removes, e_r >= 0 keeps. All in eval mode,
at the model's present weights, over the parameters that are trained.

    from unlearn.geffect.call import geffect
    from unlearn.objectives.functions import ga

    tables = geffect(model, tokenizer, forget, retain, ga)
    tables["steps"]  # e_u, e_r, their cosines and norms; `layers` and `instances` are the parts they are the sums of
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from unlearn.geffect.meter import Meter
from unlearn.geffect.monitor import Monitor, keep
from unlearn.geffect.parts import RISKS, foretelling
from unlearn.geffect.tables import TableFolder, Tables
from unlearn.geffect.target import Target, Wanted
from unlearn.models.checkpoints import pad_id
from unlearn.objectives.loss import Loss
from unlearn.objectives.needs import Objective, needs_of, needs_reference
from unlearn.objectives.rows import Row, seconds, tokenize_pairs
from unlearn.objectives.tokens import IGNORE
from unlearn.passes.forcing import Pass, check_fit, with_ref_nll

Rows = Sequence[Row] | Sequence[tuple[str, str]]


def geffect(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    forget: Rows,
    retain: Rows,
    objective: Objective | Loss,
    **settings: Any,
) -> Tables:
    """The G-effects of an objective at the model's present weights, as data frames.

    Args: as of `meter_of`.

    Returns:
        `steps`, `layers`, `instances`, and where asked `tokens` and `positions`: the columns of the files of those names
        but for `step`.

    Raises:
        ValueError: a row leaves no room for an answer, or the tokenizer can't be used (see `tokenize_pairs`).
        FloatingPointError: an effect is not finite.
    """
    return meter_of(model, tokenizer, forget, retain, objective, **settings).measure()


def meter_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    forget: Rows,
    retain: Rows,
    objective: Objective | Loss,
    *,
    reference: PreTrainedModel | None = None,
    beside: Rows = (),
    wanted: Wanted | None = None,
    bf16: bool = False,
    batch_size: int | None = None,
    tokens_per_batch: int | None = None,
    special_tokens: bool | None = None,
) -> Meter:
    """A `Meter` of an objective on texts or tokens, for `GEffectCallback`, or to measure again after the weights changed.

    Args:
        forget: the rows to forget, D_u: (prompt, answer) texts, whose answers and an end-of-sequence token carry the loss, or
            `input_ids` and `labels`, each (T,), not shifted, -100 where no loss is, and where the objective needs one `second`,
            such a second answer to the same question, or a list of them. A text that begins with the special tokens
            that the tokenizer puts in front (a chat template's does) does not get them again.
        retain: the rows to keep, D_r.
        objective: a function of `Tokens` and `Counts` as in `unlearn.objectives.functions`, or a `Loss` with a retain term.
        reference: the model before unlearning, for an objective or a retain term that compares with it.
        beside: rows for the retain term.
        batch_size: rows of a batch at most, which changes nothing but speed and memory; None: 16 on a CPU.
        tokens_per_batch: tokens of a batch at most, its padding counted; None: on a GPU what its free memory holds.
        special_tokens: whether the tokenizer's own are added to texts; None: to those that do not begin with them.

    Raises:
        ValueError: there are no rows, or they are of two kinds, or one has no label tokens; the retain term has none; the
            model trains no parameter.
    """
    for name, given in (("forget", forget), ("retain", retain)):
        if not len(given):
            raise ValueError(f"{name}: no rows")
    rows = {
        name: _tokenized(name, of, tokenizer, special_tokens)
        for name, of in (("forget", forget), ("retain", retain), ("beside", beside))
    }
    for name, of in rows.items():
        answers = [(f"{name}[{i}]", one) for i, row in enumerate(of) for one in (row, *seconds(row))]
        check_fit(model, [one for _, one in answers], [place for place, _ in answers])
    loss = objective if isinstance(objective, Loss) else Loss(objective=objective)
    if loss.reference is None and needs_reference(loss.objective, loss.retain):
        loss = replace(loss, reference=reference)
    pad = pad_id(tokenizer)
    target, beside = rows["forget"], rows["beside"]
    if reference is not None:
        how = Pass(reference, pad, tokenizer.eos_token_id, bf16, batch_size, tokens_per_batch)
        target = with_ref_nll(how, target)
        beside = with_ref_nll(how, beside) if "ref_nll" in needs_of(loss.retain) else beside
    return Meter(
        model=model,
        target=Target(loss, target, beside),
        risks=dict(zip(RISKS, (rows["forget"], rows["retain"]), strict=True)),
        pad=pad,
        wanted=wanted or Wanted(),
        bf16=bf16,
        batch_size=batch_size,
        tokens_per_batch=tokens_per_batch,
        decode=lambda token: str(tokenizer.decode([token])),
    )


def _tokenized(name: str, rows: Rows, tokenizer: PreTrainedTokenizerBase, special_tokens: bool | None) -> list[Row]:
    texts = [row for row in rows if not isinstance(row, dict)]
    if not texts:
        return [_with_tensors(f"{name}[{i}]", row) for i, row in enumerate(rows)]  # type: ignore[arg-type]
    if len(texts) < len(rows):
        raise ValueError(f"{name}: some rows are (prompt, answer) texts and some are tokens; give them all as one of the two")
    return tokenize_pairs(texts, tokenizer, special_tokens=special_tokens)


def _with_tensors(name: str, row: Mapping[str, Any]) -> Row:
    if lacking := {"input_ids", "labels"} - row.keys():
        raise ValueError(f"{name}: needs input_ids and labels, and lacks {' and '.join(sorted(lacking))}")
    found: Row = {key: torch.as_tensor(value) for key, value in row.items() if key != "second"}
    if "second" in row:
        several = [_with_tensors(f"{name}, second answer", one) for one in seconds(dict(row))]
        found["second"] = several if isinstance(row["second"], list) else several[0]
    ids, labels = found["input_ids"], found["labels"].clone()
    if ids.dim() != 1 or ids.shape != labels.shape:
        raise ValueError(
            f"{name}: input_ids and labels need to be (T,) both, and are {tuple(ids.shape)}, {tuple(labels.shape)}"
        )
    labels[:1] = IGNORE  # nothing stands before it to predict it from
    if (labels == IGNORE).all():
        raise ValueError(f"{name}: no label tokens; labels are not {IGNORE} where loss is, behind the first token")
    return found | {"labels": labels}


class GEffectCallback(TrainerCallback):
    """Measures G-effects inside any `Trainer`: before every `every`-th step, from step 0 on, and after the last.

    The weights are measured as they are before the step; its update effect and the change of both risks that it brought
    are measured right after it. Training is not touched: its results are the same bits as without. The tables go to
    `folder`; a training that goes on from a checkpoint keeps what stands there of the steps before.

        trainer = Trainer(model=model, callbacks=[GEffectCallback(meter, every=5, folder="geffect")], ...)

    Args:
        monitor: also write every step's own inner products with the gradients of the risks measured last (see `.monitor`),
            and put them into the step's log as e_u and e_r, for the progress bar.
    """

    def __init__(self, meter: Meter, every: int, folder: str | Path, monitor: bool = False) -> None:
        self.meter, self.every, self.folder = meter, every, Path(folder)
        self.pending: Tables | None = None
        self.monitor = Monitor(meter, self.folder / "monitor.csv") if monitor else None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Raises ValueError for a monitor of a training in float16, whose gradients are scaled."""
        keep(self.folder / "monitor.csv", state.global_step, self.monitor is not None)
        if self.monitor is not None:
            if args.fp16:
                raise ValueError("monitor: not with fp16=True, whose gradients are scaled; bf16=True has none of that")
            self.monitor = Monitor(self.meter, self.monitor.file)
        self.store = TableFolder(self.folder)
        self.store.keep(state.global_step if state.global_step else -1)  # an earlier training's are not this one's

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 and state.global_step not in self.store.steps():
            self._finish()
            self.pending = self.meter.measure()
            if self.monitor is not None:
                self.monitor.measured(state.global_step)
            self.meter.start_update()
            self.lr = kwargs["optimizer"].param_groups[0]["lr"]
        elif self.monitor is not None and self.monitor.since is None:
            self.monitor.measure(state.global_step)

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.monitor is not None:
            self.monitor.take(state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        if self.monitor is not None and "loss" in logs:
            logs |= dict(zip(("e_u", "e_r"), self.monitor.shown, strict=True))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._finish()  # a signal's save is known too late for `on_step_end`

    def _finish(self) -> None:
        if self.monitor is not None:
            self.monitor.finish()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if control.should_save:
            self._finish()
        if self.pending is not None:
            tables, self.pending = self.pending, None
            tables |= with_update(tables, self.meter)
            steps = tables["steps"]
            change = [after - before for after, before in zip(self.meter.risk_values(), steps["risk_value"], strict=True)]
            told = {"minus_lr_geffect": -self.lr * foretelling(steps), "update_effect": steps["update_effect"]}
            columns = {"next_step": state.global_step, "risk": RISKS, **told, "risk_change": change}
            self.store.put(state.global_step - 1, tables | {"prediction": pd.DataFrame(columns)})

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._finish()
        if state.global_step == state.max_steps and state.global_step not in self.store.steps():
            self.store.put(state.global_step, self.meter.measure())


def with_update(tables: Tables, meter: Meter) -> Tables:
    """The tables of a measurement with the update effect of what the weights have become since `start_update`."""
    update = meter.update_effect()
    steps = tables["steps"].assign(update_effect=update["totals"]["update_effect"])
    return tables | {"steps": steps, "updates": update["updates"]}
