"""What `inspect` and `compare` say of a small bundle made by hand, whose every figure is known."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from ecmfq_export import bundle
from ecmfq_export.bundle_compare import compare, difference
from ecmfq_export.bundle_facts import bundle_facts
from ecmfq_export.cli import main
from ecmfq_export.layer_facts import precision_of
from tests.validate.example_report import example_report


def _graph(path: Path, weights: dict[str, np.ndarray]) -> None:
    value = helper.make_tensor_value_info("x", 1, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [value], [helper.make_tensor_value_info("y", 1, [1])],
                              [numpy_helper.from_array(array, name) for name, array in weights.items()])
    path.parent.mkdir(parents=True)
    path.write_bytes(helper.make_model(graph).SerializeToString())


def make_bundle(root: Path, target: str = "rtx", experts: int = 8, report: dict[str, Any] | None = None, engines: bool = True) -> Path:
    """Four layers: int8 attention of 64 bytes, int4 experts of `experts` bytes, 8 bytes of scales, 4 of norms; an engine of 5 bytes."""
    with bundle.write_stage(root / "onnx", "onnx", {"attention": "onnx24", "sizes": {"max_batch": 4}}, {}) as (work, _):
        layer = {"self_attn.q_proj.weight.qvalue": np.zeros((8, 8), np.int8), "self_attn.q_proj.weight.scale": np.ones(2, np.float32),
                 "mlp.experts.down_proj.qweight": np.zeros(experts, np.int8), "norm.weight": np.zeros(2, np.float16)}  # fmt: skip
        _graph(work / "decoder" / "model.onnx", {f"layers.{i}.{name}": array for i in range(4) for name, array in layer.items()}
               | {"lm_head.weight": np.zeros(5, np.float16)})  # fmt: skip
        _graph(work / "vision" / "model.onnx", {"w": np.zeros(3, np.float32)})
        (work / "embed_tokens.safetensors").write_bytes(b"1234567")
    with bundle.write_stage(root / "report", "validate", {}, {}) as (work, _):
        (work / "report.json").write_text(json.dumps(example_report() if report is None else report))
    if engines:
        with bundle.write_stage(root / "engines" / target, "build", {}, {"plugin_library": "ab" * 32}) as (work, info):
            (work / "decoder.engine").write_bytes(b"12345")
            info["plugin_abi"] = 1
            info["decoder"] = {"bytes": 5, "runtime": "tensorrt_rtx", "runtime_version": "1.7.1.116", "compute_capabilities": [86],
                               "plugin_nodes": [{}, {}], "build": {"seconds": 1.5}}  # fmt: skip
    parts = ["onnx", "report", *([f"engines/{target}"] if engines else [])]
    bundle.write_bundle_manifest(root, parts, {"target": target}, {"engines_built": engines})
    return root


def test_figures_of_a_bundle(tmp_path: Path) -> None:
    facts = bundle_facts(make_bundle(tmp_path / "a"))
    assert facts["target"] == "rtx"
    assert [row["layer"] for row in facts["layers"]] == [0, 1, 2, 3]
    assert facts["layers"][0]["bytes"] == {"int4": 8, "int8": 64, "scales": 8, "float": 4}
    assert (facts["layers"][0]["attention"], facts["layers"][0]["mlp"]) == ("int8", "int4")
    assert [row["sqnr_db"] for row in facts["layers"]] == [30.0, 28.0, 26.0, 24.0]
    assert all(row["errors"] for row in facts["layers"])
    assert facts["outside_layers"] == {"decoder, outside of its layers": 10, "vision tower": 12, "embeddings": 7}
    assert facts["parts"]["engines/rtx"] == {"files": 2, "bytes": 5 + (tmp_path / "a/engines/rtx/manifest.json").stat().st_size}
    assert facts["settings"]["onnx.sizes.max_batch"] == 4
    assert facts["evaluation"]["questions"] == 240
    (engine,) = facts["engines"]
    assert (engine["plugin nodes"], engine["runtime version"], engine["plugin ABI"], engine["bytes"]) == (2, "1.7.1.116", 1, 5.0)


@pytest.mark.parametrize("report", [
    {}, [], "text", {"layers": 5}, {"layers": [5, {"index": "0"}]}, {"accuracy": {"float": []}}, {"logits": None},
    {"quantization": {"layers": [{"layer": 0, "errors": {"a": "b", "c": [None, "x", True]}}]}}, {"retrieval": {"recalls": {"float": 3}}},
])  # fmt: skip
def test_a_report_of_another_form_says_nothing(report: Any, tmp_path: Path) -> None:
    facts = bundle_facts(make_bundle(tmp_path / "a", report=report))
    assert facts["evaluation"] == {}
    assert all(row["sqnr_db"] is None and row["errors"] == {} for row in facts["layers"])


def test_precision_by_name_and_type() -> None:
    int4, int8, half = onnx.TensorProto.INT4, onnx.TensorProto.INT8, onnx.TensorProto.FLOAT16
    assert precision_of("a.weight.qvalue", int8) == "int8"
    assert precision_of("a.weight.qvalue", int4) == "int4"
    assert precision_of("experts.down_proj.qweight", int8) == "int4"
    assert precision_of("a.scale", half) == precision_of("a.multiplier", int8) == "scales"
    assert precision_of("norm.weight", half) == "float"


def test_two_bundles(tmp_path: Path) -> None:
    found = compare(make_bundle(tmp_path / "a"), make_bundle(tmp_path / "b", target="l4", experts=12, engines=False))
    assert [row for row in found.settings if row[0] == "target"] == [("target", "rtx", "l4")]
    assert ("decoder layers, int4", 32, 48) in found.bytes
    assert ("questions", 240.0, 240.0) in found.evaluation
    assert [index for index, _, _ in found.layers] == [0, 1, 2, 3]
    assert compare(tmp_path / "a", tmp_path / "a").settings == []
    assert difference(32, 48) == "+50.00%"
    assert difference(None, 3) == difference(3, 3) == difference("a", "b") == ""


def test_tables_and_pages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = make_bundle(tmp_path / "a"), make_bundle(tmp_path / "b", target="l4", experts=12, engines=False)
    assert main(["inspect", str(a), "--html", str(tmp_path / "a.html")]) == 0
    printed = capsys.readouterr().out
    assert "layers: bytes by precision" in printed and "rtx/decoder" in printed
    assert main(["compare", str(a), str(b), "--html", str(tmp_path / "ab.html")]) == 0
    assert "+50.00%" in capsys.readouterr().out
    assert main(["compare", str(a), str(b), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"][0] == ["target", "rtx", "l4"]
    for name in ("a", "ab"):
        page = (tmp_path / f"{name}.html").read_text()
        assert not re.search(r'(?:src|href)="(?!data:|#)', page), "nothing from outside"
        assert 'aria-label="Bytes by layer"' in page and 'aria-label="Errors by layer"' in page
    page = (tmp_path / "ab.html").read_text()
    assert "+50.00%" in page and "1.7.1.116" in page


def test_hostile_texts_stay_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_bundle(tmp_path / "a", engines=False)
    bundle.write_bundle_manifest(root, ["onnx", "report"], {"target": "<script>alert(1)</script>\x1b[2J[red]"}, {})
    assert main(["inspect", str(root), "--html", str(tmp_path / "a.html")]) == 0
    printed = capsys.readouterr().out
    assert "\x1b[2J" not in printed and "\\x1b[2J[red]" in printed
    assert "<script>" not in (tmp_path / "a.html").read_text()


@pytest.mark.parametrize("arguments", [["inspect", "{a}", "--html", "/no/x.html"], ["compare", "{a}", "{b}"], ["compare", "{b}", "{a}"]])
def test_what_cannot_be_shown(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_bundle(tmp_path / "a", engines=False)
    assert main([text.format(a=tmp_path / "a", b=tmp_path / "b") for text in arguments]) == 2
    assert "Traceback" not in capsys.readouterr().err
