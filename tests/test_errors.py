"""What a user can get wrong: one line that names the value and the valid ones, exit code 2, at once, and no model loaded."""

from __future__ import annotations

import importlib
import json
import resource
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, run_in

import basher1
from app import checks, data, families
from app.compose import given
from app.data import check_rows
from app.door import cli
from app.families import load_families, load_family
from app.methods import choices, retain_terms
from app.runs import check_run, open_run
from app.settings import COMMANDS as SETTINGS
from app.settings import Aggregate, Forget

CONFIGS = {"finetune": "finetune", "forget": "forget"}
CONFIGS |= {"tofu_evaluation": "eval_tofu", "evaluation_everything": "eval_everything"}
CONFIGS |= {"robustness": "robustness"}
CLASSES: dict[str, tuple[Any, ...]] = {script: (SETTINGS[config],) for script, config in CONFIGS.items()}
CLASSES["tofu_evaluation"] += (Aggregate,)
METHODS, TERMS = ", ".join(choices("method")), retain_terms()
FAMILIES = "llama2-7b, phi"
SPLITS = "forget01, forget05, forget10"
SET = "settings are key=value"
TINY = "model_family=tiny model_path=model"  # in `place`: a folder that looks like a checkpoint of four layers
GA = f"forget.py {TINY}"
TOFU = f"tofu_evaluation.py {TINY} split=forget10"
MINE = f"forget.py --config-dir=own {TINY} split=gone"
OWN = "forget_data=two.jsonl retain_data=stay.jsonl"
LOCAL = "no such file, and no set of benchmark=local; there are retain_data, forget_data\n"
AGGREGATE = "--config-name=aggregate_eval_stat"

# ---- the lines, and what each needs to say ----


CHECKED = [  # a command, and what its line needs to contain
    # methods and retain terms
    (f"{GA} method=xyz", ["method=xyz", METHODS]),
    (f"{GA} method=", ["method=", METHODS]),
    (f"{GA} method=npo_kl", ["npo_kl", METHODS, "method=npo retain=kl"]),
    (f"{GA} method=ins_npo", ["ins_npo", METHODS, "method=tnpo"]),
    (f"{GA} method=rmu_21", ["rmu_21", METHODS, "method=rmu method.layer=21"]),
    (f"{GA} method=grad_diff", ["grad_diff", METHODS, "method=gd"]),
    (f"{GA} retain=foo", ["retain=foo", ", ".join(choices("retain"))]),
    (f"{GA} method=gd retain=kl", ["retain=kl", "method=gd is ga with the retain term gd"]),
    ("finetune.py --config-name=forget model_family=tiny", ["forget's", "--config-name=finetune"]),
    (f"{GA} retain_holdout=0", ["retain_holdout=0", "at least 1"]),
    ("basher1.py npo --model=tiny --setting=forget10 --batch-size=8", ["--batch-size=8", "no such argument"]),
    ("forget.py --config-name=finetune model_family=tiny", ["lacks retain, method", "--config-name=forget"]),
    # families and splits
    ("forget.py", ["model_family", FAMILIES]),
    ("forget.py model_family=", ["model_family=", FAMILIES]),
    ("finetune.py model_family=lama", ["lama", FAMILIES]),
    ("tofu_evaluation.py model_family=lama model_path=model", ["lama", FAMILIES]),
    (f"{GA} split=forget20", ["forget20", SPLITS]),
    (f"{GA} split=full", ["full", SPLITS]),
    (f"{GA} split=retain90", ["retain90", SPLITS]),
    (f"{GA} split=", ["split=", SPLITS]),
    ("finetune.py model_family=tiny split=forget10", ["forget10", "full, retain99, retain95, retain90"]),
    (f"tofu_evaluation.py {TINY} split=full", ["full", SPLITS]),
    # keys and flags
    (f"{GA} metod=ga", ["metod", "method, ", "split"]),
    (f"{GA} foo=1", ["foo", "split"]),
    (f"{GA} +foo=1", ["foo", "split"]),
    (f"{GA} foo.bar=1", ["foo.bar", "split"]),
    (f"{GA} method.foo=1", ["method.foo", "name, answers, objective"]),
    (f"{GA} +method.foo=1", ["method.foo", "name, answers, objective"]),
    (f"{GA} retain.foo=1", ["retain.foo", "name, weight"]),
    ("finetune.py model_family=tiny method=ga", ["method", "lr, num_epochs"]),
    (f"{GA} --hyper=2", ["--hyper=2", SET]),
    (f"{GA} --batch-size=8", ["--batch-size=8", SET]),
    (f"{GA} lr", ["lr", "key=value"]),
    (f"{GA} 'lr=['", ["lr=[", "key=value"]),
    (f"{GA} lr=1e-5,2e-5", ["lr=1e-5,2e-5", "--multirun"]),
    (f"forget.py --config-name=nothing {TINY}", ["nothing", "eval_tofu, finetune, finetune_lora, forget"]),
    # values
    (f"{GA} lr=abc", ["lr=abc", "number above 0"]),
    (f"{GA} lr=0", ["lr=0", "number above 0"]),
    (f"{GA} lr=-1e-5", ["lr=-1e-05", "number above 0"]),
    (f"{GA} lr=nan", ["lr=nan", "number above 0"]),
    (f"{GA} lr=", ["lr=", "number above 0"]),
    (f"{GA} lr=true", ["lr=True", "number above 0"]),
    (f"{GA} batch_size=2.5", ["batch_size=2.5", "whole number of at least 1"]),
    (f"{GA} batch_size=0", ["batch_size=0", "whole number of at least 1"]),
    (f"{GA} batch_size=null", ["batch_size=None", "whole number of at least 1"]),
    (f"{GA} num_epochs=0", ["num_epochs=0", "number above 0"]),
    (f"{GA} seed=-1", ["seed=-1", "whole number of at least 0"]),
    (f"{GA} method=gd retain=kl", ["retain=kl", "method=gd"]),
    ("finetune.py --config-name=forget model_family=tiny", ["forget's", "--config-name=finetune"]),
    (f"{GA} retain_holdout=0", ["retain_holdout=0", "at least 1"]),
    ("basher1.py npo --model=tiny --setting=forget10 --batch-size=8", ["--batch-size=8", "no such argument"]),
    ("forget.py --config-name=finetune model_family=tiny", ["lacks retain", "--config-name=forget"]),
    (f"{GA} seed=x", ["seed=x", "whole number of at least 0"]),
    (f"{GA} seed=99999999999", ["seed=99999999999", "at most 4294967295"]),
    (f"{GA} num_epochs=1e9", ["num_epochs=1000000000.0", "at most 10000000"]),
    (f"{GA} geffect=5", ["geffect=5", "a group of settings, geffect.every"]),
    (f"{GA} eval=null", ["eval=None", "a group of settings, eval.every"]),
    (f"evaluation_everything.py {TINY} split=forget10 ps_p=5", ["ps_p=5", "at most 1"]),
    (f"evaluation_everything.py {TINY} split=forget10 min_k=2", ["min_k=2", "at most 1"]),
    (
        f"robustness.py {TINY} split=forget10 attacks=[relern]",
        ["attacks=relern", "relearn, quantize, sample, prefix, paraphrase"],
    ),
    (f"robustness.py {TINY} split=forget10 attacks=relearn", ["attacks=relearn", "a list, [A,B,...]"]),
    (f"robustness.py {TINY} split=forget10 sample.k=[32]", ["sample.k=[32]", "sample.n=16"]),
    (f"robustness.py {TINY} split=forget10 sample.k=[1,0]", ["sample.k=[1, 0]", "a list of whole numbers of at least 1"]),
    (f"robustness.py {TINY} split=forget10 sample.k=[-1]", ["sample.k=[-1]", "a list of whole numbers of at least 1"]),
    (f"robustness.py {TINY} split=forget10 quantize.bits=[0]", ["quantize.bits=[0]", "a list of whole numbers of at least 1"]),
    (f"robustness.py {TINY} split=forget10 relearn.data=nothing", ["relearn.data=nothing", "no such file", "forget10"]),
    (f"robustness.py {TINY} split=forget10 relearn.data=empty", ["relearn.data=empty", "no such file", "forget10"]),
    (f"robustness.py {TINY} split=forget10 relearn.data=blank.jsonl", ["relearn.data=blank.jsonl: no rows", "'answer'"]),
    (f"robustness.py {TINY} split=forget10 relearn.data=broken.jsonl", ["relearn.data=broken.jsonl, line 3: not JSON"]),
    (f"robustness.py {TINY} split=forget10 relearn.data=bare.jsonl", ["relearn.data=bare.jsonl, row 2: needs 'answer'"]),
    (
        f"robustness.py {TINY} split=forget10 relearn.data=goes_on.jsonl",
        ["relearn.data=goes_on.jsonl, row 1: needs 'question' and 'answer'", "'prompt'"],
    ),
    (f"robustness.py {TINY} split=forget10 relearn.data=retain99 {OWN}", ["relearn.data=retain99", LOCAL]),
    (f"robustness.py {TINY} split=forget10 relearn.data=full benchmark=local {OWN}", ["relearn.data=full", LOCAL]),
    ("robustness.py split=forget05", ["model_path", "folder"]),
    (f"robustness.py {TINY} split=full", ["split=full", SPLITS]),
    (f"{GA} dtype=float8", ["float8", "auto, float32, bfloat16"]),
    (f"{GA} save_dtype=float8", ["float8", "float32, bfloat16"]),
    ("finetune.py model_family=tiny optim=foo", ["foo", "adamw_torch_fused", "sgd"]),
    (
        f"{GA} optim=adamw_8bit",
        ["optim=adamw_8bit", "pip install bitsandbytes", "adamw_torch_fused, adamw_torch, sgd, adafactor"],
    ),
    ("finetune.py model_family=tiny optim=paged_adamw_8bit", ["optim=paged_adamw_8bit", "pip install bitsandbytes"]),
    (f"{GA} optim=adamw_torch_4bit", ["optim=adamw_torch_4bit", "pip install torchao"]),
    (f"{GA} keep_last=0", ["keep_last=0", "whole number of at least 1"]),
    (f"{GA} keep_last=two", ["keep_last=two", "whole number of at least 1"]),
    (f"{GA} save_steps=0", ["save_steps=0", "whole number of at least 1"]),
    (f"{GA} hyper_param=abc", ["hyper_param=abc", "number"]),
    (f"{GA} method=npo hyper_param=0", ["beta=0", "number above 0"]),
    (f"{GA} method=wtnpo method.alpha=x", ["method.alpha=x", "number"]),
    (f"{GA} retain=kl retain.weight=-1", ["retain.weight=-1", "number of at least 0"]),
    (f"{GA} debug=maybe", ["debug=maybe", "true or false"]),
    (f"{GA} logger=paper", ["logger=paper", "tensorboard, wandb, trackio"]),
    (f"{GA} logger=trackio", ["logger=trackio", "pip install trackio"]),
    (f"{TOFU} ds_size=0", ["ds_size=0", "whole number of at least 1"]),
    # a method's layer, told from the checkpoint's config.json
    (f"{GA} method=rmu method.layer=5", ["method.layer=5", "model", "0 (its embeddings) to 4"]),
    (f"{GA} method=rmu", ["method.layer=8", "0 (its embeddings) to 4"]),
    (f"{GA} method=rmu method.layer=-1", ["method.layer=-1", "whole number of at least 0"]),
    (f"{GA} method=rmu method.layer=1.5", ["method.layer=1.5", "whole number of at least 0"]),
    # folders
    (f"{GA} data_path=nowhere", ["data_path=nowhere", "no such folder", "a local copy of TOFU"]),
    (f"{GA} data_path=some_splits", ["forget10", "data_path=some_splits", "full, retain90"]),
    ("finetune.py model_family=tiny split=retain95 data_path=some_splits", ["retain95", "full, retain90"]),
    ("finetune.py model_family=tiny hf_key=nowhere", ["hf_key=nowhere", "config.json"]),
    ("finetune.py model_family=smollm2-135m data_path=some_splits hf_key=empty", ["hf_key=empty", "without a checkpoint"]),
    ("forget.py model_family=tiny", ["model_family=tiny", "finetune.py model_family=tiny", "model_path="]),
    ("forget.py model_family=tiny model_path=nowhere", ["model_path=nowhere", "folder", "hub"]),
    ("forget.py model_family=tiny model_path=empty", ["model_path=empty", "without a checkpoint"]),
    ("forget.py model_family=tiny model_path=a_run", ["model_path=a_run", "a_run/checkpoint-5, a_run/checkpoint-10"]),
    ("tofu_evaluation.py model_family=tiny model_path=a_run/checkpoint-6", ["checkpoint-6", "a_run/checkpoint-5, a_run/ch"]),
    ("forget.py model_family=tiny model_path=torn", ["model_path=torn", "torn (62 of 66 bytes)"]),
    ("forget.py model_family=tiny model_path=in_part", ["model_path=in_part", "model-2.safetensors", "not there"]),
    (f"{GA} save_dir=two.jsonl/run", ["save_dir=two.jsonl/run", "two.jsonl is a file"]),
    ("tofu_evaluation.py model_family=tiny", ["model_path", "folder"]),
    # evaluations
    ("evaluation_everything.py split=forget05", ["model_path", "folder"]),
    ("evaluation_everything.py model_path=model split=forget10", ["model_family is missing", "model is of no run", FAMILIES]),
    (f"evaluation_everything.py {TINY} split=", ["split is missing", SPLITS]),
    (f"evaluation_everything.py {TINY} split=full", ["split=full", SPLITS]),
    (f"evaluation_everything.py {TINY} split=forget10", ["model_family=tiny", "no fine-tuned model"]),
    (f"evaluation_everything.py {TINY} split=forget10 similar=some", ["similar=some", "true or false"]),
    (f"evaluation_everything.py {TINY} split=forget10 original_path=empty", ["original_path=empty", "without a checkpoint"]),
    (
        f"evaluation_everything.py {TINY} split=forget10 original_path=model data_path=some_splits",
        ["forget10", "full, retain90"],
    ),
    (f"{TOFU} truth_ratio=harmonic", ["truth_ratio=harmonic", "geometric, arithmetic"]),
    (f"{TOFU} generation.max_length=null", ["generation.max_length=null", "generation.max_new_tokens=N"]),
    (f"{TOFU} retain_path=empty", ["retain_path=empty", "without a checkpoint"]),
    (f"{TOFU} retain_path=model retain_result=log.json", ["retain_result=log.json", "retain_path=model", "one of the two"]),
    (f"{TOFU} retain_result=nowhere.json", ["retain_result=nowhere.json", "no such file"]),
    (f"{TOFU} retain_result=broken.jsonl", ["retain_result=broken.jsonl", "not JSON"]),
    (f"{TOFU} retain_result=log.json", ["retain_result=log.json", "other questions", "1 forget rows", "has 40"]),
    (f"{TOFU} forget_data=two.jsonl retain_data=two.jsonl retain_result=log.json", ["other questions", "has 2"]),
    (f"{TOFU} save_dir=two.jsonl", ["save_dir=two.jsonl", "two.jsonl is a file"]),
    (f"tofu_evaluation.py {AGGREGATE}", ["ckpt_result is missing"]),
    (f"tofu_evaluation.py {AGGREGATE} ckpt_result=log.json", ["save_file is missing"]),
    (f"tofu_evaluation.py {AGGREGATE} ckpt_result=nowhere.json save_file=a.csv", ["ckpt_result=nowhere.json", "no such file"]),
    (f"tofu_evaluation.py {AGGREGATE} ckpt_result=log.json save_file=log.csv", ["save_file=log.csv", "the place of a log"]),
    (f"tofu_evaluation.py {AGGREGATE} ckpt_result=log.json save_file=empty", ["save_file=empty", "a CSV file"]),
    (f"tofu_evaluation.py {AGGREGATE} model_path=model", ["model_path", "ckpt_result, retain_result, save_file"]),
    # local data
    (f"{GA} forget_data=two.jsonl", ["forget_data=two.jsonl", "retain_data=FILE"]),
    (f"{GA} retain_data=two.jsonl", ["retain_data=two.jsonl", "forget_data=FILE"]),
    (f"{GA} forget_data=missing.jsonl retain_data=two.jsonl", ["forget_data=missing.jsonl", "no such file"]),
    (f"{GA} forget_data=two.jsonl retain_data=empty", ["retain_data=empty", "no such file"]),
    (f"{GA} forget_data=bare.jsonl retain_data=two.jsonl", ["bare.jsonl, row 2", "'answer'", "{'question': 'str'}"]),
    (f"{GA} forget_data=two.jsonl retain_data=broken.jsonl", ["broken.jsonl, line 3", "not JSON"]),
    (f"{GA} forget_data=blank.jsonl retain_data=two.jsonl", ["forget_data=blank.jsonl: no rows", "'answer'"]),
    (f"{GA} forget_data=goes_on.jsonl retain_data=two.jsonl", ["goes_on.jsonl, row 1: needs 'question' and 'answer'"]),
    (f"{GA} forget_data=latin.jsonl retain_data=two.jsonl", ["latin.jsonl, line 1", "utf-8"]),
    ("finetune.py model_family=tiny retain_data=bare.jsonl", ["retain_data=bare.jsonl, row 2", "'answer'"]),
    ("finetune.py model_family=tiny split=retain90 forget_data=two.jsonl", ["forget_data", "retain_data=FILE", "split=full"]),
    (f"{GA} retain_holdout=360", ["retain_holdout=360", "360 rows"]),
    (f"{GA} forget_data=two.jsonl retain_data=two.jsonl retain_holdout=2", ["retain_holdout=2", "2 rows"]),
    (f"{GA} split=forget01 batch_size=8", ["num_epochs=5 of 4 rows", "batch_size=8", "gradient_accumulation_steps=4"]),
    ("finetune.py model_family=tiny num_epochs=0.01", ["num_epochs=0.01 of 400 rows", "step of 16"]),
    # a benchmark's YAML, and a method's, in a folder of one's own
    (f"{MINE} benchmark=other", ["benchmark=other: its name is tofu; needs to be other, as its file is called"]),
    (f"{GA} split=gone --config-dir=own benchmark=other", ["benchmark=other: its name is tofu"]),  # flags may be anywhere
    (f"{MINE} benchmark=bare", ["benchmark=bare: its name is None; needs to be bare"]),
    (
        f"{MINE} benchmark=unsen",
        ["unknown key 'benchmark.unlearn.gone.unsen'; benchmark.unlearn.gone has forget, retain, unseen"],
    ),
    (f"{MINE} benchmark=heldout", ["unknown key 'benchmark.heldout'; benchmark has name, data_path, ", "held_out, "]),
    (f"{MINE} benchmark=set", ["unknown key 'benchmark.own.a.set'; benchmark.own.a has sets, score, against"]),
    (f"{MINE} benchmark=one", ["benchmark.unlearn.gone.forget=full: needs to be a list, [A,B,...]"]),
    (f"{MINE} benchmark=lacks", ["benchmark lacks finetune; its keys are name, data_path"]),
    (f"{MINE} method=other", ["method=other: its name is ga; needs to be other"]),
    (f"{GA} method=ga method.name=npo", ["method=ga: its name is npo; needs to be ga"]),
    (
        f"{GA} benchmark=wmdp benchmark.held_out.share=0.5",
        ["benchmark.held_out.share=0.5: is set in the YAML of benchmark=wmdp"],
    ),
    (f"{GA} benchmark=wmdp +benchmark.piece=5", ["benchmark.piece=5: is set in the YAML of benchmark=wmdp"]),
    # basher1
    ("basher1.py xyz --model=tiny --setting=forget10", ["xyz", METHODS, "ins_npo", "rmu_LAYER"]),
    ("basher1.py npo_foo --model=tiny --setting=forget10", ["npo_foo", METHODS, f"_{' or _'.join(TERMS)}"]),
    ("basher1.py ga_21 --model=tiny --setting=forget10", ["ga_21", METHODS]),
    ("basher1.py rmu_x --model=tiny --setting=forget10", ["rmu_x", "rmu_LAYER"]),
    ("basher1.py ga --model=lama --setting=forget10", ["lama", FAMILIES]),
    ("basher1.py ga --model=tiny --setting=forget20", ["forget20", SPLITS]),
    ("basher1.py ga --model=tiny --setting=forget10 benchmark=tfou", ["benchmark=tfou: unknown; there are knowundo, local, "]),
    ("basher1.py ga --setting=forget10", ["--model", "--model=FAMILY"]),
    ("basher1.py ga --model=tiny", ["--setting", "forget01|forget05|forget10"]),
    ("basher1.py --model=tiny --setting=forget10", ["method", "METHOD"]),
    ("basher1.py ga --model=tiny --setting=forget10 --hyper=abc", ["abc", "--hyper=NUMBER"]),
    ("basher1.py ga --model=tiny --setting=forget10 --cuda_id=abc", ["abc", "--cuda_id=GPU"]),
    ("basher1.py ga --model=tiny --setting=forget10 --epochs=3", ["--epochs=3", "key=value"]),
]

COMMANDS = [  # the same as a user meets them: a process of their own, timed
    (f"{GA} method=npo_kl", ["npo_kl", METHODS, "method=npo retain=kl"]),
    (f"{GA} metod=ga", ["metod", "method, "]),
    (f"{GA} --hyper=2", ["--hyper=2", SET]),
    (f"{GA} 'lr=['", ["lr=[", "key=value"]),
    (f"{GA} split=forget20", ["forget20", SPLITS]),
    (f"{GA} method=rmu method.layer=5", ["method.layer=5", "to 4"]),
    (f"{GA} data_path=no/where", ["data_path=no/where", "no such folder", "a local copy of TOFU"]),
    (f"{GA} forget_data=bare.jsonl retain_data=two.jsonl", ["bare.jsonl, row 2", "'answer'"]),
    ("forget.py model_family=tiny model_path=a_run", ["a_run", "a_run/checkpoint-5"]),
    ("finetune.py model_family=lama", ["lama", FAMILIES]),
    ("finetune.py --config-name=nothing.yaml model_family=tiny", ["nothing", "finetune"]),
    (f"tofu_evaluation.py {TINY} split=full", ["full", SPLITS]),
    (f"{TOFU} retain_result=log.json", ["retain_result=log.json", "other questions", "1 forget rows", "has 40"]),
    (f"evaluation_everything.py {TINY} split=forget10", ["model_family=tiny", "no fine-tuned model"]),
    ("basher1.py xyz --model=tiny --setting=forget10", ["xyz", METHODS]),
    ("basher1.py ga --model=lama --setting=forget10 --cuda_id=3", ["lama", FAMILIES]),
]


# ---- where they are typed ----


def one_row_log() -> dict[str, Any]:
    """In TOFU's format, of a question that nobody asks."""
    row = {"avg_gt_loss": 0.1, "rougeL_recall": 0.2, "average_perturb_loss": [0.3], "avg_paraphrased_loss": 0.4}
    task = {key: {"0": value} for key, value in row.items()} | {"generated_text": {"0": ["Who?", "He.", "She."]}}
    names = ("eval_log", "eval_real_author_wo_options", "eval_real_world_wo_options", "eval_log_forget")
    return {f"{name}.json": task for name in names}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with whole and broken data, and with what looks like a model and a run until it is loaded."""
    row = '{"question": "Where?", "answer": "There."}\n'
    files = {
        "two.jsonl": row * 2,
        "bare.jsonl": row + '{"question": "Where?"}\n',
        "broken.jsonl": row + '\n{"question": \n',
        "blank.jsonl": "\n",
        "stay.jsonl": row * 4,
        "own/method/other.yaml": (ROOT / "config/method/ga.yaml").read_text(),
        "goes_on.jsonl": '{"prompt": "Where?", "gt": "There."}\n',
        "some_splits/full.json": row * 40,
        "some_splits/retain90.json": row,
        "log.json": json.dumps(one_row_log()),
    }
    for folder in ("model", "a_run/checkpoint-5", "a_run/checkpoint-10"):
        files |= {
            f"{folder}/config.json": (ROOT / "config/tiny/config.json").read_text(),
            f"{folder}/model.safetensors": "\2" + "\0" * 7 + "{}",
        }
    for folder in ("torn", "in_part"):
        files[f"{folder}/config.json"] = files["model/config.json"]
    gone = "{full: [full]}\nunlearn: {gone: {forget: [full], retain: [retain90]}}\n"
    files |= {
        f"own/benchmark/{name}.yaml": f"name: {name}\nfinetune: {gone}" for name in ("unsen", "heldout", "set", "one", "lacks")
    }
    for name, (here, there) in {
        "unsen": ("retain:", "unsen:"),
        "heldout": ("finetune", "heldout: {}\nfinetune"),
        "set": ("finetune", "own: {a: {set: {rows: full}, score: {_target_: a.b}}}\nfinetune"),
        "one": ("forget: [full]", "forget: full"),
        "lacks": ("finetune: {full: [full]}\n", ""),
    }.items():
        files[f"own/benchmark/{name}.yaml"] = files[f"own/benchmark/{name}.yaml"].replace(here, there)
    files["own/benchmark/other.yaml"] = f"name: tofu\nfinetune: {gone}"
    files["own/benchmark/bare.yaml"] = f"finetune: {gone}"
    header = '{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    files["torn/model.safetensors"] = chr(len(header)) + "\0" * 7 + header
    files["in_part/model.safetensors.index.json"] = '{"weight_map": {"v": "model-1.safetensors", "w": "model-2.safetensors"}}'
    files["in_part/model-1.safetensors"] = files["model/model.safetensors"]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.jsonl").write_bytes('{"question": "Où?", "answer": "Là."}\n'.encode("latin-1"))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Call a script's entry, up to its `prepare` only; gives the exit code and standard error."""
    for module in (data, checks):
        monkeypatch.setattr(module, "on_hub", lambda name, repo_type: False)
    for name, value in {"HYDRA_FULL_ERROR": "1", "CUDA_VISIBLE_DEVICES": "0"}.items():
        monkeypatch.setenv(name, value)  # what cli sets does not outlive the test

    def call(line: str, job: Callable[[Any], Any] | None = None) -> tuple[int, str]:
        argv = shlex.split(line)
        monkeypatch.setattr(sys, "argv", argv)
        script = argv[0].removesuffix(".py")
        if script == "basher1":
            code: Any = basher1.main(argv[1:])
        else:
            module = importlib.import_module(script)
            entry = module.run if AGGREGATE in line else module.prepare  # which reads two logs, and no model
            with pytest.raises(SystemExit) as stopped:
                cli(job or entry, *CLASSES[script])
            code = stopped.value.code
        out, err = capsys.readouterr()
        assert out == ""
        return code, err

    return call


# ---- one line, before anything is loaded ----


def assert_one_line(line: str, code: int, err: str, words: list[str]) -> None:
    assert code == 2, err
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    assert err.startswith(f"{line.split()[0]}: "), err
    assert [word for word in words if word not in err] == [], err
    assert "hydra.cc" not in err
    assert "search path" not in err


@pytest.mark.parametrize(("line", "words"), CHECKED, ids=[line for line, _ in CHECKED])
def test_one_line_before_anything_is_loaded(call: Callable[..., tuple[int, str]], line: str, words: list[str]) -> None:
    assert_one_line(line, *call(line), words)


def processor_seconds() -> float:
    """Of the commands that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize(("line", "words"), COMMANDS, ids=[line for line, _ in COMMANDS])
def test_command(place: Path, line: str, words: list[str]) -> None:
    seconds: list[float] = []
    while len(seconds) < 2 and not any(s < 3 for s in seconds):  # a second try, where the machine is busy
        began, used = time.monotonic(), processor_seconds()
        done = run_in(place, f"python {ROOT}/{line}", check=False, fresh=True)
        seconds.append(min(time.monotonic() - began, processor_seconds() - used))  # it waits for nothing but a processor
    assert_one_line(line, done.returncode, done.stderr, words)
    assert done.stdout == ""
    assert min(seconds) < 3


def test_what_is_right_passes(call: Callable[..., tuple[int, str]]) -> None:
    """The table's common part is no error by itself: the job is reached."""
    seen: list[Forget] = []

    def job(given: Forget) -> None:
        seen.append(importlib.import_module("forget").prepare(given)[0])
        raise ValueError("reached")

    assert call(GA, job) == (2, "forget.py: reached\n")
    assert seen[0].save_dir == "icml/tiny/ga_0.0008_forget10_5_0.0_None"


def test_a_path_may_have_an_equals_sign(call: Callable[..., tuple[int, str]], place: Path) -> None:
    """As the folders of runs with overrides have, sweeps over them included."""
    (place / "model").rename(place / "ga_seed=1")
    seen = []

    def job(cfg: Forget) -> None:
        seen.append(cfg.model_path)
        raise ValueError("reached")

    call("forget.py model_family=tiny model_path=ga_seed=1 save_dir=./a=b/c=d", job)
    call("forget.py -m model_family=tiny model_path=ga_seed=1,ga_seed=2", job)
    odd = place / "été (1), x=2.model"
    (place / "ga_seed=1").rename(odd)
    call(f"forget.py model_family=tiny 'model_path={odd.name}'", job)
    assert seen == ["ga_seed=1", "ga_seed=1", "ga_seed=2", odd.name]


# ---- the traceback, other processes, other jobs ----


def test_debug_gives_the_traceback(place: Path) -> None:
    done = run_in(place, f"python {ROOT}/{GA} split=forget20 debug=true", check=False)
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    assert "in check_split" in done.stderr


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_only_local_rank_0_prints(
    call: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch, rank: str, lines: int
) -> None:
    monkeypatch.setenv("LOCAL_RANK", rank)
    code, err = call(f"{GA} split=forget20")
    assert (code, err.count("\n")) == (2, lines)


def test_a_bad_job_does_not_end_a_sweep(call: Callable[..., tuple[int, str]]) -> None:
    seen = []

    def job(cfg: Forget) -> None:
        seen.append(cfg.lr)
        if cfg.lr > 1:
            raise ValueError(f"lr={cfg.lr}: bad")

    code, err = call(f"forget.py -m {TINY} lr=2,1,3", job)
    lines = ["lr=2: bad", "lr=3: bad", "job 0 failed: lr=2: bad", "job 2 failed: lr=3: bad"]
    assert (code, err.splitlines()[:-1]) == (2, [f"forget.py: {line}" for line in lines])
    assert err.splitlines()[-1].startswith("forget.py: 1 of 3 jobs are done; the summary is icml/sweeps/forget_")
    assert seen == [2, 1, 3]


def test_other_errors_are_one_line_too(call: Callable[..., tuple[int, str]]) -> None:
    def fail(error: Exception) -> tuple[int, str]:
        def job(cfg: Forget) -> None:
            raise error

        return call(GA, job)

    assert fail(OSError("no file\n  named a")) == (1, "forget.py: no file named a\n")
    line = "forget.py: RuntimeError: shapes differ (debug=true: the traceback)\n"
    assert fail(RuntimeError("shapes\n  differ")) == (1, line)


# ---- models and runs that do not fit ----


def test_a_model_that_does_not_load(place: Path) -> None:
    done = run_in(place, f"python {ROOT}/{TOFU}", check=False)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("tofu_evaluation.py: ")


def test_another_runs_settings(tmp_path: Path) -> None:
    defaults = ["model_family=tiny", "lr=1e-3"]
    open_run(tmp_path, given("forget", defaults))
    (tmp_path / "logs").mkdir()  # begun
    check_run(tmp_path, given("forget", [*defaults, "debug=true", "save_steps=7"]))  # the same run
    with pytest.raises(ValueError, match=r"seed=42 there, 7 here; batch_size=4 there, 8 here") as refused:
        check_run(tmp_path, given("forget", [*defaults, "batch_size=8", "seed=7"]))
    assert str(tmp_path) in str(refused.value)
    assert "lr" not in str(refused.value).replace(str(tmp_path), "")


def test_another_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the family's entry says of the prompt is a setting of the run, too."""
    cfg = given("forget", ["model_family=tiny", "lr=1e-3"])
    open_run(tmp_path, cfg)
    (tmp_path / "logs").mkdir()  # begun
    entries = load_families()
    entries["tiny"]["answer_tag"] = "A: "
    monkeypatch.setattr(families, "load_families", lambda: entries)
    with pytest.raises(ValueError, match=r"family.answer_tag=Answer:  there, A:  here"):
        check_run(tmp_path, cfg)


# ---- other commands, help ----


def test_basher1_names_the_gpus_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert basher1.choose_device(1) == {"CUDA_VISIBLE_DEVICES": "1"}
    for cuda_id in (2, -1):
        with pytest.raises(ValueError, match=rf"--cuda_id={cuda_id}: no such GPU; there are 0, 1$"):
            basher1.choose_device(cuda_id)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert basher1.choose_device(1) == {"CUDA_VISIBLE_DEVICES": "6"}


def test_basher1_gives_the_commands_exit_code(place: Path) -> None:
    done = run_in(place, f"python {ROOT}/basher1.py rmu_9 --model=tiny --setting=forget10 model_path=model", check=False)
    assert_one_line("forget.py", done.returncode, done.stderr, ["method.layer=9", "to 4"])
    assert done.stdout.endswith("split=forget10 method=rmu method.layer=9 model_path=model\n")


def test_lines_end_at_newlines_only(tmp_path: Path) -> None:
    """A line separator within a text, which JSON allows unescaped, does not break the row."""
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"question": "a\u2028b", "answer": "c\u0085d"}, ensure_ascii=False), encoding="utf-8")
    assert check_rows("a file", file) == 1


@pytest.mark.parametrize("script", sorted(CONFIGS))
def test_help_names_every_key_with_its_meaning(place: Path, script: str) -> None:
    done = run_in(place, f"python {ROOT}/{script}.py --help")
    assert done.stderr == ""
    rows = "batch_size: null # rows at once at most" if "evaluation" in script else "batch_size: 4 # rows per process"
    for words in (rows, "model_family: llama, ", "save_dir: null # "):
        assert words in done.stdout
    assert done.stdout.count("\nbatch_size: ") == 1
    assert (f"method: {METHODS}" in done.stdout) == (script == "forget")


# ---- folders with something of a model ----


CONVERT = "AutoModelForCausalLM.from_pretrained('given').save_pretrained(NEW)"
OF_A_MODEL = {  # what may stand beside a config.json, and whether transformers could convert it
    **dict.fromkeys(("pytorch_model.bin", "pytorch_model-00001-of-00002.bin"), True),
    **dict.fromkeys(("model.onnx", "last.ckpt", "weights.pth", "model.distcp", "pytorch_model.bin.index.json"), False),
    **dict.fromkeys(("pytorch_model.bin.bak", "pytorch_model.bin.1", ".model.safetensors.tmp", "model.safetensors.old"), False),
    **dict.fromkeys(("tokenizer.json", "vocab.json", "tokenizer.model"), False),
}


@pytest.mark.parametrize("name", OF_A_MODEL)
def test_no_new_model_where_there_is_something_of_one(call: Callable[..., tuple[int, str]], place: Path, name: str) -> None:
    """Not trained from scratch in silence, and told to be converted only where that is possible."""
    folder = place / "given"
    folder.mkdir()
    (folder / "config.json").write_text((ROOT / "config/tiny/config.json").read_text())
    (folder / name).write_text("of a model")
    line = "finetune.py model_family=tiny hf_key=given save_dir=out"
    code, err = call(line)
    assert_one_line(line, code, err, ["hf_key=given", name])
    assert (CONVERT in err) == OF_A_MODEL[name]
    assert not (place / "out").exists()


def test_a_config_alone_is_made_from_scratch(place: Path) -> None:
    folder = place / "given"
    folder.mkdir()
    for name in ("config.json", "generation_config.json", "README.md"):
        (folder / name).write_text((ROOT / "config/tiny/config.json").read_text())
    assert load_family("tiny", hf_key=str(folder)).from_scratch
