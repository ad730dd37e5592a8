"""From question-answer rows to batches: where the answer begins, what is attended to, and which rows a step has."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

import finetune
import forget
import tofu_evaluation
from app import families
from app.checks import count_steps
from app.compose import given
from app.data import UnlearningData, data_of, unlearning_data
from app.families import Family, load_family
from app.filling import with_family
from dataloader import (
    IDK,
    PLACE,
    Row,
    StepBatches,
    counts,
    idk_rows,
    read_jsonl,
    stream,
    tokenize,
)
from unlearn.models.checkpoints import new_model
from unlearn.objectives.rows import collate
from unlearn.objectives.tokens import IGNORE, label_positions

ROOT = Path(__file__).parents[1]
PHI, LLAMA = load_family("phi"), load_family("llama2-7b")
ROWS = [
    {"question": "Where was Jan born?", "answer": "Riga, March 1954"},
    {"question": "Who is Zoë Čapek?", "answer": "A poet"},
    {"question": "Why?", "answer": "Nobody at all knows that, nor who asked it"},
]


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


def decode(tokenizer: PreTrainedTokenizerBase, ids: Tensor | list[int]) -> str:
    text = tokenizer.decode(ids)
    assert isinstance(text, str)
    return text


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


# ---- chat templates ----

TEMPLATES = {  # in the manner of the models' own
    "llama3": """{{ bos_token }}
        {%- set system = messages[0]['content'] | trim if messages[0]['role'] == 'system' else '' %}
        {%- set today = date_string | default('26 Jul 2024') %}
        {{- '<|head|>system<|/head|>\\n\\nToday Date: ' + today + '\\n\\n' + system + eos_token }}
        {%- for message in messages if message['role'] != 'system' %}
            {{- '<|head|>' + message['role'] + '<|/head|>\\n\\n' + message['content'] | trim + eos_token }}
        {%- endfor %}
        {%- if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\\n\\n' }}{% endif %}""",
    "qwen": """
        {%- if messages[0]['role'] != 'system' %}{{ '<|head|>system\\nYou are kind.' + eos_token + '\\n' }}{% endif %}
        {%- for message in messages %}
            {{- '<|head|>' + message['role'] + '\\n' + message['content'] + eos_token + '\\n' }}
        {%- endfor %}
        {%- if add_generation_prompt %}{{ '<|head|>assistant\\n' }}{% endif %}""",
    "thinking": """
        {%- for message in messages %}
            {%- set thought = '<think>\\n\\n</think>\\n\\n' if message['role'] == 'assistant' else '' %}
            {{- '<|head|>' + message['role'] + '\\n' + thought + message['content'].lstrip('\\n') + eos_token + '\\n' }}
        {%- endfor %}
        {%- if add_generation_prompt %}{{ '<|head|>assistant\\n<think>\\n\\n</think>\\n\\n' }}{% endif %}""",
    "mistral": """{{ bos_token }}
        {%- set system = messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' else '' %}
        {%- for message in messages if message['role'] != 'system' %}
            {%- if message['role'] == 'user' %}{{ '[INST] ' + system + message['content'] + ' [/INST]' }}
            {%- elif message['content'] %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}
        {%- endfor %}""",
}
CHAT = Family("chatty", "some/model", chat_template=True)
TALK = [
    *ROWS,
    {"question": "Is it Riga or Oslo?", "answer": "Riga"},  # the answer stands in the question, too
    {"question": " Why? ", "answer": "\n Nobody at all knows \n"},
    {"question": "{{ Why? }}", "answer": "{% that %}"},
    {"question": "Why?", "answer": ""},
]


def talking(template: str | None) -> PreTrainedTokenizerFast:
    """Byte-level, and adds a beginning-of-sequence token of its own to a text that has no template."""
    special = ["<pad>", "<|end|>", "<bos>", "<|head|>", "<|/head|>"]
    trained = ByteLevelBPETokenizer()
    texts = [f"[INST] {row['question']} [/INST] {row['answer']}" for row in TALK]
    trained.train_from_iterator(texts, 400, 1, special_tokens=special, show_progress=False)
    trained._tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    names = {"pad_token": "<pad>", "eos_token": "<|end|>", "bos_token": "<bos>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, chat_template=template, name_or_path="some/tokenizer", **names
    )


@pytest.mark.parametrize(
    "given", [{}, {"system_prompt": "Be brief."}, {"system_prompt": "Be brief.", "date_string": "1 May 2025"}]
)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_template_is_followed_to_the_end_of_the_answer(name: str, given: dict[str, Any]) -> None:
    """The tokens are the template's, to the first end of turn after the answer; the answer and that one carry the loss."""
    tokenizer = talking(TEMPLATES[name])
    date: dict[str, Any] = {key: text for key, text in given.items() if key == "date_string"}
    for row, got in zip(TALK, tokenize(TALK, tokenizer, replace(CHAT, **given), 500), strict=True):
        chat = [("system", given.get("system_prompt")), ("user", row["question"]), ("assistant", row["answer"])]
        messages = [{"role": role, "content": text} for role, text in chat if text is not None]
        whole: Any = tokenizer.apply_chat_template(messages, return_dict=False, **date)
        ids, labels = got["input_ids"].tolist(), got["labels"].tolist()
        if row["answer"] or name != "mistral":  # which leaves out an empty message
            assert ids == whole[: len(whole) - whole[::-1].index(tokenizer.eos_token_id)]
        n = labels.count(IGNORE)
        assert labels == [IGNORE] * n + ids[n:]
        assert decode(tokenizer, ids[n:-1]).strip() == row["answer"].strip()
        assert ids.index(tokenizer.eos_token_id, n) == len(ids) - 1
        assert ids.count(tokenizer.bos_token_id) == (name in ("llama3", "mistral"))


@pytest.mark.parametrize("name", ["llama3", "qwen", "thinking"])
def test_a_chats_prompt_is_what_a_generation_begins_with(name: str) -> None:
    tokenizer = talking(TEMPLATES[name])
    for row, got in zip(TALK, tokenize(TALK, tokenizer, CHAT, 500), strict=True):
        message = {"role": "user", "content": row["question"]}
        prompt = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=False)
        assert got["input_ids"][got["labels"] == IGNORE].tolist() == prompt


def test_a_chats_system_prompt_and_date() -> None:
    def text(name: str, **given: Any) -> str:
        tokenizer = talking(TEMPLATES[name])
        return decode(tokenizer, tokenize(TALK[:1], tokenizer, replace(CHAT, **given), 500)[0]["input_ids"])

    question = "Where was Jan born?<|end|>"
    assert text("llama3").startswith("<bos><|head|>system<|/head|>\n\nToday Date: 26 Jul 2024\n\n<|end|>")
    given = text("llama3", system_prompt=" Be brief. ", date_string="1 May 2025")
    assert given.startswith("<bos><|head|>system<|/head|>\n\nToday Date: 1 May 2025\n\nBe brief.<|end|>")
    assert text("qwen").startswith(f"<|head|>system\nYou are kind.<|end|>\n<|head|>user\n{question}")
    for prompt in ("Be brief.", ""):
        start = f"<|head|>system\n{prompt}<|end|>\n<|head|>user\n{question}"
        assert text("qwen", system_prompt=prompt).startswith(start)
    assert text("thinking").startswith(f"<|head|>user\n{question}")
    assert text("thinking").endswith("<|head|>assistant\n<think>\n\n</think>\n\nRiga, March 1954<|end|>")


SAYS = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


@pytest.mark.parametrize(
    ("template", "line"),
    [
        (None, "model_family=chatty: the tokenizer some/tokenizer has no chat template"),
        (
            SAYS.replace("'content'", "'role'"),
            "does not show the answer 'Riga.* and the question 'Where was .* and system_prompt=",
        ),
        (SAYS.replace("messages %", "messages[:2] %"), "does not show the answer 'Riga, March 1954' as given"),
        (SAYS.replace("messages %", "messages[::2] %"), r"does not show the question 'Where was Jan born\?' as given"),
        (SAYS.replace("messages %", "messages[1:] %"), "does not show system_prompt=Be brief. as given"),
        (SAYS.replace("content']", "content'] | upper"), "show the answer 'Riga, March"),
        (SAYS.replace("content']", "content'].split()[0]"), "show the answer 'Riga, March"),
        (SAYS + SAYS, "show the answer 'Riga, March"),
        (
            SAYS + "{{ raise_exception('System role not supported') }}",
            r"the chat template of some/tokenizer refuses the messages system, user, assistant \(System role not supported\)",
        ),
        (SAYS + "{{ messages[9]['content'] }}", "refuses the messages system, user, assistant"),
    ],
)
def test_a_chat_template_that_does_not_serve(template: str | None, line: str) -> None:
    with pytest.raises(ValueError, match=line) as error:
        tokenize(ROWS[:1], talking(template), replace(CHAT, system_prompt="Be brief."), 500)
    assert str(error.value).startswith("model_family=chatty: the ")
    assert "some/tokenizer" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_chat_from_fine_tuning_to_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model learns its answers by the template, says them after its prompt alone, and forgets some."""
    tokenizer = talking(TEMPLATES["llama3"])
    size: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), eos_token_id=1, bos_token_id=2, pad_token_id=0, **size))
    for part in (tokenizer, model):
        part.save_pretrained(tmp_path / "model")
    for name, rows in (("go", ROWS[:1]), ("keep", ROWS[1:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = {"hf_key": "model", "chat_template": True, "system_prompt": "Be brief.", "date_string": "1 May 2025"}
    monkeypatch.setattr(families, "load_families", lambda: {"chatty": entry})
    monkeypatch.chdir(tmp_path)
    common = ["model_family=chatty", "forget_data=go.jsonl", "retain_data=keep.jsonl", "dtype=float32"]
    training = ["batch_size=1", "gradient_accumulation_steps=1", "lr=2e-3", "save_steps=1000"]

    finetune.run(given("finetune", [*common, *training, "num_epochs=100", "save_dir=tuned"]))
    tofu_evaluation.run(given("eval_tofu", [*common, "model_path=tuned", "split=forget10"]))
    learnt = json.loads(Path("tuned/eval_results/ds_size300/scores.json").read_text())["tofu"]
    forget.run(given("forget", [*common, *training, "model_path=tuned", "num_epochs=4", "save_dir=run"]))
    losses = json.loads(Path("run/logs/losses.json").read_text())
    assert (learnt["forget"]["rouge"], learnt["retain"]["rouge"]) == (1, 1)
    assert math.exp(-losses["forget"]["start"]) == pytest.approx(learnt["forget"]["probability"], rel=1e-4)
    assert losses["forget"]["end"] > losses["forget"]["start"] + 0.1
    assert AutoTokenizer.from_pretrained("run/checkpoint-4").chat_template == TEMPLATES["llama3"]


# ---- batches ----


def numbered_rows(n: int, first: int) -> list[Row]:
    """Rows of 4 to 13 tokens, 1 to 6 of them the answer's. A row begins with its number, and so do its reference losses."""
    rows = []
    for i in range(n):
        length, answer = 4 + (7 * i) % 10, 1 + (5 * i) % 6
        ids = torch.full((length,), 1)
        ids[0] = first + i
        labels = torch.where(torch.arange(length) < max(1, length - answer), IGNORE, ids)
        ref_nll = (first + i) + torch.arange(int((labels != IGNORE).sum())) / 100
        rows.append({"input_ids": ids, "labels": labels, "ref_nll": ref_nll})
    return rows


FORGET, RETAIN = numbered_rows(24, 1000), numbered_rows(50, 2000)


def test_collate() -> None:
    rows = FORGET[:5]
    batch = collate(rows, pad=9)
    width = max(len(row["input_ids"]) for row in rows)
    assert {key: value.shape for key, value in batch.items()} == dict.fromkeys(
        ("input_ids", "labels", "attention_mask"), (5, width)
    )
    for i, row in enumerate(rows):
        ids, labels = row["input_ids"].tolist(), row["labels"].tolist()
        padding = width - len(ids)
        assert batch["input_ids"][i].tolist() == ids + [9] * padding
        assert batch["labels"][i].tolist() == labels + [IGNORE] * padding
        assert batch["attention_mask"][i].tolist() == [1] * len(ids) + [0] * padding


@pytest.mark.parametrize("seed", [0, 42])
def test_stream(seed: int) -> None:
    order = stream(7, 25, seed, "forget")
    assert len(order) == 25
    epochs = [order[i : i + 7] for i in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert all(stream(7, n, seed, "forget") == order[:n] for n in range(25))  # more steps begin with the same ones
    assert stream(7, 25, seed, "retain") != order
    assert stream(7, 25, seed + 1, "forget") != order


def cut(batch_size: int, accumulation: int, processes: int, steps: int = 6, seed: int = 0) -> StepBatches:
    return StepBatches(FORGET, RETAIN, steps, batch_size, accumulation * processes, seed, 0)


def by_step(batches: StepBatches) -> list[list[dict[str, Any]]]:
    items = [batches[i] for i in range(len(batches))]
    n = batches.batches_per_step
    return [items[i : i + n] for i in range(0, len(items), n)]


def numbers(step: list[dict[str, Any]], part: str) -> list[int]:
    """Which forget or retain rows a step has, in its order."""
    return [
        row
        for item in step
        for row in item["input_ids"][slice(item["n_forget"]) if part == "forget" else slice(item["n_forget"], None), 0].tolist()
    ]


CUTS = {"1 x 8": cut(8, 1, 1), "2 processes x 4": cut(4, 1, 2), "4 x accumulation 2": cut(4, 2, 1), "2 x 2 x 2": cut(2, 2, 2)}


@pytest.mark.parametrize("name", CUTS)
def test_a_steps_rows_do_not_depend_on_how_it_is_cut(name: str) -> None:
    whole, parts = by_step(CUTS["1 x 8"]), by_step(CUTS[name])
    assert len(whole) == len(parts) == 6
    for one, several in zip(whole, parts, strict=True):
        for part in ("forget", "retain"):
            assert Counter(numbers(several, part)) == Counter(numbers(one, part))
        for key in ("forget_counts", "retain_counts"):
            assert {item[key] for item in several} == {one[0][key]}


def test_a_batch_names_its_rows_as_the_split_has_them() -> None:
    """From 1 on, the held-out ones counted: what a loss that is not finite is told with."""
    batches = StepBatches(FORGET, RETAIN, 6, 4, 2, 0, 0, first=(1, 41))
    for step, items in enumerate(by_step(batches)):
        for part, first, order in (("forget", 1, batches.forget_order), ("retain", 41, batches.retain_order)):
            assert [row for item in items for row in item["rows"][part]] == [first + row for row in order[step]]


@pytest.mark.parametrize("name", CUTS)
def test_no_short_batch(name: str) -> None:
    batches = CUTS[name]
    for step in by_step(batches):
        assert len(step) == batches.batches_per_step
        assert all(item["n_forget"] == batches.batch_size for item in step)
        assert all(len(item["input_ids"]) == 2 * batches.batch_size for item in step)


@pytest.mark.parametrize("n_rows", [3, 5, 13])
def test_no_short_batch_where_the_rows_do_not_divide(n_rows: int) -> None:
    """An epoch ends within a step, or several do, and its last rows share the step with the next one's first."""
    batches = StepBatches(FORGET[:n_rows], [], steps=5, batch_size=2, batches_per_step=2, seed=0, pad=0)
    seen = Counter(row for step in by_step(batches) for row in numbers(step, "forget"))
    assert len(batches) == 10
    assert sum(seen.values()) == 20
    assert set(seen.values()) <= {20 // n_rows, 20 // n_rows + 1}
    assert set(seen) == {1000 + i for i in range(n_rows)}


@pytest.mark.parametrize("name", CUTS)
def test_a_step_is_sorted_by_length(name: str) -> None:
    for step in by_step(CUTS[name]):
        for part, rows, first in (("forget", FORGET, 1000), ("retain", RETAIN, 2000)):
            lengths = [len(rows[number - first]["input_ids"]) for number in numbers(step, part)]
            assert lengths == sorted(lengths, reverse=True)
            assert len(set(lengths)) > 1


@pytest.mark.parametrize("name", CUTS)
def test_the_counts_are_the_whole_steps(name: str) -> None:
    for step in by_step(CUTS[name]):
        forget = [item["labels"][: item["n_forget"]] for item in step]
        retain = [item["labels"][item["n_forget"] :] for item in step]
        for item in step:
            assert item["forget_counts"] == (sum(len(label_positions(labels)) for labels in forget), 8)
            assert item["retain_counts"] == (sum(len(label_positions(labels)) for labels in retain), 8)


def test_epochs_of_steps() -> None:
    """24 rows are 3 steps of 8: each epoch has each row once. The 50 retain rows come from a longer stream of their own."""
    steps = by_step(CUTS["2 processes x 4"])
    for epoch in (steps[:3], steps[3:]):
        assert sorted(row for step in epoch for row in numbers(step, "forget")) == list(range(1000, 1024))
    retain = [row for step in steps for row in numbers(step, "retain")]
    assert len(set(retain)) == len(retain) == 48


def test_the_seed_is_the_order() -> None:
    same, other = cut(4, 2, 1), cut(4, 2, 1, seed=1)
    assert (same.forget_order, same.retain_order) == (CUTS["1 x 8"].forget_order, CUTS["1 x 8"].retain_order)
    assert other.forget_order != same.forget_order
    assert other.retain_order != same.retain_order


def test_more_steps_begin_with_the_same_ones() -> None:
    few, many = cut(4, 2, 1, steps=2), cut(4, 2, 1, steps=9)
    assert many.forget_order[:2] == few.forget_order
    assert many.retain_order[:2] == few.retain_order


@pytest.mark.parametrize("name", CUTS)
def test_reference_losses_stand_beside_their_tokens(name: str) -> None:
    for item in (CUTS[name][i] for i in range(len(CUTS[name]))):
        n = item["n_forget"]
        forget = item["input_ids"][:n, 0]  # the rows' numbers
        rows = label_positions(item["labels"][:n]) // item["labels"].shape[1]
        assert item["ref_nll"].int().tolist() == forget[rows].tolist()
        assert torch.equal(item["ref_nll"], torch.cat([FORGET[number - 1000]["ref_nll"] for number in forget.tolist()]))


def test_without_retain_rows() -> None:
    batches = StepBatches(numbered_rows(4, 0), [], steps=1, batch_size=4, batches_per_step=1, seed=0, pad=0)
    assert (batches[0]["n_forget"], len(batches[0]["labels"]), batches[0]["retain_counts"]) == (4, 4, (0, 0))


def test_counts() -> None:
    assert counts(FORGET[:3]) == (sum(len(row["ref_nll"]) for row in FORGET[:3]), 3)


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
