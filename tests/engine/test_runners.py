"""The runner interface over ONNX Runtime; the engine's runner says why it cannot run here; doctor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from ecmfq_export.engine.device import current_device
from ecmfq_export.engine.doctor import collect
from ecmfq_export.engine.ort_runner import OrtRunner
from ecmfq_export.engine.runner import Runner
from ecmfq_export.errors import BuildError, UserError
from ecmfq_export.target import load_target


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    value = helper.make_tensor_value_info
    proto = helper.make_graph(
        [helper.make_node("MatMul", ["a", "b"], ["product"]), helper.make_node("Shape", ["product"], ["shape"])], "g",
        [value("a", TensorProto.FLOAT, ["rows", 3]), value("b", TensorProto.FLOAT, [3, 2])],
        [value("product", TensorProto.FLOAT, ["rows", 2]), value("shape", TensorProto.INT64, [2])])
    onnx.save(helper.make_model(proto, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "g.onnx")
    return tmp_path / "g.onnx"


def test_ort_runner(graph: Path) -> None:
    runner = OrtRunner(graph, threads=1)
    assert isinstance(runner, Runner)
    assert runner.input_names == ["a", "b"] and runner.output_names == ["product", "shape"]
    a, b = np.arange(12, dtype=np.float32).reshape(4, 3), np.ones((3, 2), np.float32)
    out = runner.run({"b": b, "a": a})
    assert list(out) == ["product", "shape"]
    np.testing.assert_array_equal(out["product"], a @ b)
    np.testing.assert_array_equal(out["shape"], [4, 2])


@pytest.mark.parametrize(("change", "message"), [
    ({"a": None}, "inputs missing: a"),
    ({"c": np.zeros(1)}, "inputs unknown: c"),
    ({"a": np.zeros((4, 3))}, r"input 'a' is float64\[4, 3\], the graph takes float32"),
    ({"b": np.zeros((3, 3), np.float32)}, r"input 'b' is float32\[3, 3\], the graph takes float32\[3, 2\]"),
    ({"a": np.zeros(3, np.float32)}, r"input 'a' is float32\[3\]"),
])
def test_wrong_feeds(graph: Path, change: dict[str, np.ndarray | None], message: str) -> None:
    feeds = {"a": np.zeros((4, 3), np.float32), "b": np.zeros((3, 2), np.float32), **change}
    with pytest.raises(UserError, match=message):
        OrtRunner(graph).run({name: array for name, array in feeds.items() if array is not None})


def test_graphs_that_onnx_runtime_refuses(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such ONNX file"):
        OrtRunner(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"not a graph")
    with pytest.raises(UserError, match="cannot be read as ONNX"):
        OrtRunner(tmp_path / "bad.onnx")
    value = helper.make_tensor_value_info("a", onnx.TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("NoSuchOperator", ["a"], ["b"])], "g", [value],
                              [helper.make_tensor_value_info("b", onnx.TensorProto.FLOAT, [1])])
    onnx.save(helper.make_model(graph), tmp_path / "unknown.onnx")
    with pytest.raises(UserError, match="cannot load it"):
        OrtRunner(tmp_path / "unknown.onnx")


def test_engine_runner_without_a_gpu(tmp_path: Path) -> None:
    from ecmfq_export.engine.trt_runner import TrtRunner

    if current_device() is not None:
        pytest.skip("this machine has a GPU")
    with pytest.raises(BuildError, match=r"needs a GPU of compute capability \[86, 89, 120\]; found: none"):
        TrtRunner(tmp_path / "x.engine", load_target("rtx"))


def test_doctor_names_what_is_missing_and_how_to_get_it() -> None:
    checks = {check.name: check for check in collect()}
    assert {"python", "torch", "onnxruntime", "tensorrt_rtx", "tensorrt", "plugin library", "nvcc", "GPU", "disk",
            "can build for", "can run engines of"} <= set(checks)
    assert checks["python"].ok and checks["onnxruntime"].ok
    for check in checks.values():
        assert check.detail
        assert check.ok or check.fix, check.name
