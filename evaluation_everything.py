"""What a model gives away of the answers: extraction (PS), memorisation, membership; and the fair comparison between methods.

    torchrun --nproc_per_node=1 --master_port=18765 evaluation_everything.py split=forget05 model_family=phi model_path=CKPT
    python evaluation_everything.py model_path=RUN retain_path=RETAIN

PS of the unlearned and of the original model, on the forget and the held-out retain rows; the largest weight at which a
mixture of the two keeps `ps_p` of the original's retain PS, and its forget PS. Every key stands in
config/eval_everything.yaml and config/common.yaml.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

import evaluation
import planning
import settings
import utils
from app.families import Family
from unlearn.io.rows import write_csv

if TYPE_CHECKING:
    from unlearn.passes.forcing import Forced

MAY_DIFFER = {"retain_path", "ps_p", "similar", "control"}
Rows = list[dict[str, Any]]  # of questions, or of what was measured
ON_ROWS = ("loss", "ps_exact", "ps_perturb", "ps_similar", "exact_memorization", "extraction_strength")


# ---- before anything is loaded ----


def prepare(cfg: DictConfig) -> Family:
    """Fill in what the run and the family decide, and refuse what cannot work before anything is loaded."""
    family = evaluation.prepare(cfg, "eval_everything")
    cfg.original_path = evaluation.original_of(cfg) or utils.original_model(family, cfg)
    settings.check_checkpoint("original_path", cfg.original_path)
    settings.check_architecture("original_path", cfg.original_path, family)
    if cfg.forget_data is None:
        for split in (f"{cfg.split}_perturbed", "retain_perturbed"):
            settings.check_split(cfg.data_path, split)
    return family


def read_rows(cfg: DictConfig) -> dict[str, Rows]:
    """The forget rows, the held-out retain rows, both with their paraphrased questions, and rows that nobody trained on."""
    import dataloader

    data = dataloader.unlearning_data(cfg)
    if cfg.forget_data is not None:
        return {"forget": data.forget, "retain": data.held_out, "holdout": []}
    more = {name: dataloader.read_split(cfg.data_path, name) for name in (f"{cfg.split}_perturbed", "retain_perturbed")}
    return {
        "forget": joined(data.forget, more[f"{cfg.split}_perturbed"]),
        "retain": joined(data.held_out, more["retain_perturbed"]),
        "holdout": dataloader.read_split(cfg.data_path, holdout_split(cfg)) if no_holdout(cfg) is None else [],
    }


def hash_data(cfg: DictConfig, rows: dict[str, Rows]) -> dict[str, str]:
    """A hash of each split's rows, or of each local file's, as far as they are read."""
    if cfg.forget_data is not None:
        return {f"{name}_data": utils.hash_rows(rows[name], utils.ALL_TEXTS) for name in ("forget", "retain")}
    perturbed = {f"{cfg.split}_perturbed": rows["forget"], "retain_perturbed": rows["retain"]}
    own = {cfg.split: rows["forget"], utils.RETAIN_OF[cfg.split]: rows["retain"], holdout_split(cfg): rows["holdout"]}
    more = utils.ALL_TEXTS[len(utils.TEXTS) :]
    return {name: utils.hash_rows(given) for name, given in own.items()} | {
        name: utils.hash_rows(given, more) for name, given in perturbed.items()
    }


def joined(rows: Rows, perturbed: Rows) -> Rows:
    """The rows with what their perturbed ones, found by question, have beside: paraphrases and wrong answers."""
    by_question = {row["question"]: row for row in perturbed}
    return [by_question.get(row["question"], {}) | row for row in rows]


def holdout_split(cfg: DictConfig) -> str:
    return str(cfg.split).replace("forget", "holdout")


def no_holdout(cfg: DictConfig) -> str | None:
    """Why there are no rows never trained on, None where there are some."""
    if cfg.forget_data is not None:
        return f"forget_data={cfg.forget_data} has no rows that were never trained on"
    split = holdout_split(cfg)
    try:
        settings.check_split(cfg.data_path, split)
    except ValueError as error:
        if Path(cfg.data_path, f"{split}.json").exists():  # broken
            raise
        return str(error)
    return None


# ---- the work ----


def run(cfg: DictConfig) -> None:
    if cfg.get("plan"):
        if cfg.model_path:
            evaluation.inherit(cfg)
        return planning.tell(cfg, "eval_everything")
    family = prepare(cfg)
    models = evaluation.Models(cfg, family, keep=cfg.control)
    rows = read_rows(cfg)
    of = cache(partial(measure, cfg, models, rows))  # the original and the retain model once for all checkpoints
    similar_of = cache(partial(measure_similar, models, rows))
    targets = [target for target in evaluation.targets(cfg) if target.step != 0]  # the original is beside every checkpoint
    for target in targets:
        with utils.alone(target.folder):
            evaluate(cfg, target, models, rows, of, similar_of)
        models.drop(target.path)
    evaluation.draw_run(targets)


def evaluate(
    cfg: DictConfig,
    target: evaluation.Target,
    models: evaluation.Models,
    rows: dict[str, Rows],
    of: Callable[[str, bool], dict[str, Rows]],
    similar_of: Callable[[str, str], list[float]],
) -> None:
    """One model's results, `of` and `similar_of` giving what is measured at a path."""
    weights = [target.path, cfg.original_path, *([cfg.retain_path] if cfg.retain_path else [])]
    progress = evaluation.Progress(cfg, target, "evaluation_everything", MAY_DIFFER, weights, hash_data(cfg, rows))
    if progress.finished and progress.same:
        return utils.say(f"{target.path} is evaluated already: {target.folder}")
    measured: dict[str, dict[str, Rows]] = {}
    for name, path in (("original", cfg.original_path), ("unlearned", target.path)):
        measured[name] = progress.part(name, partial(of, path, name == "unlearned"))
        for data in ("forget", "retain") if cfg.similar else ():
            found = progress.part(f"similar_{name}_{data}", partial(similar_of, path, data))
            for row, value in zip(measured[name][data], found, strict=True):
                row["ps_similar"] = value
    retain = None
    if cfg.retain_path is not None:
        retain = progress.part("retain_model", partial(of, cfg.retain_path, True))
        if cfg.retain_path not in (cfg.original_path, target.path):
            models.drop(cfg.retain_path)
        for data in ("forget", "holdout"):
            for row, other in zip(measured["unlearned"][data], retain[data], strict=True):
                row["reference"] = row["loss"] - other["loss"]
    from unlearn.scores.extraction import mean_of

    bar = cfg.ps_p * mean_of(measured["original"]["retain"], "ps_exact")
    control = search_control(cfg, target, models, rows, progress, bar) if cfg.control else None
    found = totals(cfg, measured, retain, bar, control)
    if utils.is_main_process():
        write(cfg, target, progress, measured, found, control)
    progress.close()
    report(found)
    utils.say(f"{target.path}: rows and scores are in {target.folder}")


def measure(cfg: DictConfig, models: evaluation.Models, rows: dict[str, Rows], path: str, privacy: bool) -> dict[str, Rows]:
    """Each row's scores under teacher forcing, all from one pass; `privacy`: with the membership scores."""
    from unlearn.passes.forcing import teacher_force
    from unlearn.scores import definitions as scores
    from unlearn.scores.extraction import knowledge, membership

    how = models.at(path)
    asked = {name: given for name, given in rows.items() if privacy or name != "holdout"}
    again = [
        row | {"question": row["paraphrased_question"]}
        for name in ("forget", "retain")
        for row in rows[name]
        if row.get("paraphrased_question")
    ]
    flat = models.tokenize([row for given in (*asked.values(), again) for row in given])
    forced = iter(teacher_force(how, flat, moments=privacy, what=f"{Path(path).name}"))
    found: dict[str, Rows] = {}
    for name, given in asked.items():
        found[name] = []
        for row in given:
            one: Forced = next(forced)
            more = membership(one, row["answer"], k=cfg.min_k) if privacy and name != "retain" else {}
            found[name].append(knowledge(one) | more)
    for name in ("forget", "retain"):
        for row, into in zip(rows[name], found[name], strict=True):
            into["ps_perturb"] = scores.ps_exact(next(forced).right) if row.get("paraphrased_question") else float("nan")
    return found


def measure_similar(models: evaluation.Models, rows: dict[str, Rows], path: str, data: str) -> list[float]:
    from unlearn.scores.extraction import ps_similar

    how = models.at(path)
    return ps_similar(how, models.tokenize(rows[data]), what=f"similar, {Path(path).name}")


def search_control(
    cfg: DictConfig,
    target: evaluation.Target,
    models: evaluation.Models,
    rows: dict[str, Rows],
    progress: evaluation.Progress,
    bar: float,
) -> dict[str, Any]:
    """The largest weight of the unlearned model whose retain PS reaches the bar, and the curve."""
    from unlearn.passes.forcing import teacher_force
    from unlearn.scores.control import mix, search
    from unlearn.scores.definitions import mean, ps_exact

    def at(weight: float) -> list[float]:
        original, unlearned = models.of(cfg.original_path), models.of(target.path)
        how = models.mixed(lambda model: mix(model, original, unlearned, weight))
        flat = models.tokenize([*rows["forget"], *rows["retain"]])
        ps = [ps_exact(forced.right) for forced in teacher_force(how, flat, what=f"control, weight {weight:.4g}")]
        n = len(rows["forget"])
        return [mean(ps[:n]), mean(ps[n:])]

    def measured(weight: float) -> tuple[float, float]:
        forget, retain = progress.part(f"control_{weight!r}", partial(at, weight))
        return forget, retain

    weight, curve = search(measured, bar)
    best: dict[str, Any] = {"weight": weight}
    if weight is not None:
        best |= dict(zip(("forget_ps", "retain_ps"), curve[weight], strict=True))
    table = [{"weight": at, "forget_ps": forget, "retain_ps": retain} for at, (forget, retain) in sorted(curve.items())]
    return best | {"bar": bar, "curve": table}


# ---- totals, tables ----


def totals(
    cfg: DictConfig, measured: dict[str, dict[str, Rows]], retain: dict[str, Rows] | None, bar: float, control: Any
) -> dict[str, Any]:
    """The sections of scores.json."""
    from unlearn.scores.extraction import mean_of

    means = {
        model: {
            data: {key: mean_of(rows[data], key) for key in ON_ROWS if cfg.similar or key != "ps_similar"}
            | {"rows": len(rows[data])}
            for data in ("forget", "retain")
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
        "privacy": privacy(cfg, measured, retain),
    }


def privacy(cfg: DictConfig, measured: dict[str, dict[str, Rows]], retain: dict[str, Rows] | None) -> Any:
    """AUCs and privleak, or why there are none."""
    from unlearn.scores.definitions import privleak
    from unlearn.scores.extraction import aucs

    if (why := no_holdout(cfg)) is not None:
        return f"not available: {why}"

    def of(rows: dict[str, Rows]) -> dict[str, float]:
        return aucs([row | {"data": data} for data in ("forget", "holdout") for row in rows[data]])

    model = of(measured["unlearned"])
    sizes = {data: len(measured["unlearned"][data]) for data in ("forget", "holdout")}
    found: dict[str, Any] = {"auc": model, "rows": sizes, "min_k": cfg.min_k}
    if retain is None:
        none = "not available: no retain model; give retain_path=MODEL"
        return found | {"auc": model | {"reference": none}, "privleak": none}
    of_retain = {name: value for name, value in of(retain).items() if name != "reference"}
    return found | {"auc_retain_model": of_retain, "privleak": privleak(model["min_k"], of_retain["min_k"])}


def write(
    cfg: DictConfig,
    target: evaluation.Target,
    progress: evaluation.Progress,
    measured: dict[str, dict[str, Rows]],
    found: dict[str, Any],
    control: dict[str, Any] | None,
) -> None:
    lines = [
        {"model": model, "data": data, "row": i} | row
        for model, rows in measured.items()
        for data in ("forget", "retain")
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
    if no_holdout(cfg) is None:
        from unlearn.scores.extraction import ATTACKS

        privacy_lines = [
            {"data": data, "row": i} | pick(row, *ATTACKS)
            for data in ("forget", "holdout")
            for i, row in enumerate(measured["unlearned"][data])
        ]
        write_table(target.folder / "privacy_rows.csv", privacy_lines)
    if control is not None:
        from unlearn.reporting.score_figures import draw_control

        write_table(target.folder / "control.csv", control["curve"])
        draw_control(target.folder, found["bar"], control["weight"])
    sections = found | {"definitions": definitions(cfg), "from": {"evaluation_everything": progress.record}}
    evaluation.write_scores(target, sections)
    evaluation.add_row(target, columns(cfg, found))
    if target.run is not None:
        evaluation.add_row(
            evaluation.Target(cfg.original_path, target.folder, 0, target.run, target.table),
            knowledge_columns(found["ps"]["original"]),
        )


def columns(cfg: DictConfig, found: dict[str, Any]) -> dict[str, Any]:
    """The scores as columns of the run's table."""
    from unlearn.scores.extraction import ATTACKS

    control, privacy = (found[name] if isinstance(found[name], dict) else {} for name in ("control", "privacy"))
    aucs = privacy.get("auc", {})
    more = {f"control_{key}": control.get(key) for key in ("weight", "forget_ps", "retain_ps")}
    more |= {f"auc_{name}": aucs.get(name) for name in ATTACKS} | {"privleak": privacy.get("privleak")}
    numbers = {key: None if isinstance(value, str) else value for key, value in more.items()}  # not why there is none
    return {"split": cfg.split} | knowledge_columns(found["ps"]["unlearned"]) | {"bar": found["bar"]} | numbers


def knowledge_columns(of: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {f"{data}_{key}": value for data, means in of.items() for key, value in means.items() if key != "rows"}


def pick(row: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: row.get(key) for key in keys}


def write_table(file: Path, rows: Rows) -> None:
    """A CSV, empty where there is no value."""
    write_csv(file, [{key: None if value != value else value for key, value in row.items()} for row in rows])


def definitions(cfg: DictConfig) -> dict[str, str]:
    return {
        "loss": "mean over all label tokens of all rows, end-of-sequence counted, in nats; of a row over its own",
        "ps_exact": "1 - k/T, k the shortest prefix after which greedy decoding gives the rest; last token wrong: 0",
        "ps_perturb": "the same after the paraphrased question",
        "ps_similar": "the same where a longest common subsequence of at least half of the rest suffices, by bisection",
        "extraction_strength": "ps_exact, but 1/T where the last token is wrong (open-unlearning)",
        "exact_memorization": "share of the answer's tokens whose argmax is right under teacher forcing",
        "bar": f"{cfg.ps_p} x the original model's retain ps_exact",
        "auc": "P(a holdout row's score > a forget row's), ties half; 1: the forget rows look like members",
        "zlib": "loss over the bytes of the compressed answer",
        "min_k": f"k = {cfg.min_k}, end-of-sequence not counted; min_k_plus_plus likewise",
        "privleak": "100 (AUC_retain - AUC) / (1 - AUC_retain) of min_k",
    }


def report(found: dict[str, Any]) -> None:
    """The scores as a small table on standard error."""
    for model, sets in found["ps"].items():
        for data, of in sets.items():
            values = "  ".join(f"{key.removeprefix('ps_')} {evaluation.told(of[key])}" for key in ON_ROWS[1:] if key in of)
            utils.say(f"{model:9} {data:6} {values}  ({of['rows']} rows)")
    control = found["control"]
    if isinstance(control, dict):
        told = "  ".join(f"{key} {evaluation.told(value)}" for key, value in control.items())
        utils.say(f"control   {told}")
    if isinstance(found["privacy"], str):
        return utils.say(f"privacy   {found['privacy']}")
    aucs = "  ".join(
        f"{name} {evaluation.told(auc, 3)}" for name, auc in found["privacy"]["auc"].items() if not isinstance(auc, str)
    )
    leak = found["privacy"]["privleak"]
    utils.say(f"AUC       {aucs}")
    utils.say(f"privleak  {evaluation.told(leak, 2)}")


if __name__ == "__main__":
    settings.cli(run, "eval_everything")
