"""The command line: Hydra composes, settings are parsed once, and what a user got wrong is one line and exit code 2.

Nothing here imports torch: a mistyped command is answered at once.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from app.compose import GROUPS, check_names, compose, nested, parsed
from app.families import load_families
from app.fields import Settings, fields, flatten, of_groups, what
from app.methods import choices, hint
from app.places import CONFIG
from app.settings import COMMANDS
from app.sweeping import close_sweep, noted, open_sweep
from unlearn.io.signals import Stopped, stop_at_once
from utils import end_processes

NO_COMMAND = ("common", "model_config", "shapes")  # files of config/
VALUED = ("--config-name", "-cn", "--config-path", "-cp", "--config-dir", "-cd", "--package", "-p", "--cfg", "-c")
FLAGS = (
    *("--help", "-h", "--hydra-help", "--version", "--multirun", "-m", "--resolve", "--run", "-r", "--info", "-i"),
    *VALUED,
)


def cli(run: Callable[[Any], Path | None], *commands: type[Settings]) -> None:
    """Run a script on its settings; on those of each job, in a sweep.

    Args:
        run: gives the folder that it has written to.
        commands: the script's settings; the one whose first key the configuration has is meant, the first as a rule.
    """
    config_name: str = commands[0].config  # type: ignore[attr-defined]
    if "WORLD_SIZE" not in os.environ:  # one process: one device, not torch's DataParallel over all
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors reach us
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")  # 1024 kernels, one a shape, would be a GiB on a CPU
    codes: list[int] = []
    sweep: Path | None = None

    @functools.wraps(run)
    def job(config: DictConfig) -> None:  # Hydra would print a line of its own, and stop a sweep
        with noted() as note:
            try:
                command = next((one for one in commands if next(iter(one.model_fields)) in config), commands[0])
                folder = run(parsed(command, check_names(nested(config), HydraConfig.get().runtime.choices)))
                note["folder"] = None if folder is None else str(folder)
            except Exception as error:
                note["error"] = one_line(error, config_name)
                codes.append(report(error, config_name))

    sys.argv[1:] = map(quote, sys.argv[1:])
    stop_at_once()
    try:
        flags, overrides = split_flags(sys.argv[1:])
        sys.argv[1:] = [word for word in sys.argv[1:] if word not in overrides] + overrides  # Hydra refuses them elsewhere
        config_name = flags.config_name or config_name
        if flags.help:
            return print(help_text(sys.modules[run.__module__].__doc__ or "", config_name))
        if flags.multirun:
            sweep = open_sweep(overrides, compose(config_name).get("output_dir", "icml"))
        hydra.main(version_base=None, config_path=str(CONFIG), config_name=config_name)(job)()
    except Stopped as stopped:
        tell(f"{stopped}; the same command goes on from what is saved")
        codes.append(stopped.code)
    except Exception as error:
        codes.append(report(error, config_name))
    if sweep is not None and close_sweep(sweep, tell):
        codes.append(1)
    end_processes(failed=bool(codes))
    if codes:
        sys.exit(max(codes))


def split_flags(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Those of Hydra's flags that matter here, and the settings. Raises ValueError for a flag that it does not have."""

    def refuse(message: str) -> NoReturn:
        raise ValueError(f"{message}; settings are key=value, and flags are Hydra's (--help lists them)")

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = refuse  # type: ignore[method-assign]
    parser.add_argument("--config-name", "-cn")
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--multirun", "-m", action="store_true")
    flags, rest = parser.parse_known_args(words)
    values = {i + 1 for i, word in enumerate(rest) if word in VALUED}
    if rest[-1:] and rest[-1] in VALUED:
        refuse(f"argument {rest[-1]}: expected one argument")
    names = sorted(file.stem for file in CONFIG.glob("*.yaml") if file.stem not in NO_COMMAND)
    if flags.config_name is not None and Path(flags.config_name).stem not in names:
        raise ValueError(f"--config-name={flags.config_name}: unknown; there are {', '.join(names)}")
    for group, value in (word.split("=", 1) for word in rest if word.partition("=")[0] in GROUPS):
        if value in ("", "null"):
            raise ValueError(f"{group}={value}: unknown; there are {', '.join(choices(group))}")
    if strange := [word for word in rest if word.startswith("-") and word.partition("=")[0] not in FLAGS]:
        refuse(f"unrecognized arguments: {' '.join(strange)}")
    return flags, [word for i, word in enumerate(rest) if i not in values and not word.startswith("-")]


def quote(word: str) -> str:
    """key=value as Hydra reads it where the value is a path with a = of its own (.../ga_..._seed=1) or such signs, or a
    regular expression."""
    key, _, value = word.partition("=")
    if key == "trainable" and value != "null" and not re.match(r"['\"]", value):
        return "trainable='" + value.replace("'", "\\'") + "'"
    if "=" not in word or word.startswith("-") or re.match(r"['\"\[{$]", value):
        return word
    if not re.fullmatch(r"[A-Za-z0-9_./:-]*", value) and Path(value).exists():
        return f"{key}='" + value.replace("'", "\\'") + "'"
    return f"{key}=" + ",".join(f"'{part}'" if "=" in part else part for part in value.split(","))


# ---- what is told ----


def help_text(description: str, config_name: str) -> str:
    """What a script does, and every setting with its default, meaning and range."""
    command = COMMANDS[re.sub("_lora$", "", Path(config_name).stem)]
    config = flatten(compose(config_name))
    lines = [description.strip(), ""]
    lines += [f"model_family: {', '.join(load_families())}"] if "model_family" in command.model_fields else []
    lines += [f"{name}: {', '.join(choices(name))}" for name in GROUPS if name in command.model_fields]
    lines += ["", "key: default # meaning (what it needs to be)"]
    keys = {key: field for key, field in [*fields(command), *of_groups(command)] if key in config}
    own = command.__annotations__
    for key in sorted(keys, key=lambda key: key.partition(".")[0] not in own):  # the command's own first
        value, needed = config[key], what(keys[key])
        told = "null" if value is None else str(value).lower() if isinstance(value, bool) else value
        lines.append(f"{key}: {told} # {keys[key].description}" + (f" ({needed})" if needed != "a text" else ""))
    return "\n".join([*lines, "", "--hydra-help: its flags"])


def report(error: Exception, config_name: str) -> int:
    """Print an error as one line and return the exit code: 2 for what a user got wrong. Raises it where `debug=true`."""
    if any(word.lower() == "debug=true" for word in sys.argv):
        raise error
    users = isinstance(error, (ValueError, HydraException, OmegaConfBaseException))
    clear = users or isinstance(error, FloatingPointError | OSError)
    tell(one_line(error, config_name) if clear else f"{type(error).__name__}: {_flat(error)} (debug=true: the traceback)")
    return 2 if users else 1


def tell(line: str) -> None:
    """Print the line once whatever the number of processes."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)


def _flat(error: BaseException) -> str:
    return " ".join(str(error).split())


def one_line(error: Exception, config_name: str) -> str:
    """What a user got wrong, in one line; Hydra's messages with the valid names and without its search path."""
    text = _flat(error)
    if key := re.search(r"Could not override '([^']+)'", text):
        return unknown_key(key[1], compose(config_name))
    if choice := re.search(r"Could not find '(\w+)/([^']*)' Available options in '\w+': (.*?) Config search path", text):
        group, name, options = choice.groups()
        return f"{group}={name}: unknown; there are {', '.join(options.split())}" + (hint(name) if group == "method" else "")
    if isinstance(error, OverrideParseException):
        return f"{error.override}: no setting, which is key=value ({text.partition(' See https')[0]})"
    return f"{text} {_flat(error.__cause__)}" if isinstance(error, HydraException) and error.__cause__ else text


def unknown_key(key: str, config: dict[str, Any]) -> str:
    """The line for a key that does not exist, with those that do, at the nearest place above it."""
    there, parents = config, ""
    for part in key.split(".")[:-1]:
        if not isinstance(there.get(part), dict):
            break
        there, parents = there[part], f"{parents}{part}."
    return f"unknown key '{key}'; {parents.rstrip('.') or 'the configuration'} has {', '.join(there)}"
