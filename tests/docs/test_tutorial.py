"""The tutorial's commands: those that say so are run here, one after the other; of the others only the form is checked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.commands import Block, blocks, parse

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "tutorial.md"
RUN, NETWORK, JETSON = "runs in a test", "needs a network", "needs a Jetson"
BLOCKS = blocks(PAGE)


def test_every_block_is_marked_and_every_mark_is_explained() -> None:
    assert {block.mark for block in BLOCKS} == {RUN, NETWORK, JETSON}
    for mark in (RUN, NETWORK, JETSON):
        assert f"- **{mark}**:" in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.text.splitlines()[0][:60])
def test_form(block: Block) -> None:
    """bash can parse it, and our own commands and options exist."""
    subprocess.run(["bash", "-n", "-c", block.text], check=True)
    for arguments in block.own_commands():
        assert parse(arguments).command == arguments[0]


def test_a_wrong_option_would_be_found() -> None:
    with pytest.raises(SystemExit):
        parse(Block(JETSON, "ecmfq-export build ./bundle --no-such-option").own_commands()[0])


def test_the_tutorial_from_top_to_bottom(tmp_path: Path) -> None:
    """Every block that says so, in one shell, in a directory that looks like the repository's root."""
    for name in ("examples", "calib_data"):
        (tmp_path / name).symlink_to(ROOT / name)
    tools = tmp_path / "bin"
    tools.mkdir()
    command = tools / "ecmfq-export"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ecmfq_export.cli "$@"\n')
    command.chmod(0o755)
    script = "\n".join(block.text for block in BLOCKS if block.mark == RUN)
    environment = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    for name in ("bundle/manifest.json", "bundle.html", "compare.html", "bundle/report/report.html", "bundle/onnx/decoder/model.onnx"):
        assert (tmp_path / name).is_file(), name
    assert "GFLOP/s" in done.stdout, "the plan"
    assert "settings that differ" in done.stdout
