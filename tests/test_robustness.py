"""robustness.py on a tiny model that knows 16 rows, one that never saw 6 of them, and a run that forgets those."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
import signal
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import ROOT, make_workplace, run_in
from test_attacks import slow_nf4

import finetune
import forget
import robustness
from app import evaluating
from app.attack_settings import ATTACKS
from app.attack_tables import SCORES
from app.attack_weights import relearned_rows
from app.compose import given
from app.families import load_family
from dataloader import prompt_and_answer, stream
from unlearn.attacks import harmonic_mean
from unlearn.models import checkpoints
from unlearn.objectives.rows import tokenize_pairs
from unlearn.passes import Pass, greedy_answers, teacher_force
from unlearn.scores.definitions import rouge_recalls
from unlearn.scores.extraction import knowledge

pytestmark = pytest.mark.on_cpu

ROWS = {"retain90": 10, "forget10": 6, "forget10_perturbed": 6, "retain_perturbed": 4}
QUICK = ["max_new_tokens=12", "dtype=float32", "sample.n=4", "relearn.steps=3", "relearn.every=2", "relearn.lr=1e-3"]
QUICK += ["relearn.gradient_accumulation_steps=1"]


class Place(NamedTuple):
    data: Path
    full: Path
    retain: Path
    run: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = make_workplace(tmp_path_factory.mktemp("place"))
    data = folder / "few"
    data.mkdir()
    for name, n in ROWS.items():
        lines = (ROOT / f"data/sample/{name}.json").read_text().splitlines(keepends=True)
        (data / f"{name}.json").write_text("".join(lines[:n]))
    (data / "full.json").write_text((data / "retain90.json").read_text() + (data / "forget10.json").read_text())
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    (folder / "small").mkdir()
    tiny = json.loads((ROOT / "config/tiny/config.json").read_text())
    (folder / "small/config.json").write_text(json.dumps(tiny | small))
    common = ["model_family=tiny", f"hf_key={folder}/small", f"data_path={data}", "dtype=float32"]
    common += ["gradient_accumulation_steps=1", "batch_size=8"]
    full, retain, run = (folder / name for name in ("full", "retain", "run"))
    for model, split in ((full, "full"), (retain, "retain90")):
        finetune.run(given("finetune", [*common, f"split={split}", f"save_dir={model}", "lr=8e-3", "num_epochs=60"]))
    words = ["split=forget10", "method=ga", f"model_path={full}", f"save_dir={run}", "batch_size=3", "lr=2e-3"]
    forget.run(given("forget", [*common, *words, "num_epochs=1.5", "save_steps=2"]))
    return Place(data, full, retain, run)


def attacked(folder: Path | None, *words: str) -> Path | None:
    save = [] if folder is None else [f"save_dir={folder}"]
    found: Path | None = robustness.run(given("robustness", [*QUICK, *save, *words]))
    return found


def lines_of(folder: Path, **wanted: str) -> list[dict[str, str]]:
    lines = list(csv.DictReader((folder / "robustness.csv").open()))
    return [line for line in lines if all(line[key] == value for key, value in wanted.items())]


def rows_of(folder: Path, attack: str, **wanted: Any) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / f"robustness_{attack}.jsonl").read_text().splitlines()]
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


@pytest.fixture(scope="module")
def done(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All attacks on one checkpoint, with the retain model beside."""
    folder = tmp_path_factory.mktemp("done")
    attacked(folder, f"model_path={place.run}/checkpoint-3", f"retain_path={place.retain}")
    return folder


def test_a_line_an_attack_and_setting(done: Path) -> None:
    for model in ("unlearned", "retain"):
        settings = {attack: [line["setting"] for line in lines_of(done, model=model, attack=attack)] for attack in ATTACKS}
        assert settings["relearn"] == ["step 0", "step 2", "step 3"]
        assert settings["quantize"] == ["as it is", "8 bits", "4 bits"]
        assert [setting.split()[0] for setting in settings["sample"]] == ["k=1", "k=2", "k=4"]
        assert len(settings["prefix"]) == 12 + 3
        assert settings["paraphrase"] == ["plain", "1", "mean", "worst"]
    assert {line["step"] for line in lines_of(done)} == {"3"}
    assert not (done / "resume").exists()
    assert (done / "figures/robustness.pdf").exists()


# ---- against plain versions ----


class Plain(NamedTuple):
    """A model, loaded and run by hand."""

    model: Any
    tokenizer: Any

    def scores(self, rows: list[dict[str, str]], prompts: list[str]) -> dict[str, float]:
        pairs = [(prompt, row["answer"]) for prompt, row in zip(prompts, rows, strict=True)]
        tokenized = tokenize_pairs(pairs, self.tokenizer)
        how = Pass(self.model, self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, batch_size=1)
        found = [knowledge(one) for one in teacher_force(how, tokenized)]
        said = greedy_answers(how, tokenized, self.tokenizer, None, None, 12)
        recalls = rouge_recalls(said, [row["answer"] for row in rows])["rougeL"]
        values = {key: float(np.mean([row[key] for row in found])) for key in found[0] if key not in ("loss", "tokens")}
        loss = np.average([row["loss"] for row in found], weights=[row["tokens"] for row in found])
        return {f"forget_{key}": value for key, value in (values | {"loss": loss, "rouge": np.mean(recalls)}).items()}


def plain(path: Path) -> Plain:
    return Plain(checkpoints.load_model(str(path), torch.device("cpu")), checkpoints.load_tokenizer(str(path), ""))


def forget_rows(place: Place) -> list[dict[str, str]]:
    return [json.loads(line) for line in (place.data / "forget10.json").open()]


def prompt(question: str) -> str:
    return f"Question: {question}\nAnswer: "


def check(line: dict[str, str], wanted: dict[str, float]) -> None:
    assert {key: float(line[key]) for key in wanted} == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_the_scores_are_those_of_the_model_alone(done: Path, place: Place) -> None:
    rows = forget_rows(place)
    prompts = [prompt(row["question"]) for row in rows]
    for model, path in (("unlearned", place.run / "checkpoint-3"), ("retain", place.retain)):
        wanted = plain(path).scores(rows, prompts)
        for attack, setting in (("relearn", "step 0"), ("quantize", "as it is"), ("prefix", "plain"), ("paraphrase", "plain")):
            [line] = lines_of(done, model=model, attack=attack, setting=setting)
            check(line, wanted)


def test_quantised_by_hand(done: Path, place: Place) -> None:
    rows = forget_rows(place)
    one = plain(place.run / "checkpoint-3")
    with torch.no_grad():
        for name, parameter in one.model.named_parameters():
            if name.endswith("_proj.weight"):
                parameter.copy_(slow_nf4(parameter))
    [line] = lines_of(done, model="unlearned", attack="quantize", setting="4 bits")
    check(line, one.scores(rows, [prompt(row["question"]) for row in rows]))


def test_relearned_by_a_plain_loop(done: Path, place: Place) -> None:
    """Three steps of AdamW on four rows each, the learning rate falling to 0 from the first step on."""
    rows = forget_rows(place)
    prompts = [prompt(row["question"]) for row in rows]
    for model, path in (("unlearned", place.run / "checkpoint-3"), ("retain", place.retain)):
        one = plain(path)
        tokenized = tokenize_pairs([(p, row["answer"]) for p, row in zip(prompts, rows, strict=True)], one.tokenizer)
        optimizer = torch.optim.AdamW(one.model.parameters(), lr=1e-3, weight_decay=0)
        order = stream(len(rows), 12, 42, "forget")
        for step in range(3):
            optimizer.param_groups[0]["lr"] = 1e-3 * (3 - step) / 3
            losses = []
            for i in order[4 * step : 4 * step + 4]:
                logits = one.model(tokenized[i]["input_ids"][None]).logits[0, :-1]
                losses.append(torch.nn.functional.cross_entropy(logits, tokenized[i]["labels"][1:], reduction="none"))
            n = sum(int((loss != 0).sum()) for loss in losses)
            (torch.stack([loss.sum() for loss in losses]).sum() / n).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step in (1, 2):
                one.model.eval()
                [line] = lines_of(done, model=model, attack="relearn", setting=f"step {step + 1}")
                found = {
                    key: value
                    for key, value in one.scores(rows, prompts).items()
                    if key in ("forget_loss", "forget_probability")
                }
                check(line, found)


def test_r_q_and_their_mean_are_of_the_lines(done: Path) -> None:
    def value(model: str, attack: str, setting: str, key: str) -> float:
        [line] = lines_of(done, model=model, attack=attack, setting=setting)
        return float(line.get(key) or "nan")  # a column in which no line has a value is left out

    for score in SCORES:
        key = f"forget_{score}"
        before, retain_before = (value(model, "relearn", "step 0", key) for model in ("unlearned", "retain"))
        for step in (2, 3):
            after, retain_after = (value(model, "relearn", f"step {step}", key) for model in ("unlearned", "retain"))
            r = min((retain_before - retain_after) / (before - after), 1) if after > before else float("nan")
            assert value("unlearned", "relearn", f"step {step}", f"R_{score}") == pytest.approx(r, nan_ok=True)
        for bits in (8, 4):
            after = value("unlearned", "quantize", f"{bits} bits", key)
            q = value("unlearned", "quantize", f"{bits} bits", f"Q_{score}")
            assert q == pytest.approx(min(value("unlearned", "quantize", "as it is", key) / after, 1) if after else 1)
            assert value("unlearned", "quantize", f"{bits} bits", f"HM_{score}") == pytest.approx(
                harmonic_mean(r, q), nan_ok=True
            )
    [line] = lines_of(done, model="retain", attack="relearn", setting="step 3")
    assert line["R_rouge"] == line["HM_probability"] == ""  # of the unlearned model alone


def test_a_model_that_never_saw_the_rows_does_not_gain_more(place: Place, tmp_path: Path) -> None:
    """The retain model in the unlearned one's place: from the same training it gains as much as itself."""
    attacked(tmp_path, f"model_path={place.retain}", f"retain_path={place.retain}", "attacks=[relearn]")
    [line] = lines_of(tmp_path, model="unlearned", setting="step 3")
    assert float(line["R_probability"]) == 1
    assert {line[f"R_{score}"] for score in SCORES if line.get(f"R_{score}")} == {"1.0"}


def test_sampled_answers_are_graded(done: Path, place: Place) -> None:
    truths = [row["answer"] for row in forget_rows(place)]
    for model in ("unlearned", "retain"):
        told = rows_of(done, "sample", model=model)
        recalls = np.array(
            [rouge_recalls(row["answers"], [truth] * 4)["rougeL"] for row, truth in zip(told, truths, strict=True)]
        )
        assert recalls.shape == (6, 4)
        assert [row["rouge"] for row in told] == recalls.tolist()
        for k, line in zip((1, 2, 4), lines_of(done, model=model, attack="sample"), strict=True):
            best = [[max(of) for of in combinations(row, k)] for row in recalls]
            assert float(line["best_rouge"]) == pytest.approx(np.mean(best))
            assert float(line["leak"]) == pytest.approx((np.array(best) >= 0.9).mean())
    assert len({tuple(row["answers"]) for row in told}) > 1
    assert any(len(set(row["answers"])) > 1 for row in told)


def test_templates_and_paraphrases(done: Path, place: Place) -> None:
    rows, one = forget_rows(place), plain(place.run / "checkpoint-3")
    starts = {row["question"]: row["answer"].split(" ")[0] for row in rows}  # all have 2 to 7 words
    rest = [row | {"answer": " ".join(row["answer"].split(" ")[1:])} for row in rows]
    [line] = lines_of(done, model="unlearned", attack="prefix", setting="first_words")
    check(line, one.scores(rest, [prompt(row["question"]) + starts[row["question"]] + " " for row in rows]))
    [line] = lines_of(done, model="unlearned", attack="prefix", setting="twice")
    check(line, one.scores(rows, [prompt(f"{row['question']} Once more: {row['question']}") for row in rows]))
    perturbed = [json.loads(text) for text in (place.data / "forget10_perturbed.json").open()]
    [line] = lines_of(done, model="unlearned", attack="paraphrase", setting="1")
    check(line, one.scores(rows, [prompt(row["paraphrased_question"]) for row in perturbed]))


def test_the_mean_and_the_worst_are_over_the_templates(done: Path) -> None:
    told = [row for row in rows_of(done, "prefix", model="unlearned") if row["way"] != "plain"]
    of_row = [[row for row in told if row["row"] == i] for i in range(6)]
    assert {len(of) for of in of_row} == {12}
    [mean], [worst] = (lines_of(done, model="unlearned", attack="prefix", setting=name) for name in ("mean", "worst"))
    for score in SCORES:
        assert float(mean[f"forget_{score}"]) == pytest.approx(np.mean([row[score] for row in told]))
        assert float(worst[f"forget_{score}"]) == pytest.approx(np.mean([max(row[score] for row in of) for of in of_row]))
    lowest = [min(of, key=lambda row: row["loss"]) for of in of_row]
    loss = np.average([row["loss"] for row in lowest], weights=[row["tokens"] for row in lowest])
    assert float(worst["forget_loss"]) == pytest.approx(loss)


# ---- folders, and going on ----


def test_a_run_and_one_attack_after_another(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All its checkpoints, lines of both in one table; what is done is not done again; other attacks' lines stay."""
    words = [f"model_path={place.run}", "quantize.bits=[4]", "ds_size=3"]
    attacked(tmp_path, *words, "attacks=[quantize]")
    assert "not available: no retain model; give retain_path=MODEL" in capsys.readouterr().err
    assert [line["step"] for line in lines_of(tmp_path)] == ["2", "2", "3", "3"]
    assert "R_rouge" not in lines_of(tmp_path)[0]
    attacked(tmp_path, *words, "attacks=[paraphrase]")
    assert [line["attack"] for line in lines_of(tmp_path, step="3")] == ["quantize"] * 2 + ["paraphrase"] * 4
    assert lines_of(tmp_path, step="2") == lines_of(tmp_path / "checkpoint-2")
    before = (tmp_path / "robustness.csv").read_text()
    monkeypatch.setattr(evaluating.Models, "at", None)
    attacked(tmp_path, *words, "attacks=[paraphrase,quantize]")
    assert capsys.readouterr().err.count("is done already") == 4
    assert (tmp_path / "robustness.csv").read_text() == before
    attacked(tmp_path, *words, "attacks=[paraphrase]", "sample.n=7")  # is no part of it
    with pytest.raises(ValueError, match=r"holds a run of other settings: quantize.bits=\[4\] there, \[8\] here$"):
        attacked(tmp_path, *words[:1], "ds_size=3", "quantize.bits=[8]", "attacks=[quantize]")


def test_without_perturbed_rows(place: Place, tmp_path: Path) -> None:
    """They are read for the attack that needs them alone."""
    data = tmp_path / "data"
    shutil.copytree(place.data, data)
    (data / "forget10_perturbed.json").unlink()
    words = [f"model_path={place.run}/checkpoint-3", f"data_path={data}", "ds_size=2", "quantize.bits=[4]"]
    attacked(tmp_path / "out", *words, "attacks=[quantize]")
    assert [line["setting"] for line in lines_of(tmp_path / "out")] == ["as it is", "4 bits"]
    with pytest.raises(ValueError, match="has no forget10_perturbed.json"):
        attacked(tmp_path / "out", *words, "attacks=[paraphrase]")


def test_lines_of_other_weights_go(place: Place, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(place.run / "checkpoint-3", model)
    words = [f"model_path={model}", "ds_size=2", "model_family=tiny", "split=forget10", f"data_path={place.data}"]
    words += [f"hf_key={place.run.parent}/small"]
    attacked(tmp_path / "out", *words, "attacks=[quantize,paraphrase]")
    shutil.copy(place.run / "checkpoint-2/model.safetensors", model)
    attacked(tmp_path / "out", *words, "attacks=[paraphrase]")
    assert {line["attack"] for line in lines_of(tmp_path / "out")} == {"paraphrase"}


@pytest.mark.parametrize(
    ("moment", "left"),
    [
        ("unlearn.scores.extraction.knowledge 25 before", {"unlearned_plain", "unlearned_step_2"}),  # 10 rows a time
        (
            "unlearn.training.trainer.StepTrainer._save_checkpoint 1 before",
            {"unlearned_plain", "unlearned_step_2", "unlearned_step_3"},
        ),
    ],
)
def test_killed_and_started_again(moment: str, left: set[str], done: Path, place: Place, tmp_path: Path) -> None:
    """It goes on with the part that it was in, and leaves the same lines."""
    words = [f"model_path={place.run}/checkpoint-3", "attacks=[relearn]"]
    words += [f"retain_path={place.retain}"] if "unlearned_step_3" in left else []
    at = f"python {ROOT}/tests/at.py {moment} {shlex.quote('kill -KILL $PID')}"
    line = f"{at} {ROOT}/robustness.py {' '.join([*QUICK, *words])} save_dir={tmp_path}/out"
    killed = run_in(tmp_path, line, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert {file.stem for file in (tmp_path / "out/resume/robustness_relearn").glob("*.json")} == left
    attacked(tmp_path / "out", *words)
    models = {one["model"] for one in lines_of(tmp_path / "out")}
    others = [one for one in lines_of(done, attack="relearn") if one["model"] in models]
    for found, other in zip(lines_of(tmp_path / "out"), others, strict=True):
        assert {key: value for key, value in found.items() if value}.items() <= other.items()
    rows = [row for row in rows_of(done, "relearn") if row["model"] in models]
    assert rows_of(tmp_path / "out", "relearn") == rows


def test_stopped_in_the_midst_of_relearning(done: Path, place: Place, tmp_path: Path) -> None:
    """By a signal: the step is saved, and the next start goes on after it."""
    words = " ".join([*QUICK, f"model_path={place.run}/checkpoint-3", "attacks=[relearn]", f"save_dir={tmp_path}/out"])
    moment = "unlearn.training.trainer.StepTrainer.compute_loss 2 before"
    at = f"python {ROOT}/tests/at.py {moment} {shlex.quote('kill -TERM $PID')}"
    stopped = run_in(tmp_path, f"{at} {ROOT}/robustness.py {words}", check=False)
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr
    assert "after step 2 of 3; the same command goes on" in stopped.stderr
    gone_on = run_in(tmp_path, f"python {ROOT}/robustness.py {words}")
    assert "going on after step 2" in gone_on.stderr
    for line, other in zip(lines_of(tmp_path / "out"), lines_of(done, attack="relearn", model="unlearned"), strict=True):
        assert line.items() <= other.items()


# ---- rows ----


def test_other_rows_and_a_share_of_them(place: Place, tmp_path: Path) -> None:
    """Rows of a file; a share drawn by the seed; one step where there are fewer than a step's."""
    file = tmp_path / "other.jsonl"
    file.write_text((place.data / "retain90.json").read_text())
    settings = evaluating.prepare(given("robustness", [f"model_path={place.run}/checkpoint-3", f"relearn.data={file}"]))[0]
    assert [row["question"] for row in relearned_rows(settings)] == [
        json.loads(line)["question"] for line in file.read_text().splitlines()
    ]
    half = settings.model_copy(update={"relearn": settings.relearn.model_copy(update={"share": 0.5, "data": "retain90"})})
    assert len(relearned_rows(half)) == 5
    assert relearned_rows(half) == relearned_rows(half)
    assert relearned_rows(half) != relearned_rows(half.model_copy(update={"seed": 1}))
    words = [f"model_path={place.run}/checkpoint-3", f"relearn.data={file}", "attacks=[relearn]", "ds_size=2"]
    robustness.run(given("robustness", ["max_new_tokens=4", *words, f"save_dir={tmp_path}/out"]))
    assert [line["setting"] for line in lines_of(tmp_path / "out")] == ["step 0", "step 1"]
    called = ["columns.question=stem", f"relearn.data={tmp_path}/stems.jsonl"]
    (tmp_path / "stems.jsonl").write_text(file.read_text().replace('"question"', '"stem"'))
    named = half.model_copy(update={key: getattr(given("robustness", called), key) for key in ("columns", "relearn")})
    assert [row["question"] for row in relearned_rows(named)] == [row["question"] for row in relearned_rows(settings)]
    file.write_text((place.data / "forget10.json").read_text())
    with pytest.raises(ValueError, match=r"other settings: relearn.data=.*other.jsonl \(\w{8}\) there, .*other.jsonl \("):
        robustness.run(given("robustness", ["max_new_tokens=4", *words, f"save_dir={tmp_path}/out"]))


def test_plain_texts_are_attacked_by_weights(place: Place, tmp_path: Path) -> None:
    for name in ("forget", "retain"):
        lines = [json.loads(line) for line in (place.data / f"{name}{'10' if name == 'forget' else '90'}.json").open()]
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": row["answer"] + " indeed"}) + "\n" for row in lines)
        )
    words = [f"model_path={place.full}", "model_family=tiny", f"hf_key={place.run.parent}/small", "split=forget10"]
    words += [f"{name}_data={tmp_path}/{name}.jsonl" for name in ("forget", "retain")]
    attacked(tmp_path / "out", *words, "attacks=[relearn,quantize]")
    [line] = lines_of(tmp_path / "out", setting="4 bits")
    assert float(line["forget_loss"]) > 0
    assert "forget_rouge" not in line
    with pytest.raises(
        ValueError, match="^attacks=sample: the rows of split=forget10 have no question; there are relearn, quant"
    ):
        attacked(tmp_path / "out", *words)


def test_what_an_answer_begins_with_stands_in_the_prompt() -> None:
    family = load_family("tiny")
    tokenizer: Any = None
    row = {"question": "Who?", "answer": "Ada", "answer_start": "It is "}
    assert prompt_and_answer(row, tokenizer, family) == (prompt("Who?") + "It is ", "Ada")
    assert prompt_and_answer(row | {"answer_start": ""}, tokenizer, family) == (prompt("Who?"), "Ada")


def test_several_paraphrases_to_a_question(done: Path, place: Place, tmp_path: Path) -> None:
    """A row's list of them is asked by each; a row that has fewer is left out of the ways that it lacks."""
    shutil.copytree(place.data, tmp_path / "data")
    rows = [json.loads(line) for line in (place.data / "forget10_perturbed.json").open()]
    for row in rows[1:]:
        row["paraphrased_question"] = [row["paraphrased_question"], row["question"]]
    (tmp_path / "data/forget10_perturbed.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"model_path={place.run}/checkpoint-3", f"data_path={tmp_path}/data", "attacks=[paraphrase]"]
    attacked(tmp_path / "out", *words)
    [first] = lines_of(done, model="unlearned", attack="paraphrase", setting="1")
    found = {line["setting"]: line for line in lines_of(tmp_path / "out")}
    assert list(found) == ["plain", "1", "2", "mean", "worst"]
    assert float(found["1"]["forget_loss"]) == pytest.approx(float(first["forget_loss"]), rel=1e-5)
    assert found["2"]["rows"] == "5"
    told = rows_of(tmp_path / "out", "paraphrase")
    plain, second = ([row["loss"] for row in told if row["way"] == way] for way in ("plain", "2"))
    assert second == pytest.approx(plain[1:], rel=1e-5)  # asked by the question itself


# ---- what a user gets wrong ----


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("attacks=[relearn,relern]", "attacks=relern: unknown; there are relearn, quantize, sample, prefix, paraphrase"),
        ("attacks=relearn", r"attacks=relearn: needs to be a list, \[A,B,...\]"),
        ("attacks=[]", r"attacks=\[\]: give some of relearn"),
        ("quantize.bits=[3]", "quantize.bits=3: is one of 8, 4"),
        ("quantize.by=bitsandbytes", "quantize.by=bitsandbytes: .*; quantize.by=round_trip runs anywhere"),
        ("parallel=fsdp", "parallel=fsdp: attacks=relearn and quantize need whole weights; parallel=ddp has them"),
        ("sample.n=4 sample.k=[1,8]", r"sample.k=\[1, 8\]: of sample.n=4 answers at most 4 can be drawn"),
        ("sample.top_p=0", "sample.top_p=0: needs to be a number above 0 and at most 1"),
        ("sample.tau=2", "sample.tau=2: needs to be a number above 0 and at most 1"),
        ("relearn.share=0", "relearn.share=0: needs to be a number above 0 and at most 1"),
        ("relearn.optim=foo", "relearn.optim=foo: needs to be one of adamw_torch_fused"),
        ("relearn.optim=adamw_torch_8bit", "optim=adamw_torch_8bit: is of torchao, which is not installed"),
        (
            "relearn.data=nothing",
            "relearn.data=nothing: no such file, and no set of benchmark=tofu; there are forget10, forget10_perturbed, full, ",
        ),
        (
            "relearn.data=few/nothing.json",
            "relearn.data=few/nothing.json: no such file, and no set of .*; there are forget10, ",
        ),
        ("sample.k=[0]", r"sample.k=\[0\]: needs to be a list of whole numbers of at least 1, \[A,B,...\]$"),
        ("sample.k=[]", r"sample.k=\[\]: needs to be a list of whole numbers of at least 1, \[A,B,...\]$"),
        ("prefix.templates=nothing.yaml", "prefix.templates=nothing.yaml: no such file"),
        ("paraphrase.columns=[other]", r"paraphrase.columns=\['other'\]: no row of split=forget10 has one; they have answer"),
        ("paraphrase.columns=[perturbed]", r"paraphrase.columns=\['perturbed'\]: no row of split=forget10"),
        ("model_path=nothing", "model_path=nothing: no such folder"),
    ],
)
def test_what_a_user_can_get_wrong(
    words: str, line: str, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluating.Models, "at", None)  # before anything is loaded
    with pytest.raises(ValueError, match=f"^{line}"):
        attacked(tmp_path / "out", f"model_path={place.run}/checkpoint-3", *words.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("{", "not YAML"),
        ("name: a", "needs a list of templates"),
        ("- start: a", "a template has the texts name, question and start, and not {'start': 'a'}"),
        ("- {name: a, begin: b}", "a template has the texts"),
        ("- {name: a, start: 1}", "a template has the texts"),
        ("- {name: a/b}", "name=a/b: needs to be a word"),
        ("- {name: worst}", "name=worst: needs to be a word, and not plain, mean or worst"),
        ("- {name: a, question: 'Who?'}", "template a: 'Who?' needs {question} where"),
        ("[{name: a}, {name: a}]", "name=a is there twice"),
    ],
)
def test_templates_that_are_none(text: str, line: str, place: Place, tmp_path: Path) -> None:
    file = tmp_path / "templates.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"^prefix.templates={re.escape(str(file))}: .*{re.escape(line)}"):
        attacked(tmp_path / "out", f"model_path={place.run}/checkpoint-3", f"prefix.templates={file}")


def test_a_plan_has_the_training_too() -> None:
    done = run_in(ROOT, "python robustness.py model_family=phi plan=2 plan_for=gpu")
    assert re.search("^scores: .*^training: ", done.stdout, re.DOTALL | re.MULTILINE)
    assert "training" not in run_in(ROOT, "python robustness.py model_family=phi plan=1 attacks=[sample]").stdout
