"""lm-eval's tasks of made-up questions on tiny models: log-likelihoods against teacher forcing, text against a slow loop, runs
that are killed and go on, the tables, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import ROOT, run_in

import evaluation_everything
from app import planning
from app.compose import given
from unlearn.models import checkpoints
from unlearn.objectives.rows import tokenize_pairs
from unlearn.passes import Pass
from unlearn.passes.forcing import teacher_force
from unlearn.scores import harness
from utils import device

device()
pytestmark = pytest.mark.on_cpu

THINGS = [("river", "Belmora"), ("bridge", "Tarn"), ("tower", "Ost"), ("market", "Velin"), ("wall", "Kes")]
TOWNS = """
task: towns
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
fewshot_split: train
metric_list: [{metric: acc}, {metric: acc_norm}]
metadata: {version: 1}
"""
SAID = """
task: towns_said
output_type: generate_until
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
GROUP = "group: all_towns\ntask: [towns]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"


class Place:
    """Tasks, few rows, and a run of two checkpoints from a random model."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tasks, self.data, small = folder, folder / "tasks", folder / "few", folder / "small"
        for made in (self.tasks, self.data, small):
            made.mkdir()
        rows = [
            {
                "question": f"What is the {thing} of {town}?",
                "choices": [f"the old {thing} of {town}", "the sea", f"a {thing} of stone and wood", "none"],
                "answer": i % 4,
            }
            for i, (thing, town) in enumerate(THINGS)
        ]
        for split, of in (("train", rows[:3]), ("test", rows[::-1])):
            (self.tasks / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of))
        files = {split: str(self.tasks / f"{split}.jsonl") for split in ("train", "test")}
        kwargs = {"data_files": files, "cache_dir": str(folder / "cache")}
        lines = f"dataset_path: json\ntest_split: test\ndataset_kwargs: {json.dumps(kwargs)}"
        for name, text in (("towns", TOWNS), ("said", SAID)):
            (self.tasks / f"{name}.yaml").write_text(text + lines + "\n")
        (self.tasks / "group.yaml").write_text(GROUP)
        sizes = {"retain90": 9, "forget10": 4, "forget10_perturbed": 4, "retain_perturbed": 4, "holdout10": 4}
        for name, n in sizes.items():
            given_lines = (ROOT / f"data/sample/{name}.json").read_text().splitlines(keepends=True)
            (self.data / f"{name}.json").write_text("".join(given_lines[:n]))
        tiny = json.loads((ROOT / "config/tiny/config.json").read_text())
        sized = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        (small / "config.json").write_text(json.dumps(tiny | sized))
        texts = [f"{row['question']} {row['choices']}" for row in rows]
        for seed, name in enumerate(("original", "retain")):
            tokenizer, model = checkpoints.new_model(str(small), texts, seed, torch.device("cpu"))
            checkpoints.save_into(folder / name, model, tokenizer, "float32")
        self.common = f"model_family=tiny hf_key={small} data_path={self.data} dtype=float32"
        self.run = folder / "run"
        line = f"python forget.py {self.common} split=forget10 method=ga model_path={folder / 'original'} lr=0.01 num_epochs=2"
        run_in(ROOT, f"{line} save_steps=1 retain_holdout=4 gradient_accumulation_steps=1 save_dir={self.run}")

    def words(self, model: Path, *words: str) -> list[str]:
        return [*self.common.split(), f"model_path={model}", "control=false", f"lm_eval_tasks={self.tasks}", *words]

    def evaluate(self, model: Path, *words: str) -> None:
        evaluation_everything.run(given("eval_everything", self.words(model, *words)))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


def loaded(path: Path, dtype: torch.dtype = torch.float32, bf16: bool = False) -> tuple[Any, Pass]:
    tokenizer, model = checkpoints.load(str(path), "", torch.device("cpu"), dtype=dtype)
    return tokenizer, Pass(model, tokenizer.pad_token_id, tokenizer.eos_token_id, bf16, batch_size=3)


def samples(place: Place, name: str, tokenizer: Any, how: Pass, fewshot: int | None = None) -> list[dict[str, Any]]:
    asked = harness.load(name, harness.index([name], str(place.tasks)), fewshot)
    found = harness.evaluate(how, tokenizer, asked, fewshot, samples=True)
    assert found is not None
    return found["samples"][name] + [found["results"][name]]


@pytest.mark.parametrize(
    ("dtype", "bf16", "fewshot", "rel"),
    [
        (torch.float32, False, None, 1e-5),
        (torch.float32, False, 2, 1e-5),
        (torch.float64, False, None, 1e-12),
        (torch.float32, True, None, 2e-2),
    ],
)
def test_log_likelihoods_are_those_of_teacher_forcing(
    place: Place, dtype: torch.dtype, bf16: bool, fewshot: int | None, rel: float
) -> None:
    """Each choice's: the sum over its tokens, end-of-sequence not counted; and the accuracies that follow from them."""
    tokenizer, how = loaded(place.run / "checkpoint-2", dtype, bf16)
    *asked, totals = samples(place, "towns", tokenizer, how, fewshot)
    assert len(asked) == len(THINGS)
    right = {"acc": 0.0, "acc_norm": 0.0}
    for one in asked:
        pairs = [tuple(argument) for argument in one["arguments"]]
        assert pairs[0][0].count("Question:") == 1 + (fewshot or 0)
        forced = teacher_force(how, tokenize_pairs(pairs, tokenizer))
        ours = [-float(of.nll[: of.size].astype("float64").sum()) for of in forced]
        theirs = [float(response[0][0]) for response in one["resps"]]
        assert theirs == pytest.approx(ours, rel=rel, abs=rel)
        assert len({round(value, 3) for value in theirs}) == 4
        by_length = [value / len(choice) for value, choice in zip(ours, one["doc"]["choices"], strict=True)]
        right["acc"] += ours.index(max(ours)) == one["doc"]["answer"]
        right["acc_norm"] += by_length.index(max(by_length)) == one["doc"]["answer"]
    if not bf16:
        assert {key: totals[f"{key},none"] * len(THINGS) for key in right} == pytest.approx(right)


def test_text_is_greedy_decodings(place: Place) -> None:
    """Against a loop of one token at a time over the whole text."""
    tokenizer, how = loaded(place.run / "checkpoint-1")
    *asked, _ = samples(place, "towns_said", tokenizer, how)
    for one in asked:
        ids = tokenizer(one["arguments"][0][0], return_tensors="pt").input_ids
        start = ids.shape[1]
        for _ in range(6):
            with torch.no_grad():
                token = how.model.eval()(input_ids=ids).logits[0, -1].argmax()
            if token == tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, token.view(1, 1)], dim=1)
        assert one["resps"][0][0] == tokenizer.decode(ids[0, start:], skip_special_tokens=True).split("\n")[0]


def test_a_hash_is_of_what_is_asked(place: Place, tmp_path: Path) -> None:
    """Of questions, examples where there are some, and settings; not of where the files are."""
    tasks = tmp_path / "tasks"
    shutil.copytree(place.tasks, tasks)
    for file in tasks.glob("*.yaml"):
        file.write_text(file.read_text().replace(str(place.tasks), str(tasks)))

    def digest(folder: Path, fewshot: int | None = None) -> str:
        return harness.load("towns", harness.index(["towns"], str(folder)), fewshot).digest

    plain, shots = digest(place.tasks), digest(place.tasks, 1)
    assert (digest(tasks), digest(tasks, 1)) == (plain, shots)
    (tasks / "train.jsonl").write_text((tasks / "train.jsonl").read_text().replace("river", "brook"))
    assert digest(tasks) == plain
    assert digest(tasks, 1) != shots
    (tasks / "test.jsonl").write_text((tasks / "test.jsonl").read_text().replace("river", "brook"))
    assert digest(tasks) != plain


def test_totals_are_named_after_tasks_metrics_and_filters() -> None:
    of_a = {"alias": "a", "name": "a", "sample_len": 3, "acc,none": 0.5, "acc_stderr,none": 0.1, "f1,strict-match": 0.2}
    of_b = {"acc,none": 0.25, "bleu,none": "not available"}
    assert harness.totals("a", {"results": {"a": of_a}}) == {"a_acc": 0.5, "a_f1_strict-match": 0.2}
    both = {"a": of_a, "b": of_b}
    assert harness.totals("g", {"results": both | {"g": {"alias": "g"}}}) == {
        "a_acc": 0.5,
        "a_f1_strict-match": 0.2,
        "b_acc": 0.25,
    }
    assert harness.totals("g", {"results": both | {"g": {"acc,none": 0.4}}}) == {"g_acc": 0.4}


# ---- of a run ----


class Killed(Exception):
    pass


def counted(monkeypatch: pytest.MonkeyPatch, most: int | None = None) -> list[str]:
    """The tasks that are asked from here on; at the `most`-th the process is killed."""
    whole = harness.evaluate
    names: list[str] = []

    def evaluate(how: Any, tokenizer: Any, asked: Any, *args: Any) -> Any:
        if len(names) == most:
            raise Killed
        names.append(asked.name)
        return whole(how, tokenizer, asked, *args)

    monkeypatch.setattr(harness, "evaluate", evaluate)
    return names


def test_a_run_goes_on_where_it_was(place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is asked twice: neither after a kill, nor of the original model, nor where another task is wanted too."""
    run = tmp_path / "run"
    shutil.copytree(place.run, run)
    words = [f"retain_path={place.folder / 'retain'}", "lm_eval=[towns]"]
    with monkeypatch.context() as patch:
        names = counted(patch, most=3)  # unlearned, original, retain; then the second checkpoint's
        with pytest.raises(Killed):
            place.evaluate(run, *words)
    assert names == ["towns"] * 3
    file = "eval_results/ds_size300/lm_eval.json"
    first = (run / "checkpoint-1" / file).read_bytes()
    assert not (run / "checkpoint-2" / file).exists()
    with monkeypatch.context() as patch:
        names = counted(patch)
        place.evaluate(run, *words)
        assert names == ["towns"]
        place.evaluate(run, *words)
        assert names == ["towns"]
    assert json.loads((run / "checkpoint-1" / file).read_bytes())["results"] == json.loads(first)["results"]
    with monkeypatch.context() as patch:
        names = counted(patch)
        patch.setattr(evaluation_everything, "measure", lambda *_: pytest.fail("what else there is, is measured already"))
        place.evaluate(run, words[0], "lm_eval=[towns,all_towns,towns_said]")
        assert names == ["all_towns", "towns_said"] * 3 + ["all_towns", "towns_said"]
        names.clear()
        place.evaluate(run, words[0], "lm_eval=[towns]", "lm_eval_limit=2")
        assert names == ["towns"] * 4
    check_tables(run, place)


def check_tables(run: Path, place: Place) -> None:
    table = pd.read_csv(run / "scores.csv", index_col="step")
    assert table.index.tolist() == [0, 1, 2]
    ours = ["towns_acc", "towns_acc_norm", "all_towns_acc", "towns_said_exact_match"]
    assert {"forget_ps_exact", *ours, "retain_model_all_towns_acc"} <= set(table)
    assert table[ours].notna().all(axis=None)
    for step in (1, 2):
        folder = run / f"checkpoint-{step}/eval_results/ds_size300"
        results = json.loads((folder / "lm_eval.json").read_text())
        assert list(results["results"]) == ["unlearned", "original", "retain"]
        assert {"lm_eval", "torch"} <= set(results["from"]["versions"])
        of = results["results"]["unlearned"]
        assert of["towns"]["n-samples"]["towns"] == {"original": 5, "effective": 2}
        assert table.loc[step, "towns_acc"] == of["towns"]["results"]["towns"]["acc,none"]
        assert table.loc[step, "all_towns_acc"] == of["all_towns"]["results"]["all_towns"]["acc,none"]
        assert 0 <= of["all_towns"]["results"]["towns"]["acc_stderr,none"] < 1
        original = results["results"]["original"]["all_towns"]["results"]["all_towns"]["acc,none"]
        assert table.loc[0, "all_towns_acc"] == original
        scores = json.loads((folder / "scores.json").read_text())
        assert scores["lm_eval"]["unlearned"]["all_towns_acc"] == table.loc[step, "all_towns_acc"]
        assert "ps" in scores
    assert (run / "figures/lm_eval.pdf").exists()


def test_two_processes_share_the_questions(place: Place, tmp_path: Path) -> None:
    """And do not wait for each other where there are fewer questions than processes."""
    words = place.words(place.run / "checkpoint-2", "lm_eval=[towns,towns_said]")
    for limit in ("null", "1"):
        found = []
        for start in ("python", "torchrun --nproc_per_node=2"):
            folder = tmp_path / f"{limit}{len(start)}"
            run_in(ROOT, f"{start} evaluation_everything.py {' '.join(words)} lm_eval_limit={limit} save_dir={folder}")
            results = json.loads((folder / "lm_eval.json").read_text())["results"]["unlearned"]
            numbers = [(name, key, value) for name in results for key, value in results[name]["results"][name].items()]
            found.append({f"{name}, {key}": value for name, key, value in numbers if not isinstance(value, str)})
        assert found[0] == pytest.approx(found[1], rel=1e-12)
        assert found[0]["towns, sample_len"] == (5 if limit == "null" else 1)


# ---- what is refused ----


def refused(place: Place, *words: str) -> str:
    with pytest.raises(ValueError, match="lm_eval") as error:
        place.evaluate(place.run, *words)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_cannot_be_asked_is_said_first(place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checkpoints, "load", None)  # no model is loaded
    unknown = refused(place, "lm_eval=[towns,wmdp_bioo]")  # the library's own tasks are known by name
    assert unknown.startswith("lm_eval=[wmdp_bioo]: no such task; like it are wmdp_bio")
    assert unknown.endswith(f"; {place.tasks} has all_towns, towns, towns_said")
    assert refused(place, "lm_eval=[towns]", "parallel=fsdp").endswith("parallel=ddp")
    assert refused(place, "lm_eval_limit=3").endswith("give lm_eval=[TASK,...]")
    assert refused(place, "lm_eval=[towns]", f"lm_eval_tasks={tmp_path}").endswith("no folder with tasks, a YAML file each")
    for change, why in (
        ("task: other\nunsafe_code: true", "its task other runs code that the model writes"),
        ("task: retain", "its task retain has the name that columns of other scores begin with"),
        ("task: other\nno_such_key: 1", "it can't be loaded (TypeError"),
    ):
        text = (place.tasks / "towns.yaml").read_text().replace("task: towns", change)
        (tmp_path / "other.yaml").write_text(text)
        name = change.split()[1]
        assert why in refused(place, f"lm_eval=[{name}]", f"lm_eval_tasks={tmp_path}")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert refused(place, "lm_eval=[towns]").endswith("which is not installed; pip install lm-eval")


def test_a_plan_counts_the_prompts(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    planning.tell(given("eval_everything", ["model_family=smollm2-135m", "split=forget10", "plan=1", "lm_eval=[mmlu]"]))
    assert "lm-eval, 1000 tokens of prompts at once: " in capsys.readouterr().out
