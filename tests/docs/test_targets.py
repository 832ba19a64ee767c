"""docs/targets.md is what the targets' files say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ecmfq_export.cli import main
from ecmfq_export.target import list_targets

PAGE = Path(__file__).parents[2] / "docs" / "targets.md"


def test_the_page_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["targets", "--markdown"]) == 0
    assert capsys.readouterr().out == PAGE.read_text(encoding="utf-8"), "run: ecmfq-export targets --markdown > docs/targets.md"


def test_every_target_and_every_field_is_there() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert re.findall(r"^## ([a-z0-9-]+)$", text, re.MULTILINE) == list_targets()
    fields = text.split("## Fields")[1].split("\n## ")[0]
    listed = set(re.findall(r"^- `([\w.]+)`: \S", fields, re.MULTILINE))
    assert set(re.findall(r"^\| `([\w.]+)` \|", text, re.MULTILINE)) | {"name", "description"} == listed
