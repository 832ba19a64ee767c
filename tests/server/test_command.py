"""The command `serve` as a user starts and stops it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ecmfq_export.cli import main
from tests.server.raw_http import body, post

ROOT = Path(__file__).resolve().parents[2]


def test_start_ask_stop(bundle_dir, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("the-key\n")
    command = [sys.executable, "-m", "ecmfq_export.cli", "serve", str(bundle_dir), "--port", "0", "--api-key-file", str(keys),
               "--max-new-tokens", "5", "--threads", "1"]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        url = re.fullmatch(r"serving tiny at (http://127\.0\.0\.1:\d+)/v1 with an API key; Ctrl-C stops\n", line)
        if url is None:
            process.kill()
            pytest.fail(line + process.stderr.read())
        assert post(url[1], body())[0] == 401
        assert post(url[1], body(), {"Authorization": "Bearer the-key"})[0] == 200
        status, _, answer = post(url[1], body(max_tokens=6), {"Authorization": "Bearer the-key"})
        assert status == 400 and "limit is 5" in answer["error"]["message"]
        assert "the-key" not in Path(f"/proc/{process.pid}/cmdline").read_text()
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, log
    assert "POST /v1/chat/completions 200" in log and "stopping" in log and "Traceback" not in log


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--port", "0"], "nowhere"),
        (["nowhere", "--host", "0.0.0.0"], "--api-key-file or ECMFQ_API_KEY"),
        (["nowhere", "--queue", "-1"], "--queue -1 is out of range"),
        (["nowhere", "--model-name", "a b"], "--model-name"),
        (["nowhere", "--api-key-file", "none"], "no API key can be read"),
    ],
)
def test_errors_come_before_any_work(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["serve", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_engines_need_a_build(bundle_dir, capsys):
    assert main(["serve", str(bundle_dir), "--port", "0", "--target", "rtx"]) == 2
    assert os.path.join("engines", "rtx") in capsys.readouterr().err


def test_missing_packages_are_named(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("ecmfq_export.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["serve", "nowhere"]) == 2
    assert "pip install 'ecmfq-export[serve]'" in capsys.readouterr().err
