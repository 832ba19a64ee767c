"""The command line: help that teaches and is instant, errors in one message with exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ecmfq_export.cli import main

COMMANDS = ("export", "quantize", "import", "build", "validate", "evaluate", "run", "serve", "inspect", "compare", "targets", "doctor")


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert "usage: ecmfq-export " + command in capsys.readouterr().out


def test_help_imports_nothing_heavy() -> None:
    code = ("import sys\nfrom ecmfq_export.cli import main\ntry: main(['export', '--help'])\nexcept SystemExit: pass\n"
            "heavy = {'torch', 'onnx', 'transformers', 'numpy', 'onnxruntime'} & set(sys.modules)\nassert not heavy, heavy")
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_no_command_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "commands:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "nowhere", "-o", "out", "--target", "rtx"], "nowhere"),
        (["export", "nowhere", "-o", "out", "--target", "no-such-target"], "no-such-target"),
        (["export", "nowhere", "-o", "out", "--target", "rtx", "--set", "bits=2"], "bits=2"),
        (["export", "nowhere", "-o", "out"], "export needs --target"),
        (["export", "nowhere", "-o", "out", "--flavour", "ort", "--target", "rtx"], "leave --target out"),
        (["export", "nowhere", "-o", "out", "--flavour", "ort"], "nowhere"),
        (["quantize", "nowhere", "-o", "out", "--method", "rtn"], "nowhere"),
        (["import", "nowhere", "-o", "out"], "nowhere"),
        (["build", "nowhere", "--target", "rtx"], "nowhere"),
        (["inspect", "nowhere"], "nowhere"),
        (["run", "nowhere", "--prompt", "hi"], "nowhere"),
    ],
)
def test_errors_are_one_message(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "ecmfq-export: error:" in error
    assert message in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == [], "an error before any work leaves nothing behind"


def test_targets_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["targets", "--json"]) == 0
    names = {fact["name"] for fact in json.loads(capsys.readouterr().out)}
    assert {"rtx", "jetson-orin", "jetson-thor"} <= names


def test_doctor_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)
    assert all(check["ok"] or check["fix"] for check in checks), "what is missing says how to get it"


def test_inspect_describes_a_graph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import onnx.helper as oh

    value = oh.make_tensor_value_info("x", 1, ["batch", 4])
    graph = oh.make_graph([oh.make_node("Identity", ["x"], ["y"])], "g", [value], [oh.make_tensor_value_info("y", 1, ["batch", 4])])
    (tmp_path / "m.onnx").write_bytes(oh.make_model(graph).SerializeToString())
    assert main(["inspect", "--json", str(tmp_path / "m.onnx")]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["ops"] == {"Identity": 1}
    assert facts["inputs"] == {"x": ["batch", 4]}
    assert main(["inspect", str(tmp_path / "m.onnx")]) == 0
    assert "Identity" in capsys.readouterr().out
