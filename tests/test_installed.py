"""The wheel, in an environment of its own and outside a clone: the scripts' work by `geffect COMMAND`, and the library."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from conftest import ROOT

LEFT_OUT = (".*", "__pycache__", "build", "*.egg-info", "icml", "weight", "_build", "results", "tests")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel; what it depends on is that of this one."""
    folder = tmp_path_factory.mktemp("installed")
    source = shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*LEFT_OUT))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    offline = ["--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "wheel", *offline, "--wheel-dir", str(folder), str(source)], check=True)
    shutil.rmtree(source)
    venv.create(folder / "env", symlinks=True)
    python = folder / "env/bin/python"
    [wheel] = folder.glob("*.whl")
    subprocess.run([*pip, "--python", str(python), "install", *offline[:2], str(wheel)], check=True)
    [packages] = (folder / "env/lib").glob("python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (folder / "work").mkdir()
    return folder


def run(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [str(place / "env/bin" / words[0]), *words[1:]]
    return subprocess.run(command, cwd=place / "work", capture_output=True, text=True)


def test_the_commands_are_the_scripts(place: Path) -> None:
    told = run(place, "geffect")
    scripts = {file.stem for file in ROOT.glob("*.py")} - {"console", "utils", "dataloader"}
    assert told.returncode == 0
    assert {line.split()[0] for line in told.stdout.splitlines() if line.startswith("    ") and "  " in line.strip()} >= scripts
    unknown = run(place, "geffect", "forgot")
    assert unknown.returncode == 2
    assert "forgot: unknown; there are" in unknown.stderr
    assert "is it forget?" in unknown.stderr


def test_help_and_refusals_are_the_scripts_own(place: Path) -> None:
    assert "split: forget10 # the rows to forget" in run(place, "geffect", "forget", "--help").stdout
    refused = run(place, "geffect", "forget", "model_family=tiny", "method=nothing")
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1


def test_the_whole_way_outside_a_clone(place: Path) -> None:
    """Fine-tune, and unlearn by the short way, with the configurations and the sample data that come with it."""
    for words in (
        ["finetune", "model_family=tiny", "num_epochs=1", "save_dir=tuned"],
        ["basher1", "ga", "--model=tiny", "--setting=forget10", "model_path=tuned", "num_epochs=1", "save_dir=run"],
    ):
        done = run(place, "geffect", *words)
        assert done.returncode == 0, done.stderr
    assert json.loads((place / "work/run/logs/losses.json").read_text())["forget"]["end"] > 0


def test_every_room_is_in_it() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    rooms = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "unlearn").rglob("__init__.py")}
    assert rooms == {name for name in packages if name.startswith("unlearn")}


def test_the_library_is_installed(place: Path) -> None:
    code = "import unlearn.geffect as g, pathlib; print(pathlib.Path(g.__file__))"
    done = run(place, "python", "-c", code)
    assert Path(done.stdout.strip()).is_relative_to(place / "env"), done.stderr
