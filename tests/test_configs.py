"""Every YAML composes and names functions that exist; families, run folders and the short names of methods."""

from __future__ import annotations

import json
import sys
from itertools import cycle, islice
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

import basher1
import forget
from app import checks, data, families, runs
from app.checks import count_steps
from app.compose import given, nested
from app.families import load_families, load_family
from app.fields import flatten
from app.filling import with_family
from app.runs import finetuned_folder, original_model
from app.settings import OF_OPEN
from unlearn.objectives.answers import DIVERGENCES
from unlearn.objectives.needs import needs_reference

CONFIG = ROOT / "config"
NO_MODEL = ("aggregate_eval_stat",)  # without a family
PRIMARY = sorted(
    file.stem for file in CONFIG.glob("*.yaml") if file.stem not in (*NO_MODEL, "model_config", "common", "shapes")
)
METHODS = sorted(file.stem for file in (CONFIG / "method").glob("*.yaml"))
RULES = sorted(file.stem for file in (CONFIG / "rule").glob("*.yaml"))
RETAIN = sorted(file.stem for file in (CONFIG / "retain").glob("*.yaml"))
EXPERIMENTS = sorted(file.stem for file in (CONFIG / "experiment").glob("*.yaml"))


def composed(*overrides: str, config: str = "forget") -> DictConfig:
    with initialize_config_dir(str(CONFIG), version_base=None):
        return compose(config, list(overrides))


def test_there_are_configs() -> None:
    assert {"finetune", "forget", "eval_tofu", "eval_everything"} <= set(PRIMARY)
    assert {"ga", "wga", "npo", "tnpo", "wtnpo", "rmu", "idk", "gd", "kl"} <= set(METHODS)
    assert {"sum", "pcgrad", "gru", "blur", "sago"} <= set(RULES)
    assert {"none", "gd", "kl", "hidden", "ap", "jensun", "circuit_breakers"} <= set(RETAIN)


def test_a_choice_that_is_refused_early_is_the_objectives_own() -> None:
    assert set(get_args(OF_OPEN["divergence"])) == set(DIVERGENCES)
    for words in ("method=ipo hyper_param=-1", "method=satimp method.beta2=-1", "method=flat method.divergence=hinge"):
        with pytest.raises(ValueError, match=r"^method\.(objective\.tau=-1|beta2=-1|divergence=hinge): needs to be"):
            given("forget", ["model_family=tiny", *words.split()])


@pytest.mark.parametrize("name", PRIMARY)
def test_primary(name: str) -> None:
    cfg = composed("model_family=tiny", config=name)
    assert OmegaConf.missing_keys(cfg) == set()
    settings = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(settings, dict)
    assert {"model_family", "seed", "batch_size", "dtype", "save_dir", "output_dir", "debug"} <= set(settings)
    assert not cfg.debug
    assert (CONFIG / f"{name}.yaml").read_text().startswith("# ")  # what it is, the command, where the results go


@pytest.mark.parametrize("name", NO_MODEL)
def test_primary_without_a_model(name: str) -> None:
    cfg = composed(config=name)
    assert OmegaConf.missing_keys(cfg) == set()
    assert {"ckpt_result", "retain_result", "save_file", "debug"} <= set(cfg)
    assert (CONFIG / f"{name}.yaml").read_text().startswith("# ")


@pytest.mark.parametrize("rule", RULES)
def test_rule(rule: str) -> None:
    cfg = composed("model_family=tiny", "method=npo", "retain=gd", f"rule={rule}")
    OmegaConf.to_container(cfg, resolve=True)
    assert cfg.rule.name == rule
    assert callable(instantiate(cfg.rule.combine))
    assert (cfg.rule.get("average") is not None) == (rule == "gru")


@pytest.mark.parametrize("retain", RETAIN)
@pytest.mark.parametrize("method", METHODS)
def test_method_and_retain(method: str, retain: str) -> None:
    cfg = composed("model_family=tiny", f"method={method}", *([] if method in ("gd", "kl") else [f"retain={retain}"]))
    OmegaConf.to_container(cfg, resolve=True)
    assert cfg.method.name == method
    assert cfg.retain.name == (method if method in ("gd", "kl") else retain)
    assert callable(instantiate(cfg.method.objective))
    assert cfg.method.answers in ("forget", "idk")
    assert cfg.retain.weight == (0 if cfg.retain.name == "none" else 1)
    term = instantiate(cfg.retain.term)
    assert term is None if cfg.retain.name == "none" else callable(term)
    assert needs_reference(term) == (cfg.retain.name not in ("none", "gd", "ap"))  # a second model, for whole outputs only


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment(name: str) -> None:
    """Every value that its sweeper names is one, and its settings are there."""
    with initialize_config_dir(str(CONFIG), version_base=None):
        whole = compose("forget", [f"+experiment={name}"], return_hydra_config=True)
    params = whole.hydra.sweeper.params
    columns = [str(value).split(",") for value in params.values()]
    for values in zip(*(islice(cycle(column), max(map(len, columns))) for column in columns), strict=True):
        words = [f"{key}={value}" for key, value in zip(params, values, strict=True)]
        settings = given("forget", [f"+experiment={name}", *words])
        assert (settings.split, settings.eval.every, settings.save_steps) == ("forget01", 5, 25)
    assert f"forget.py -m +experiment={name} " in (CONFIG / "experiment" / f"{name}.yaml").read_text()


# ---- families ----


@pytest.mark.parametrize("name", load_families())
def test_family(name: str) -> None:
    family = load_family(name)
    assert family.name == ("llama2-7b" if name == "llama" else name)
    assert family.hf_key
    assert family.finetune_lr > 0
    assert family.unlearn_lr > 0
    assert family.chat_template == (family.prompt("Who?") == "Who?")  # either the template or the tags


@pytest.mark.parametrize("name", load_families())
def test_every_family_composes(name: str) -> None:
    settings, family = with_family(given("forget", [f"model_family={name}"]))
    assert settings.model_family == family.name == load_family(name).name
    assert settings.hf_key == family.hf_key


def test_family_overrides() -> None:
    assert load_family("tiny").data_path == "data/sample"
    assert load_family("tiny", data_path="elsewhere", hf_key=None) == load_family("tiny", data_path="elsewhere")
    assert load_family("llama") == load_family("llama2-7b")
    assert load_family("llama").prompt("Who?") == "[INST] Who? [/INST]"
    assert load_family("phi").prompt("Who?") == "Question: Who?\nAnswer: "


OPEN_UNLEARNING = ["Llama-3.2-1B-Instruct", "Llama-3.2-3B-Instruct", "Llama-3.1-8B-Instruct", "Llama-2-7b-chat-hf"]


@pytest.mark.parametrize("name", OPEN_UNLEARNING)
def test_open_unlearnings_models(name: str) -> None:
    family = load_family(name)
    chat = (True, "You are a helpful assistant.", "10 Apr 2025") if "3." in name else (False, None, None)
    assert (family.chat_template, family.system_prompt, family.date_string) == chat
    assert (family.hf_key, family.ft_model_path) == (f"meta-llama/{name}", f"open-unlearning/tofu_{name}_full")
    assert family.retain_model_path is not None
    assert family.retain_model_path.format(split="retain95") == f"open-unlearning/tofu_{name}_retain95"
    assert family.gradient_checkpointing == ("1B" not in name)
    if not family.chat_template:
        assert family.prompt("Who?") == load_family("llama2-7b").prompt("Who?")


def test_families_with_a_chat_template(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tags are needed, those that are there do nothing, and there is no answer tag for the loss, nor one from scratch."""
    chat: dict[str, Any] = {"hf_key": "some/model", "chat_template": "true"}
    entries = {"chat": chat, "tagged": chat | {"answer_tag": "A: "}, "scratch": chat | {"from_scratch": True}}
    entries |= {"keyless": {"chat_template": True}, "plain": chat | {"chat_template": "false", "answer_tag": ""}}
    monkeypatch.setattr(families, "load_families", lambda: entries)
    for name in ("chat", "tagged"):
        family = load_family(name)
        assert (family.chat_template, family.system_prompt, family.date_string) == (True, None, None)
        with pytest.raises(ValueError, match=f"loss_on_answer_tag=true: model_family={name} has a chat template"):
            load_family(name, loss_on_answer_tag=True)
    for name, line in (
        ("scratch", "from_scratch makes a tokenizer without a chat template"),
        ("keyless", "lacks hf_key"),
        ("plain", "lacks question_start_tag, question_end_tag$"),
    ):
        with pytest.raises(ValueError, match=f"model_family={name}: .*{line}"):
            load_family(name)


def test_entry_of_the_published_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its seven keys, booleans quoted or not, are enough; keys that we do not know do no harm."""
    entry: dict[str, Any] = {
        "hf_key": "some/model",
        "question_start_tag": "### Q: ",
        "question_end_tag": "\n",
        "answer_tag": "### A: ",
        "flash_attention2": "true",
        "gradient_checkpointing": "false",
        "ft_model_path": "some/finetuned",
    }
    entries = {"theirs": entry, "unquoted": entry | {"flash_attention2": False, "gradient_checkpointing": True, "of_theirs": 1}}
    (tmp_path / "model_config.yaml").write_text(yaml.safe_dump(entries | {"short": "theirs", "bare": {"hf_key": "some/model"}}))
    monkeypatch.setattr(families, "CONFIG", tmp_path)
    family = load_family("theirs")
    assert (family.flash_attention2, family.gradient_checkpointing) == (True, False)
    assert (family.finetune_lr, family.unlearn_lr, family.finetune_epochs) == (1e-5, 1e-5, 5)
    assert (family.data_path, family.ft_model_path) == ("locuslab/TOFU", "some/finetuned")
    assert family.prompt("Who?") == "### Q: Who?\n### A: "
    other = load_family("unquoted")
    assert (other.flash_attention2, other.gradient_checkpointing) == (False, True)
    assert load_family("short") == family
    with pytest.raises(ValueError, match=r"model_family=bare.*question_start_tag"):
        load_family("bare")


# ---- folders ----


@pytest.fixture
def folder_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The folder that basher1's arguments, or forget.py's settings, lead to."""
    monkeypatch.chdir(tmp_path)
    for module in (data, checks):
        monkeypatch.setattr(module, "on_hub", lambda name, repo_type: True)
    monkeypatch.setattr(runs, "original_model", lambda settings, family: "some/model")
    monkeypatch.setattr(forget, "check_layer", lambda model_path, layer: None)

    def folder_of(line: str) -> str:
        words = line.split()
        if not words[0].startswith("model_family="):
            words = basher1.command(basher1.parse_args(words))[2:]
        return str(forget.prepare(given("forget", words))[0].save_dir)

    return folder_of


@pytest.mark.parametrize(
    ("line", "folder"),
    [
        ("ga --model=llama --setting=forget05 --hyper=2", "llama2-7b/ga_1e-05_forget05_5_0.0_2"),
        ("ga --model=llama --setting=forget05", "llama2-7b/ga_1e-05_forget05_5_0.0_None"),
        ("ga --model=phi --setting=forget10 --hyper=0.5", "phi/ga_2e-05_forget10_5_0.0_0.5"),
        ("wga --model=llama --setting=forget05 --hyper=2.0", "llama2-7b/wga_1e-05_forget05_5_0.0_2"),
        ("ins_npo --model=phi --setting=forget01", "phi/tnpo_2e-05_forget01_5_0.0_None"),
        ("npo_kl --model=phi --setting=forget05", "phi/npo_kl_2e-05_forget05_5_0.0_None"),
        ("rmu_2 --model=tiny --setting=forget10 --hyper=6", "tiny/rmu_2_0.0008_forget10_5_0.0_6"),
        ("rmu_21_gd --model=llama --setting=forget10", "llama2-7b/rmu_21_gd_1e-05_forget10_5_0.0_None"),
        ("KL --model=phi --setting=forget05 --hyper=3", "phi/kl_2e-05_forget05_5_0.0_3"),
        ("gd --model=phi --setting=forget05", "phi/gd_2e-05_forget05_5_0.0_None"),
        ("wtnpo_0.5 --model=phi --setting=forget05", "phi/wtnpo_2e-05_forget05_5_0.0_None_method.alpha=0.5"),
        ("wtnpo_1.5 --model=phi --setting=forget05", "phi/wtnpo_2e-05_forget05_5_0.0_None"),
        ("ga --model=phi --setting=forget05 seed=1", "phi/ga_2e-05_forget05_5_0.0_None_seed=1"),
        ("ga --model=phi --setting=forget05 seed=1 batch_size=8", "phi/ga_2e-05_forget05_5_0.0_None_batch_size=8_seed=1"),
        ("npo_kl --model=phi --setting=forget05 retain.weight=5", "phi/npo_kl_2e-05_forget05_5_0.0_None_retain.weight=5"),
        ("ga --model=phi --setting=forget05 lr=1e-5 num_epochs=2.5 weight_decay=0.01", "phi/ga_1e-05_forget05_2.5_0.01_None"),
        (
            "rmu_2 --model=tiny --setting=forget10 method.normalize=true",
            "tiny/rmu_2_0.0008_forget10_5_0.0_None_method.normalize=True",
        ),
        (
            "npo --model=phi --setting=forget05 method.objective.beta=2",
            "phi/npo_2e-05_forget05_5_0.0_None_method.objective.beta=2",
        ),
        ("wga --model=phi --setting=forget05 --hyper=0", "phi/wga_2e-05_forget05_5_0.0_0"),
        ("npo --model=phi --setting=forget05 --hyper=0.123456789", "phi/npo_2e-05_forget05_5_0.0_0.123457"),
        # nothing is appended for a default given explicitly, for a path, or for what leaves the weights alone
        ("ga --model=phi --setting=forget05 seed=42 batch_size=4 optim=adamw_torch_fused", "phi/ga_2e-05_forget05_5_0.0_None"),
        ("npo_kl --model=phi --setting=forget05 retain.weight=1", "phi/npo_kl_2e-05_forget05_5_0.0_None"),
        ("ga --model=phi --setting=forget05 data_path=a/b model_path=c/d hf_key=e/f", "phi/ga_2e-05_forget05_5_0.0_None"),
        ("ga --model=phi --setting=forget05 save_steps=1 save_dtype=bfloat16 debug=true", "phi/ga_2e-05_forget05_5_0.0_None"),
        ("ga --model=phi --setting=forget05 gradient_checkpointing=true", "phi/ga_2e-05_forget05_5_0.0_None"),
        ("ga --model=Llama-3.2-1B-Instruct --setting=forget05", "Llama-3.2-1B-Instruct/ga_1e-05_forget05_5_0.0_None"),
        ("model_family=phi split=forget05 method=npo retain=kl", "phi/npo_kl_2e-05_forget05_5_0.0_None"),
        ("model_family=Llama-2-7b-chat-hf split=forget01 method=ga", "Llama-2-7b-chat-hf/ga_1e-05_forget01_5_0.0_None"),
        ("model_family=phi split=forget05 method=gd hyper_param=2", "phi/gd_2e-05_forget05_5_0.0_2"),
    ],
)
def test_run_folder(folder_of: Any, line: str, folder: str) -> None:
    assert folder_of(line) == f"icml/{folder}"


def test_run_folder_is_where_the_user_says(folder_of: Any) -> None:
    line = "ga --model=phi --setting=forget05 --hyper=2"
    assert folder_of(f"{line} output_dir=out") == "out/phi/ga_2e-05_forget05_5_0.0_2"
    assert folder_of(f"{line} save_dir=here") == "here"


def test_finetuned_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where finetune.py puts a model of the family is where forget.py looks for it."""
    tiny, phi = load_family("tiny"), load_family("phi")
    tuning = given("finetune", ["model_family=any"])
    cfg = given("forget", ["model_family=any"])
    assert str(finetuned_folder(tuning, phi)) == "data/weight/ft_epoch5_lr2e-05_phi_full_wd0.0"
    words = ["model_family=tiny", "split=retain90", "lr=2e-5", "num_epochs=2.5", "weight_decay=0.01", "seed=1", "output_dir=w"]
    folder = finetuned_folder(given("finetune", words), tiny)
    assert str(folder) == "w/ft_epoch2.5_lr2e-05_tiny_retain90_wd0.01_seed=1"
    monkeypatch.chdir(tmp_path)
    assert original_model(cfg, phi) == "locuslab/tofu_ft_phi-1.5"
    here = finetuned_folder(tuning, tiny)
    assert str(here) == "data/weight/ft_epoch40_lr0.001_tiny_full_wd0.0"
    here.mkdir(parents=True)
    with pytest.raises(ValueError, match="no fine-tuned model"):
        original_model(cfg, tiny)
    (here / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (here / "model.safetensors").write_bytes(b"\2" + bytes(7) + b"{}")  # no tensors, whole
    assert original_model(cfg, tiny) == str(here)
    # local files: a model of TOFU is never taken for theirs
    cfg = cfg.model_copy(update={"forget_data": "mine/go.jsonl", "retain_data": "mine/keep.jsonl"})
    for family in (tiny, phi):
        with pytest.raises(ValueError, match=r"keep\+go_wd0.0 is not there"):
            original_model(cfg, family)


# ---- the short names ----

NAMES = {
    "ga": ["method=ga"],
    "grad_ascent": ["method=ga"],
    "wga": ["method=wga"],
    "npo": ["method=npo"],
    "ins_npo": ["method=tnpo"],
    "tnpo": ["method=tnpo"],
    "w_ins_npo": ["method=wtnpo"],
    "wtnpo": ["method=wtnpo"],
    "wtnpo_0.5": ["method=wtnpo", "method.alpha=0.5"],
    "w_ins_npo_2": ["method=wtnpo", "method.alpha=2"],
    "rmu_21": ["method=rmu", "method.layer=21"],
    "rmu_0": ["method=rmu", "method.layer=0"],
    "idk": ["method=idk"],
    "po": ["method=idk"],
    "gd": ["method=gd"],
    "grad_diff": ["method=gd"],
    "kl": ["method=kl"],
    "KL": ["method=kl"],
}


@pytest.mark.parametrize("suffix", ["", "_gd", "_kl"])
@pytest.mark.parametrize("name", [*NAMES, *(method for method in METHODS if method not in NAMES)])
def test_parse_method(name: str, suffix: str) -> None:
    settings = NAMES.get(name, [f"method={name}"])
    assert basher1.parse_method(name + suffix) == settings + ([f"retain={suffix[1:]}"] if suffix else [])


@pytest.mark.parametrize("name", ["", "_kl", "ga_21", "npo_kl_gd", "rmu_", "rmu_-1", "rmu_1.5", "wtnpo_x", "rmu_kl_21", "GA"])
def test_parse_method_refuses(name: str) -> None:
    with pytest.raises(ValueError, match="unknown; there are adaptive_rmu, altpo, ceu"):
        basher1.parse_method(name)


@pytest.mark.parametrize(
    ("method", "key", "default"),
    [
        ("wga", "method.objective.alpha", 5),
        ("npo", "method.objective.beta", 0.5),
        ("tnpo", "method.objective.beta", 4),
        ("wtnpo", "method.objective.beta", 4),
        ("rmu", "method.objective.c", 2),
        ("gd", "retain.weight", 1),
        ("kl", "retain.weight", 1),
    ],
)
def test_hyper_param_reaches_its_argument(method: str, key: str, default: float) -> None:
    assert OmegaConf.select(composed("model_family=tiny", f"method={method}"), key) == default
    cfg = composed("model_family=tiny", f"method={method}", "hyper_param=3.5")
    assert OmegaConf.select(cfg, key) == 3.5
    if key.startswith("method.objective."):
        assert instantiate(cfg.method.objective).keywords[key.rpartition(".")[2]] == 3.5
        assert cfg.retain.weight == 0
    assert {name for name, value in flatten(nested(cfg)).items() if value == 3.5} == {key, "hyper_param"}  # and nothing else


def test_npo_kl_has_two_numbers() -> None:
    cfg = composed("model_family=tiny", "method=npo", "retain=kl", "hyper_param=2", "retain.weight=7")
    assert (cfg.method.objective.beta, cfg.retain.weight) == (2, 7)
    assert composed("model_family=tiny", "method=npo", "retain=kl", "hyper_param=2").retain.weight == 1


def test_wtnpo_has_two_numbers() -> None:
    cfg = composed("model_family=tiny", *basher1.parse_method("wtnpo_0.5"), "hyper_param=2")
    assert instantiate(cfg.method.objective).keywords == {"beta": 2, "alpha": 0.5}


def test_basher1_prints_the_published_numbers() -> None:
    """5 epochs of 4 x 4 rows a step, a checkpoint every 5 steps, lr 2e-5 for phi and 1e-5 for llama."""
    args = basher1.parse_args(["ga", "--model=llama", "--cuda_id=3", "--setting=forget05", "--hyper=2"])
    assert args.cuda_id == 3
    command = basher1.command(args)
    assert command[:2] == [sys.executable, str(ROOT / "forget.py")]
    cfg = composed(*command[2:])
    assert (cfg.num_epochs, cfg.batch_size, cfg.gradient_accumulation_steps, cfg.save_steps) == (5, 4, 4, 5)
    assert (cfg.weight_decay, cfg.max_grad_norm, cfg.seed, cfg.hyper_param) == (0, 0, 42, 2)
    assert {name: load_family(name).unlearn_lr for name in ("phi", "llama")} == {"phi": 2e-5, "llama": 1e-5}


@pytest.mark.parametrize(("rows", "steps", "per_epoch"), [(40, 12, 2), (200, 62, 12), (400, 125, 25)])
def test_steps_of_tofus_splits(rows: int, steps: int, per_epoch: int) -> None:
    assert count_steps(given("forget", ["model_family=phi"]), rows) == (steps, per_epoch)
