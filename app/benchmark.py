"""A benchmark: which sets of rows a data set has, and what each is for. A file of config/benchmark each."""

from __future__ import annotations

from typing import Any, ClassVar

from app.fields import Count, Settings, Share, setting


class Unlearning(Settings):
    """What one split to forget is made of, by the names of sets."""

    forget: list[str]
    retain: list[str] = setting([], "to keep: beside the rows to forget while unlearning, and held out of it")
    unseen: str | None = setting(None, "rows that nobody trains on")


class HeldOut(Settings):
    """Which rows to keep are measured and never trained on while unlearning: the first ones, or a set of their own."""

    first_of: str | None = setting(None, "as many of the first as this set has")
    share: Share | None = setting(None, "this share of them, the first ones")
    most: Count | None = setting(None, "and no more than so many")
    rows: str | None = setting(None, "the rows of this set, and none of those to keep")


class Benchmark(Settings):
    """A data set as a benchmark: which sets there are, and what each is for."""

    by_file: ClassVar[bool] = True
    name: str
    data_path: str | None = setting(None, "where its sets are, unless the family or data_path= says")
    read: dict[str, Any] | None = setting(None, "a function (data_path, set) -> rows; null: JSON files, or the hub's splits")
    hub: dict[str, list[str]] = setting(
        {}, "sets that the hub has otherwise than as <set>: each as one or several of <subset>/<split>[/<column>]"
    )
    columns: dict[str, str] = setting({}, "the names of question, answer or text in its rows, where they are others")
    finetune: dict[str, list[str]]
    unlearn: dict[str, Unlearning]
    held_out: HeldOut = HeldOut()
    perturbed: dict[str, str] = setting({}, "sets with paraphrased questions and wrong answers, of forget and retain rows")
    asked: dict[str, str] = setting({}, "the sets that tofu_evaluation.py asks, by what its tables call them")
    also: dict[str, str] = setting({}, "further sets that both evaluations score, by what their tables call them")
