"""The two evaluation scripts on a tiny model that knows 24 rows, one that never saw 8 of them, and a run that forgets those."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, make_workplace, run_in
from transformers import AutoTokenizer

import evaluation_everything
import finetune
import forget
import tofu_evaluation
from app import checks, evaluating
from app import data as sets
from app.compose import given
from app.families import load_family
from unlearn.models import checkpoints
from unlearn.objectives.rows import Row, tokenize_pairs
from unlearn.passes.forcing import Pass, teacher_force
from unlearn.scores import definitions as scores
from unlearn.scores import tofu
from unlearn.scores.control import mix
from unlearn.scores.extraction import knowledge, score_rows

pytestmark = pytest.mark.on_cpu  # commands go on with what was measured in this process, to the same bits

CONFIGS = {tofu_evaluation: "eval_tofu", evaluation_everything: "eval_everything"}
ROWS = {"retain90": 16, "forget10": 8, "forget10_perturbed": 8, "retain_perturbed": 8, "holdout10": 8}
ROWS |= {"real_authors_perturbed": 3, "world_facts_perturbed": 3}
SETS = {"retain": 8, "real_authors": 3, "real_world": 3, "forget": 8}
STEPS = (1, 3)
SHORT = "generation.max_new_tokens=24"
MODELS = ("original", "unlearned")


class Place(NamedTuple):
    data: Path
    full: Path
    retain: Path
    run: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A workplace with rows of data/sample, the two models where finetune.py puts them, and a run."""
    folder = make_workplace(tmp_path_factory.mktemp("place"))
    data = folder / "data/few"
    data.mkdir(parents=True)
    for name, n in ROWS.items():
        lines = (ROOT / f"data/sample/{name}.json").read_text().splitlines(keepends=True)
        (data / f"{name}.json").write_text("".join(lines[:n]))
    (data / "full.json").write_text((data / "retain90.json").read_text() + (data / "forget10.json").read_text())
    tiny = json.loads((ROOT / "config/tiny/config.json").read_text())
    small = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2}
    (folder / "small").mkdir()
    (folder / "small/config.json").write_text(json.dumps(tiny | small))
    common = ["model_family=tiny", f"hf_key={folder}/small", f"data_path={data}", "dtype=float32"]
    common += ["gradient_accumulation_steps=1"]
    full, retain, run = (folder / name for name in ("data/weight/ft_epoch40_lr0.001_tiny_full_wd0.0", "retain", "run"))
    for model, split, epochs in ((full, "full", 60), (retain, "retain90", 90)):
        words = [f"split={split}", f"save_dir={model}", "batch_size=8", "lr=4e-3"]
        finetune.run(given("finetune", [*common, *words, f"num_epochs={epochs}"]))
    words = ["split=forget10", "method=ga", f"model_path={full}", f"save_dir={run}", "batch_size=4", "lr=2e-3"]
    forget.run(given("forget", [*common, *words, "num_epochs=1.5", "save_steps=1"]))
    shutil.rmtree(run / "checkpoint-2")
    return Place(data, full, retain, run)


def evaluate(script: ModuleType, folder: Path | None, **asked: Any) -> None:
    """Run the script with its results in `folder` (None: where they go by themselves), in float32."""
    words = [f"{key.replace('__', '.')}={value}" for key, value in asked.items()]
    words = [SHORT, *words] if script is tofu_evaluation else words
    words += [f"save_dir={folder}"] if folder is not None else []
    script.run(given(CONFIGS[script], ["dtype=float32", *words]))


def read(file: Path) -> Any:
    return json.loads(file.read_text()) if file.suffix == ".json" else list(csv.DictReader(file.open()))


def prepared(script: ModuleType, *words: str) -> Any:
    return script.prepare(given(CONFIGS[script], list(words)))[0]


@pytest.fixture
def nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and a model that is run is an error from then on."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a model is run")

    return lambda: monkeypatch.setattr(evaluating.Models, "at", refuse)


# ---- TOFU's scores ----


@pytest.fixture(scope="module")
def by_path(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TOFU's scores of the full model, Forget Quality against the retain model."""
    folder = tmp_path_factory.mktemp("by_path")
    evaluate(tofu_evaluation, folder, split="forget10", model_path=place.full, retain_path=place.retain)
    return folder


@pytest.fixture(scope="module")
def of_retain(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TOFU's scores of the retain model, against itself; its split is what it has not seen."""
    folder = tmp_path_factory.mktemp("of_retain")
    evaluate(tofu_evaluation, folder, model_path=place.retain, retain_path=place.retain, split="")
    return folder


def test_tofus_files(by_path: Path) -> None:
    log = read(by_path / "eval_log_aggregated.json")
    assert list(log) == [file for file, _ in tofu.TASKS.values()]
    names = {f"{kind}_loss" for kind in ("avg_gt", "gt", "avg_paraphrased", "paraphrased", "average_perturb", "perturb")}
    names |= {f"num_token_{kind}" for kind in ("gt", "paraphrased", "perturb")}
    names |= {"rouge1_recall", "rougeL_recall", "generated_text", "truth_ratio"}
    for name, (file, _) in tofu.TASKS.items():
        assert set(log[file]) == names | ({"normalized_gt_loss"} if name in tofu.REAL else set())
        assert all(list(values) == [str(i) for i in range(SETS[name])] for values in log[file].values())
    tofu.check_log(log, "ours")
    [row] = read(by_path / "aggregate_stat.csv")
    columns = {f"{kind} {title}" for kind in tofu.KINDS.values() for _, title in tofu.TASKS.values()}
    assert set(row) == columns | {"Model Utility", "Forget Quality", "Method", "Submitted By"}
    found = read(by_path / "scores.json")
    assert float(row["ROUGE Forget"]) == found["tofu"]["forget"]["rouge"] == 1
    assert float(row["Forget Quality"]) == found["tofu"]["forget_quality"]["p"] < 1
    assert found["tofu"]["forget_quality"]["n"] == [8, 8]
    assert 0 < found["tofu"]["forget_quality"]["D"] <= 1
    assert found["definitions"]["truth_ratio"] == "geometric, epsilon 0"
    record = found["from"]["tofu_evaluation"]
    assert set(record) == {"settings", "hash", "versions", "device", "precision", "weights", "data", "tokenizer"}
    assert (record["settings"]["split"], record["settings"]["model_family"]) == ("forget10", "tiny")
    assert yaml.safe_load((by_path / "tofu_evaluation.yaml").read_text()) == record | {"finished": True}
    assert not (by_path / "resume").exists()


def test_the_scores_are_those_of_the_log(by_path: Path) -> None:
    log = read(by_path / "eval_log_aggregated.json")["eval_log_forget.json"]
    found = read(by_path / "scores.json")["tofu"]
    assert found["forget"]["probability"] == pytest.approx(np.exp(-np.array(list(log["avg_gt_loss"].values()))).mean())
    ratio = np.exp([x - np.mean(log["average_perturb_loss"][row]) for row, x in log["avg_paraphrased_loss"].items()])
    assert found["forget"]["truth_ratio"] == pytest.approx(np.minimum(ratio, 1 / ratio).mean())
    assert all(told[1] == told[2] for told in log["generated_text"].values())  # it knows them by heart


def test_the_retain_model_against_itself(of_retain: Path) -> None:
    found = read(of_retain / "scores.json")
    assert found["tofu"]["forget_quality"] == {"p": 1, "D": 0, "n": [8, 8]}
    assert found["from"]["tofu_evaluation"]["settings"]["split"] == "forget10"
    assert found["tofu"]["forget"]["rouge"] < 0.9
    assert found["tofu"]["retain"]["rouge"] == 1


def test_forget_quality_by_the_retain_models_log(place: Place, by_path: Path, of_retain: Path, tmp_path: Path) -> None:
    log = of_retain / "eval_log_aggregated.json"
    evaluate(tofu_evaluation, tmp_path, split="forget10", model_path=place.full, retain_result=log)
    found, other = (read(folder / "scores.json")["tofu"] for folder in (tmp_path, by_path))
    assert found["forget_quality"] == other["forget_quality"]
    assert read(tmp_path / "eval_log_aggregated.json") == read(by_path / "eval_log_aggregated.json")


def test_scored_otherwise_without_measuring_anew(
    by_path: Path, place: Place, tmp_path: Path, nothing_is_measured: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "again"
    shutil.copytree(by_path, folder)
    nothing_is_measured()
    given = {"split": "forget10", "model_path": place.full}
    evaluate(tofu_evaluation, folder, **given, retain_path=place.retain, truth_ratio="arithmetic")
    found, before = (read(at / "scores.json") for at in (folder, by_path))
    assert found["tofu"]["forget"]["truth_ratio"] != before["tofu"]["forget"]["truth_ratio"]
    assert found["tofu"]["forget"]["rouge"] == before["tofu"]["forget"]["rouge"]
    assert found["definitions"]["truth_ratio"] == "arithmetic, epsilon 0"
    capsys.readouterr()
    evaluate(tofu_evaluation, folder, **given)
    none = read(folder / "scores.json")["tofu"]["forget_quality"]
    assert none.startswith("not available: no retain model; give retain_result=LOG or retain_path=a model trained on retain90")
    assert none in capsys.readouterr().err
    assert read(folder / "aggregate_stat.csv")[0]["Forget Quality"] == "not available"
    with pytest.raises(ValueError, match=r"other settings: generation.max_new_tokens=24 there, 9 here$"):
        evaluate(tofu_evaluation, folder, **given, generation__max_new_tokens=9)


def test_answers_in_another_script(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without words as published: no ROUGE, left out of means, counted and told; by words of any script scored."""
    shutil.copytree(place.data, tmp_path / "data")
    for name, changed in (("forget10_perturbed", 3), ("world_facts_perturbed", 3), ("retain_perturbed", 0)):
        rows = [json.loads(line) for line in (place.data / f"{name}.json").open()]
        for row in rows[:changed]:
            row["answer"] = "В Риге"
        rows[-1]["answer"] += " José" if name == "retain_perturbed" else ""
        (tmp_path / f"data/{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"split": "forget10", "model_path": place.full, "data_path": tmp_path / "data"}
    evaluate(tofu_evaluation, tmp_path / "ascii", **given)
    err = capsys.readouterr().err
    assert "Forget        3 rows have no ROUGE, for their answers have no word (rouge_tokenizer=unicode" in err
    assert "Retain        1 answers have letters that ROUGE's words leave out" in err
    assert "Real World    ROUGE not available" in err
    assert "Model Utility not available" in err
    assert "nan" not in err
    log, found = (read(tmp_path / "ascii" / name) for name in ("eval_log_aggregated.json", "scores.json"))
    recalls = list(log["eval_log_forget.json"]["rougeL_recall"].values())
    assert recalls == [None] * 3 + [1] * 5
    assert found["tofu"]["forget"]["rouge"] == 1
    assert found["tofu"]["real_world"]["rouge"] == found["tofu"]["model_utility"] == "not available"
    assert found["tofu"]["rouge_rows"]["forget"] == {"without_rouge": 3, "letters_dropped": 3}
    assert found["tofu"]["rouge_rows"]["retain"] == {"without_rouge": 0, "letters_dropped": 1}
    assert "rouge_tokenizer=ascii" in found["definitions"]["rouge"]
    [row] = read(tmp_path / "ascii/aggregate_stat.csv")
    assert row["ROUGE Real World"] == row["Model Utility"] == "not available"
    aggregated(ckpt_result=tmp_path / "ascii/eval_log_aggregated.json", save_file=tmp_path / "out.csv")
    assert read(tmp_path / "out.csv")[0] == row | {"Method": "eval_log_aggregated"}
    with pytest.raises(ValueError, match=r"other settings: rouge_tokenizer=ascii there, unicode here$"):
        evaluate(tofu_evaluation, tmp_path / "ascii", **given, rouge_tokenizer="unicode")
    capsys.readouterr()
    evaluate(tofu_evaluation, tmp_path / "unicode", **given, rouge_tokenizer="unicode")
    assert "have no ROUGE" not in capsys.readouterr().err
    found = read(tmp_path / "unicode/scores.json")
    assert found["tofu"]["forget"]["rouge"] == 5 / 8  # it does not know the three
    assert found["tofu"]["real_world"]["rouge"] == 0
    assert "rouge_tokenizer=unicode" in found["definitions"]["rouge"]
    with pytest.raises(ValueError, match=r"^rouge_tokenizer=latin: needs to be one of ascii, unicode$"):
        prepared(tofu_evaluation, *(f"{key}={value}" for key, value in given.items()), "rouge_tokenizer=latin")


def test_paraphrased_questions_have_columns_of_their_own(place: Place, by_path: Path, tmp_path: Path) -> None:
    """They are what the same answers score where the paraphrased questions stand in place of the others."""
    shutil.copytree(place.data, tmp_path / "data")
    for name in ("forget10_perturbed", "retain_perturbed"):
        rows = [json.loads(line) for line in (place.data / f"{name}.json").open()]
        asked = [json.dumps(row | {"question": row["paraphrased_question"]}) + "\n" for row in rows]
        (tmp_path / f"data/{name}.json").write_text("".join(asked))
    given = {"split": "forget10", "model_path": place.full, "generation__max_new_tokens": 24}
    evaluate(tofu_evaluation, tmp_path / "own", **given, data_path=place.data, paraphrased="true")
    evaluate(tofu_evaluation, tmp_path / "otherwise", **given, data_path=tmp_path / "data")
    own, otherwise, plain = (read(f / "scores.json")["tofu"] for f in (tmp_path / "own", tmp_path / "otherwise", by_path))
    for name in ("forget", "retain"):
        for kind in ("probability", "rouge"):
            assert own[name][f"paraphrased_{kind}"] == pytest.approx(otherwise[name][kind], rel=1e-6)
            assert own[name][kind] == pytest.approx(plain[name][kind], rel=1e-6)
        assert f"paraphrased_{kind}" not in plain[name]
    assert "paraphrased_rouge" not in own["real_world"]  # has none
    [row] = read(tmp_path / "own/aggregate_stat.csv")
    assert float(row["Paraphrased Prob. Forget"]) == own["forget"]["paraphrased_probability"]
    listed(place.data, tmp_path / "data")
    evaluate(tofu_evaluation, tmp_path / "listed", **given, data_path=tmp_path / "data", paraphrased="true")
    several = read(tmp_path / "listed/scores.json")["tofu"]
    for name in ("forget", "retain"):
        for kind in ("probability", "rouge"):
            mean = (own[name][kind] + own[name][f"paraphrased_{kind}"]) / 2
            assert several[name][f"paraphrased_{kind}"] == pytest.approx(mean, rel=1e-6)
    log = read(tmp_path / "listed/eval_log_aggregated.json")["eval_log_forget.json"]
    assert {len(log[key]["0"]) for key in log if key.startswith(("avg_paraphrased_q", "paraphrased_q"))} == {2}


def listed(data: Path, to: Path) -> None:
    """The rows with lists of paraphrased questions: the question itself, and the one that it has."""
    for name in ("forget10_perturbed", "retain_perturbed"):
        rows = [json.loads(line) for line in (data / f"{name}.json").open()]
        asked = [row | {"paraphrased_question": [row["question"], row["paraphrased_question"]]} for row in rows]
        (to / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in asked))


# ---- two logs and no model ----


def test_logs_alone(by_path: Path, of_retain: Path, tmp_path: Path) -> None:
    logs = [folder / "eval_log_aggregated.json" for folder in (by_path, of_retain)]
    words = "--config-name=aggregate_eval_stat ckpt_result={} retain_result={} save_file=out.csv".format(*logs)
    run_in(tmp_path, f"python {ROOT}/tofu_evaluation.py {words}")
    [row], [expected] = (read(file) for file in (tmp_path / "out.csv", by_path / "aggregate_stat.csv"))
    differ = {"Method"}
    assert {key: row[key] for key in row if key not in differ} == {key: expected[key] for key in row if key not in differ}
    found = read(tmp_path / "out.json")
    assert found["forget_quality"] == read(by_path / "scores.json")["tofu"]["forget_quality"]
    assert found["settings"]["ckpt_result"] == str(logs[0])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.csv", "out.json"]


def aggregated(**asked: Any) -> None:
    tofu_evaluation.run(given("aggregate_eval_stat", [f"{key}={value}" for key, value in asked.items()]))


def without_task(log: Any) -> None:
    del log["eval_log_forget.json"]


def without_key(log: Any) -> None:
    del log["eval_log.json"]["rougeL_recall"]


def without_row(log: Any) -> None:
    del log["eval_log.json"]["average_perturb_loss"]["3"]


def with_a_text(log: Any) -> None:
    log["eval_log.json"]["avg_gt_loss"]["3"] = "low"


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (without_task, "lacks eval_log_forget.json; it has eval_log.json, "),
        (without_key, "eval_log.json lacks rougeL_recall"),
        (without_row, "eval_log.json has 8 rows in avg_gt_loss, and others in average_perturb_loss"),
        (with_a_text, "eval_log.json, row 3: avg_gt_loss is 'low'"),
    ],
)
def test_a_log_that_is_none(spoil: Callable[[Any], None], line: str, by_path: Path, tmp_path: Path) -> None:
    log, file = read(by_path / "eval_log_aggregated.json"), tmp_path / "log.json"
    spoil(log)
    file.write_text(json.dumps(log))
    with pytest.raises(ValueError, match=f"ckpt_result={file}: {line}"):
        aggregated(ckpt_result=file, save_file=tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


def test_logs_are_not_written_over(by_path: Path, tmp_path: Path) -> None:
    file = tmp_path / "log.json"
    shutil.copy(by_path / "eval_log_aggregated.json", file)
    before = file.read_text()
    for name in ("log.json", "log.csv"):
        with pytest.raises(ValueError, match=f"save_file={tmp_path / name}: "):
            aggregated(ckpt_result=file, save_file=tmp_path / name)
    file.with_suffix(".txt").write_text("{")
    with pytest.raises(ValueError, match=r"log.txt: not JSON \("):
        aggregated(ckpt_result=file.with_suffix(".txt"), save_file=tmp_path / "out.csv")
    assert file.read_text() == before


def test_logs_of_other_questions(by_path: Path, place: Place, tmp_path: Path) -> None:
    """Told before a model is loaded where there is one, and by the two logs where there is none."""
    log, file = read(by_path / "eval_log_aggregated.json"), tmp_path / "log.json"
    for texts in log["eval_log_forget.json"]["generated_text"].values():
        texts[0], texts[-1] = "Question: Who?\nAnswer:", "Nobody"
    file.write_text(json.dumps(log))
    with pytest.raises(
        ValueError, match=r"not answer the same questions: forget row 0 is 'Question: Where.* here, 'Question: Who"
    ):
        aggregated(ckpt_result=by_path / "eval_log_aggregated.json", retain_result=file, save_file=tmp_path / "out.csv")
    words = [f"model_path={place.full}", "split=forget10", f"retain_result={file}"]
    with pytest.raises(ValueError, match=r"retain_result=.*: answers other questions: 8 forget rows"):
        prepared(tofu_evaluation, *words)
    with pytest.raises(ValueError, match=r"8 forget rows, and split=forget10 with ds_size=5 has 5"):
        prepared(tofu_evaluation, *words[:2], f"retain_result={by_path}/eval_log_aggregated.json", "ds_size=5")


# ---- extraction, memorisation, privacy ----


@pytest.fixture(scope="module")
def everything(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("everything")
    given: dict[str, Any] = {"model_path": place.run / "checkpoint-3", "retain_path": place.retain, "similar": "true"}
    evaluate(evaluation_everything, folder, **given)
    return folder


def test_everythings_tables(everything: Path) -> None:
    columns = {
        "ps_rows": ["model", "data", "row", "exact", "perturb", "similar"],
        "ps": ["model", "data", "exact", "perturb", "similar", "rows"],
        "control": ["weight", "forget_ps", "retain_ps"],
        "memorization_rows": ["model", "data", "row", "exact_memorization", "extraction_strength"],
        "privacy_rows": ["data", "row", "loss", "zlib", "min_k", "min_k_plus_plus", "reference"],
    }
    tables = {name: read(everything / f"{name}.csv") for name in columns}
    for name, table in tables.items():
        assert list(table[0]) == columns[name]
        assert all(value != "" for row in table for value in row.values())
    each = [(model, data, str(row)) for model in MODELS for data in ("forget", "retain") for row in range(8)]
    for name in ("ps_rows", "memorization_rows"):
        assert [(row["model"], row["data"], row["row"]) for row in tables[name]] == each
    assert [row["data"] for row in tables["privacy_rows"]] == ["forget"] * 8 + ["holdout"] * 8
    found = read(everything / "scores.json")
    for mean in tables["ps"]:
        rows = [row for row in tables["ps_rows"] if (row["model"], row["data"]) == (mean["model"], mean["data"])]
        assert int(mean["rows"]) == len(rows) == 8
        for kind in ("exact", "perturb", "similar"):
            assert float(mean[kind]) == pytest.approx(np.mean([float(row[kind]) for row in rows]))
            assert float(mean[kind]) == found["ps"][mean["model"]][mean["data"]][f"ps_{kind}"]
    original = [row for row in tables["ps_rows"] if row["model"] == "original"]
    assert {(row["exact"], row["similar"]) for row in original} == {("1.0", "1.0")}  # known by heart
    assert found["ps"]["unlearned"]["forget"]["ps_exact"] < 0.9
    assert found["bar"] == pytest.approx(0.9)
    assert set(found["privacy"]["auc"]) == {"loss", "zlib", "min_k", "min_k_plus_plus", "reference"}
    members, others = (
        [float(row["loss"]) for row in tables["privacy_rows"] if row["data"] == x] for x in ("forget", "holdout")
    )
    assert found["privacy"]["auc"]["loss"] == np.mean([(b > a) + (a == b) / 2 for a in members for b in others])
    assert isinstance(found["privacy"]["privleak"], float)
    assert set(found["from"]["evaluation_everything"]) == {
        "settings",
        "hash",
        "versions",
        "device",
        "precision",
        "weights",
        "data",
        "tokenizer",
    }
    assert "ps_exact" in found["definitions"]


def test_the_mean_over_several_paraphrases(everything: Path, place: Place, tmp_path: Path) -> None:
    shutil.copytree(place.data, tmp_path / "data")
    listed(place.data, tmp_path / "data")
    words: dict[str, Any] = {"model_path": place.run / "checkpoint-3", "data_path": tmp_path / "data", "control": "false"}
    evaluate(evaluation_everything, tmp_path, **words)
    for row, of_one in zip(read(tmp_path / "ps_rows.csv"), read(everything / "ps_rows.csv"), strict=True):
        assert row["exact"] == of_one["exact"]
        assert float(row["perturb"]) == pytest.approx((float(of_one["exact"]) + float(of_one["perturb"])) / 2)


def test_gradient_norms_where_they_are_asked_for(everything: Path, place: Place, tmp_path: Path) -> None:
    """One column and one AUC more, of both models; all others as without."""
    given: dict[str, Any] = {"model_path": place.run / "checkpoint-3", "retain_path": place.retain, "control": "false"}
    evaluate(evaluation_everything, tmp_path, **given, gradnorm="true")
    rows, before = (read(folder / "privacy_rows.csv") for folder in (tmp_path, everything))
    assert [{key: value for key, value in row.items() if key != "gradnorm"} for row in rows] == before
    found, without = (read(folder / "scores.json")["privacy"] for folder in (tmp_path, everything))
    members, others = ([float(row["gradnorm"]) for row in rows if row["data"] == x] for x in ("forget", "holdout"))
    assert found["auc"].pop("gradnorm") == np.mean([(b > a) + (a == b) / 2 for a in members for b in others])
    assert 0 <= found["auc_retain_model"].pop("gradnorm") <= 1
    assert found == without
    with pytest.raises(ValueError, match=r"^gradnorm=true: needs whole gradients"):
        prepared(evaluation_everything, f"model_path={place.run}", "gradnorm=true", "parallel=fsdp")


def test_the_control_search(everything: Path, place: Place) -> None:
    """At the ends of the curve stand the two models; the weight found is that of a finer grid."""
    found = read(everything / "scores.json")
    curve = {float(row["weight"]): row for row in read(everything / "control.csv")}
    for weight, model in ((0.0, "original"), (1.0, "unlearned")):
        for data in ("forget", "retain"):
            assert float(curve[weight][f"{data}_ps"]) == found["ps"][model][data]["ps_exact"]
    full, other, unlearned = (
        checkpoints.load_model(str(path), torch.device("cpu")) for path in (place.full, place.full, place.run / "checkpoint-3")
    )
    weights, tokenizer = dict(unlearned.named_parameters()), checkpoints.load_tokenizer(str(place.full), "")

    def ps(weight: float, name: str) -> float:
        mix(other, dict(full.named_parameters()), weights, weight)
        rows = [json.loads(line) for line in (place.data / f"{name}.json").open()]
        pairs = [(f"Question: {row['question']}\nAnswer: ", row["answer"]) for row in rows]
        forced = teacher_force(pass_of(other, tokenizer), tokenize_pairs(pairs, tokenizer))
        return scores.mean([scores.ps_exact(one.right) for one in forced])

    passing = max(weight for weight in np.linspace(0, 1, 41) if ps(weight, "retain_perturbed") >= found["bar"])
    control = found["control"]
    assert 0.1 < passing <= control["weight"] < passing + 1 / 40 < 1
    assert control["retain_ps"] == ps(control["weight"], "retain_perturbed") >= control["bar"]
    assert control["forget_ps"] == ps(control["weight"], "forget10")


def test_one_loss_of_one_name(everything: Path, place: Place) -> None:
    """That of a run's end, its losses.json, is that of the tables: a mean over tokens, and not over rows."""
    losses = read(place.run / "logs/losses.json")
    found = read(everything / "scores.json")["ps"]
    for data in ("forget", "retain"):
        for model, when in (("original", "start"), ("unlearned", "end")):
            assert found[model][data]["loss"] == pytest.approx(losses[data][when], rel=1e-5)
    assert scores.token_mean([1.0, 4.0], [2, 1]) == 2
    assert np.isnan(scores.token_mean([], []))


def test_elsewhere_is_nothing_of_the_run(place: Place, tmp_path: Path) -> None:
    """With `save_dir` the run's folder is as it was; a whole run has its table and its figure there, a checkpoint has none."""
    run = tmp_path / "run"
    shutil.copytree(place.run, run)
    (run / "scores.csv").write_text("step,forget_rouge\n3,0.25\n")

    def state() -> dict[Path, bytes]:
        return {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}

    before = state()
    for script in (tofu_evaluation, evaluation_everything):
        more = {} if script is tofu_evaluation else {"control": "false"}
        evaluate(script, tmp_path / "one", model_path=run / "checkpoint-3", **more)
        evaluate(script, tmp_path / "all", model_path=run, **more)
        assert state() == before
    assert not (tmp_path / "one/scores.csv").exists()
    table = read(tmp_path / "all/scores.csv")
    assert [row["step"] for row in table] == ["0", *map(str, STEPS)]
    assert all(row["forget_rouge"] and row["forget_loss"] for row in table)
    assert (tmp_path / "all/figures/scores.pdf").exists()


def test_kept_weights_are_on_the_cpu(place: Place) -> None:
    """Whatever the model's place: each goes there before the next is read or copied."""
    cfg = prepared(evaluation_everything, f"model_path={place.run}/checkpoint-3", "dtype=float32")
    models = evaluating.Models(cfg, load_family("tiny", hf_key=cfg.hf_key, data_path=cfg.data_path), keep=True)
    own = {parameter.data_ptr() for parameter in models.at(str(place.full)).model.parameters()}
    for path in (place.full, place.run / "checkpoint-3"):
        weights = models.of(str(path))
        want = dict(checkpoints.load_model(str(path), torch.device("cpu")).named_parameters())
        assert {weight.device.type for weight in weights.values()} == {"cpu"}
        assert all(torch.equal(weights[name], want[name]) for name in want)
        assert not own & {weight.data_ptr() for weight in weights.values()}
    assert models.of(str(place.full)) is models.of(str(place.full))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each model is loaded."""
    counted: Counter[str] = Counter()
    load = checkpoints.load_model

    def load_and_count(path: str, *how: Any, **more: Any) -> Any:
        counted[path] += 1
        return load(path, *how, **more)

    monkeypatch.setattr(checkpoints, "load_model", load_and_count)
    return counted


def test_a_whole_run(place: Place, loads: Counter[str], tmp_path: Path, nothing_is_measured: Callable[[], None]) -> None:
    """Results beside each checkpoint, one row a step, no model loaded twice, and nothing measured when started again."""
    run = tmp_path / "run"
    shutil.copytree(place.run, run)
    models = [str(place.full), str(place.retain), *(str(run / f"checkpoint-{step}") for step in STEPS)]
    given: dict[str, Any] = {"model_path": run, "retain_path": place.retain}
    for script in (tofu_evaluation, evaluation_everything):
        loads.clear()
        for _ in range(3 if script is evaluation_everything else 2):
            evaluate(script, None, **given)
            assert loads == dict.fromkeys(models, 1)
    for step in STEPS:
        inside = {file.name for file in (run / f"checkpoint-{step}/eval_results/ds_size300").iterdir()}
        assert inside > {"aggregate_stat.csv", "control.csv", "ps.csv", "scores.json", "eval_log_aggregated.json"}
        assert set(read(run / f"checkpoint-{step}/eval_results/ds_size300/scores.json")) > {"tofu", "ps", "control", "privacy"}
    assert (run / "original/eval_results/ds_size300/eval_log_aggregated.json").exists()
    table = read(run / "scores.csv")
    assert [row["step"] for row in table] == ["0", *map(str, STEPS)]
    assert all(row["forget_rouge"] and row["forget_ps_exact"] and row["forget_quality"] for row in table)
    assert table[0]["forget_ps_exact"] == "1.0"
    assert (run / "figures/scores.pdf").stat().st_size > 1000
    nothing_is_measured()
    evaluate(evaluation_everything, None, **given | {"model_path": run / "checkpoint-3"}, batch_size=5)


def test_no_model_is_loaded_twice_without_control(place: Place, loads: Counter[str], tmp_path: Path) -> None:
    given: dict[str, Any] = {"similar": "true", "control": "false", "ps_p": 0.5}
    evaluate(evaluation_everything, tmp_path, model_path=place.run / "checkpoint-3", **given)
    assert loads == {str(place.full): 1, str(place.run / "checkpoint-3"): 1}
    told = read(tmp_path / "scores.json")
    assert told["control"] == "not searched (control=false)"
    assert told["bar"] == pytest.approx(0.5)
    assert not (tmp_path / "control.csv").exists()
    assert told["privacy"]["privleak"] == "not available: no retain model; give retain_path=MODEL"
    assert {row["reference"] for row in read(tmp_path / "privacy_rows.csv")} == {""}


def test_rows_that_nobody_trained_on_may_lack(place: Place, tmp_path: Path) -> None:
    shutil.copytree(place.data, tmp_path / "data")
    (tmp_path / "data/holdout10.json").unlink()
    given: dict[str, Any] = {"control": "false", "retain_path": place.retain}
    evaluate(evaluation_everything, tmp_path, model_path=place.run / "checkpoint-3", data_path=tmp_path / "data", **given)
    assert read(tmp_path / "scores.json")["privacy"].startswith("not available: split=holdout10: data_path=")
    assert not (tmp_path / "privacy_rows.csv").exists()
    assert len(read(tmp_path / "ps_rows.csv")) == 32


def test_local_data(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without paraphrases, wrong answers and holdout rows: what needs them says so, the rest is there."""
    given: dict[str, Any] = {"model_family": "tiny", "model_path": place.full, "retain_path": place.retain}
    given |= {"forget_data": place.data / "forget10.json", "retain_data": place.data / "retain90.json", "split": "forget10"}
    evaluate(evaluation_everything, tmp_path, **given, original_path=place.full, control="false")
    evaluate(tofu_evaluation, tmp_path, **given)
    found = read(tmp_path / "scores.json")
    assert found["privacy"] == f"not available: forget_data={given['forget_data']} has no rows that were never trained on"
    assert found["tofu"]["forget_quality"].endswith("lack perturbed_answer, a list of wrong answers")
    assert found["tofu"]["forget"]["rouge"] == found["ps"]["unlearned"]["forget"]["ps_exact"] == 1
    assert found["ps"]["unlearned"]["forget"]["ps_perturb"] == "not available"
    told = capsys.readouterr().err
    assert "perturb not available" in told
    assert "Truth Ratio not available" in told
    assert "Model Utility not available" in told
    assert "nan" not in told
    assert {row["perturb"] for row in read(tmp_path / "ps_rows.csv")} == {""}
    assert read(tmp_path / "aggregate_stat.csv")[0]["Model Utility"] == "not available"


# ---- what is typed ----


@pytest.mark.parametrize("script", CONFIGS, ids=CONFIGS.values())
def test_what_the_run_says(script: ModuleType, place: Place) -> None:
    """Left out, or empty as an unset shell variable gives it; with _perturbed or without."""
    path = f"model_path={place.run}/checkpoint-3"
    for words in ([], ["split=", "model_family=", "original_path="], ["split=forget10_perturbed", "model_family=tiny"]):
        cfg = prepared(script, path, *words)
        assert (cfg.model_family, cfg.split, cfg.data_path, cfg.max_length) == ("tiny", "forget10", str(place.data), 500)
        assert script is tofu_evaluation or cfg.original_path == str(place.full)
    for words, line in (
        (["split=full"], r"split=full: to unlearn is one of forget01, forget05, forget10"),
        (["model_family=phi"], r"model_family=phi: .* is of the family tiny"),
        (["model_family=lama"], r"model_family=lama: unknown; the families"),
        ([f"original_path={place.data}"], r"original_path=.*: a folder without a checkpoint"),
    ):
        with pytest.raises(ValueError, match=line):
            prepared(script, path, *words)
    with pytest.raises(ValueError, match=r"checkpoint-9: no such folder.* there are .*checkpoint-1, .*checkpoint-3"):
        prepared(script, f"model_path={place.run}/checkpoint-9")
    with pytest.raises(ValueError, match=r"split is missing; to unlearn is one of forget01, forget05, forget10"):
        prepared(script, f"model_path={place.full}")  # fine-tuned on all of them


@pytest.mark.parametrize("script", CONFIGS, ids=CONFIGS.values())
def test_a_family_that_is_not_the_checkpoints(script: ModuleType, place: Place, tmp_path: Path) -> None:
    """Told by the two config.json, before anything is loaded."""
    config = json.loads((place.full / "config.json").read_text())
    for name, change in (("other", {"model_type": "phi"}), ("wider", {"vocab_size": 50304})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config | change))
    shutil.copytree(place.full, tmp_path / "bare", ignore=shutil.ignore_patterns("config.yaml"))
    words = [f"model_path={tmp_path}/bare", "split=forget10", f"data_path={place.data}", f"original_path={place.full}"]
    with pytest.raises(ValueError, match=r"has model_type llama, and model_family=phi phi; the families are llama, "):
        prepared(script, *words, "model_family=phi", f"hf_key={tmp_path}/other")
    with pytest.raises(ValueError, match=rf"has vocab_size {config['vocab_size']}, and model_family=tiny 50304"):
        prepared(script, *words, "model_family=tiny", f"hf_key={tmp_path}/wider")
    with pytest.raises(ValueError, match=r"model_family is missing, and .*/bare is of no run; the families are llama"):
        prepared(script, *words)


def test_models_with_other_tokens_are_not_compared(place: Place, tmp_path: Path) -> None:
    """Whose tokenizers give two words each other's numbers; one with a token more is as good."""
    other, more = (shutil.copytree(place.full, tmp_path / name) for name in ("other", "more"))
    saved = json.loads((other / "tokenizer.json").read_text())
    ids = saved["model"]["vocab"]
    first, second = [token for token in ids if token.isalpha()][:2]
    saved["model"]["vocab"] = ids | {first: ids[second], second: ids[first]}
    (other / "tokenizer.json").write_text(json.dumps(saved))
    tokenizer = AutoTokenizer.from_pretrained(more)
    tokenizer.add_special_tokens({"pad_token": "<another>"})
    tokenizer.save_pretrained(more)
    words = [f"model_path={place.full}", "split=forget10", f"data_path={place.data}", f"original_path={place.full}"]
    cfg = prepared(evaluation_everything, *words, "model_family=tiny")
    family = load_family("tiny")
    evaluating.Models(cfg.model_copy(update={"retain_path": str(more)}), family)
    with pytest.raises(ValueError, match=r"^retain_path=.*/other: its tokenizer makes other tokens of texts than that of "):
        evaluating.Models(cfg.model_copy(update={"retain_path": str(other)}), family)


def test_a_bare_checkpoint(place: Place, by_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a tokenizer and a config.yaml: the family's tokenizer, and the same log."""
    shutil.copytree(place.full, tmp_path / "bare", ignore=shutil.ignore_patterns("config.yaml", "tokenizer*", "logs"))
    monkeypatch.chdir(place.run.parent)
    given = {"model_path": tmp_path / "bare", "model_family": "tiny", "split": "forget10", "data_path": place.data}
    evaluate(tofu_evaluation, None, **given, hf_key="small")
    found = read(tmp_path / "bare/eval_results/ds_size300/eval_log_aggregated.json")
    assert found == read(by_path / "eval_log_aggregated.json")


def test_a_model_of_the_hub_leaves_no_folder_of_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """That would be taken for the model itself."""
    monkeypatch.chdir(tmp_path)
    for module in (sets, checks):
        monkeypatch.setattr(module, "on_hub", lambda name, kind: True)
    monkeypatch.setattr(evaluating, "check_architecture", lambda *_: None)
    cfg = prepared(tofu_evaluation, "model_path=some/model", "model_family=tiny", "split=forget10")
    [target] = evaluating.targets(cfg)
    assert (target.path, target.folder) == ("some/model", Path("icml/some--model/eval_results/ds_size300"))


# ---- killed ----


@pytest.mark.parametrize(
    ("script", "moment", "left"),
    [
        (tofu_evaluation, "unlearn.scores.asking.measure_task 3 before", ["real_world", "forget"]),
        (evaluation_everything, "unlearn.scores.control.mix 4 after", None),
    ],
    ids=CONFIGS.values(),
)
def test_killed_and_started_again(
    script: ModuleType, moment: str, left: list[str] | None, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on with the part that it was in, and leaves the same files."""
    given = {"model_path": place.run / "checkpoint-3", "dtype": "float32"}
    words = " ".join(f"{key}={value}" for key, value in given.items()) + (f" {SHORT}" if script is tofu_evaluation else "")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    at = f"python {ROOT}/tests/at.py {moment} {shlex.quote('kill -KILL $PID')}"
    killed = run_in(tmp_path / "a", f"{at} {ROOT}/{script.__name__}.py {words} save_dir=out", check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    parts = sorted(file.stem for file in (tmp_path / f"a/out/resume/{script.__name__}").iterdir())
    assert parts == (
        ["real_authors", "retain"] if left else ["control_0.0", "control_0.05", "control_0.1", "original", "unlearned"]
    )
    measured: list[str] = []
    part = evaluating.Progress.part

    def noted(self: evaluating.Progress, name: str, measure: Callable[[], Any]) -> Any:
        def measure_and_note() -> Any:
            measured.append(name)
            return measure()

        return part(self, name, measure_and_note)

    monkeypatch.setattr(evaluating.Progress, "part", noted)
    files: dict[str, dict[str, str]] = {}
    for name in ("a", "b"):
        monkeypatch.chdir(tmp_path / name)
        if name == "a":
            with pytest.raises(ValueError, match=r"out holds a run of other settings: max_length=500 there, 400 here"):
                evaluate(script, Path("out"), **given, max_length=400)
        evaluate(script, Path("out"), **given)
        if name == "a":
            assert not set(measured) & set(parts)
            assert left is None or measured == left
        there = sorted(file for file in Path("out").rglob("*") if file.suffix in (".json", ".csv", ".yaml"))
        files[name] = {str(file): file.read_text() for file in there}
    assert files["a"] == files["b"]
    assert len(files["a"]) >= (4 if script is tofu_evaluation else 7)


# ---- rows at the edge ----


@pytest.fixture(scope="module")
def knows(place: Place) -> tuple[Any, Any, list[tuple[str, str]]]:
    """The full model, its tokenizer, and pairs that it knows by heart."""
    rows = [json.loads(line) for line in (place.data / "forget10.json").open()]
    tokenizer = checkpoints.load_tokenizer(str(place.full), "")
    model = checkpoints.load_model(str(place.full), torch.device("cpu"))
    return model, tokenizer, [(f"Question: {row['question']}\nAnswer: ", row["answer"]) for row in rows]


def pass_of(model: Any, tokenizer: Any) -> Pass:
    return Pass(model, tokenizer.pad_token_id, tokenizer.eos_token_id)


def test_an_empty_answer_and_one_of_a_token(knows: Any) -> None:
    """Without a token there is no PS, and the mean is of the others; with one it is all or nothing."""
    model, tokenizer, [(prompt, answer), *_] = knows
    one = tokenizer.decode(tokenizer(answer)["input_ids"][:1])
    table = score_rows(model, tokenizer, [(prompt, ""), (prompt, answer), (prompt, one), (prompt, "Zzz")])
    on_tokens = ["ps_exact", "extraction_strength", "exact_memorization", "min_k", "min_k_plus_plus"]
    assert table.loc[0, on_tokens].isna().all()
    assert np.isfinite(table.loc[0, "loss"])  # of its end-of-sequence token
    assert set(table.loc[1:, "ps_exact"]) == {0, 1}
    assert table.loc[1, "ps_exact"] == 1
    assert table.loc[2, "ps_exact"] == table.loc[2, "exact_memorization"]  # right or not
    with pytest.raises(ValueError, match=r"^no rows to score$"):
        score_rows(model, tokenizer, [])
    assert scores.mean(table["ps_exact"]) == pytest.approx(table.loc[1:, "ps_exact"].mean())


def test_an_answer_that_does_not_fit_is_cut(knows: Any) -> None:
    model, tokenizer, [(prompt, answer), *_] = knows
    how, pair = pass_of(model, tokenizer), (prompt, f"{answer} " * 5)
    [whole], [cut] = (teacher_force(how, tokenize_pairs([pair], tokenizer, n)) for n in (500, 20))
    assert not cut.ends
    assert 1 < cut.size < whole.size
    assert cut.size == len(cut.labels) == 20 - len(tokenizer(prompt.rstrip(" "))["input_ids"])
    assert cut.loss == pytest.approx(whole.nll[: cut.size].mean(), abs=1e-5)
    assert knowledge(cut)["exact_memorization"] == pytest.approx(whole.right[: cut.size].mean())


def test_a_model_that_answers_nothing(knows: Any) -> None:
    model, tokenizer, pairs = knows
    nothing = torch.zeros(model.config.vocab_size)
    nothing[tokenizer.eos_token_id] = 1e4
    hook = model.get_output_embeddings().register_forward_hook(lambda *given: given[-1] + nothing)
    table = score_rows(model, tokenizer, pairs)
    hook.remove()
    assert set(table["ps_exact"]) == set(table["exact_memorization"]) == set(table["rougeL_recall"]) == {0}
    assert set(table["generated_text"]) == {""}
    assert set(score_rows(model, tokenizer, pairs)["ps_exact"]) == {1}


def test_only_the_last_token_wrong(knows: Any) -> None:
    model, tokenizer, pairs = knows
    rows: list[Row] = tokenize_pairs(pairs, tokenizer)
    for row in rows:  # the answer's last token, before end-of-sequence
        row["input_ids"][-2] = row["labels"][-2] = (row["labels"][-2] + 1) % 100
    for forced in teacher_force(pass_of(model, tokenizer), rows):
        found = knowledge(forced)
        assert found["ps_exact"] == 0
        assert found["extraction_strength"] == pytest.approx(1 / forced.size)
        assert found["exact_memorization"] == pytest.approx(1 - 1 / forced.size)
