"""The tables and totals of evaluation_everything.py, written and told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from app import evaluating
from app.data import Rows, data_of
from app.settings import EvalEverything
from unlearn.io.rows import write_csv
from utils import say

ON_ROWS = ("loss", "ps_exact", "ps_perturb", "ps_similar", "exact_memorization", "extraction_strength")


def scored(settings: EvalEverything) -> list[str]:
    """The sets of which PS and memorisation are told."""
    return ["forget", "retain", *settings.benchmark.also]


def attacks(settings: EvalEverything) -> list[str]:
    """The membership scores that are measured."""
    from unlearn.scores.extraction import ATTACKS, GRADNORM

    return [*ATTACKS, *([GRADNORM] if settings.gradnorm else [])]


def no_holdout(settings: EvalEverything) -> str | None:
    """Why there are no rows never trained on, None where there are some."""
    data = data_of(settings)
    unseen = data.benchmark.unlearn[settings.split].unseen
    if unseen is None:
        where = f"forget_data={data.forget_data}" if data.forget_data else f"benchmark={data.benchmark.name}"
        return f"{where} has no rows that were never trained on"
    try:
        data.check(unseen)
    except ValueError as error:
        if data.file(unseen).exists():  # broken
            raise
        return str(error)
    return None


def totals(
    settings: EvalEverything, measured: dict[str, dict[str, Rows]], retain: dict[str, Rows] | None, bar: float, control: Any
) -> dict[str, Any]:
    """The sections of scores.json."""
    from unlearn.scores.extraction import mean_of

    means = {
        model: {
            data: {key: mean_of(rows[data], key) for key in ON_ROWS if settings.similar or key != "ps_similar"}
            | {"rows": len(rows[data])}
            for data in scored(settings)
        }
        for model, rows in measured.items()
    }
    best = {key: value for key, value in (control or {}).items() if key != "curve"}
    if control is not None and control["weight"] is None:
        best["weight"] = "no weight reaches the bar"
    return {
        "ps": means,
        "bar": bar,
        "control": best or "not searched (control=false)",
        "privacy": privacy(settings, measured, retain),
    }


def privacy(settings: EvalEverything, measured: dict[str, dict[str, Rows]], retain: dict[str, Rows] | None) -> Any:
    """AUCs and privleak, or why there are none."""
    from unlearn.scores.definitions import privleak
    from unlearn.scores.extraction import aucs

    if (why := no_holdout(settings)) is not None:
        return f"not available: {why}"

    def of(rows: dict[str, Rows]) -> dict[str, float]:
        return aucs([row | {"data": data} for data in ("forget", "holdout") for row in rows[data]])

    model = of(measured["unlearned"])
    sizes = {data: len(measured["unlearned"][data]) for data in ("forget", "holdout")}
    found: dict[str, Any] = {"auc": model, "rows": sizes, "min_k": settings.min_k}
    if retain is None:
        none = "not available: no retain model; give retain_path=MODEL"
        return found | {"auc": model | {"reference": none}, "privleak": none}
    of_retain = {name: value for name, value in of(retain).items() if name != "reference"}
    return found | {"auc_retain_model": of_retain, "privleak": privleak(model["min_k"], of_retain["min_k"])}


def write(
    settings: EvalEverything,
    target: evaluating.Target,
    progress: evaluating.Progress,
    measured: dict[str, dict[str, Rows]],
    found: dict[str, Any],
    control: dict[str, Any] | None,
) -> None:
    lines = [
        {"model": model, "data": data, "row": i} | row
        for model, rows in measured.items()
        for data in scored(settings)
        for i, row in enumerate(rows[data])
    ]
    key = ("model", "data", "row")
    table = [pick(line, *key) | {name: line.get(f"ps_{name}") for name in ("exact", "perturb", "similar")} for line in lines]
    write_table(target.folder / "ps_rows.csv", table)
    write_table(target.folder / "memorization_rows.csv", [pick(line, *key, *ON_ROWS[-2:]) for line in lines])
    means = [
        {"model": model, "data": data}
        | {name: of.get(f"ps_{name}") for name in ("exact", "perturb", "similar")}
        | {"rows": of["rows"]}
        for model, sets in found["ps"].items()
        for data, of in sets.items()
    ]
    write_table(target.folder / "ps.csv", means)
    if no_holdout(settings) is None:
        privacy_lines = [
            {"data": data, "row": i} | pick(row, *attacks(settings))
            for data in ("forget", "holdout")
            for i, row in enumerate(measured["unlearned"][data])
        ]
        write_table(target.folder / "privacy_rows.csv", privacy_lines)
    if control is not None:
        from unlearn.reporting.score_figures import draw_control

        write_table(target.folder / "control.csv", control["curve"])
        draw_control(target.folder, found["bar"], control["weight"])
    sections = found | {"definitions": definitions(settings), "from": {"evaluation_everything": progress.record}}
    evaluating.write_scores(target, sections)
    evaluating.add_row(target, columns(settings, found))
    if target.run is not None:
        evaluating.add_row(
            evaluating.Target(settings.original_path, target.folder, 0, target.run, target.table),
            knowledge_columns(found["ps"]["original"]),
        )


def columns(settings: EvalEverything, found: dict[str, Any]) -> dict[str, Any]:
    """The scores as columns of the run's table."""
    control, privacy = (found[name] if isinstance(found[name], dict) else {} for name in ("control", "privacy"))
    aucs = privacy.get("auc", {})
    more = {f"control_{key}": control.get(key) for key in ("weight", "forget_ps", "retain_ps")}
    more |= {f"auc_{name}": aucs.get(name) for name in attacks(settings)} | {leak_of(settings): privacy.get("privleak")}
    numbers = {key: None if isinstance(value, str) else value for key, value in more.items()}  # not why there is none
    return {"split": settings.split} | knowledge_columns(found["ps"]["unlearned"]) | {"bar": found["bar"]} | numbers


def leak_of(settings: EvalEverything) -> str:
    """The column of this script's privleak: another one where the benchmark has a score of that name, of other texts."""
    return "rows_privleak" if "privleak" in settings.benchmark.own else "privleak"


def knowledge_columns(of: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {f"{data}_{key}": value for data, means in of.items() for key, value in means.items() if key != "rows"}


def pick(row: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: row.get(key) for key in keys}


def write_table(file: Path, rows: Rows) -> None:
    """A CSV, empty where there is no value."""
    write_csv(file, [{key: None if value != value else value for key, value in row.items()} for row in rows])


def definitions(settings: EvalEverything) -> dict[str, str]:
    return {
        "loss": "mean over all label tokens of all rows, end-of-sequence counted, in nats; of a row over its own",
        "ps_exact": "1 - k/T, k the shortest prefix after which greedy decoding gives the rest; last token wrong: 0",
        "ps_perturb": "the same after the paraphrased question",
        "ps_similar": "the same where a longest common subsequence of at least half of the rest suffices, by bisection",
        "extraction_strength": "ps_exact, but 1/T where the last token is wrong (open-unlearning)",
        "exact_memorization": "share of the answer's tokens whose argmax is right under teacher forcing",
        "bar": f"{settings.ps_p} x the original model's retain ps_exact",
        "auc": "P(a holdout row's score > a forget row's), ties half; 1: the forget rows look like members",
        "zlib": "loss over the bytes of the compressed answer",
        "min_k": f"k = {settings.min_k}, end-of-sequence not counted; min_k_plus_plus likewise",
        "gradnorm": "gradnorm=true: mean over parameter tensors of the L2 norm of the gradient of the answer's mean loss,"
        " end-of-sequence not counted",
        leak_of(settings): "100 (AUC_retain - AUC) / (1 - AUC_retain) of min_k",
    }


def report(found: dict[str, Any]) -> None:
    """The scores as a small table on standard error."""
    for model, sets in found["ps"].items():
        for data, of in sets.items():
            values = "  ".join(f"{key.removeprefix('ps_')} {evaluating.told(of[key])}" for key in ON_ROWS[1:] if key in of)
            say(f"{model:9} {data:6} {values}  ({of['rows']} rows)")
    control = found["control"]
    if isinstance(control, dict):
        told = "  ".join(f"{key} {evaluating.told(value)}" for key, value in control.items())
        say(f"control   {told}")
    if isinstance(found["privacy"], str):
        return say(f"privacy   {found['privacy']}")
    aucs = "  ".join(
        f"{name} {evaluating.told(auc, 3)}" for name, auc in found["privacy"]["auc"].items() if not isinstance(auc, str)
    )
    leak = found["privacy"]["privleak"]
    say(f"AUC       {aucs}")
    say(f"privleak  {evaluating.told(leak, 2)}")
