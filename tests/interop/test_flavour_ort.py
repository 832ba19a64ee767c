"""A GPTQ checkpoint to a bundle for ONNX Runtime alone, the whole way: the library's logits, a report, text, an evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from ecmfq_export import workflow
from ecmfq_export.config import ExportConfig, QuantConfig
from ecmfq_export.errors import BuildError
from ecmfq_export.progress import Silent
from ecmfq_export.target import load_target
from ecmfq_export.validate import onnx_side
from tests.interop.checkpoints import Fixture, make

HELDOUT = Path(__file__).resolve().parents[2] / "examples" / "tiny_vlm" / "heldout"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Fixture, Path, dict]:
    root = tmp_path_factory.mktemp("ort")
    fixture = make("example_gptq", root / "checkpoint")
    report = workflow.export(fixture.path, None, root / "bundle", None, QuantConfig(), ExportConfig(max_seq_len=128), Silent(),
                             evaluation=HELDOUT / "questions.jsonl", limit=24)  # fmt: skip
    return fixture, root / "bundle", report


def test_logits_are_the_library_s(exported: tuple[Fixture, Path, dict]) -> None:
    fixture, bundle, _ = exported
    found = onnx_side.answer_logits(onnx_side.open_session(bundle / "onnx"), fixture.samples)
    for logits, theirs in zip(found, fixture.logits, strict=True):
        wanted = theirs[:-1].numpy()  # of the last token no logits are asked for: nothing follows it
        np.testing.assert_allclose(logits[-len(wanted) :], wanted, atol=1e-3 * np.abs(wanted).max())


def test_what_the_bundle_says(exported: tuple[Fixture, Path, dict]) -> None:
    _, bundle, report = exported
    assert report["passed"] and report["model"]["computes"].startswith("W4A16")
    assert report["logits"]["quantized_vs_onnx"]["kl_max"] < 1e-6 and report["logits"]["float_vs_quantized"]["kl_max"] == 0
    # 4 bits of 16, and a float16 scale and a zero point a channel, a group index a column
    assert 0.25 < report["bytes"]["layers"]["w4a16"]["ratio"] < 0.3
    manifest, runtime = (json.loads((bundle / "onnx" / file).read_text()) for file in ("manifest.json", "runtime.json"))
    assert manifest["config"]["flavour"] == "ort" and manifest["info"]["computes"].startswith("W4A16")
    assert runtime["moe"]["op"] == "QMoE" and "decoder_reference" not in runtime["files"]
    assert not (bundle / "stages").exists() or not list((bundle / "stages").glob("*/manifest.json"))
    graph = onnx.load(bundle / "onnx" / "decoder" / "model.onnx", load_external_data=False)
    kinds = [node.op_type for node in graph.graph.node]
    assert kinds.count("QMoE") == 4 and kinds.count("MatMulNBits") == 16 and not graph.functions
    assert {opset.domain for opset in graph.opset_import} == {"", "com.microsoft"}


def test_it_runs_and_is_evaluated(exported: tuple[Fixture, Path, dict]) -> None:
    fixture, bundle, _ = exported
    question = json.loads((HELDOUT / "questions.jsonl").read_text().splitlines()[0])
    said = workflow.open_generator(bundle).generate(question["question"], [HELDOUT / question["image"]], max_new_tokens=8)
    assert said
    result = workflow.evaluate_model(bundle, HELDOUT / "questions.jsonl", Silent(), reference=fixture.path, limit=12, resamples=0)
    assert result.model["quantized"] and result.model["form"] == "ONNX Runtime"


def test_no_engine_is_built_of_it(exported: tuple[Fixture, Path, dict]) -> None:
    with pytest.raises(BuildError, match="for ONNX Runtime alone"):
        workflow.build_engines(exported[1], load_target("rtx"), Silent())
