"""Bad input through the command line: one clear message, exit code 2, nothing half-written taken for a result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ecmfq_export import bundle
from ecmfq_export.cli import main
from tests.tiny_models import make_qwen3_vl_moe


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3_vl_moe(tmp_path_factory.mktemp("model"))


@pytest.fixture
def checkpoint(pristine: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    copy = tmp_path / "model"
    copy.mkdir()
    for file in pristine.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def _weights(checkpoint: Path) -> Path:
    (path,) = checkpoint.glob("*.safetensors")
    return path


def _edit_tensors(checkpoint: Path, edit) -> None:
    path = _weights(checkpoint)
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def _truncate(checkpoint: Path) -> None:
    path = _weights(checkpoint)
    path.write_bytes(path.read_bytes()[:-1000])


def _missing(checkpoint: Path) -> None:
    _edit_tensors(checkpoint, lambda tensors: tensors.pop("model.language_model.layers.1.mlp.gate.weight"))


def _extra(checkpoint: Path) -> None:
    _edit_tensors(checkpoint, lambda tensors: tensors.update({"model.language_model.layers.0.surprise": torch.ones(3)}))


def _nan(checkpoint: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.language_model.layers.1.mlp.experts.down_proj"][0, 0, 0] = float("nan")

    _edit_tensors(checkpoint, edit)


def _model_type(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["model_type"] = "llava"
    (checkpoint / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "model.safetensors"),
        (_missing, "layers.1.mlp.gate.weight"),
        (_extra, "layers.0.surprise"),
        (_nan, "layers.1.mlp.experts.down_proj"),
        (_model_type, "llava"),
    ],
)
def test_damaged_checkpoints(damage, message: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(checkpoint)
    out = tmp_path / "work" / "quantized"
    assert main(["quantize", str(checkpoint), "-o", str(out), "--method", "rtn"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not out.exists()


def test_an_unknown_target_is_refused_before_any_work(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundle"
    assert main(["export", str(checkpoint), "-o", str(out), "--method", "rtn", "--target", "jetson-nano"]) == 2
    error = capsys.readouterr().err
    assert "jetson-nano" in error
    assert "jetson-orin" in error, "the message names the targets there are"
    assert not out.exists()


def test_a_full_disk(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tmpfs of 300 KB, smaller than the result."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here (needs root): {mounted.stderr.strip()}")
    try:
        out = disk / "quantized"
        assert main(["quantize", str(checkpoint), "-o", str(out), "--method", "rtn"]) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        assert str(disk) in error
        assert "space" in error
        assert not out.exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def _tree(root: Path) -> dict[str, str]:
    return {p.relative_to(root).as_posix(): bundle.sha256_file(p) for p in sorted(root.rglob("*")) if p.is_file()}


def test_kill_in_the_middle_of_quantize_then_resume(tmp_path: Path) -> None:
    """kill -9 after the first finished layer; the second run keeps it and ends with the same bytes as an undisturbed one."""
    checkpoint = make_qwen3_vl_moe(tmp_path / "model", num_hidden_layers=6)
    command = [sys.executable, "-m", "ecmfq_export.cli", "quantize", str(checkpoint), "--method", "rtn", "-o"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    whole = tmp_path / "whole" / "quantized"
    subprocess.run([*command, str(whole)], check=True, capture_output=True, env=environment)

    out = tmp_path / "killed" / "quantized"
    partial = bundle.partial_dir(out)
    process = subprocess.Popen([*command, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    deadline = time.monotonic() + 120
    while not list(partial.glob("*.safetensors")) and process.poll() is None:
        assert time.monotonic() < deadline, "no layer was finished in two minutes"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {p.name: p.stat().st_mtime_ns for p in partial.glob("*.safetensors")}
    if out.exists():
        pytest.skip("the run ended before it could be killed")
    assert kept, "a finished layer was on disk when the run was killed"

    subprocess.run([*command, str(out)], check=True, capture_output=True, env=environment)
    assert _tree(out) == _tree(whole)
    unchanged = [name for name, stamp in kept.items() if (out / name).is_file() and (out / name).stat().st_mtime_ns == stamp]
    assert unchanged, "finished layers are kept, not made again"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "group_size=128"], "group_size = 128"),
        (["--max-seq-len", "1000000"], "max_seq_len = 1000000"),
        (["--max-batch", "1000"], "max_batch = 1000"),
        (["--evaluate", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_what_a_later_stage_would_refuse_is_refused_first(
    arguments: list[str], message: str, pristine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundle"
    assert main(["export", str(pristine), "-o", str(out), "--target", "rtx", "--method", "rtn", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
