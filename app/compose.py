"""From Hydra's YAML and overrides to settings: here, and nowhere below, is a configuration that is not typed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf, open_dict

from app.attack_settings import Robustness
from app.benchmark import Benchmark
from app.fields import Number, Settings, check_value, defaults, flatten, parse, unknown
from app.methods import RETAINED
from app.places import CONFIG
from app.settings import COMMANDS, OF_OPEN, Method, Retain, Rule

OPEN: dict[str, type[Settings]] = {"method": Method, "retain": Retain, "rule": Rule}
GROUPS = ("benchmark", *OPEN)

OmegaConf.register_new_resolver(
    "hyper", lambda default, *, _root_: default if _root_.hyper_param is None else _root_.hyper_param, replace=True
)
OmegaConf.register_new_resolver(
    "layers", lambda found: "-".join(map(str, found)) if isinstance(found, Sequence) else str(found), replace=True
)
COMMANDS[Robustness.config] = Robustness
for _name, _group in COMMANDS.items():  # what their YAML begins with
    ConfigStore.instance().store(name=f"{_name}_settings", node=defaults(_group))


def compose(config_name: str, overrides: list[str] | None = None) -> dict[str, Any]:
    """What Hydra composes, nested, inside a Hydra job or outside. Raises ValueError where a group is not called as its file."""
    if not GlobalHydra.instance().is_initialized():
        with initialize_config_dir(str(CONFIG), version_base=None):
            return compose(config_name, overrides)
    found = hydra_compose(config_name, overrides, return_hydra_config=True)
    choices = dict(found.hydra.runtime.choices)
    with open_dict(found):
        del found["hydra"]
    return check_names(nested(found), choices)


def nested(config: DictConfig) -> dict[str, Any]:
    """With interpolations resolved."""
    found: Any = OmegaConf.to_container(config, resolve=True)
    return found


def check_names(found: dict[str, Any], choices: Mapping[str, Any]) -> dict[str, Any]:
    """What was composed.

    Args:
        choices: the file of each group.

    Raises:
        ValueError: a group has another `name` than its file: folders and records would say what nobody has asked for.
    """
    for key in GROUPS:
        file, group_of = str(choices.get(key)).removesuffix(".yaml"), found.get(key)
        if isinstance(group_of, dict) and group_of.get("name") != file:
            raise ValueError(f"{key}={file}: its name is {group_of.get('name')}; needs to be {file}, as its file is called")
    return found


def given(config_name: str, overrides: list[str] | None = None) -> Any:
    """A command's settings as they are given, nothing filled in. Raises ValueError for what does not fit."""
    return parsed(COMMANDS[config_name], compose(config_name, overrides))


@cache
def group(name: str, choice: str, *overrides: str) -> dict[str, Any]:
    """A group's YAML (of `GROUPS`); to be read only, for it is composed once."""
    found: dict[str, Any] = compose("forget", [f"{name}={choice}", *overrides])[name]
    return found


def parsed(command: type[Settings], config: dict[str, Any]) -> Any:
    """The command's settings of what was composed.

    Raises:
        ValueError: it was composed for another command, a key is unknown, or a value does not fit.
    """
    name = getattr(command, "config")  # noqa: B009
    if "method" in config and "method" not in command.model_fields:
        raise ValueError(f"the configuration is forget's: is --config-name={name} meant?")
    by_file = {key for key in command.model_fields if key in GROUPS}
    absent = by_file if name not in ("forget", "finetune") else set()  # taken from a run
    if lacking := [key for key in command.model_fields if key not in config and key not in absent]:
        lacking.sort(key=lambda key: key not in by_file)
        raise ValueError(f"the configuration lacks {', '.join(lacking)}: is --config-name={name} meant?")
    for key in by_file & config.keys():
        if not isinstance(config[key], dict):
            raise ValueError(f"{key}={config[key]}: is a group of settings, config/{key} has them")
        check_open(key, config[key])
    return parse(command, config)


def check_open(name: str, found: dict[str, Any]) -> None:
    """Raises ValueError where a group has keys that its YAML does not have, or a value of another type than there.

    A benchmark is as its YAML has it: of a run its name alone is noted.
    """
    if name == "benchmark":
        parse(Benchmark, found, name)
        here, there = flatten(found), flatten(group(name, found["name"]))
        if changed := [key for key in {**there, **here} if here.get(key) != there.get(key)]:
            raise ValueError(
                f"{name}.{changed[0]}={here.get(changed[0])}: is set in the YAML of {name}={found['name']}, not here"
            )
        return
    hyper = [f"method={found['name']}"] if name == "retain" and found["name"] in RETAINED else []
    fields = OPEN[name].model_fields
    of_file = flatten(group(name, str(found["name"]), *hyper))
    for key, value in flatten(found).items():
        if key in fields:
            continue  # it has its own check
        if key not in of_file:
            parent = key.rpartition(".")[0]
            beside = [k for k in of_file if k.startswith(f"{parent}." if parent else "")]
            names = list(dict.fromkeys(k.partition(".")[0] for k in beside))
            raise ValueError(unknown(f"{name}.{key}", names) + owners(name, key))
        kind = OF_OPEN.get(key.rpartition(".")[2]) or like(of_file[key])
        if kind is not None:
            check_value(f"{name}.{key}", value, kind)


def owners(name: str, key: str) -> str:
    """Which of a group's YAMLs have the key."""
    files = sorted(file.stem for file in (CONFIG / name).glob("*.yaml"))
    having = [choice for choice in files if key in flatten(group(name, choice))]
    return f"; {name}={'|'.join(having)} has {key}" if having else ""


def like(default: Any) -> Any:
    """The type of a method's own key: its default's."""
    return bool if isinstance(default, bool) else Number if isinstance(default, int | float) else str if default else None
