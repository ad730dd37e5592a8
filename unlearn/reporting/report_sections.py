"""The sections of a report, in the page's order; of each, the runs that lack it and the command that makes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from unlearn.reporting import report_geffects as geffects
from unlearn.reporting import report_scores as scores
from unlearn.reporting.report_panels import Figure
from unlearn.reporting.report_tables import Run

MEASURE = "python compute_geffect.py model_path_cur={run}"
FULL = "python evaluation_everything.py model_path={run}"
TOFU = "python tofu_evaluation.py model_path={run} retain_path=RETAIN"
ATTACK = "python robustness.py model_path={run} retain_path=RETAIN attacks=[relearn,quantize,sample,prefix,paraphrase]"


@dataclass
class Section:
    """Figures of one thing.

    Args:
        missing: the names of the runs that lack it.
        commands: what would make it, RUN being such a run's folder; of one run alone, its own folder.
    """

    name: str
    title: str
    figures: list[Figure]
    missing: list[str]
    commands: list[str]


def sections(runs: Sequence[Run]) -> list[Section]:
    names = [run.name for run in runs]
    steps = [*geffects.steps(runs, names), *geffects.prediction(runs, names), *geffects.monitor(runs, names)]

    def section(name: str, title: str, figures: list[Figure], has: str, *commands: str) -> Section:
        lacking = [run for run in runs if not there(run, has)]
        folder = str(lacking[0].folder) if len(lacking) == 1 else "RUN"
        return Section(name, title, figures, [run.name for run in lacking], [one.format(run=folder) for one in commands])

    return [
        section("losses", "Losses", geffects.training(runs, names), "logs/train.jsonl"),
        section("geffects", "G-effects by step", steps, "geffect/steps.csv", MEASURE),
        section("layers", "Layers", geffects.layers(runs), "geffect/layers.csv", MEASURE),
        section("instances", "Instances", geffects.instances(runs, names), "geffect/instances.csv", MEASURE),
        section("tokens", "Tokens", geffects.tokens(runs), "geffect/tokens.parquet", f"{MEASURE} tokens=true"),
        section(
            "objectives", "Other objectives", geffects.objectives(runs, names), "geffect/sweep.csv", f"{MEASURE} sweep=all"
        ),
        section(
            "scores",
            "Scores over steps",
            [*scores.over_steps(runs, names), *scores.harness(runs, names)],
            "scores.csv",
            TOFU,
            FULL,
        ),
        section("fair", "The fair comparison", scores.fair(runs, names), "control.csv", f"{FULL} retain_path=RETAIN"),
        section("attacks", "Attacks", scores.attacks(runs, names), "robustness.csv", ATTACK),
        section("inside", "Where in the model", scores.inside(runs, names), "layers.csv", f"{FULL} representation=true"),
    ]


def there(run: Run, name: str) -> bool:
    """Whether the run has that table."""
    if name.startswith("geffect/"):
        return run.geffect(name.removeprefix("geffect/")) is not None
    if name == "control.csv":
        return bool(run.scored(name))
    return run.represented() if name == "layers.csv" else (run.folder / name).exists()
