"""MUSE: its layout, its scores against slow versions written from their definitions, and the whole way on the sample."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, make_workplace, run_in
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoModelForCausalLM, AutoTokenizer

import tofu_evaluation
from app import evaluating
from app.compose import given
from app.data import PLACE, data_of, unlearning_data
from app.filling import with_family
from app.forms import pieces, read_rows
from unlearn.io.rows import read_jsonl
from unlearn.passes.forcing import Pass
from unlearn.scores import definitions as scores
from unlearn.scores import muse
from unlearn.scores.asking import Asked

SAMPLE = ROOT / "data/sample_muse"
HERE = "model_family=tiny hf_key=small benchmark=muse_news data_path=data"
STEP = "batch_size=6 gradient_accumulation_steps=1 save_steps=99"
SMALL = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "vocab_size": 700}


def rows_of(name: str) -> list[dict[str, Any]]:
    return read_jsonl(SAMPLE / f"{name}.json")


# ---- the layout ----


def test_the_sample_is_what_its_generator_writes(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("make_sample", ROOT / "data/make_sample.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(importlib.import_module("sys").modules, "make_sample", module)
        spec.loader.exec_module(module)
    module.write_muse(tmp_path, 42, 0)
    files = sorted(file.relative_to(tmp_path) for file in tmp_path.rglob("*") if file.is_file())
    assert files == sorted(file.relative_to(SAMPLE) for file in SAMPLE.rglob("*") if file.is_file())
    assert [file for file in files if (tmp_path / file).read_bytes() != (SAMPLE / file).read_bytes()] == []
    with pytest.raises(ValueError, match="at least 14 authors are needed, not 13"):
        module.write_muse(tmp_path, 13, 0)


def test_what_the_sample_holds() -> None:
    """Texts of different people; the questions are about theirs; the prompts and their rests are the texts to forget."""
    names = {name: {row["text"] for row in rows_of(f"raw/{name}")} for name in ("forget", "retain1", "retain2", "holdout")}
    assert sum(map(len, names.values())) == len(set().union(*names.values())) == 24
    assert {f"{row['prompt']} {row['gt']}" for row in rows_of("verbmem/forget")} == names["forget"]
    for name, of in (("forget", "forget"), ("retain", "retain2")):
        assert all(
            any(row["answer"].split()[0].lower().strip(",") in text.lower() for text in names[of])
            for row in rows_of(f"knowmem/{name}_qa")
        )
        shown, asked = ({row["question"] for row in rows_of(f"knowmem/{name}_qa{end}")} for end in ("_icl", ""))
        assert not shown & asked
    whole = [{row["text"] for row in rows_of(f"scal/forget_{i}")} for i in range(1, 5)]
    parts = [{row["text"] for row in rows_of(f"sust/forget_{i}")} for i in range(1, 5)]
    assert whole == [set().union(*parts[:i]) for i in range(1, 5)]
    assert whole[0] == names["forget"]


def data(*words: str) -> Any:
    return data_of(with_family(given("forget", ["model_family=phi", *words]))[0])


@pytest.mark.parametrize(("name", "hub"), [("muse_news", "muse-bench/MUSE-News"), ("muse_books", "muse-bench/MUSE-Books")])
def test_the_hubs_names(name: str, hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its subsets are the sets' folders, its splits their files; and its models are those to begin with."""
    import datasets

    asked: list[tuple[str, str]] = []

    def load_dataset(path: str, subset: str, split: str) -> datasets.Dataset:
        assert path == hub
        asked.append((subset, split))
        return datasets.Dataset.from_list([{"text": f"{subset} {split}"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = unlearning_data(data(f"benchmark={name}"), "scal_3", None)
    assert asked == [("scal", "forget_3"), ("raw", "retain1"), ("raw", "retain2")]
    assert [row["text"] for row in found.held_out] == ["raw retain2"]
    settings, family = with_family(given("forget", ["model_family=Llama-2-7b-hf", f"benchmark={name}"]))
    assert evaluating.original_model(settings, family) == f"{hub}_target"
    assert settings.benchmark.retain_models == {"Llama-2-7b-hf": f"{hub}_retrain"}
    assert (settings.max_length, given("forget", ["model_family=phi", "max_length=99"]).max_length) == (2048, 99)


def test_texts_of_arrays_and_long_texts(tmp_path: Path) -> None:
    """A file may be one array of texts; a text that is longer than a piece is cut at white space, nothing but that lost."""
    (tmp_path / "raw").mkdir()
    words = " ".join(f"word{i}" for i in range(3000))
    (tmp_path / "raw/forget.json").write_text(json.dumps(["one text", words]))
    assert len(read_rows(tmp_path / "raw/forget.json")) == 2
    found = data("benchmark=muse_news", f"data_path={tmp_path}").rows("raw/forget")
    assert found[0]["text"] == "one text"
    assert " ".join(row["text"] for row in found[1:]) == words
    assert max(len(row["text"]) for row in found) <= 7000
    assert {row[PLACE] for row in found[1:]} == {"split raw/forget, row 2"}
    assert data("benchmark=muse_news", f"data_path={tmp_path}").check("raw/forget") == len(found)
    assert pieces("a" * 25, 10) == ["a" * 10, "a" * 10, "a" * 5]
    assert pieces("", 10) == [""]


# ---- the scores ----


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workplace with the sample, a model that has learnt all of it, and one that never saw the texts to forget."""
    folder = make_workplace(tmp_path_factory.mktemp("muse"))
    shutil.copytree(SAMPLE, folder / "data")
    (folder / "small").mkdir()
    tiny = json.loads((ROOT / "config/tiny/config.json").read_text())
    (folder / "small/config.json").write_text(json.dumps(tiny | SMALL))
    run_in(folder, f"python finetune.py {HERE} {STEP} num_epochs=40 lr=4e-3 save_dir=target")
    run_in(folder, f"python finetune.py {HERE} {STEP} num_epochs=15 lr=4e-3 split=retrain save_dir=retrained")
    return folder


def asked(path: Path, batch_size: int | None = 3) -> Asked:
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return Asked(Pass(model, tokenizer.pad_token_id or 0, tokenizer.eos_token_id, batch_size=batch_size), tokenizer)


def goes_on(one: Asked, prompt: str, n: int) -> str:
    """transformers' own generation, a prompt at a time."""
    ids = one.tokenizer(prompt, return_tensors="pt", add_special_tokens=True).input_ids
    ids = ids[:, :-1] if ids[0, -1] == one.how.eos else ids
    model: Any = one.how.model
    out = model.generate(ids, max_new_tokens=n, do_sample=False, pad_token_id=one.how.pad)
    return str(one.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def f1(truth: str, said: str) -> float:
    return float(RougeScorer(["rougeL"], use_stemmer=False).score(truth, said)["rougeL"].fmeasure)


def test_verbmem_by_the_slow_way(place: Path) -> None:
    one = asked(place / "target")
    rows = rows_of("verbmem/forget")
    rows.append({"prompt": rows[0]["prompt"], "gt": " ".join(row["gt"] for row in rows)})  # longer than what is asked for
    found = muse.verbmem(one, rows, max_new_tokens=40)
    want = []
    for row in rows:
        short = one.tokenizer(row["gt"], add_special_tokens=True).input_ids[:40]
        truth = one.tokenizer.decode(short, skip_special_tokens=True)
        want.append(f1(str(truth), goes_on(one, row["prompt"], 40)))
    assert [row["rougeL"] for row in found.rows] == pytest.approx(want, abs=1e-12)
    assert found.totals[""] == pytest.approx(np.mean(want), abs=1e-12)
    assert found.totals[""] > 0.3  # it has learnt them


def test_knowmem_by_the_slow_way(place: Path) -> None:
    one = asked(place / "target")
    rows, shown = rows_of("knowmem/forget_qa"), rows_of("knowmem/forget_qa_icl")
    found = muse.knowmem(one, rows, shown, max_new_tokens=12)
    before = "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in shown)
    for row, got in zip(rows, found.rows, strict=True):
        said = goes_on(one, f"{before}Question: {row['question']}\nAnswer: ", 12)
        for word in ("\n\n", "\nQuestion", "Question:"):
            said = said.split(word)[0]
        assert got["response"] == said
        assert got["rougeL"] == pytest.approx(f1(row["answer"], said), abs=1e-12)
    assert found.totals[""] == pytest.approx(np.mean([row["rougeL"] for row in found.rows]), abs=1e-12)


@pytest.mark.parametrize(
    ("said", "left"),
    [("a\n\nb", "a"), ("a\nQuestion: b\n\nc", "a"), ("Question: a", ""), ("a Question b\nc", "a Question b\nc"), ("", "")],
)
def test_where_an_answer_ends(said: str, left: str) -> None:
    assert muse._until(said, muse.ENDS) == left


def test_privleak_by_the_slow_way(place: Path) -> None:
    """Log-probabilities of whole texts one at a time, the pairs counted; and both conventions by hand."""
    totals = {}
    for name in ("target", "retrained"):
        one = asked(place / name)
        sets = {of: rows_of(f"privleak/{of}") for of in ("forget", "holdout")}
        found = muse.privleak(one, sets["forget"], sets["holdout"])
        values: dict[str, list[float]] = {"forget": [], "holdout": []}
        for of, rows in sets.items():
            for row in rows:
                ids = torch.tensor(one.tokenizer(row["text"]).input_ids)
                ids = ids[:-1] if ids[-1] == one.how.eos else ids
                with torch.no_grad():
                    log_p = one.how.model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
                values[of].append(-float(log_p.sort().values[: int(len(log_p) * 0.4)].double().mean()))
            assert [row["min_k"] for row in found.rows if row["data"] == of] == pytest.approx(values[of], rel=1e-5)
        pairs = [(h < f) + (h == f) / 2 for f in values["forget"] for h in values["holdout"]]
        assert found.totals == pytest.approx({"auc": np.mean(pairs), "auc_members": 1 - np.mean(pairs)}, abs=1e-12)
        totals[name] = found.totals
    assert totals["target"]["auc"] == 0  # every text that it has learnt looks like a member
    assert muse.against_retrained(totals["target"], totals["retrained"])[""] == -100


def test_what_cannot_be_asked_is_named(place: Path) -> None:
    """A prompt that fills the model, and a text of one token: no number of theirs is counted as one."""
    one = asked(place / "target")
    most = one.how.model.config.max_position_embeddings
    with pytest.raises(ValueError, match=rf"^VerbMem, row 2: its prompt has \d+ tokens, and the model positions for {most}$"):
        muse.verbmem(one, [rows_of("verbmem/forget")[0], {"prompt": "word " * most, "gt": "word"}])
    texts = [{"text": "two words"}]
    with pytest.raises(ValueError, match=r"^PrivLeak: holdout, row 2: a text of one token"):
        muse.privleak(one, texts, [*texts, {"text": "a"}])


def test_both_conventions_by_hand() -> None:
    """The benchmark's, which is also evaluation_everything.py's; and that of an AUC that is 1 for members."""
    both = muse.against_retrained({"auc": 0.1, "auc_members": 0.9}, {"auc": 0.4, "auc_members": 0.6})
    assert both == pytest.approx({"": -75, "members": 50})
    assert both[""] == pytest.approx(scores.privleak(0.9, 0.6))
    assert np.isnan(scores.relative_auc(0.5, 0.0))


# ---- the whole way ----


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    run_in(
        place, f"python forget.py {HERE} {STEP} split=forget method=npo retain=kl num_epochs=3 model_path=target save_dir=run"
    )
    run_in(place, "python tofu_evaluation.py model_path=run retain_path=retrained dtype=float32")
    return place / "run"


def test_the_whole_way(place: Path, run: Path) -> None:
    """By one command at all checkpoints; scores.csv has the same numbers as each folder's scores.json."""
    table = pd.read_csv(run / "scores.csv").set_index("step")
    assert table.index.tolist() == [0, 3]
    folder = run / "checkpoint-3/eval_results/ds_size300"
    found = json.loads((folder / "scores.json").read_text())
    own = found["own"]
    assert {"verbmem", "knowmem", "utility", "privleak", "privleak_members", "privleak_auc", "privleak_retain_model_auc"} < set(
        own
    )
    for name, value in own.items():  # an AUC of 0 of the retrained model leaves one of the two conventions without a value
        assert pd.isna(table.loc[3, name]) if value == "not available" else table.loc[3, name] == pytest.approx(value)
    for name in ("verbmem", "knowmem", "utility"):
        rows = pd.read_csv(folder / f"{name}_rows.csv")
        assert rows["rougeL"].mean() == pytest.approx(own[name], abs=1e-12)
    assert len(pd.read_csv(folder / "utility_rows.csv")) == 18
    assert set(pd.read_csv(folder / "privleak_rows.csv")["data"]) == {"forget", "holdout"}
    assert table.loc[0, "privleak"] == -100
    assert found["definitions"]["verbmem"].startswith("Mean ROUGE-L F1, without stemming, of the greedy continuation")
    assert (run / "figures/scores.pdf").exists()
    one = asked(run / "checkpoint-3", None)
    limits = {"verbmem": (muse.verbmem, {"rows": "verbmem/forget"})}
    assert own["verbmem"] == pytest.approx(limits["verbmem"][0](one, rows_of("verbmem/forget")).totals[""], abs=1e-9)


def test_finished_and_without_a_retain_model(place: Path, run: Path) -> None:
    """The same command again measures nothing; without the retain model only PrivLeak is lacking, and it says what would do."""
    again = run_in(place, "python tofu_evaluation.py model_path=run retain_path=retrained dtype=float32")
    assert again.stderr.count("has its own scores already") == 2
    done = run_in(place, "python tofu_evaluation.py model_path=run/checkpoint-3 dtype=float32 save_dir=alone ds_size=2")
    assert "privleak  not available: no retain model; give retain_path=MODEL  auc" in done.stderr
    own = json.loads((place / "alone/scores.json").read_text())["own"]
    assert own["privleak"] == "not available: no retain model; give retain_path=MODEL"
    assert len(pd.read_csv(place / "alone/knowmem_rows.csv")) == 2


def test_killed_after_a_part(place: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured is not measured anew, and the end is the same."""
    words = ["model_path=run/checkpoint-3", "retain_path=retrained", "dtype=float32", f"save_dir={tmp_path}"]
    monkeypatch.chdir(place)
    measure: Callable[..., Any] = tofu_evaluation.measure_own
    calls: list[str] = []

    def killed(settings: Any, models: Any, sets: Any, path: str, score: str) -> Any:
        calls.append(score)
        if score == "utility" and calls.count("utility") == 1:
            raise KeyboardInterrupt
        return measure(settings, models, sets, path, score)

    monkeypatch.setattr(tofu_evaluation, "measure_own", killed)
    with pytest.raises(KeyboardInterrupt):
        tofu_evaluation.run(given("eval_tofu", words))
    tofu_evaluation.run(given("eval_tofu", words))
    assert calls == ["verbmem", "knowmem", "utility", "utility", "privleak", "privleak"]
    whole = json.loads((run / "checkpoint-3/eval_results/ds_size300/scores.json").read_text())["own"]
    assert json.loads((tmp_path / "scores.json").read_text())["own"] == pytest.approx(whole)
    assert not (tmp_path / "resume").exists()


def test_the_other_scripts(place: Path, run: Path) -> None:
    """G-effects, and PS and membership of the raw texts."""
    run_in(place, "python compute_geffect.py model_path_cur=run instances=false")
    run_in(place, "python evaluation_everything.py model_path=run/checkpoint-3 retain_path=retrained control=false")
    found = json.loads((run / "checkpoint-3/eval_results/ds_size300/scores.json").read_text())
    assert found["ps"]["unlearned"]["forget"]["rows"] == 6
    assert found["privacy"]["rows"] == {"forget": 6, "holdout": 6}
    assert "own" in found
    done = run_in(place, f"python tofu_evaluation.py {HERE} split=forget model_path=target plan=1")
    assert "scores: " in done.stdout


def test_what_a_user_gets_wrong(place: Path, tmp_path: Path) -> None:
    shutil.copytree(SAMPLE, tmp_path / "data")
    (tmp_path / "data/verbmem/forget.json").write_text('[{"prompt": 3, "gt": "x"}]')
    line = f"python tofu_evaluation.py model_family=tiny benchmark=muse_news split=forget model_path={place}/target"
    for more, said in (
        (f"data_path={tmp_path}/data", f"{tmp_path}/data/verbmem/forget.json, row 1: 'prompt' is a text, and not 3"),
        (f"data_path={SAMPLE} retain_result=x", "retain_result=x: benchmark=muse_news has no such log; give retain_path=MODEL"),
        (f"data_path={SAMPLE} split=news", "split=news: to unlearn is one of forget, scal_1, scal_2"),
    ):
        told = run_in(place, f"{line} {more}", check=False)
        assert (told.returncode, len(told.stderr.splitlines())) == (2, 1), told.stderr
        assert said in told.stderr
    (tmp_path / "data/verbmem/forget.json").unlink()
    told = run_in(place, f"{line} data_path={tmp_path}/data", check=False)
    assert f"split=verbmem/forget: data_path={tmp_path}/data has no verbmem/forget.json" in told.stderr
