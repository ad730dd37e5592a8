"""The pages: README, docs/ and their like. Links lead somewhere, the tree of files is the tree, code compiles."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

import basher1
import report
import study
from app.compose import compose, parsed
from app.door import quote, split_flags
from app.fields import flatten
from app.settings import COMMANDS

TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [*TOP, *sorted(file for file in (ROOT / "docs").rglob("*.md") if "_build" not in file.parts)]
ROOMS = sorted(file.parent.name for file in (ROOT / "unlearn").glob("*/__init__.py"))


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def without_code(text: str) -> str:
    """A page without its code, in which brackets are no links."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE))


def links(text: str) -> Iterator[str]:
    """Where a page's links and images lead that are no addresses."""
    for match in re.finditer(r"\]\(([^)\s]+)\)", without_code(text)):
        if not re.match(r"[a-z]+:", match[1]):
            yield match[1]


def anchors(file: Path) -> set[str]:
    """The headings of a page as GitHub and the site name them."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", file.read_text(), flags=re.DOTALL | re.MULTILINE), re.MULTILINE
    )
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def python_blocks(file: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", file.read_text(), re.DOTALL | re.MULTILINE)


def tree() -> set[str]:
    """The paths that the tree of docs/files.md names: files, and folders with a slash at their end."""
    block = re.search(r"^```\n(.*?)^```$", (ROOT / "docs/files.md").read_text(), re.DOTALL | re.MULTILINE)
    assert block is not None
    found: set[str] = set()
    folders: list[str] = []
    for line in block[1].splitlines():
        names = line.strip().split("  ")[0].split(", ")
        folders = folders[: (len(line) - len(line.lstrip())) // 2]
        found |= {"".join(folders) + name for name in names}
        folders.append(names[0])
    return found


def commands() -> Iterator[list[str]]:
    """The words of every command on a page, from the script on; a sweep's with the first of its values."""
    for file in PAGES:
        blocks = re.findall(r"^```(.*?)\n(.*?)^```$", file.read_text(), re.DOTALL | re.MULTILINE)
        for block in (text for language, text in blocks if language in ("", "bash")):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True) if line.startswith(("python ", "torchrun ")) else []
                script = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
                if words[:1] in (["python"], ["torchrun"]) and script is not None and (ROOT / words[script]).parent == ROOT:
                    words = [word for word in words[script:] if word not in (">", "-m") and not word.startswith("hydra")]
                    yield [re.sub(r"=([^\[,]*),.*", r"=\1", word) for word in words if not word.endswith(".txt")]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_has_settings_that_are_there(words: list[str]) -> None:
    """Whether it also runs, with the tiny model: test_commands.py, test_demo.py and their like."""
    script, *rest = words
    if script in ("report.py", "study.py"):
        assert (report if script == "report.py" else study).parse_args(rest)
        return
    if script.startswith("basher"):
        args = basher1.parse_args(rest)
        config, overrides = "forget", basher1.run_settings(args)
        of_measuring = flatten(compose("forget_ge"))
        overrides += [word for word in args.overrides if script == "basher1.py" or word.partition("=")[0] not in of_measuring]
    else:
        flags, overrides = split_flags([quote(word) for word in rest])
        config = Path(flags.config_name or OF_SCRIPT[script]).stem
    command = COMMANDS[config.removesuffix("_lora")]
    assert parsed(command, compose(config, overrides)) is not None


OF_SCRIPT = {"finetune.py": "finetune", "forget.py": "forget", "compute_geffect.py": "forget_ge"}
OF_SCRIPT |= {"tofu_evaluation.py": "eval_tofu", "evaluation_everything.py": "eval_everything", "robustness.py": "robustness"}


@pytest.mark.parametrize("file", PAGES, ids=name_of)
def test_lines_fit(file: Path) -> None:
    assert [f"{number}: {len(line)}" for number, line in enumerate(file.read_text().split("\n"), 1) if len(line) > 120] == []


def test_the_readme_is_a_screen() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100


@pytest.mark.parametrize("file", PAGES, ids=name_of)
def test_links_lead_somewhere(file: Path) -> None:
    for link in links(file.read_text()):
        path, _, anchor = link.partition("#")
        target = (file.parent / path).resolve() if path else file
        assert target.is_file(), link
        assert target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_reached() -> None:
    """From the README by links, however many."""
    reached, new = set[Path](), {ROOT / "README.md"}
    while new:
        reached |= new
        new = {(file.parent / link.partition("#")[0]).resolve() for file in new for link in links(file.read_text())}
        new = {file for file in new - reached if file.suffix == ".md"}
    assert set(PAGES) - reached == set()


def test_the_tree_of_files_is_the_tree() -> None:
    code = {name for name in tree() if name.endswith(".py")}
    there = [
        *ROOT.glob("*.py"),
        *(ROOT / "unlearn").rglob("*.py"),
        *(ROOT / "app").rglob("*.py"),
        *(ROOT / "benchmarks").glob("*.py"),
        ROOT / "data/make_sample.py",
    ]
    assert code == {name_of(file) for file in there}
    assert {f"unlearn/{room}/" for room in ROOMS} == {name for name in tree() if re.fullmatch(r"unlearn/\w+/", name)}
    assert [name for name in tree() if not (ROOT / name).exists()] == []


def test_every_room_has_its_page() -> None:
    assert sorted(file.stem for file in (ROOT / "docs/api").glob("*.md")) == sorted([*ROOMS, "index"])
    for room in ROOMS:
        named = re.findall(r"^\.\. automodule:: (\S+)$", (ROOT / f"docs/api/{room}.md").read_text(), re.MULTILINE)
        assert named[0] == f"unlearn.{room}"
        assert [name for name in named[1:] if not (ROOT / f"{name.replace('.', '/')}.py").is_file()] == []


@pytest.mark.parametrize("file", [file for file in PAGES if python_blocks(file)], ids=name_of)
def test_code_compiles(file: Path) -> None:
    for number, block in enumerate(python_blocks(file)):
        compile(block, f"{file.name}, block {number}", "exec")


def test_the_library_page_shows_the_public_names() -> None:
    text = "\n".join(python_blocks(ROOT / "docs/library.md"))
    for room, names in {
        "geffect": {"geffect", "GEffectCallback", "meter_of"},
        "scores": {"score_rows", "ScoreCallback"},
        "objectives": {"wga", "Tokens", "Counts", "Loss"},
    }.items():
        lines = re.findall(rf"^from unlearn\.{room} import (.*)$", text, re.MULTILINE)
        assert {name for line in lines for name in line.split(", ")} >= names


def test_the_citation_is_whole() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= cited.keys()
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    assert cited["version"] == version[1]
    names = [author["family-names"] for author in cited["preferred-citation"]["authors"]]
    assert names == ["Wang", "Zhou", "Zhou", "Shin", "Han", "Weinberger"]


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "--fail-on-warning",
        "--keep-going",
        "--quiet",
        "-b",
        "html",
        "docs",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "unlearn.geffect.meter_of" in (tmp_path / "api/geffect.html").read_text()
