"""The command ``evaluate`` on the trained example: a reference once, then a quantized checkpoint against it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ecmfq_export.cli import main
from ecmfq_export.config import QuantConfig
from ecmfq_export.progress import Silent
from ecmfq_export.stages.quantize import quantize
from tests.e2e.conftest import CHECKPOINT, QUESTIONS

HELDOUT = QUESTIONS.parent
FEW = ["--limit", "40", "--captions", "12", "--candidates", "6", "--resamples", "200"]


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize(CHECKPOINT, None, None, tmp_path_factory.mktemp("rtn") / "quantized", QuantConfig(method="rtn"), Silent())


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("results") / "fp.json"
    assert main(["evaluate", str(CHECKPOINT), "--data", str(HELDOUT), "--json", str(path), *FEW]) == 0
    return path


def test_a_result_holds_every_item(reference: Path) -> None:
    result = json.loads(reference.read_text())
    assert result["metrics"]["vqa"]["all"]["total"] == 40 and len(result["items"]["answers"]["correct"]) == 40
    assert result["metrics"]["vqa"]["all"]["accuracy"] >= 0.85
    assert result["metrics"]["p_yes"]["mean"]["value"] >= 0.8 and len(result["items"]["p_yes"]["scores"]) == 6
    assert result["metrics"]["perplexity"]["answers"]["perplexity"] < 1.5
    assert result["comparison"] is None


def test_against_a_file_and_against_the_model(
    rounded: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", str(rounded), "--data", str(HELDOUT), *FEW, "--tasks", "vqa, p_yes"]
    assert main([*arguments, "--reference", str(reference), "--json", str(tmp_path / "a.json")]) == 0
    printed = capsys.readouterr().out
    assert "answers right (40)" in printed and "a lower bound" in printed and "decisive choices flipped" in printed
    assert main([*arguments, "--reference", str(CHECKPOINT), "--json", str(tmp_path / "b.json")]) == 0
    saved, model = (json.loads((tmp_path / name).read_text())["comparison"] for name in ("a.json", "b.json"))
    assert saved["difference"] == model["difference"] and saved["retention"] == model["retention"]
    assert 0.9 <= saved["retention"]["vqa"]["value"] <= 1.1
    assert 0 < saved["kl_top"]["answers"]["mean"] <= model["kl"]["answers"]["mean"] * 1.001 < 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{model}", "--data", "nowhere"], "no evaluation data at nowhere"),
        (["nowhere", "--data", "{data}"], "no model at nowhere"),
        (["{model}/config.json", "--data", "{data}"], "is a file"),
        (["{model}", "--data", "{data}", "--tasks", "bleu"], "no task 'bleu'"),
        (["{model}", "--data", "{data}", "--limit", "-3"], "limit of -3"),
        (["{model}", "--data", "{data}", "--yes-no", "yes"], "1 different answers"),
        (["{model}", "--data", "{data}", "--yes-no", "yes,absolutely not"], "one token each"),
        (["{model}", "--data", "{data}", "--memory", "0"], "memory limit of 0"),
        (["{model}", "--data", "{data}", "--json", "no/such/dir.json"], "no/such/dir.json cannot be written"),
        (["{model}", "--data", "{data}", "--reference", "{data}/questions.jsonl"], "cannot be read"),
        (["{model}", "--data", "{data}", "--reference", "{reference}", "--limit", "7"], "measured with different data"),
    ],
)
def test_errors_name_what_is_wrong(
    arguments: list[str], message: str, reference: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"model": CHECKPOINT, "data": HELDOUT, "reference": reference}
    assert main(["evaluate", *(a.format(**places) for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert "ecmfq-export: error:" in error and message in error and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_another_tokenizer_is_no_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    shutil.copytree(CHECKPOINT, other)
    (other / "chat_template.jinja").write_text((other / "chat_template.jinja").read_text() + " ")
    assert main(["evaluate", str(CHECKPOINT), "--data", str(HELDOUT), "--reference", str(other)]) == 2
    assert "different chat_template.jinja" in capsys.readouterr().err
