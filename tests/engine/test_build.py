"""Real engines, built without a GPU by TensorRT-RTX, and what must be refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ecmfq_export.engine.build import build_engine
from ecmfq_export.engine.engine_file import EngineInfo, expect_plugin_nodes, read_engine_file
from ecmfq_export.engine.plugin_library import read_plugin_library
from ecmfq_export.errors import BuildError
from ecmfq_export.target import load_target
from tests import aarch64
from tests.engine.small_graphs import CACHE, EXPERTS, HIDDEN, INNER, TOP_K, decoder, profiles

pytestmark = pytest.mark.tensorrt


def _build(graph: Path, library: Path | None, target: str = "l4") -> EngineInfo:
    return build_engine(graph, load_target(target), graph.with_suffix(".engine"), profiles=profiles(graph), plugin_library=library,
                        log_path=graph.with_suffix(".log"))


def test_engine_for_three_architectures_holds_both_plugin_layers(built: tuple[Path, EngineInfo], library: Path) -> None:
    path, info = built
    assert info.compute_capabilities == (86, 89, 120)
    expect_plugin_nodes(info, 2)
    assert sorted(node.layer for node in info.plugin_nodes) == ["layers.0.moe", "layers.1.moe"]
    for node in info.plugin_nodes:
        assert node.fields == {"abi_version": 1, "num_experts": EXPERTS, "top_k": TOP_K, "hidden_size": HIDDEN, "group_size": -1,
                               "intermediate_size": INNER, "activation": 0, "weight_layout": 0, "checksum": node.fields["checksum"]}
    assert info.plugin_library_sha256 == read_plugin_library(library).sha256
    assert info.io_names[:3] == ("hidden", "mask", "write_indices") and "layers.1.present_v" in info.io_names
    assert json.loads(json.dumps(dataclasses.asdict(info)))["bytes"] == path.stat().st_size
    # The same again from the file alone.
    assert dataclasses.replace(read_engine_file(path), build=info.build) == info


def test_build_log_names_the_plugin_layers(built: tuple[Path, EngineInfo]) -> None:
    """TensorRT's own log, as a second witness besides the engine's bytes."""
    lines = (built[0].parent / "build.log").read_text().splitlines()
    for layer in ("layers.0.moe", "layers.1.moe"):
        assert any(line.endswith(f"PLUGIN_V3 {layer}") for line in lines), layer
    assert sum("LayerType: custom_layer" in line for line in lines) == 2


@pytest.mark.parametrize(("target", "capability"), [("l4", 89), ("a100", 80)])
def test_other_targets(tmp_path: Path, library: Path, target: str, capability: int) -> None:
    info = _build(decoder(tmp_path / "model.onnx", layers=1), library, target)
    assert info.compute_capabilities == (capability,) and len(info.plugin_nodes) == 1


def test_group_multipliers_and_the_library_beside(small: tuple[Path, EngineInfo]) -> None:
    """As on-device targets have it: no library in the engine, measured times kept in a file (TensorRT-RTX keeps none in it)."""
    path, info = small
    assert info.compute_capabilities == (120,)
    assert [node.fields["group_size"] for node in info.plugin_nodes] == [128]
    assert info.plugin_library_sha256 == ""
    assert (path.parent / "timing.cache").is_file()


def test_library_of_the_device_s_platform_is_embedded(tmp_path: Path, library: Path) -> None:
    """The DGX Spark is an aarch64 machine: its engine holds the library for that, and a library for this machine is refused."""
    cross = aarch64.library()
    graph, target = decoder(tmp_path / "model.onnx", layers=1), load_target("dgx-spark")
    info = build_engine(graph, target, tmp_path / "decoder.engine", profiles=profiles(graph), plugin_library=library,
                        device_library=cross.path)
    assert info.compute_capabilities == (121,) and info.plugin_library_sha256 == cross.sha256
    with pytest.raises(BuildError, match="is for linux-x86_64, the devices of target 'dgx-spark' are linux-aarch64"):
        build_engine(graph, target, tmp_path / "x.engine", profiles=profiles(graph), plugin_library=library)


def test_graph_without_the_plugin_is_noticed(tmp_path: Path) -> None:
    info = _build(decoder(tmp_path / "model.onnx", moe=False), None)
    assert info.plugin_nodes == () and info.num_custom_layers == 0 and info.plugin_library_sha256 == ""
    expect_plugin_nodes(info, 0)
    with pytest.raises(BuildError, match=r"holds 0 EcmfqRoutedMoE layers of 0 plugin layers, expected 2; found: none"):
        expect_plugin_nodes(info, 2)


def test_without_a_library(tmp_path: Path) -> None:
    graph = decoder(tmp_path / "model.onnx", layers=1)
    with pytest.raises(BuildError, match="1 EcmfqRoutedMoE nodes and no plugin library"):
        _build(graph, None)
    with pytest.raises(BuildError, match="cannot be read"):
        _build(graph, tmp_path / "libecmfq_plugin.so")
    (tmp_path / "broken.so").write_bytes(b"\x7fELF" + bytes(100))
    with pytest.raises(BuildError, match="not a 64-bit shared object"):
        _build(graph, tmp_path / "broken.so")
    assert not list(tmp_path.glob("*.engine*"))


def test_device_targets_say_where_to_build(tmp_path: Path, library: Path) -> None:
    from ecmfq_export.engine.device import current_device

    if current_device() is not None:
        pytest.skip("this machine has a GPU")
    for target, capability in (("jetson-orin", 87), ("h100", 90)):
        with pytest.raises(BuildError, match=rf"compute capability {capability}; none was found\n.*ecmfq-export build BUNDLE"):
            _build(decoder(tmp_path / "model.onnx", layers=1), library, target)


def _replace(graph: onnx.GraphProto, name: str, array: np.ndarray) -> None:
    for tensor in graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(numpy_helper.from_array(array, name))


def _attribute(graph: onnx.GraphProto, name: str, value: object) -> None:
    node = next(node for node in graph.node if node.op_type == "EcmfqRoutedMoE")
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend(kept + ([helper.make_attribute(name, value)] if value is not None else []))


def _ids_as_int64(graph: onnx.GraphProto) -> None:
    next(node for node in graph.node if node.op_type == "EcmfqRoutedMoE").input[1] = "layers.0.topk_int64"


def _too_few_inputs(graph: onnx.GraphProto) -> None:
    del next(node for node in graph.node if node.op_type == "EcmfqRoutedMoE").input[6]


REFUSED: dict[str, tuple[Callable[[onnx.GraphProto], None], str]] = {
    "attribute value": (lambda g: _attribute(g, "top_k", 9), "attribute 'top_k' is 9; allowed: 1 to 8"),
    "attribute string": (lambda g: _attribute(g, "activation", "gelu"), "attribute 'activation' is 'gelu'; allowed: 'silu_glu'"),
    "attribute missing": (lambda g: _attribute(g, "hidden_size", None), "attribute 'hidden_size' is missing"),
    "other ABI": (lambda g: _attribute(g, "abi_version", 7), "attribute 'abi_version' is 7; allowed: 1"),
    "group mode without multipliers": (lambda g: _attribute(g, "group_size", 128), "7 inputs and 1 outputs; allowed: 9 inputs"),
    "type of scales": (lambda g: _replace(g, "layers.0.down_scale", np.zeros((EXPERTS, HIDDEN), np.float16)),
                       "input 6 'down_scale' has type float16; allowed: float32"),
    "type of ids": (_ids_as_int64, "input 1 'topk_ids' has type int64; allowed: int32"),
    "shape of weights": (lambda g: _replace(g, "layers.0.gate_up_qweight", np.zeros((EXPERTS, 2 * INNER, HIDDEN), np.int8)),
                         f"input 3 'gate_up_qweight' has shape [{EXPERTS}, {2 * INNER}, {HIDDEN}]; allowed: [num_experts, 2 * "),
    "rank of scales": (lambda g: _replace(g, "layers.0.gate_up_scale", np.zeros((EXPERTS, 2 * INNER, 1), np.float32)),
                       "input 4 'gate_up_scale' has rank 3; allowed: 2"),
    "input missing": (_too_few_inputs, "6 inputs and 1 outputs; allowed: 7 inputs"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_plugin_refuses_with_node_and_reason(tmp_path: Path, library: Path, case: str) -> None:
    """What comes out of build_engine names the node, the field, what was seen and what is allowed."""
    change, message = REFUSED[case]
    with pytest.raises(BuildError) as caught:
        _build(decoder(tmp_path / "model.onnx", layers=1, change=change), library)
    assert f"EcmfqRoutedMoE node 'layers.0.moe': {message}" in caught.value.what
    assert "driver version" not in caught.value.what, "noise of a machine without a GPU"
    assert not list(tmp_path.glob("*.engine*"))
    assert (tmp_path / "model.log").is_file()


def test_sizes_that_no_kernel_tiles(tmp_path: Path, library: Path) -> None:
    """hidden_size 130 passes the operator's rules; the kernels refuse it, in a sentence."""
    value = helper.make_tensor_value_info
    weights = {"guq": np.zeros((2, 4, 65), np.int8), "gus": np.zeros((2, 4), np.float32), "dq": np.zeros((2, 130, 1), np.int8),
               "ds": np.zeros((2, 130), np.float32)}
    node = helper.make_node("EcmfqRoutedMoE", ["x", "ids", "w", *weights], ["y"], name="odd", domain="ecmfq", num_experts=2, top_k=1,
                            hidden_size=130, intermediate_size=2, activation="silu_glu", group_size=-1, weight_layout="row_major",
                            abi_version=1)
    inputs = [value("x", TensorProto.FLOAT16, [4, 130]), value("ids", TensorProto.INT32, [4, 1]), value("w", TensorProto.FLOAT, [4, 1])]
    graph = helper.make_graph([node], "odd", inputs, [value("y", TensorProto.FLOAT16, [4, 130])],
                              [numpy_helper.from_array(array, name) for name, array in weights.items()])
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("ecmfq", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "model.onnx")
    with pytest.raises(BuildError, match=r"node 'odd': the kernels refuse num_tokens 4, .*hidden_size 130"):
        _build(tmp_path / "model.onnx", library)


def test_parser_errors_name_the_node(tmp_path: Path, library: Path) -> None:
    def spoil(graph: onnx.GraphProto) -> None:
        graph.node[0].op_type = "NoSuchOperator"

    with pytest.raises(BuildError, match=r"node 'layers.0.q_MatMul' \(NoSuchOperator\)"):
        _build(decoder(tmp_path / "model.onnx", layers=1, change=spoil), library)


def test_profiles_are_checked(tmp_path: Path, library: Path) -> None:
    graph = decoder(tmp_path / "model.onnx", layers=1)
    good = profiles(graph)

    def attempt(changed: dict[str, object]) -> None:
        build_engine(graph, load_target("l4"), tmp_path / "x.engine", profiles=changed, plugin_library=library)  # type: ignore[arg-type]

    with pytest.raises(BuildError, match="dynamic inputs without a profile: mask"):
        attempt({name: shapes for name, shapes in good.items() if name != "mask"})
    with pytest.raises(BuildError, match="profiles without an input: masks"):
        attempt({**good, "masks": good["mask"]})
    low, opt, high = good["hidden"]
    with pytest.raises(BuildError, match="min <= opt <= max"):
        attempt({**good, "hidden": (high, opt, low)})


def test_local_function_of_the_plugins_name(tmp_path: Path, library: Path) -> None:
    graph = decoder(tmp_path / "model.onnx", layers=1)
    model = onnx.load(graph)
    body = [helper.make_node("Identity", ["x"], ["y"])]
    model.functions.append(helper.make_function("ecmfq", "EcmfqRoutedMoE", ["x"], ["y"], body, [helper.make_opsetid("", 24)]))
    onnx.save(model, graph)
    with pytest.raises(BuildError, match="local function 'EcmfqRoutedMoE'"):
        _build(graph, library)


def test_too_large_for_the_target(tmp_path: Path, library: Path) -> None:
    target = load_target("l4")
    small = dataclasses.replace(target, limits=dataclasses.replace(target.limits, memory_bytes=100_000))
    graph = decoder(tmp_path / "model.onnx")
    with pytest.raises(BuildError, match=r"target 'l4' has 0.00 GiB, the engine needs .* weights .* KV cache .* scratch"):
        build_engine(graph, small, tmp_path / "x.engine", profiles=profiles(graph), plugin_library=library)


def test_memory_is_counted(tmp_path: Path) -> None:
    from ecmfq_export.engine.memory import memory_needs

    graph = decoder(tmp_path / "model.onnx", layers=2)
    needs = memory_needs(graph, profiles(graph))
    head = HIDDEN // 4
    assert needs.kv_cache == 2 * 2 * (2 * 2 * CACHE * head) * 2  # layers, K and V, batch, heads, bytes
    expert_bytes = EXPERTS * (2 * INNER * HIDDEN + HIDDEN * INNER) // 2
    assert needs.weights > 2 * expert_bytes
    assert needs.io == 2 * (2 * 32 * HIDDEN) * 2 + 2 * 32 * CACHE * 2 + 2 * 8  # hidden, logits, mask, write_indices
