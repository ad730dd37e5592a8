"""The scores against values that others published, identities, and slow but obvious versions of what is fast."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, SHARED, run_in
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import forget
from app.compose import given
from unlearn.objectives.rows import Row, tokenize_pairs
from unlearn.passes.decoding import decode, greedy_answers
from unlearn.passes.forcing import Pass, teacher_force, token_nlls
from unlearn.passes.gradients import gradient_norms
from unlearn.scores import definitions as scores
from unlearn.scores import tofu
from unlearn.scores.asking import measure_task
from unlearn.scores.control import kept, mix, put, search
from unlearn.scores.extraction import ATTACKS, aucs, knowledge, means, membership, ps_similar, score_rows
from utils import device

GOLD = SHARED / "gold" / "scores"
LOGS = SHARED / "gold" / "tofu_eval_logs"
gold = pytest.mark.skipif(not GOLD.exists(), reason="needs ../shared/gold")
MODELS = ("llama", "llama_retain")
TOLERANCE = {"float32": 1e-5, "float64": 1e-9}
device()


def text(row: Mapping[str, Any], question: str = "question") -> str:
    return f"Question: {row[question]}\nAnswer: "


# ---- published logs ----


@gold
@pytest.mark.parametrize("name", ["phi_full", "phi_retain90", "phi_retain95", "phi_retain99"])
@pytest.mark.parametrize("definition", scores.DEFINITIONS)
def test_published_logs_score_what_tofu_says(name: str, definition: str) -> None:
    log = json.loads((LOGS / f"{name}.json").read_text())
    expected = json.loads((LOGS / "expected.json").read_text())["models"][name]
    tofu.check_log(log, name)
    found = tofu.aggregate(log, definition)
    for key, (_, title) in tofu.TASKS.items():
        assert found[key]["rows"] == expected["rows"][title]
        for kind, called in (("rouge", "ROUGE"), ("probability", "Probability"), ("truth_ratio", "Truth Ratio")):
            assert found[key][kind] == pytest.approx(expected[definition][f"{title} {called}"], rel=1e-9)
    assert found["model_utility"] == pytest.approx(expected[definition]["Model Utility"], rel=1e-9)


@gold
def test_forget_quality_of_published_logs() -> None:
    """Full against retain90 as published; models that were asked other questions are refused."""
    names = ("phi_full", "phi_retain90", "phi_retain95", "phi_retain99")
    logs = {name: json.loads((LOGS / f"{name}.json").read_text()) for name in names}
    expected = json.loads((LOGS / "expected.json").read_text())["forget_quality"]["phi_full vs phi_retain90"]
    for definition in scores.DEFINITIONS:
        found = tofu.forget_quality(logs["phi_full"], logs["phi_retain90"], definition)
        assert found["p"] == pytest.approx(expected[definition]["pvalue"], rel=1e-9)
        assert found["D"] == pytest.approx(expected[definition]["statistic"], rel=1e-9)
        assert found["n"] == expected["n"]
    for one in names:
        assert (
            tofu.forget_quality(logs[one], logs[one]) == {"p": 1.0, "D": 0.0, "n": [found["n"][0], found["n"][0]]}
            or one > "phi_retain90"
        )
        for other in names:
            if one != other and {one, other} != {"phi_full", "phi_retain90"}:
                with pytest.raises(ValueError, match="same questions"):
                    tofu.forget_quality(logs[one], logs[other])


@gold
@pytest.mark.parametrize("name", ["phi_full", "phi_retain90", "phi_retain95", "phi_retain99"])
def test_rouge_of_published_generations(name: str) -> None:
    log = json.loads((LOGS / f"{name}.json").read_text())
    for file, _ in tofu.TASKS.values():
        rows = tofu.row_names(log[file])
        said, truths = ([log[file]["generated_text"][row][i] for row in rows] for i in (1, 2))
        for kind, recalls in scores.rouge_recalls(said, truths).items():
            assert recalls == [log[file][f"{kind}_recall"][row] for row in rows]


# ---- a model whose scores open-unlearning's code computed ----


@gold
@pytest.mark.parametrize(("dtype", "batch_size"), [("float32", 3), ("float64", 16)])
@pytest.mark.parametrize("name", MODELS)
def test_gold_scores(name: str, dtype: str, batch_size: int) -> None:
    """Every score of every row and every total."""
    expected = json.loads((GOLD / "expected.json").read_text())["models"]
    data = json.loads((GOLD / "rows.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(GOLD / name)
    model, other = (
        AutoModelForCausalLM.from_pretrained(GOLD / path, dtype=getattr(torch, dtype)) for path in (name, MODELS[1])
    )
    near: dict[str, Any] = {"rel": TOLERANCE[dtype], "abs": TOLERANCE[dtype]}
    how = Pass(model, tokenizer.pad_token_id, tokenizer.eos_token_id, batch_size=batch_size)
    log = {}
    for part, task in (
        ("retain", "retain"),
        ("real_authors", "real_authors"),
        ("world_facts", "real_world"),
        ("forget", "forget"),
    ):
        given, want = data[part], expected[name][part]
        one = measure_task(
            how,
            tokenizer,
            given,
            lambda rows: tokenize_pairs([(text(row), row["answer"]) for row in rows], tokenizer),
            max_length=None,
            max_new_tokens=200,
        )
        log[tofu.TASKS[task][0]] = one
        assert list(one["avg_gt_loss"].values()) == pytest.approx(want["probability"]["avg_loss"], **near)
        wrong = list(one["average_perturb_loss"].values())
        assert np.array(wrong) == pytest.approx(np.array(want["probability_perturbed"]["avg_loss"]), **near)
        assert [texts[1] for texts in one["generated_text"].values()] == want["rouge"]["generation"]
        assert list(one["rougeL_recall"].values()) == pytest.approx(want["rouge"]["rougeL_recall"], abs=1e-12)
        ratios = tofu.truth_ratios(one, "geometric", scores.OPEN_UNLEARNING)
        assert ratios == pytest.approx(want["truth_ratio"]["score"], **near)
        close = scores.truth_ratio_forget(ratios, scores.OPEN_UNLEARNING)
        assert close == pytest.approx(want["truth_ratio"]["closer_to_1_better"], **near)
        assert scores.truth_ratio_keep(ratios) == pytest.approx(want["truth_ratio"]["true_better"], **near)
        if part in ("real_authors", "world_facts"):
            among = [
                scores.probability_among(loss, others, scores.OPEN_UNLEARNING)
                for loss, others in zip(one["avg_gt_loss"].values(), wrong, strict=True)
            ]
            assert among == pytest.approx(want["probability_w_options"]["prob"], **near)
    found = tofu.aggregate(log, epsilon=scores.OPEN_UNLEARNING)
    assert found["model_utility"] == pytest.approx(expected[name]["model_utility"], **near)
    check_extraction(how, tokenizer, data, expected[name], near)
    check_privacy(how, Pass(other, how.pad, how.eos), tokenizer, data, expected[name], near)
    if "forget_quality" in expected[name]:
        retain = expected[MODELS[1]]["forget"]["truth_ratio"]["score"]
        ratios = tofu.truth_ratios(log[tofu.TASKS["forget"][0]], "geometric", scores.OPEN_UNLEARNING)
        p, d = scores.forget_quality(ratios, retain)
        assert p == pytest.approx(expected[name]["forget_quality"]["p"], **near)
        assert d == pytest.approx(expected[name]["forget_quality"]["D"], **near)


def check_extraction(how: Pass, tokenizer: Any, data: Any, expected: Any, near: Any) -> None:
    for part in ("forget", "retain"):
        rows = tokenize_pairs([(text(row), row["answer"]) for row in data[part]], tokenizer)
        found = [knowledge(one) for one in teacher_force(how, rows)]
        for ours, theirs in (
            ("ps_exact", "ps_exact"),
            ("extraction_strength", "extraction_strength"),
            ("exact_memorization", "exact_memorization"),
        ):
            assert [row[ours] for row in found] == pytest.approx(expected[part][theirs], abs=1e-12)
        assert [row["probability"] for row in found] == pytest.approx(expected[part]["probability"]["prob"], **near)
        again = tokenize_pairs([(text(row, "paraphrased_question"), row["answer"]) for row in data[part]], tokenizer)
        perturb = [scores.ps_exact(one.right) for one in teacher_force(how, again)]
        assert perturb == pytest.approx(expected[part]["ps_perturb"], abs=1e-12)


@gold
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", MODELS)
def test_gold_gradient_norms(name: str, dtype: str) -> None:
    """Each row's, and the AUC; the model is left as it was."""
    expected = json.loads((GOLD / "expected.json").read_text())["models"][name]["mia"]["gradnorm"]
    data = json.loads((GOLD / "rows.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(GOLD / name)
    model = AutoModelForCausalLM.from_pretrained(GOLD / name, dtype=getattr(torch, dtype)).requires_grad_(False).train()
    how = Pass(model, tokenizer.pad_token_id, tokenizer.eos_token_id)
    found = []
    for part in ("forget", "holdout"):
        rows = tokenize_pairs([(text(row), row["answer"]) for row in data[part]], tokenizer)
        norms = gradient_norms(how, rows)
        assert norms == pytest.approx(expected[part], rel=TOLERANCE[dtype])
        found += [{"data": part, "gradnorm": norm} | dict.fromkeys(ATTACKS, 0.0) for norm in norms]
    assert aucs(found)["gradnorm"] == pytest.approx(expected["auc"], abs=1e-12)
    assert model.training
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def check_privacy(how: Pass, retain: Pass, tokenizer: Any, data: Any, expected: Any, near: Any) -> None:
    aucs_of: dict[float, dict[str, float]] = {}
    for k in (0.4, 0.2):
        found = []
        for part in ("forget", "holdout"):
            rows = tokenize_pairs([(text(row), row["answer"]) for row in data[part]], tokenizer)
            others = teacher_force(retain, rows)
            for row, one, other in zip(data[part], teacher_force(how, rows, moments=True), others, strict=True):
                found.append({"data": part} | membership(one, row["answer"], other.loss, k))
        names = {"loss": "loss", "zlib": "zlib_answer_text", "min_k": f"min_k_{k}", "min_k_plus_plus": f"min_k++_{k}"}
        if "reference" in expected["mia"]:
            names["reference"] = "reference"
        aucs_of[k] = aucs(found)
        for ours, theirs in names.items():
            want = expected["mia"][theirs]
            for part in ("forget", "holdout"):
                assert [row[ours] for row in found if row["data"] == part] == pytest.approx(want[part], **near)
            assert aucs_of[k][ours] == pytest.approx(want["auc"], abs=1e-12)
    if "privleak" in expected:
        retain_auc = json.loads((GOLD / "expected.json").read_text())["models"]["llama_retain"]["mia"]["min_k_0.4"]["auc"]
        assert scores.privleak(aucs_of[0.4]["min_k"], retain_auc) == pytest.approx(expected["privleak"], rel=1e-9)


# ---- what is fast against what is slow and obvious ----

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": {},
    "qwen2": {"num_key_value_heads": 2},
    "opt": {"ffn_dim": 20, "max_position_embeddings": 64, "word_embed_proj_dim": 16},
    "bloom": {"n_layer": 2, "n_head": 4},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 4, "sliding_window": 4},  # its cache forgets
    "mamba": {"state_size": 4, "expand": 2},  # has no keys and values
}
SMALL = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 23}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def how(request: pytest.FixtureRequest) -> Pass:
    torch.manual_seed(1)
    special = {"eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 1}
    config = AutoConfig.for_model(request.param, **SMALL | special | ARCHITECTURES[request.param])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)  # clear argmaxes
    return Pass(model.eval(), pad=0, eos=2, batch_size=3)


def questions(eos: int = 2) -> list[Row]:
    """Three prompts, two of one length, with one to four answers each; one answer stands twice."""
    draw = torch.Generator().manual_seed(3)
    rows = []
    for length, answers in ((4, (3, 1, 5, 5)), (4, (2,)), (6, (4, 7)), (9, (1,))):
        prompt = torch.randint(3, 23, (length,), generator=draw)
        for size in answers:
            answer = torch.cat([torch.randint(3, 23, (size,), generator=draw), torch.tensor([eos])])
            labels = torch.cat([torch.full((length,), -100), answer])
            rows.append({"input_ids": torch.cat([prompt, answer]), "labels": labels})
    return [*rows, rows[2]]


def one_by_one(how: Pass, row: Row) -> dict[str, torch.Tensor]:
    """The label tokens' log-probabilities from a pass of this row alone."""
    with torch.no_grad():
        log_p = how.model(input_ids=row["input_ids"][None]).logits[0].log_softmax(-1)
    at = (row["labels"] != -100).nonzero().squeeze(1)
    p = log_p[at - 1].exp()
    mean = (p * log_p[at - 1]).sum(-1)
    return {
        "nll": -log_p[at - 1, row["labels"][at]],
        "predicted": log_p[at - 1].argmax(-1),
        "mean": mean,
        "variance": (p * log_p[at - 1] ** 2).sum(-1) - mean**2,
    }


def test_gradient_norms_of_a_row_by_hand(how: Pass) -> None:
    """transformers' own loss and `backward`, a row at a time, on rows with and without an end; no answer has no norm."""
    whole = questions()[1:4]
    cut = {key: value[:-1] for key, value in whole[0].items()}
    alone = {"input_ids": torch.tensor([5, 6, how.eos]), "labels": torch.tensor([-100, -100, how.eos])}
    found = gradient_norms(how, [*whole, cut, alone])
    for row, norm in zip([*whole, cut], found[:-1], strict=True):
        size = len(row["labels"]) - int(row["labels"][-1] == how.eos)
        how.model.zero_grad()
        how.model(input_ids=row["input_ids"][None, :size], labels=row["labels"][None, :size]).loss.backward()
        norms = [p.grad.double().norm().item() for p in how.model.parameters() if p.grad is not None]
        assert norm == pytest.approx(np.mean(norms), rel=1e-5)
    how.model.zero_grad()
    assert np.isnan(found[-1])


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_shared_prompts_give_what_single_rows_do(how: Pass, batch_size: int) -> None:
    rows = questions()
    found = teacher_force(replace(how, batch_size=batch_size), rows, moments=True)
    for row, one in zip(rows, found, strict=True):
        for name, want in one_by_one(how, row).items():
            assert getattr(one, name) == pytest.approx(want.numpy(), rel=2e-4, abs=2e-5)
        assert one.ends
        assert one.size == len(one.labels) - 1


def generated(how: Pass, prompt: torch.Tensor, n: int) -> list[int]:
    """Plain greedy decoding of one row, by transformers."""
    config = GenerationConfig(max_new_tokens=n, do_sample=False, pad_token_id=0, eos_token_id=2)
    ids = prompt[None]
    out = how.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)  # type: ignore[operator]
    return out[0, len(prompt) :].tolist()


def test_decoding_gives_what_generate_does(how: Pass) -> None:
    prefixes = [row["input_ids"][: int((row["labels"] != -100).nonzero()[0])] for row in questions()]
    limits = [1 + i % 7 for i in range(len(prefixes))]
    found = decode(how, prefixes, limits)
    assert found == [generated(how, prefix, n) for prefix, n in zip(prefixes, limits, strict=True)]
    assert len({tuple(tokens) for tokens in found}) > 1


NASTY: dict[str, Any] = {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "min_length": 40, "forced_bos_token_id": 3}
NASTY |= {"suppress_tokens": list(range(4, 14)), "bad_words_ids": [[14]], "do_sample": True, "temperature": 9.0, "num_beams": 3}
NASTY |= {"max_length": 3, "cache_implementation": "static", "forced_eos_token_id": 15, "encoder_repetition_penalty": 7.0}
GREEDY: dict[str, dict[str, Any]] = {
    "mistral": {"num_key_value_heads": 2, "sliding_window": 4},
    "gemma2": ARCHITECTURES["gemma2"],
    "mamba": ARCHITECTURES["mamba"],
    "bamba": {"num_key_value_heads": 2, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_chunk_size": 4}
    | {"mamba_n_groups": 1, "attn_layer_indices": [1]},  # a state, and keys and values
    "rwkv": {"attention_hidden_size": 16},  # takes no mask
    "openai-gpt": {"n_embd": 16, "n_layer": 2, "n_head": 4},  # keeps nothing
    "xlstm": {"num_blocks": 2, "hidden_size": 32, "embedding_dim": 32, "num_heads": 2},  # fails with the states that it keeps
}


@pytest.mark.parametrize("kind", GREEDY)
def test_every_token_is_the_argmax_of_a_plain_pass(kind: str) -> None:
    """Whatever generation_config.json says but for what ends a text; prefixes of several lengths, more than a batch."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, **SMALL | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} | GREEDY[kind])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    model.generation_config = GenerationConfig(eos_token_id=[2, 7], **NASTY)
    draw = torch.Generator().manual_seed(3)
    prefixes = [torch.randint(3, 23, (size,), generator=draw) for size in (4, 9, 6, 4, 1, 7, 4, 4, 12, 4, 2, 4, 4)]
    limits = [10, 3, 12, 7, 9, 8, 1, 10, 6, 10, 10, 4, 12]
    found = decode(Pass(model, pad=0, eos=2, batch_size=1), prefixes, limits)
    for prefix, limit, tokens in zip(prefixes, limits, found, strict=True):
        want: list[int] = []
        while len(want) < limit and not {2, 7} & set(want):
            ids = torch.cat([prefix, torch.tensor(want, dtype=torch.long)])
            with torch.no_grad():
                want.append(int(model(input_ids=ids[None], use_cache=False).logits[0, -1].argmax()))
        assert tokens == want
    assert len({tuple(tokens) for tokens in found}) > 5
    assert model.generation_config.repetition_penalty == 9  # the model is as it was


def test_a_row_without_a_label_is_named(how: Pass) -> None:
    """In one line, whoever asks; a row that is nothing but the end of an answer is none of them."""
    rows = questions()
    rows[2] = {"input_ids": rows[2]["input_ids"], "labels": torch.full_like(rows[2]["labels"], -100)}
    for ask in (teacher_force, token_nlls, ps_similar):
        with pytest.raises(ValueError, match=rf"^.*: row 3 of {len(rows)} has no label token: no answer, and no end of one$"):
            ask(how, rows)
    rows[2] = {"input_ids": rows[2]["input_ids"], "labels": rows[2]["input_ids"]}
    with pytest.raises(
        ValueError, match=rf"row 3 of {len(rows)}: its first token has a label, and nothing before it to tell it$"
    ):
        teacher_force(how, rows)
    last = torch.full((4,), -100)
    last[-1] = 2
    [one] = teacher_force(how, [{"input_ids": torch.tensor([3, 4, 5, 2]), "labels": last}])
    assert (one.size, len(one.nll)) == (0, 1)


class Letters:
    """A tokenizer that spells a token as its number."""

    def batch_decode(self, rows: Any, skip_special_tokens: bool = True) -> list[str]:
        return [" ".join(map(str, row)) for row in rows]


def test_drafts_change_no_text(how: Pass) -> None:
    """Answers that greedy decoding follows to the end, a part of the way, not at all: the texts are plain greedy decoding's."""
    rows = []
    for follow in (0, 2, 6):
        for row in questions():
            start = int((row["labels"] != -100).nonzero()[0])
            prompt = row["input_ids"][:start]
            said = generated(how, prompt, 6)[:follow]
            answer = torch.tensor([*said, *([] if 2 in said else [5, 2])])
            labels = torch.cat([torch.full((start,), -100), answer])
            rows.append({"input_ids": torch.cat([prompt, answer]), "labels": labels})
    drafts = teacher_force(how, rows)
    assert len({one.followed for one in drafts}) > 2
    letters: Any = Letters()
    for max_length in (11, 2):
        plain = greedy_answers(how, rows, letters, None, max_length)
        assert greedy_answers(how, rows, letters, drafts, max_length) == plain
        assert plain == [
            " ".join(str(t) for t in generated(how, prompt_of(row), max(1, max_length - len(prompt_of(row)))) if t != 2)
            for row in rows
        ]


def prompt_of(row: Row) -> torch.Tensor:
    return row["input_ids"][: int((row["labels"] != -100).nonzero()[0])]


def test_ps_exact_is_what_generation_gives(how: Pass) -> None:
    """1 - k/T by trying every prefix with real greedy decoding."""
    rows = [row for row in questions() if len(row["input_ids"]) - len(prompt_of(row)) > 1]
    for row in rows:  # the end of each answer is what the model would say
        start, end = len(prompt_of(row)), len(row["input_ids"]) - 1
        for at in range((start + end) // 2, end):
            row["input_ids"][at] = row["labels"][at] = generated(how, row["input_ids"][:at], 1)[0]
    found = [scores.ps_exact(one.right) for one in teacher_force(how, rows)]
    want = []
    for row in rows:
        start, end = len(prompt_of(row)), len(row["input_ids"]) - 1
        works = [
            k
            for k in range(end - start + 1)
            if _gives_the_rest(how, row["input_ids"][: start + k], row["input_ids"][start + k : end])
        ]
        want.append(1 - works[0] / (end - start))
    assert found == pytest.approx(want)


def _gives_the_rest(how: Pass, prefix: torch.Tensor, rest: torch.Tensor) -> bool:
    with torch.no_grad():
        for token in rest.tolist():
            if how.model(input_ids=prefix[None]).logits[0, -1].argmax().item() != token:
                return False
            prefix = torch.cat([prefix, torch.tensor([token])])
    return True


def test_ps_similar_is_never_below_exact(how: Pass) -> None:
    rows = questions()
    exact = [scores.ps_exact(one.right) for one in teacher_force(how, rows)]
    similar = ps_similar(how, rows)
    assert all(0 <= e <= s <= 1 for e, s in zip(exact, similar, strict=True))


# ---- the formulas ----

SCRIPTS = {
    "Cyrillic": ("Ада родилась в Риге.", ["ада", "родилась", "в", "риге"]),
    "Greek": ("Η Άντα ΖΕΙ", ["η", "άντα", "ζει"]),
    "Chinese": ("她住在里加。", ["她", "住", "在", "里", "加"]),
    "Japanese": ("カードを買う", ["カ", "ー", "ド", "を", "買", "う"]),
    "Thai": ("ที่นี่", ["ที่", "นี่"]),
    "Hindi": ("वह रीगा में है।", ["वह", "रीगा", "में", "है"]),
    "Arabic": ("وُلِدَت في ريغا", ["وُلِدَت", "في", "ريغا"]),
    "Korean": ("리가에 산다", ["리가에", "산다"]),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_rouge_of_every_script(script: str) -> None:
    """As published such answers have no value; by words of any script a perfect one has 1, another less."""
    truth, words = SCRIPTS[script]
    assert scores.unicode_words(truth) == [unicodedata.normalize("NFKC", word) for word in words]
    answers = [truth, unicodedata.normalize("NFD", truth).upper(), " ".join(words[:-1]), ""]
    for recalls in scores.rouge_recalls(answers, [truth] * 4).values():
        assert np.isnan(recalls).all()
    for recalls in scores.rouge_recalls(answers, [truth] * 4, "unicode").values():
        assert recalls == [1, 1, pytest.approx(1 - 1 / len(words)), 0]
    assert scores.loses_letters(truth)


def test_rouge_of_mixed_and_of_wordless_texts() -> None:
    """English is the same by both; José keeps what rouge-score leaves of it; without words there is no value."""
    english = [json.loads(line)["answer"] for line in (ROOT / "data/sample/forget10.json").read_text().splitlines()]
    english += ["Don't RE-ENTER the co_op's 3.5 \u2018meetings\u2019 \u2014 running, runs!", "A\tB\nC"]
    said = [answer.replace(" is ", " was ").upper() for answer in english[1:] + english[:1]]
    assert scores.rouge_recalls(said, english) == scores.rouge_recalls(said, english, "unicode")
    assert not any(map(scores.loses_letters, english))
    assert scores.loses_letters("José")
    assert scores.rouge_recalls(["jose", "jos"], ["José", "José"])["rougeL"] == [0, 1]
    assert scores.rouge_recalls(["jose", "jos"], ["José", "José"], "unicode")["rougeL"] == [0, 0]
    assert scores.rouge_recalls(["Анна runs"], ["Анна running"], "unicode")["rouge1"] == [1]  # stems of English words
    for kind in scores.ROUGE_TOKENIZERS:
        assert np.isnan(scores.rouge_recalls(["", "!", "x"], ["", "?!", "\U0001f469\u200d\U0001f680"], kind)["rougeL"]).all()
    with pytest.raises(ValueError, match=r"^rouge_tokenizer=utf8: is one of ascii, unicode$"):
        scores.rouge_recalls(["a"], ["a"], "utf8")


def test_common_subsequence() -> None:
    def slow(a: list[int], b: list[int]) -> int:
        if not a or not b:
            return 0
        return slow(a[1:], b[1:]) + 1 if a[0] == b[0] else max(slow(a[1:], b), slow(a, b[1:]))

    draw = np.random.default_rng(0)
    for _ in range(50):
        a, b = (draw.integers(0, 4, draw.integers(0, 8)).tolist() for _ in range(2))
        assert scores.common_subsequence(a, b) == slow(a, b)


def test_auc_counts_pairs_and_ties_half() -> None:
    draw = np.random.default_rng(0)
    for _ in range(20):
        forget, holdout = draw.integers(0, 5, 7).astype(float), draw.integers(0, 5, 9).astype(float)
        pairs = [(h > f) + 0.5 * (h == f) for f in forget for h in holdout]
        assert scores.auc(forget, holdout) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert np.isnan(scores.auc([], [1.0]))


def test_ps_of_the_edges() -> None:
    right = {"": float("nan"), "1": 1.0, "0": 0.0, "1110": 0.0, "0001": 0.25, "0111": 0.75, "1011": 0.5, "1111": 1.0}
    for text_, want in right.items():
        found = scores.ps_exact(np.array([c == "1" for c in text_], dtype=bool))
        assert found == want or np.isnan(found) and np.isnan(want)
    assert scores.extraction_strength(np.array([True, False])) == 0.5


def test_truth_ratio_of_answers_that_are_impossible() -> None:
    """Losses of hundreds of nats, as after gradient ascent: no division of 0 by 0."""
    assert scores.truth_ratio(800.0, [800.0, 800.0]) == pytest.approx(1)
    assert scores.truth_ratio(2000.0, [1.0]) == float("inf")
    assert scores.truth_ratio_forget([float("inf"), 1.0]) == 0.5
    assert scores.probability_among(800.0, [800.0]) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="geometric, arithmetic"):
        scores.truth_ratio(1.0, [1.0], "harmonic")


def test_privleak_and_utility() -> None:
    assert scores.privleak(0.5, 0.5) == 0
    assert scores.privleak(1.0, 0.5) == pytest.approx(-100)
    assert scores.model_utility([0.5] * 9) == pytest.approx(0.5)
    assert scores.model_utility([0.5] * 8 + [0.0]) == 0
    assert scores.forget_quality([1, 2, 3], [1, 2, 3]) == (1.0, 0.0)


# ---- the control search ----


@pytest.mark.parametrize("seed", range(5))
def test_the_search_finds_the_largest_weight_that_passes(seed: int) -> None:
    """Falling PS curves: not below the last that passes on a grid of 41, and within the bisection's width of the truth."""
    edge = float(np.random.default_rng(seed).uniform(0.05, 0.95))

    def at(weight: float) -> tuple[float, float]:
        return 1 - weight, 1 - 0.5 * weight / edge

    weight, curve = search(at, 0.5)
    grid = [i / 40 for i in range(41) if at(i / 40)[1] >= 0.5]
    assert weight is not None
    assert grid[-1] <= weight <= edge
    assert edge - weight < 1e-3
    assert curve[weight] == at(weight)
    assert list(curve) == sorted(curve)


def test_the_search_where_ps_is_not_monotone() -> None:
    """It passes to 0.2, fails, and passes again from 0.7 to 0.8: 0.8 it is. All pass: 1. None passes: none."""
    weight, _ = search(lambda w: (0.0, float(w <= 0.2 or 0.7 <= w <= 0.8)), 1.0)
    assert weight == pytest.approx(0.8, abs=1e-3)
    assert search(lambda w: (0.0, 1.0), 1.0)[0] == 1
    assert search(lambda w: (0.0, 0.0), 1.0)[0] is None


def test_a_mixture_is_exactly_the_two_at_its_ends() -> None:
    draw = torch.Generator().manual_seed(0)
    model = torch.nn.Linear(5, 7)
    one, other = ({name: torch.randn(p.shape, generator=draw) for name, p in model.named_parameters()} for _ in range(2))
    for weight, want in ((0.0, one), (1.0, other), (0.25, {name: 0.75 * one[name] + 0.25 * other[name] for name in one})):
        mix(model, one, other, weight)  # type: ignore[arg-type]
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, want[name]) or (weight == 0.25 and torch.allclose(parameter, want[name]))


def test_kept_weights_are_on_the_cpu_and_mixed_where_the_model_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model on another device (one that only counts places) no weight stays there but the model's own."""
    model, asked = torch.nn.Linear(5, 7), []
    weights = {name: kept(parameter) for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert weights[name].device.type == "cpu"
        assert torch.equal(weights[name], parameter)
        assert weights[name].data_ptr() != parameter.data_ptr()
    to = torch.Tensor.to

    def note(self: torch.Tensor, *where: Any, **more: Any) -> torch.Tensor:
        asked.append(where)
        return to(self, *where, **more)

    monkeypatch.setattr(torch.Tensor, "to", note)
    elsewhere = torch.nn.Linear(5, 7, device="meta")
    mix(elsewhere, weights, weights, 0.5)  # type: ignore[arg-type]
    put(elsewhere, weights)  # type: ignore[arg-type]
    assert asked == [(torch.device("meta"),)] * 4  # both weights of each parameter
    assert {weight.device.type for weight in weights.values()} == {"cpu"}


# ---- the library ----


@gold
def test_score_rows_is_one_call() -> None:
    data = json.loads((GOLD / "rows.json").read_text())["forget"][:4]
    want = json.loads((GOLD / "expected.json").read_text())["models"]["llama"]
    model, retain = (AutoModelForCausalLM.from_pretrained(GOLD / name) for name in MODELS)
    tokenizer = AutoTokenizer.from_pretrained(GOLD / "llama")
    found = score_rows(model, tokenizer, [(text(row), row["answer"]) for row in data], retain)
    assert list(found["reference"]) == pytest.approx(want["mia"]["reference"]["forget"][:4], rel=1e-5)
    assert list(found["generated_text"]) == want["forget"]["rouge"]["generation"][:4]
    assert set(ATTACKS) < set(found.columns)
    assert [
        nlls.numpy().mean()
        for nlls in token_nlls(Pass(model, 0, 0), tokenize_pairs([(text(data[0]), data[0]["answer"])], tokenizer))
    ] == pytest.approx(list(found["loss"])[:1], rel=1e-5)


@gold
@pytest.mark.slow
def test_gold_scores_by_the_scripts_in_two_processes(tmp_path: Path) -> None:
    """The documented commands in float64 under torchrun: each row's scores and the totals."""
    data = json.loads((GOLD / "rows.json").read_text())
    splits = {f"{name}_perturbed": data[name] for name in ("retain", "real_authors", "world_facts")}
    splits |= {"forget05": data["forget"], "forget05_perturbed": data["forget"], "holdout05": data["holdout"]}
    splits["retain95"] = [*data["retain"], data["holdout"][0]]  # one more than is held out
    for name, rows in splits.items():
        (tmp_path / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = json.loads((GOLD / "expected.json").read_text())["models"]["llama"]
    common = (
        f"model_family=tiny hf_key={GOLD}/llama data_path={tmp_path} split=forget05 model_path={GOLD}/llama dtype=float64"
        f" retain_path={GOLD}/llama_retain save_dir={tmp_path}/out batch_size=5"
    )
    answers = "epsilon=1e-10 generation.max_length=null generation.max_new_tokens=200"
    start = "torchrun --nproc_per_node=2 --master_port=18791"
    run_in(ROOT, f"{start} tofu_evaluation.py {common} {answers}")
    run_in(ROOT, f"{start} evaluation_everything.py {common} original_path={GOLD}/llama_retain control=false")
    log = json.loads((tmp_path / "out/eval_log_aggregated.json").read_text())["eval_log_forget.json"]
    assert list(log["avg_gt_loss"].values()) == pytest.approx(expected["forget"]["probability"]["avg_loss"], rel=1e-9)
    assert [texts[1] for texts in log["generated_text"].values()] == expected["forget"]["rouge"]["generation"]
    found = json.loads((tmp_path / "out/scores.json").read_text())
    assert found["tofu"]["model_utility"] == pytest.approx(expected["model_utility"], rel=1e-9)
    for key, value in expected["forget_quality"].items():
        assert found["tofu"]["forget_quality"][key] == pytest.approx(value, rel=1e-9)
    assert found["privacy"]["privleak"] == pytest.approx(expected["privleak"], rel=1e-9)
    ps = pd.read_csv(tmp_path / "out/ps_rows.csv", float_precision="round_trip")
    membership_rows = pd.read_csv(tmp_path / "out/privacy_rows.csv", float_precision="round_trip")
    for part in ("forget", "retain"):
        mine = ps[(ps["model"] == "unlearned") & (ps["data"] == part)]
        assert list(mine["exact"]) == pytest.approx(expected[part]["ps_exact"], abs=1e-12)
        assert list(mine["perturb"]) == pytest.approx(expected[part]["ps_perturb"], abs=1e-12)
    for name, column in (("loss", "loss"), ("zlib_answer_text", "zlib"), ("min_k_0.4", "min_k"), ("reference", "reference")):
        for part in ("forget", "holdout"):
            mine = membership_rows[membership_rows["data"] == part]
            assert list(mine[column]) == pytest.approx(expected["mia"][name][part], rel=1e-9)
        assert found["privacy"]["auc"][column] == pytest.approx(expected["mia"][name]["auc"], abs=1e-12)


# ---- while unlearning ----


def test_scores_while_unlearning_change_no_bit(young: Path, tmp_path: Path) -> None:
    """`eval.every=4`: rows for the steps 0, 4 and the last, of the checkpoint's own scores; the training is the same bits."""
    common = ["model_family=tiny", "split=forget05", f"model_path={young}", "method=ga", "save_steps=100", "dtype=float32"]
    for name, more in (("plain", []), ("scored", ["eval.every=4"])):
        forget.run(given("forget", [*common, *more, f"save_dir={tmp_path}/{name}"]))
    weights = [load_file(tmp_path / name / "checkpoint-6/model.safetensors") for name in ("plain", "scored")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    table = pd.read_csv(tmp_path / "scored/scores.csv", float_precision="round_trip").set_index("step")
    assert list(table.index) == [0, 4, 6]
    assert table["forget_loss"][6] > table["forget_loss"][0]
    losses = json.loads((tmp_path / "scored/logs/losses.json").read_text())  # one name, one number
    for name in ("forget", "retain"):
        for step, when in ((0, "start"), (6, "end")):
            assert table[f"{name}_loss"][step] == pytest.approx(losses[name][when], rel=1e-7)
    assert (tmp_path / "scored/figures/scores.pdf").exists()
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "scored/checkpoint-6"),
        AutoTokenizer.from_pretrained(young),
    )
    rows = [json.loads(line) for line in (ROOT / "data/sample/forget05.json").read_text().splitlines()]
    again = [
        knowledge(one)
        for one in teacher_force(
            Pass(model, 0, tokenizer.eos_token_id), tokenize_pairs([(text(row), row["answer"]) for row in rows], tokenizer)
        )
    ]
    for key, value in means(again).items():
        assert table[f"forget_{key}"][6] == pytest.approx(value, rel=1e-4)
