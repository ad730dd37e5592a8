"""A benchmark: which sets of rows a data set has, and what each is for. A file of config/benchmark each."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

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


class Own(Settings):
    """A score of the benchmark's own: `score(asked, **sets)` gives a `Score`, `sets` being rows by the function's names."""

    sets: dict[str, str]
    score: dict[str, Any]
    against: dict[str, Any] | None = setting(None, "(score, the retain model's) -> more scores")


class Benchmark(Settings):
    """A data set as a benchmark: which sets there are, and what each is for."""

    by_file: ClassVar[bool] = True
    name: str
    data_path: str | None = setting(None, "where its sets are, unless the family or data_path= says")
    read: dict[str, Any] | None = setting(None, "a function (data_path, set) -> rows; null: JSON files, or the hub's splits")
    lacking: bool = setting(False, "true: sets that a local data_path lacks are those of the benchmark's own")
    hub: dict[str, list[str]] = setting(
        {}, "sets that the hub has otherwise than as <set>: each as one or several of <subset>/<split>[/<column>]"
    )
    max_length: Annotated[int, Field(ge=2)] = setting(500, "tokens a row keeps at most, unless the command says")
    piece: Count | None = setting(None, "plain texts longer than so many characters are cut in pieces, rows each")
    columns: dict[str, str] = setting({}, "the names of question, answer or text in its rows, where they are others")
    finetune: dict[str, list[str]]
    unlearn: dict[str, Unlearning]
    held_out: HeldOut = HeldOut()
    perturbed: dict[str, str] = setting({}, "sets with paraphrased questions and wrong answers, of forget and retain rows")
    asked: dict[str, str] = setting({}, "the sets that tofu_evaluation.py asks, by what its tables call them")
    own: dict[str, Own] = setting({}, "scores of its own, which tofu_evaluation.py measures, by their names")
    pretrained: bool = setting(
        False, "true: what is unlearned is the family's pretrained model, where none was fine-tuned here"
    )
    models: dict[str, str] = setting({}, "by family, the published model to unlearn, where none was fine-tuned here")
    retain_models: dict[str, str] = setting({}, "by family, the published model that never saw the rows to forget")
    also: dict[str, str] = setting({}, "further sets that both evaluations score, by what their tables call them")

    def sets(self) -> list[str]:
        """The sets that its YAML names, in the order in which they are first named."""
        found = [name for names in self.finetune.values() for name in names]
        for of in self.unlearn.values():
            found += [*of.forget, *of.retain, *([] if of.unseen is None else [of.unseen])]
        found += [name for name in (self.held_out.first_of, self.held_out.rows) if name is not None]
        asked = [name for name in (*self.perturbed.values(), *self.asked.values(), *self.also.values()) if name != "held_out"]
        found += [name.format(split=split) for name in asked for split in self.unlearn]
        found += [name for own in self.own.values() for name in own.sets.values()]
        return list(dict.fromkeys(found))
