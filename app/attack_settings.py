"""The settings of robustness.py: every one once, as those of the other commands in `app.settings`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from app.fields import Count, Positive, Settings, setting
from app.settings import Evaluation, Optim

Share = Annotated[int | float, Field(gt=0, le=1)]
Between = Annotated[int | float, Field(gt=0, lt=1)]
Some = Annotated[list[Count], Field(min_length=1)]
ATTACKS = ("relearn", "quantize", "sample", "prefix", "paraphrase")


class Relearn(Settings):
    data: str | None = setting(None, "rows to train on, a local file or a set of the benchmark's; null: the forget rows")
    share: Share = setting(1, "of these rows, drawn by seed")
    steps: Count | None = setting(None, "optimiser steps; null: one pass over the rows")
    every: Count | None = setting(None, "scores after every so many steps and the last; null: after each quarter")
    lr: Positive = setting(None, "null: the family's finetune_lr, else 1e-5")
    batch_size: Count = setting(4, "rows per process and forward pass")
    gradient_accumulation_steps: Count = setting(4, "micro-batches a step, on each process")
    optim: Optim = setting("adamw_torch_fused", "8bit: with bitsandbytes; torch_8bit, torch_4bit: with torchao")


class Quantize(Settings):
    bits: Some = setting([8, 4], "8: int8, 4: NF4")
    by: Literal["auto", "bitsandbytes", "round_trip"] = setting(
        "auto", "round_trip: to the grid and back, in float; auto: bitsandbytes on a GPU where it is installed"
    )


class Sample(Settings):
    n: Count = setting(16, "answers to each question")
    k: Some | None = setting(None, "of which an attacker draws so many; null: powers of two up to n")
    temperature: Positive = setting(1, "logits are divided by it")
    top_p: Share = setting(1, "only the fewest tokens that have this share of the probability are drawn from")
    tau: Share = setting(0.9, "an answer leaks from this ROUGE-L recall on")
    confidence: Between = setting(0.95, "of the upper bound of a leak's probability")


class Prefix(Settings):
    templates: str | None = setting(None, "a YAML file of templates; null: config/attack/prefixes.yaml")


class Paraphrase(Settings):
    columns: Annotated[list[str], Field(min_length=1)] = setting(
        ["paraphrased_question"], "the rows' columns with paraphrased questions, a text or a list of texts each"
    )


class Robustness(Evaluation):
    """Attacks on an unlearned model, and on a retain model beside it."""

    config: ClassVar[str] = "robustness"

    attacks: list[str] = setting([*ATTACKS], f"which of {', '.join(ATTACKS)}", may_differ=True)
    ds_size: Count | None = setting(300, "forget and held-out retain rows that are scored, at most; null: all")
    max_new_tokens: Count = setting(200, "of an answer, greedy or sampled")
    rouge_tokenizer: Literal["ascii", "unicode"] = setting(
        "ascii", "ROUGE's words: a-z and 0-9, as rouge-score is published; unicode: of any script"
    )
    relearn: Relearn = Relearn()
    quantize: Quantize = Quantize()
    sample: Sample = Sample()
    prefix: Prefix = Prefix()
    paraphrase: Paraphrase = Paraphrase()
