"""A setting is one field: its check, its line, its help, its default and the folder's name come from there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import pytest
from hydra.core.config_store import ConfigStore
from pydantic import Field, ValidationError

from app.compose import given
from app.door import help_text
from app.fields import defaults, fields, marked, setting, what
from app.runs import suffix
from app.settings import COMMANDS, OPTIMIZERS, EvalEverything, EvalTofu, Evaluation, Finetune, Forget, GEffects


@pytest.mark.parametrize("command", COMMANDS.values(), ids=list(COMMANDS))
def test_every_setting_has_its_meaning_and_its_help(command: Any) -> None:
    text = help_text("What it does.", command.config)
    for key, field in fields(command):
        assert field.description, key
        if not (isinstance(field.annotation, type) and getattr(field.annotation, "by_file", False)):
            lines = [line for line in text.splitlines() if line.startswith(f"{key}: ")]
            needed = "" if what(field) == "a text" else what(field)
            assert any(field.description in line and needed in line for line in lines)


def test_settings_are_frozen_and_their_defaults_fit() -> None:
    for command in (Finetune, Forget):
        found = given(command.config)
        with pytest.raises(ValidationError):
            found.seed = 3
        assert found.seed == 42


@pytest.fixture
def changed() -> Iterator[None]:
    """The number of rows a micro-batch is another setting: other default, range and meaning."""

    class Changed(Forget):
        batch_size: Annotated[int, Field(ge=3)] = setting(7, "rows, told otherwise")

    store = ConfigStore.instance()
    COMMANDS["forget"] = Changed
    store.store(name="forget_settings", node=defaults(Changed))
    yield
    COMMANDS["forget"] = Forget
    store.store(name="forget_settings", node=defaults(Forget))


def folder_suffix(*words: str) -> str:
    return suffix(given("forget", ["model_family=tiny", *words]))


def test_a_changed_field_changes_all_that_is_said_of_it(changed: None) -> None:
    assert "\nbatch_size: 7 # rows, told otherwise (a whole number of at least 3)\n" in help_text("", "forget")
    with pytest.raises(ValueError, match="^batch_size=2: needs to be a whole number of at least 3$"):
        given("forget", ["batch_size=2"])
    assert (folder_suffix(), folder_suffix("batch_size=7"), folder_suffix("batch_size=4")) == ("", "", "_batch_size=4")


def test_and_as_it_is() -> None:
    assert "\nbatch_size: 4 # rows per process and forward pass (a whole number of at least 1)\n" in help_text("", "forget")
    assert given("forget", ["batch_size=2"]).batch_size == 2
    assert (folder_suffix(), folder_suffix("batch_size=7"), folder_suffix("batch_size=4")) == ("", "_batch_size=7", "")


def test_what_changes_the_weights_is_named_or_in_the_name() -> None:
    """Of forget.py's settings: the others are paths, say where and when to write, or stand in the folder's name already."""
    in_the_name = {
        "model_family",
        "split",
        "lr",
        "num_epochs",
        "weight_decay",
        "hyper_param",
        "method",
        "retain",
        "benchmark",
        "rule",
    }
    paths = {"model_path", "hf_key", "data_path", "forget_data", "retain_data"}
    paths |= {f"columns.{name}" for name in ("question", "answer", "choices", "text")}  # what is in the paths' files
    no_weights = {
        "parallel",
        "save_dtype",
        "plan",
        "plan_for",
        "deterministic",
        "eval.every",
        "keep_last",
        "merge",
        "log_conflict",
    }
    no_weights |= {f"geffect.{name}" for name in ("every", "retain_rows", "instances", "norms", "offload", "monitor")}
    unnamed = {key for key, _ in fields(Forget)} - marked(Forget, "named")
    assert unnamed == in_the_name | paths | no_weights | marked(Forget, "may_differ")


def test_what_may_differ() -> None:
    """When a run goes on; when a folder of results is added to."""
    assert marked(Finetune, "may_differ") == {
        *("save_dir", "output_dir", "debug", "logger", "save_steps", "gradient_checkpointing")
    }
    of_results = {"save_dir", "output_dir", "debug", "batch_size", "tokens_per_batch", "parallel"}
    of_results |= {"model_path", "retain_path"}
    assert marked(Evaluation, "may_differ") == of_results
    scored = {"retain_result", "original_path", "truth_ratio", "epsilon", "method_name", "submitted_by"}
    assert marked(EvalTofu, "may_differ") == of_results | scored
    own = {"ps_p", "similar", "representation", "control", "gradnorm"}
    own |= {f"lm_eval{name}" for name in ("", "_tasks", "_fewshot", "_limit")}
    assert marked(EvalEverything, "may_differ") == of_results | own
    measured = {"model_path_cur", "step", "tokens", "positions", "sweep", "sweep_norms", "batch_size", "parallel"}
    others = {"gradient_checkpointing", "tokens_per_batch", "save_dir", "output_dir", "debug"}
    assert marked(GEffects, "may_differ") == measured | others


def test_every_optimizer_is_a_choice() -> None:
    field = dict(fields(Forget))["optim"]
    assert what(field) == f"one of {', '.join(OPTIMIZERS)}"
