"""The house's order: imports go one way, the top level has the documented scripts, and no file names a machine's path."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import unlearn

MODULES = {"dataloader", "utils"}
SCRIPTS = {"finetune", "forget", "compute_geffect", "evaluation_everything", "tofu_evaluation", "basher1", "basher2"}
SCRIPTS |= {"robustness", "report", "study", "console"}
PACKAGE = sorted((ROOT / "unlearn").rglob("*.py"))
ROOMS = {  # of the package: which others each may import
    "io": set(),
    "models": {"io"},
    "objectives": {"io", "models"},
    "passes": {"io", "models", "objectives"},
    **dict.fromkeys(("training", "geffect", "scores"), {"io", "models", "objectives", "passes"}),
    "attacks": {"io", "models", "objectives", "passes", "training", "scores"},
    "reporting": {"io"},
    "study": {"io", "scores", "reporting"},
}
MOST_LINES, OF_A_SCRIPT = 400, 150
APP = sorted((ROOT / "app").rglob("*.py"))


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def rooms_imported(file: Path) -> set[str]:
    """The rooms of `unlearn` that a file imports, within functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "unlearn" else [node.module]
        found |= {name.split(".")[1] for name in names if name.startswith("unlearn.")}
    return found


def imported(file: Path) -> set[str]:
    """The top-level names of all that a file imports, within functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def tracked() -> list[Path]:
    """The files that git knows or would add."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no git checkout here")
    files = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    return [file for file in files if file.is_file()]


def test_the_top_level_has_the_documented_scripts_only() -> None:
    there = {file.stem for file in ROOT.glob("*.py")}
    assert there >= MODULES | {"finetune", "forget", "basher1", "tofu_evaluation", "evaluation_everything"}
    assert there <= MODULES | SCRIPTS
    assert [str(file) for file in tracked() if file.suffix in (".sh", ".ipynb") and file.parent == ROOT] == []


@pytest.mark.parametrize("file", PACKAGE, ids=name_of)
def test_the_package_imports_no_top_level_module(file: Path) -> None:
    assert imported(file) & (MODULES | SCRIPTS | {"app"}) == set()
    assert imported(file) & {"hydra", "omegaconf", "yaml", "pydantic"} == set()  # no configuration either


@pytest.mark.parametrize("room", ROOMS)
def test_the_rooms_import_one_way(room: str) -> None:
    files = sorted((ROOT / "unlearn" / room).rglob("*.py"))
    assert (ROOT / "unlearn" / room / "__init__.py") in files
    assert {name_of(file): away for file in files if (away := rooms_imported(file) - ROOMS[room] - {room})} == {}


def test_every_room_has_its_place() -> None:
    assert {file.name for file in (ROOT / "unlearn").iterdir() if file.is_dir() and file.name != "__pycache__"} == set(ROOMS)
    assert [file.name for file in (ROOT / "unlearn").glob("*.py")] == ["__init__.py"]
    assert rooms_imported(ROOT / "unlearn/scores/callback.py") == {"io", "objectives", "passes", "scores"}


@pytest.mark.parametrize("old", unlearn.MOVED)
def test_what_moved_is_found_by_its_old_name(old: str) -> None:
    """By scripts written before the rooms, with a warning that names the new one."""
    sys.modules.pop(f"unlearn.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"unlearn.{old} is unlearn.{unlearn.MOVED[old]} now"):
        found = importlib.import_module(f"unlearn.{old}")
    assert found is importlib.import_module(f"unlearn.{unlearn.MOVED[old]}")


def test_an_old_command_is_found(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "unlearn.figures", str(tmp_path)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1].partition(":")[0]) == (2, "unlearn.reporting.figures")


@pytest.mark.parametrize("file", [*APP, *(ROOT / f"{name}.py" for name in sorted(MODULES))], ids=name_of)
def test_what_is_no_script_imports_none(file: Path) -> None:
    assert imported(file) & SCRIPTS == set()


def test_utils_stand_on_the_library_alone() -> None:
    assert imported(ROOT / "utils.py") & ({"app"} | MODULES | SCRIPTS) == set()
    assert rooms_imported(ROOT / "utils.py") == {"io"}


def test_configurations_end_at_the_door() -> None:
    """No function elsewhere takes a DictConfig, and nobody imports what is Hydra's own."""
    files = [*PACKAGE, *APP, *ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py")]
    taking = {name_of(file): functions for file in files if (functions := with_parameter(file, "DictConfig"))}
    assert taking == {"app/compose.py": ["nested"], "app/door.py": ["job"]}
    assert [name_of(file) for file in files if "hydra._internal" in file.read_text()] == []


def with_parameter(file: Path, kind: str) -> list[str]:
    """The functions of a file that have a parameter of that type."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef):
            types = [ast.unparse(arg.annotation) for arg in ast.walk(node.args) if isinstance(arg, ast.arg) and arg.annotation]
            found += [node.name] if any(kind in one for one in types) else []
    return found


def test_files_are_short() -> None:
    files = [*PACKAGE, *APP, *ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py")]
    lines = {name_of(file): len(file.read_text().splitlines()) for file in files}
    assert {name: n for name, n in lines.items() if n > MOST_LINES} == {}
    assert {name: lines[f"{name}.py"] for name in SCRIPTS if lines[f"{name}.py"] > OF_A_SCRIPT} == {}


def test_the_walk_sees_what_is_imported() -> None:
    assert imported(ROOT / "forget.py") >= {"utils", "dataloader", "unlearn", "app"}
    assert imported(ROOT / "app/building.py") >= {"dataloader", "torch", "hydra"}
    assert len(PACKAGE) >= 5


def test_the_command_line_imports_torch_late() -> None:
    """A mistyped command is answered at once: nothing slow is imported on the way to the checks."""
    scripts = sorted(SCRIPTS & {file.stem for file in ROOT.glob("*.py")})
    code = f"import sys, {', '.join(scripts)}; print(sorted({{'torch', 'transformers', 'datasets'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_what_is_installed_has_two_names() -> None:
    """The library, and a folder with all else, whose modules are found by its own command only."""
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^packages = \[(.*?)\]$", text, re.MULTILINE | re.DOTALL)
    assert listed is not None
    assert {name.partition(".")[0] for name in re.findall(r'"(.*?)"', listed[1])} == {"unlearn", "geffect"}
    assert "py-modules" not in text


def test_no_file_names_a_path_of_a_machine() -> None:
    """Results and README included: what is written here means the same on any machine."""
    path = re.compile(rb"(?<![\w.$}/])/(?:work|root|tmp|home|mnt|Users)/\w")
    files = [file for file in tracked() if file.stat().st_size < 5_000_000 and file != Path(__file__).resolve()]
    assert len(files) > 30
    found = [f"{file.relative_to(ROOT)}: {match[0].decode()}" for file in files for match in path.finditer(file.read_bytes())]
    assert found == []
