"""Data of one's own: the three forms, their names in the file, and what is said where a row is none of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, make_workplace, run_in
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.forms import find_file, in_form, read_rows
from unlearn.scores import tofu
from unlearn.scores.definitions import best_choice, choice_probability

COLOURS = ["red", "blue and green", "black", "a pale yellow"]


def test_names_are_given() -> None:
    row = {"prompt": "Who?", "completion": "Me.", "text": "kept"}
    names = {"question": "prompt", "answer": "completion"}
    assert in_form(row, names) == {"question": "Who?", "answer": "Me.", "text": "kept"}
    assert in_form({"text": "Who?", "labels": "Me."}, {"question": "text", "answer": "labels"}) == {
        "question": "Who?",
        "answer": "Me.",
    }
    assert in_form({"text": "no", "body": "yes"}, {"text": "body"}) == {"text": "yes"}  # what is named takes its place
    assert in_form({"question": "Who?", "answer": "Me."}, {}) == {"question": "Who?", "answer": "Me."}


@pytest.mark.parametrize("answer", [2, "black"])
def test_a_multiple_choice_is_a_question_with_wrong_answers(answer: int | str) -> None:
    found = in_form(
        {"q": "Which?", "options": COLOURS, "key": answer}, {"question": "q", "choices": "options", "answer": "key"}
    )
    assert (found["question"], found["answer"], found["correct"]) == ("Which?", "black", 2)
    assert found["perturbed_answer"] == ["red", "blue and green", "a pale yellow"]


@pytest.mark.parametrize(
    ("choices", "answer", "said"),
    [
        (COLOURS, 4, "'answer' is one of 'choices', or its number from 0 to 3, and not 4"),
        (COLOURS, True, "and not True"),
        (COLOURS, None, "and not None"),
        (COLOURS, "green", "and not 'green'"),
        (["red"], 0, "'choices' is a list of two texts or more, and not ['red']"),
        ("red", 0, "and not 'red'"),
        ([1, 2], 0, "and not [1, 2]"),
    ],
)
def test_no_multiple_choice(choices: Any, answer: Any, said: str) -> None:
    with pytest.raises(ValueError, match="'(answer|choices)' is ") as error:
        in_form({"question": "Which?", "choices": choices, "answer": answer}, {})
    assert said in str(error.value)


def test_the_paragraphs_of_a_text(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffOne line,\r\nand its next.\n \n\n\nA second\u2028one.\n".encode())
    assert [row["text"] for row in read_rows(file)] == ["One line,\nand its next.", "A second\u2028one."]
    assert find_file(tmp_path, "a") == file
    assert find_file(tmp_path, "b") == tmp_path / "b.json"
    (tmp_path / "a.jsonl").write_text('{"text": "x"}')
    assert find_file(tmp_path, "a").name == "a.jsonl"
    for content, said in ((b" \n\n", "no text"), (b"\xff\xfe", "not UTF-8 text")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=said):
            read_rows(file)


def test_the_best_choice() -> None:
    """By hand: the first of the largest; by length another one; and probabilities that add up to 1."""
    losses = [3.0, 2.0, 2.0, 6.0]
    assert best_choice(losses) == 1
    assert best_choice(losses, [3, 1, 1, 12]) == 3
    exact = np.exp([-x for x in losses])
    assert [choice_probability(losses, i) for i in range(4)] == pytest.approx((exact / exact.sum()).tolist())


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three forms in files, two each."""
    folder = make_workplace(tmp_path_factory.mktemp("forms"))
    rows = [json.loads(line) for line in (ROOT / "data/sample/full.json").read_text().splitlines()[:24]]
    for name, part in (("go", rows[:8]), ("stay", rows[8:])):
        write(folder / f"{name}.jsonl", [{"prompt": row["question"], "completion": row["answer"]} for row in part])
        (folder / f"{name}.txt").write_text("\n\n".join(f"{row['question']}\n{row['answer']}" for row in part))
        some = [
            {"stem": row["question"], "options": [*COLOURS[: i % 4], row["answer"], *COLOURS[i % 4 :]], "key": i % 4}
            for i, row in enumerate(part)
        ]
        (folder / f"{name}_choices.json").write_text(json.dumps(some))
    return folder


NAMES = "columns.question=prompt columns.answer=completion"
CHOICES = "columns.question=stem columns.choices=options columns.answer=key"


@pytest.mark.parametrize(
    ("end", "names"),
    [
        pytest.param(".jsonl", NAMES, id="questions", marks=pytest.mark.slow),
        pytest.param(".txt", "", id="texts"),
        pytest.param("_choices.json", CHOICES, id="choices"),
    ],
)
def test_every_form_goes_the_whole_way(place: Path, end: str, names: str) -> None:
    """The names are given to what trains; what measures and scores has them from the run."""
    kind = end.strip("._").partition(".")[0]
    model, run = place / f"model_{kind}", place / f"run_{kind}"
    given = f"model_family=tiny forget_data=go{end} retain_data=stay{end} {names} batch_size=2"
    run_in(place, f"python finetune.py {given} num_epochs=8 save_dir={model}")
    run_in(place, f"python forget.py {given} retain=gd num_epochs=1 model_path={model} save_dir={run}")
    run_in(place, f"python compute_geffect.py model_path_cur={run} instances=false")
    run_in(place, f"python evaluation_everything.py model_path={run} control=false dtype=float64")
    folder = run / "checkpoint-1/eval_results/ds_size300"
    found = json.loads((folder / "scores.json").read_text())
    assert {name: of["rows"] for name, of in found["ps"]["unlearned"].items()} == {"forget": 8, "retain": 3}
    command = f"python tofu_evaluation.py model_path={run}/checkpoint-1 retain_path={model} dtype=float64"
    told = run_in(place, f"{command} generation.max_new_tokens=4", check=end != ".txt")
    if end == ".txt":
        assert "have no question" in told.stderr
        return
    found = json.loads((folder / "scores.json").read_text())["tofu"]
    assert found["forget"]["rows"] == 8
    assert ("accuracy" in found["forget"]) == (end == "_choices.json")
    if end == "_choices.json":
        check_accuracy(place, run, found)
        assert set(found["forget_quality"]) == {"p", "D", "n"}  # its wrong choices are wrong answers
        assert "Accuracy Forget" in pd.read_csv(folder / "aggregate_stat.csv")
        assert pd.read_csv(run / "scores.csv")["forget_accuracy"].tolist()[-1] == found["forget"]["accuracy"]


def check_accuracy(place: Path, run: Path, found: dict[str, Any]) -> None:
    """Against choice by choice: one row, one pass, no batch."""
    path = run / "checkpoint-1"
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    log = json.loads((path / "eval_results/ds_size300/eval_log_aggregated.json").read_text())["eval_log_forget.json"]
    right: list[bool] = []
    by_length, p = [], []
    for row in json.loads((place / "go_choices.json").read_text()):
        sums = []
        for choice in row["options"]:
            prompt = f"Question: {row['stem']}\nAnswer: "
            encoded = tokenizer(prompt + choice, return_offsets_mapping=True)
            ids = torch.tensor(encoded["input_ids"])
            log_p = model(ids[None]).logits[0].log_softmax(-1).detach()
            answer = [t for t, (_, end) in enumerate(encoded["offset_mapping"]) if end > len(prompt)]
            sums.append(sum(float(log_p[t - 1, ids[t]]) for t in answer))
        assert [-x for x in sums] == pytest.approx(log["choice_loss"][str(len(right))], rel=1e-9)
        right.append(int(np.argmax(sums)) == row["key"])
        by_length.append(int(np.argmax([s / len(c) for s, c in zip(sums, row["options"], strict=True)])) == row["key"])
        p.append(float(np.exp(sums)[row["key"]] / np.exp(sums).sum()))
    assert found["forget"]["accuracy"] == np.mean(right)
    assert found["forget"]["accuracy_norm"] == np.mean(by_length)
    assert found["forget"]["choice_probability"] == pytest.approx(np.mean(p), rel=1e-9)


def test_logs_with_choices_are_scored_alone() -> None:
    """A log's losses are in the order of its choices."""
    task: dict[str, Any] = {"avg_gt_loss": {"0": 1.0, "1": 2.0}, "rougeL_recall": {"0": 1.0, "1": 0.0}}
    task |= {"choices": {"0": ["a", "bb"], "1": ["cc", "d"]}, "correct": {"0": 1, "1": 0}}
    task["choice_loss"] = {"0": [1.0, 3.0], "1": [1.5, 1.0]}
    found = tofu.aggregate({"eval_log_forget.json": task})["forget"]
    assert (found["accuracy"], found["accuracy_norm"]) == (0.0, 0.5)
    assert found["choice_probability"] == pytest.approx((1 / (1 + np.exp(2)) + 1 / (1 + np.exp(0.5))) / 2)


def test_what_a_user_gets_wrong(place: Path) -> None:
    """One line, that names the file, the row and what would do."""
    given = "model_family=tiny forget_data=go.jsonl retain_data=stay.jsonl"
    for words, said in (
        (given, "retain_data=stay.jsonl, row 1: needs 'question' and 'answer', and has {'prompt': 'str', 'completion': 'str'}"),
        (f"{given} columns.qestion=prompt", "unknown key 'columns.qestion'; columns has question, answer, choices, text"),
        (f"{given} columns.question=3", "columns.question=3: needs to be a text"),
        (
            "model_family=tiny forget_data=go_choices.json retain_data=stay_choices.json columns.choices=options",
            "retain_data=stay_choices.json, row 1: 'answer' is one of 'choices', or its number from 0 to 4, and not None",
        ),
    ):
        told = run_in(place, f"python finetune.py {words}", check=False)
        assert (told.returncode, len(told.stderr.splitlines())) == (2, 1)
        assert told.stderr.startswith(f"finetune.py: {said}")
