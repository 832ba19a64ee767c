"""The page for users: its client snippet runs, its curl request is answered, its options exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.serve.traffic import picture
from ecmfq_export.cli import main
from tests.server.raw_http import post

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")


def _for(server, text: str) -> str:
    return text.replace("http://127.0.0.1:8000", server.url).replace('"bundle"', '"tiny"')


def test_the_client_snippet(server, generator, tmp_path):
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    picture(1).save(tmp_path / "photo.png")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, "-c", _for(server, snippet)], cwd=tmp_path, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    text = generator.generate("Describe the image.", [tmp_path / "photo.png"], max_new_tokens=64)
    assert done.stdout.decode().replace("\r", "").count(text.replace("\r", "")) == 2, "whole and streamed"


def test_the_curl_request(server, tmp_path):
    picture(1).save(tmp_path / "photo.png")
    document = re.search(r"<<JSON\n(.*?)\n    JSON", PAGE, re.DOTALL)[1]
    shell = subprocess.run(["bash", "-c", f"cat <<JSON\n{_for(server, document)}\nJSON"], cwd=tmp_path, capture_output=True, check=True)
    status, _, answer = post(server.url, shell.stdout)
    assert status == 200 and answer["usage"]["completion_tokens"] > 0


def test_every_option_exists(capsys):
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    text = capsys.readouterr().out
    for option in set(re.findall(r"--[a-z][a-z-]+", PAGE)):
        assert option in text or option == "--target", option
