"""README says what is there: its tree names every source file, its links and commands lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ecmfq_export.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _listed() -> set[str]:
    """Paths of the tree's lines: two spaces of indentation a level; a nested folder ends in a slash."""
    found, folders = set(), {}
    for line in README.split("## The tree\n")[1].splitlines():
        if match := re.match(r"    ( *)(\S+) ", line):
            level, name = len(match[1]) // 2, match[2]
            parent = folders.get(level - 1, "")
            if name.endswith("/"):
                folders[level] = parent + name
            else:
                found.add(parent + name)
    return found


def test_the_tree_names_every_source_file() -> None:
    there = {p.relative_to(ROOT).as_posix() for folder in ("ecmfq_export", "plugins") for p in (ROOT / folder).rglob("*")
             if p.suffix in (".py", ".cu", ".cuh", ".cpp", ".h", ".cmake") or p.name == "CMakeLists.txt"}
    there = {path for path in there if not path.endswith("__init__.py")}
    listed = {path for path in _listed() if path.startswith(("ecmfq_export/", "plugins/"))}
    assert listed == there


def test_links_lead_to_files() -> None:
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", README):
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_the_two_commands_are_there() -> None:
    for script in re.findall(r"^    bash (\S+)", README, re.MULTILINE):
        assert (ROOT / script).is_file(), script


@pytest.mark.parametrize("line", sorted(set(re.findall(r"^    ecmfq-export (.+)$", README, re.MULTILINE))))
def test_options_that_are_shown_exist(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = line.split("#")[0].split()
    with pytest.raises(SystemExit):
        main([command[0], "--help"])
    text = capsys.readouterr().out
    for option in (word for word in command[1:] if word.startswith("-")):
        assert option in text, option
