"""Second answers that the model generates itself: how they are drawn, what is kept of them, and who reads them."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, run_in
from transformers import AutoTokenizer

from app import second
from app.compose import given
from app.families import load_family
from app.runs import check_run, made_of, open_run
from app.settings import GEffects, Method, Retain
from dataloader import second_rows
from unlearn.io.rows import read_jsonl
from unlearn.models.checkpoints import load_model
from unlearn.objectives.rows import tokenize_pairs
from unlearn.passes.decoding import Sampling, greedy_answers, sampled_answers
from unlearn.passes.forcing import Pass

ALTPO = Method.model_validate(given("forget", ["model_family=tiny", "method=altpo"]).method.model_dump())
ROWS = [{"question": "Who?", "answer": "Ada"}, {"question": "Where {answer}?", "answer": "Rome {question}"}]


def command(model: Path, save_dir: str = "run", more: str = "") -> str:
    own = f"model_family=tiny split=forget05 method=altpo dtype=float32 save_steps=2 model_path={model} save_dir={save_dir}"
    return f"{ROOT}/forget.py {own} {more}"


def measured(model: Path, more: str) -> str:
    own = f"model_family=tiny split=forget05 model_path={model} dtype=float32 instances=false geffect.retain_rows=2"
    return f"python {ROOT}/compute_geffect.py {own} {more}"


@pytest.fixture(scope="module")
def run(young: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stopped."""
    folder = tmp_path_factory.mktemp("altpo")
    run_in(folder, f"python {command(young)}")
    return folder / "run"


@pytest.mark.parametrize("value", ["", [], None, 5, [5], ["Ada", ""]])
def test_a_column_of_other_than_texts_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^method.second=other: .*(nothing in that column|an answer there is a text)"):
        second_rows([{"question": "Who?", "answer": "Ada", "other": value}], "other", 0)


# ---- drawing ----


def test_tokens_are_drawn_by_their_probabilities() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0, 0.0]])
    n = 10_000
    sampling = Sampling((torch.arange(n, dtype=torch.float64)[:, None] + 0.5) / n, temperature=0.5, top_k=3)
    drawn = sampling(logits.expand(n, -1), range(n), 0)
    expected = n * (torch.tensor([1.0, 3.0, 2.0]).double() / 0.5).softmax(0)
    assert torch.bincount(drawn, minlength=5)[:3].tolist() == pytest.approx(expected.tolist(), abs=1)
    assert drawn.max() == 2
    last = Sampling(torch.full((1, 1), 1 - 1e-17, dtype=torch.float64), 1, 50)
    assert last(logits, [0], 0).item() == 3


def test_answers_are_the_seeds_whatever_the_batches(young: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(young), load_model(str(young), torch.device("cpu"), dtype=torch.float64)
    rows = tokenize_pairs([(f"Question: {'Who ' * i}\nAnswer: ", "") for i in range(1, 6)], tokenizer)

    def said(seed: int, batch_size: int, **how: Any) -> list[str]:
        one = Pass(model, 0, tokenizer.eos_token_id, batch_size=batch_size)
        return sampled_answers(one, rows, tokenizer, torch.Generator().manual_seed(seed), max_new_tokens=8, **how)

    assert said(1, 1) == said(1, 16) != said(2, 16)
    greedy = greedy_answers(Pass(model, 0, tokenizer.eos_token_id), rows, tokenizer, max_length=None, max_new_tokens=8)
    assert said(1, 16, top_k=1) == greedy == said(1, 16, temperature=1e-9)


def test_what_is_empty_or_true_is_drawn_again(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    said = iter([["Bob", "", "Ada ", "x", "Paris", "Oslo"], ["Ada", "Eve Question: y"], ["Ada"], ["Ada"], [""]])
    asked: list[str] = []

    def speak(how: Any, rows: list[str], *args: Any, **kwargs: Any) -> list[str]:
        asked.extend(rows)
        return next(said)

    monkeypatch.setattr("unlearn.passes.decoding.sampled_answers", speak)
    family = load_family("phi")
    assert family.question_start_tag.strip() == "Question:"
    speaker: Any = second.Speaker(None, family, None, lambda rows, max_length: [row["question"] for row in rows])  # type: ignore[arg-type]
    method = ALTPO.model_copy(update={"alternatives": 3})
    assert second.generate(ROWS, method, 0, speaker) == [["Bob", "Eve"], ["x", "Paris", "Oslo"]]
    assert asked[3].startswith("Where {answer}?\nOne answer is: Rome {question}\n")
    assert asked[:3] == [asked[0]] * 3 == asked[6:7] * 3
    assert "1 of 6 second answers were empty or the true one, 5 times each" in capsys.readouterr().err
    said = iter([["", "", "", "Rome {question}", "", ""], *[[""] * 6] * 4])
    with pytest.raises(ValueError, match=r"^Who\?: all second answers are empty; raise method.temperature or top_k$"):
        second.generate(ROWS, method, 0, speaker)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ask": "Another one!"}, "method.ask=Another one!: needs {question} where"),
        (
            {"top_k": None, "ask": None},
            "the rows have no such column, and method=altpo no method.top_k, method.ask; config/method/",
        ),
    ],
)
def test_a_method_that_does_not_say_how(changed: dict[str, Any], message: str) -> None:
    method = ALTPO.model_copy(update=changed)
    with pytest.raises(ValueError, match="^method") as error:
        second.generates(method, ROWS)
    assert message in str(error.value)
    assert not second.generates(method, [row | {"generated": "Eve"} for row in ROWS])  # the rows' own
    assert not second.generates(method.model_copy(update={"second": "idk"}), ROWS)
    with pytest.raises(ValueError, match="a text: has no question that could be answered otherwise"):
        second.generates(ALTPO, [{"text": "x", "_place": "a text"}])


@pytest.mark.parametrize("word", ["method.top_k=0", "method.alternatives=0", "method.temperature=0", "method.ask=3"])
def test_wrong_values(word: str) -> None:
    with pytest.raises(ValueError, match=f"^{word}"):
        given("forget", ["model_family=tiny", "method=altpo", word])


# ---- keeping ----


def test_a_run_keeps_its_answers(run: Path) -> None:
    lines = read_jsonl(run / "second.jsonl")
    asked = read_jsonl(ROOT / "data/sample/forget05.json")
    assert [(line["question"], line["answer"]) for line in lines] == [(row["question"], row["answer"]) for row in asked]
    assert all(1 <= len(line["generated"]) <= 5 for line in lines)
    assert {len(line["generated"]) for line in lines} >= {5}
    assert not any(text in ("", line["answer"]) or text != text.strip() for line in lines for text in line["generated"])


def test_killed_and_resumed_with_the_same_bits(young: Path, run: Path, tmp_path: Path) -> None:
    """Nothing is generated a second time."""
    then = shlex.quote("kill -KILL $PID")
    killed = run_in(tmp_path, f"python {ROOT}/tests/at.py torch.optim.AdamW.step 4 before {then} {command(young)}", check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    file = tmp_path / "run/second.jsonl"
    when = file.stat().st_mtime_ns
    assert file.read_bytes() == (run / "second.jsonl").read_bytes()  # by the seed
    assert "going on after step 2" in run_in(tmp_path, f"python {command(young)}").stderr
    assert file.stat().st_mtime_ns == when
    ends = [(folder / "checkpoint-6/model.safetensors").read_bytes() for folder in (run, tmp_path / "run")]
    assert ends[0] == ends[1]
    file.write_text(file.read_text().replace('"generated": ["', '"generated": ["x', 1))
    refused = run_in(tmp_path, f"python {command(young)}", check=False)
    assert refused.returncode == 2
    assert f"holds a run of other data: {file.relative_to(tmp_path)}: is not what it was" in refused.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_the_same_rows_on_every_process(young: Path, run: Path, tmp_path: Path, parallel: str) -> None:
    more = f"parallel={parallel} num_epochs=1 batch_size=2"
    run_in(tmp_path, f"torchrun --nproc_per_node=2 {command(young, 'run', more)}")
    assert (tmp_path / "run/second.jsonl").read_bytes() == (run / "second.jsonl").read_bytes()


def test_bad_rows_are_mended_in_place(young: Path, tmp_path: Path) -> None:
    """Refused before a model is loaded; once the rows are mended, the same command runs."""
    rows = [{"question": f"Where is {i}?", "answer": "Riga", "other": "Oslo"} for i in range(8)]
    file = tmp_path / "rows.jsonl"

    def forget(other: str) -> subprocess.CompletedProcess[str]:
        rows[2]["other"] = other
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        how = f"method=ipo method.second=other batch_size=2 num_epochs=1 model_path={young} save_dir=run"
        data = "forget_data=rows.jsonl retain_data=rows.jsonl gradient_accumulation_steps=1"
        return run_in(
            tmp_path, f"python {ROOT}/forget.py model_family=tiny {how} {data} model_path={young} save_dir=run", check=False
        )

    for other, why in (("", "row 3 has nothing in that column"), ("Riga", "row 3: an answer there is the row's own")):
        refused = forget(other)
        assert refused.returncode == 2, refused.stderr
        assert f"method.second=other: rows.jsonl, {why}" in refused.stderr.splitlines()[-1]
    assert forget("Rome").returncode == 0


def test_a_run_that_has_not_begun_is_none(tmp_path: Path) -> None:
    """A folder with nothing but the note of a run is for any other; with more it is that run's."""
    settings = given("forget", ["model_family=tiny", "method=ga", "split=forget05", f"save_dir={tmp_path}"])
    other = settings.model_copy(update={"seed": 7})
    open_run(tmp_path, settings)
    check_run(tmp_path, other)
    open_run(tmp_path, other)
    (tmp_path / "logs").mkdir()
    check_run(tmp_path, other)
    with pytest.raises(ValueError, match="holds a run of other settings: seed=7 there, 42 here"):
        check_run(tmp_path, settings)


# ---- measuring ----


def of_run(run: Path, *words: str) -> GEffects:
    saved = given("forget", ["model_family=tiny"])
    settings = given("forget_ge", ["model_family=tiny", f"model_path_cur={run}", *words])
    noted = second.saved_settings(run)
    keys = {key: noted[key] for key in (*second.SAME, "hf_key")}
    return settings.model_copy(update=keys | {"save_dir": str(run), "benchmark": saved.benchmark})


def test_the_runs_own_are_measured(run: Path) -> None:
    """Of the same settings, and of the same rows; the speaker is not asked."""
    speaker: Any = None
    rows: list[dict[str, Any]] = read_jsonl(ROOT / "data/sample/forget05.json")
    settings, retain = of_run(run), Retain.model_validate({"name": "none", "term": None})
    ga = Method.model_validate({"name": "ga", "objective": {}})
    objectives, found = second.of_measured([(ga, retain), (ALTPO, retain)], rows, settings, speaker)
    assert [method.second for method, _ in objectives] == [None, "second"]
    assert [row["second"] for row in found] == [line["generated"] for line in read_jsonl(run / "second.jsonl")]
    with pytest.raises(ValueError, match=r"second.jsonl: is of other rows; give save_dir=FOLDER"):
        second.of_measured([(ALTPO, retain)], rows[1:], settings, speaker)
    for other in (settings.model_copy(update={"seed": 1}), settings.model_copy(update={"model_path_cur": None})):
        with pytest.raises(AttributeError):  # others: the speaker is asked
            second.of_measured([(ALTPO, retain)], rows, other, speaker)


def test_measured_with_a_run(young: Path, run: Path) -> None:
    """The run's objective and the same in a sweep have the same rows, and so the same G-effects."""
    run_in(run.parent, measured(young, "model_path_cur=run/checkpoint-6 sweep=[altpo,altpo:0.5]"))
    assert not list((run / "geffect").glob("second*"))
    lines = [line.split(",") for line in (run / "geffect/sweep.csv").read_text().splitlines()]
    swept = [float(line[lines[0].index("geffect")]) for line in lines[1:] if "altpo" in line and "0.5" not in line]
    steps = [line.split(",") for line in (run / "geffect/steps.csv").read_text().splitlines()]
    own = [float(line[steps[0].index("geffect")]) for line in steps[1:]]
    assert sorted(swept) == pytest.approx(sorted(own), rel=1e-4)


def test_measured_without_a_run(young: Path, tmp_path: Path) -> None:
    """Generated once, into the geffect folder; a changed file is noticed."""
    own = "method=altpo method.alternatives=2 save_dir=alone"
    run_in(tmp_path, measured(young, own))
    (file,) = (tmp_path / "alone/geffect").glob("second-*.jsonl")
    before = file.read_text()
    assert all(len(json.loads(line)["generated"]) <= 2 for line in before.splitlines())
    when = file.stat().st_mtime_ns
    run_in(tmp_path, measured(young, f"{own} sweep=[altpo]"))
    assert file.stat().st_mtime_ns == when
    assert len(list(file.parent.glob("second-*.jsonl"))) == 2  # the sweep's has 5 answers a question
    file.write_text(before.replace('"generated": ["', '"generated": ["x', 1))
    refused = run_in(tmp_path, measured(young, f"{own} sweep=[npo]"), check=False)
    assert refused.returncode == 2
    assert f"run of other data: {file.relative_to(tmp_path)}: is not what it was" in refused.stderr.splitlines()[-1]


def test_only_what_is_noted_is_data(run: Path, tmp_path: Path) -> None:
    settings = given("forget", ["model_family=tiny", "method=altpo", "split=forget05", f"save_dir={tmp_path}"])
    settings = settings.model_copy(update={"data_path": str(ROOT / "data/sample"), "model_path": "some/model", "hf_key": "a/b"})
    (tmp_path / "second.jsonl").write_bytes((run / "second.jsonl").read_bytes())
    assert "second" not in made_of(settings)["data"]  # left by another run
    (tmp_path / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    assert made_of(settings)["data"]["second"] == second.noted_data(run, "second") is not None


def test_a_file_that_is_gone_is_generated_again(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where that gives other answers than the run began with, it is refused."""
    (tmp_path / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    lines, file, speaker = read_jsonl(run / "second.jsonl"), tmp_path / "second.jsonl", object()
    answers = [line["generated"] for line in lines]
    monkeypatch.setattr(second, "generate", lambda *args: answers)
    assert second.kept(file, lines, ALTPO, 42, speaker) == answers  # type: ignore[arg-type]
    assert file.read_bytes() == (run / "second.jsonl").read_bytes()
    file.unlink()
    answers = [["Eve"] for _ in lines]
    with pytest.raises(
        ValueError, match=r"second.jsonl: its answers are not those that this began with; give save_dir=FOLDER$"
    ):
        second.kept(file, lines, ALTPO, 42, speaker)  # type: ignore[arg-type]
