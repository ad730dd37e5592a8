"""Chat templates: the prompt and the answer as the tokenizer's own template has them, and where the loss is."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_texts import ROWS, decode
from tokenizers import ByteLevelBPETokenizer, processors
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import finetune
import forget
import tofu_evaluation
from app import families
from app.compose import given
from app.families import Family
from dataloader import (
    tokenize,
)
from unlearn.objectives.tokens import IGNORE

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
