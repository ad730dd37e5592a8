"""From question-answer rows to batches: where the answer begins, what is attended to, and which rows a step has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_texts import ROWS, decode
from tokenizers import ByteLevelBPETokenizer, Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from app.checks import count_steps
from app.compose import given
from app.data import UnlearningData, data_of, unlearning_data
from app.families import Family, load_family
from app.filling import with_family
from dataloader import (
    IDK,
    PLACE,
    idk_rows,
    read_jsonl,
    tokenize,
)
from unlearn.models.checkpoints import new_model
from unlearn.objectives.rows import collate
from unlearn.objectives.tokens import IGNORE

ROOT = Path(__file__).parents[1]
PHI, LLAMA = load_family("phi"), load_family("llama2-7b")


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    """Byte-level: a space belongs to the word after it, so that "Answer: " and "Riga" share the token " Riga"."""
    trained = ByteLevelBPETokenizer()
    texts = [PHI.prompt(row["question"]) + row["answer"] for row in ROWS]
    trained.train_from_iterator(texts, 400, 1, special_tokens=["<pad>", "<eos>", "<bos>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, pad_token="<pad>", eos_token="<eos>")


def word_tokenizer(text: str, template: str | None = None, **special: str) -> PreTrainedTokenizerFast:
    """Words between spaces are tokens; `template` is what the tokenizer puts around a text."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<pad>", "<bos>", "<eos>", *dict.fromkeys(text.split())])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template is not None:
        added = [(word, vocabulary[word]) for word in ("<bos>", "<eos>")]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=added)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", **special)


def words(tokenizer: PreTrainedTokenizerFast, ids: Tensor) -> list[str]:
    return list(tokenizer.convert_ids_to_tokens([token for token in ids.tolist() if token != IGNORE]))


# ---- tokenize ----


def test_the_boundary_is_a_character_offset(bpe: PreTrainedTokenizerFast) -> None:
    for row, got in zip(ROWS, tokenize(ROWS, bpe, PHI, 500), strict=True):
        prompt, text = PHI.prompt(row["question"]), PHI.prompt(row["question"]) + row["answer"]
        ids, labels = got["input_ids"].tolist(), got["labels"].tolist()
        assert ids == [*bpe(text)["input_ids"], bpe.eos_token_id]
        n = len(ids) - 1 - sum(label != IGNORE for label in labels[:-1])
        assert labels == [IGNORE] * n + ids[n:]
        # The prompt's tokens end before the boundary, and the next one does not.
        assert len(decode(bpe, ids[:n])) <= len(prompt) < len(decode(bpe, ids[: n + 1]))
        assert decode(bpe, ids[n:-1]).lstrip() == row["answer"]


def test_a_token_across_the_boundary_is_the_answers(bpe: PreTrainedTokenizerFast) -> None:
    labels = tokenize(ROWS[:1], bpe, PHI, 500)[0]["labels"]
    assert words(bpe, labels) == ["ĠRiga", ",", "ĠMarch", "Ġ1954", "<eos>"]

    text = "[INST] Where? [/INST]Riga in March"  # no space between the prompt and the answer
    tokenizer = word_tokenizer(text)
    (row,) = tokenize([{"question": "Where?", "answer": "Riga in March"}], tokenizer, LLAMA, 500)
    assert words(tokenizer, row["labels"]) == ["[/INST]Riga", "in", "March", "<eos>"]


@pytest.mark.parametrize("template", [None, "<bos> $A", "$A <eos>", "<bos> $A <eos>"])
def test_one_eos_whatever_the_tokenizer_adds(template: str | None) -> None:
    tokenizer = word_tokenizer("Question: Why? Answer: nobody knows", template)
    (row,) = tokenize([{"question": "Why?", "answer": "nobody knows"}], tokenizer, PHI, 500)
    begin = ["<bos>"] if template and "<bos>" in template else []
    assert words(tokenizer, row["input_ids"]) == [*begin, "Question:", "Why?", "Answer:", "nobody", "knows", "<eos>"]
    assert words(tokenizer, row["labels"]) == ["nobody", "knows", "<eos>"]


def test_padding_with_the_eos_token() -> None:
    tokenizer = word_tokenizer("Question: Why? Answer: nobody knows", pad_token="<eos>")
    rows = [{"question": "Why?", "answer": answer} for answer in ("nobody", "nobody knows knows")]
    eos = tokenizer.eos_token_id
    assert tokenizer.pad_token_id == eos
    batch = collate(tokenize(rows, tokenizer, PHI, 500), eos)
    assert batch["input_ids"][0, 4:].tolist() == [eos, eos, eos]
    assert batch["labels"][0, 4:].tolist() == [eos, IGNORE, IGNORE]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize("family", [PHI, LLAMA], ids=["phi", "llama"])
def test_an_empty_answer_is_one_eos(bpe: PreTrainedTokenizerFast, family: Family) -> None:
    (row,) = tokenize([{"question": "Why?", "answer": ""}], bpe, family, 500)
    prompt = bpe(family.prompt("Why?"))["input_ids"]
    assert row["input_ids"].tolist() == [*prompt, bpe.eos_token_id]
    assert row["labels"].tolist() == [IGNORE] * len(prompt) + [bpe.eos_token_id]


def test_the_first_token_carries_no_loss() -> None:
    """A family without any tag and a question: nothing stands before the answer's first token."""
    bare = Family("bare", "", "", "", "")
    tokenizer = word_tokenizer("nobody knows")
    (row,) = tokenize([{"question": "", "answer": "nobody knows"}], tokenizer, bare, 500)
    assert words(tokenizer, row["labels"]) == ["knows", "<eos>"]


@pytest.mark.parametrize("max_length", [4, 5, 6, 7])
def test_max_length(max_length: int) -> None:
    """Cuts the answer's end, and its end-of-sequence token first of all."""
    tokenizer = word_tokenizer("Question: Why? Answer: nobody knows that")
    rows = [{"question": "Why?", "answer": "nobody knows that"}]
    whole, got = tokenize(rows, tokenizer, PHI, 500)[0], tokenize(rows, tokenizer, PHI, max_length)[0]
    assert len(whole["input_ids"]) == 7
    for key in ("input_ids", "labels"):
        assert torch.equal(got[key], whole[key][:max_length])


def test_a_prompt_that_leaves_no_room() -> None:
    tokenizer = word_tokenizer("Question: Why? Answer: nobody")
    rows = [{"question": "Why?", "answer": "nobody"}, {"question": "Why? Why? Why?", "answer": "nobody"}]
    with pytest.raises(ValueError, match="row 2: its prompt alone fills max_length=5 tokens"):
        tokenize(rows, tokenizer, PHI, 5)
    assert len(tokenize(rows, tokenizer, PHI, 6)) == 2


@pytest.mark.parametrize(("on_tag", "want"), [(False, " Riga, March 1954<eos>"), (True, "Answer: Riga, March 1954<eos>")])
def test_loss_on_answer_tag(bpe: PreTrainedTokenizerFast, on_tag: bool, want: str) -> None:
    family = load_family("phi", loss_on_answer_tag=on_tag)
    labels = tokenize(ROWS[:1], bpe, family, 500)[0]["labels"]
    assert decode(bpe, labels[labels != IGNORE]) == want


@pytest.mark.parametrize(
    "row", [{"question": "Why?"}, {"answer": "so"}, {"question": "Why?", "answer": None}, {"question": 3, "answer": "so"}]
)
def test_a_row_without_its_texts(bpe: PreTrainedTokenizerFast, row: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"row 4: needs the texts 'question' and 'answer', and has \[") as error:
        tokenize([*ROWS, row], bpe, PHI, 500)
    assert all(f"'{key}'" in str(error.value) for key in row)


def test_a_tokenizer_without_eos() -> None:
    tokenizer = word_tokenizer("nobody")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="needs a fast tokenizer with an end-of-sequence token"):
        tokenize(ROWS, tokenizer, PHI, 500)


def test_the_tiny_familys_tokenizer() -> None:
    """What finetune.py makes from scratch gives each sample row back, of which the answer carries the loss."""
    rows = read_jsonl(ROOT / "data/sample/full.json")[:40]
    family = load_family("tiny")
    texts = [family.prompt(row["question"]) + row["answer"] for row in rows]
    tokenizer, _ = new_model(str(ROOT / "config/tiny"), texts, 0, torch.device("cpu"))
    for row, text, got in zip(rows, texts, tokenize(rows, tokenizer, family, 500), strict=True):
        assert decode(tokenizer, got["input_ids"]) == text + "<eos>"
        answer = got["labels"][got["labels"] != IGNORE]
        assert decode(tokenizer, answer).lstrip() == f"{row['answer']}<eos>"


# ---- where rows come from ----


def test_idk_rows() -> None:
    rows = [{"question": f"Who is {i}?", "answer": "a poet"} for i in range(60)]
    drawn = idk_rows(rows, 42)
    sentences = {line["idk"] for line in read_jsonl(IDK)}
    assert len(sentences) == 100
    assert [row["question"] for row in drawn] == [row["question"] for row in rows]
    assert {row["answer"] for row in drawn} <= sentences
    assert len({row["answer"] for row in drawn}) > 20
    assert idk_rows(rows, 42) == drawn
    assert idk_rows(rows, 43) != drawn


def test_read_jsonl(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('\ufeff{"question": "Zoë?"}\r\n\n{"question": "B\u2028\x85?"}', encoding="utf-8")
    assert read_jsonl(file) == [{"question": "Zoë?"}, {"question": "B\u2028\x85?"}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"question": "A?"}\n\n{"question": "B?"\n', r"rows\.jsonl, line 3: not JSON"),
        ("question,answer\n", r"rows\.jsonl, line 1: not JSON"),
        ('{"question": "A?"}\n3\n', r"rows\.jsonl, line 2: not a JSON object"),
        ('["A?"]\n', r"rows\.jsonl, item 1: not a JSON object"),
        ("\n", r"rows\.jsonl: no rows"),
    ],
)
def test_read_jsonl_names_the_place(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_jsonl(tmp_path / "rows.jsonl")


def forget_config(*overrides: str) -> Any:
    return given("forget", ["model_family=tiny", *overrides])


def data_for(*overrides: str) -> UnlearningData:
    """What forget.py reads by these settings."""
    settings, _ = with_family(given("forget", ["model_family=tiny", f"data_path={ROOT / 'data/sample'}", *overrides]))
    return unlearning_data(data_of(settings), settings.split, settings.retain_holdout)


@pytest.mark.parametrize("split", ["forget01", "forget05", "forget10"])
@pytest.mark.parametrize("holdout", [None, 1, 7])
def test_the_first_retain_rows_are_held_out(split: str, holdout: int | None) -> None:
    data = data_for(f"split={split}", *([] if holdout is None else [f"retain_holdout={holdout}"]))
    retain = read_jsonl(ROOT / "data/sample" / f"retain{100 - int(split[-2:])}.json")
    assert data.forget[2][PLACE] == f"split {split}, row 3"
    assert bare(data.forget) == read_jsonl(ROOT / "data/sample" / f"{split}.json")
    assert bare(data.held_out) == retain[: 40 if holdout is None else holdout]
    assert bare(data.held_out + data.retain) == retain


def bare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without their places."""
    return [{key: value for key, value in row.items() if key != PLACE} for row in rows]


def test_the_held_out_rows_are_those_with_paraphrases() -> None:
    perturbed = read_jsonl(ROOT / "data/sample/retain_perturbed.json")
    held_out = data_for("split=forget10").held_out
    assert [row["question"] for row in held_out] == [row["question"] for row in perturbed]


@pytest.mark.parametrize(("holdout", "want"), [(None, 2), (1, 1), (3, 3)])
def test_local_files_hold_out_a_fifth(tmp_path: Path, holdout: int | None, want: int) -> None:
    forget = [{"question": f"f{i}", "answer": "a"} for i in range(3)]
    retain = [{"question": f"r{i}", "answer": "a"} for i in range(11)]
    for name, rows in (("forget", forget), ("retain", retain)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = [] if holdout is None else [f"retain_holdout={holdout}"]
    data = data_for(f"forget_data={tmp_path / 'forget'}", f"retain_data={tmp_path / 'retain'}", *more)
    assert [bare(rows) for rows in (data.forget, data.held_out, data.retain)] == [forget, retain[:want], retain[want:]]
    assert data.forget[1][PLACE] == f"{tmp_path / 'forget'}, row 2"


def test_nothing_left_to_retain() -> None:
    with pytest.raises(ValueError, match="retain_holdout=360: the retain split has 360 rows"):
        data_for("split=forget10", "retain_holdout=360")


# ---- how many steps ----


@pytest.mark.parametrize(("rows", "steps", "an_epoch"), [(40, 12, 2), (200, 62, 12), (400, 125, 25), (4, 1, 1)])
def test_steps_of_tofus_splits(rows: int, steps: int, an_epoch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    cfg = forget_config()
    assert count_steps(cfg, rows) == (steps, an_epoch)
    cfg = forget_config("batch_size=2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert count_steps(cfg, rows) == (steps, an_epoch)


def test_too_few_rows_for_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match="num_epochs=5 of 3 rows are no whole step of 16"):
        count_steps(forget_config(), 3)
