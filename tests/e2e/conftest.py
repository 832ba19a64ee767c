"""The trained example, exported once by the command line; every end-to-end test reads that bundle."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "examples" / "tiny_vlm" / "checkpoint"
QUESTIONS = ROOT / "examples" / "tiny_vlm" / "heldout" / "questions.jsonl"


def command_line(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``ecmfq-export`` in a process of its own, as a user does."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run([sys.executable, "-m", "ecmfq_export.cli", *arguments], capture_output=True, text=True, env=environment)


def export_arguments(output: Path) -> list[str]:
    return ["export", str(CHECKPOINT), "--data", str(ROOT / "calib_data"), "--target", "rtx", "-o", str(output),
            "--evaluate", str(QUESTIONS)]


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The bundle's directory and what the command printed."""
    output = tmp_path_factory.mktemp("e2e") / "bundle"
    done = command_line(*export_arguments(output))
    assert done.returncode == 0, done.stderr + done.stdout
    return output, done.stdout


@pytest.fixture(scope="session")
def bundle_dir(exported: tuple[Path, str]) -> Path:
    return exported[0]
