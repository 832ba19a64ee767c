"""Expert weights as inputs of the decoder's engine: built for real without a GPU, and filled over a CPU in the device's place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from ecmfq_export.engine.build import build_engine
from ecmfq_export.engine.bundle_engines import require_weights
from ecmfq_export.engine.device import current_device
from ecmfq_export.engine.engine_file import expect_plugin_nodes
from ecmfq_export.engine.expert_weights import mapped_weights, places, weights_as_inputs
from ecmfq_export.engine.graph_file import load_graph
from ecmfq_export.errors import BuildError, BundleError, UserError
from ecmfq_export.target import load_target
from tests.engine.small_graphs import EXPERTS, HIDDEN, INNER, decoder, profiles

PACKED = [f"layers.{layer}.{name}_qweight" for layer in range(2) for name in ("gate_up", "down")]


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """Two layers with all weights in a file beside the graph."""
    path = decoder(tmp_path / "model.onnx")
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="experts.data", size_threshold=1024)
    return path


def _weight(path: Path, name: str) -> np.ndarray:
    return next(onnx.numpy_helper.to_array(t, str(path.parent)) for t in load_graph(path).graph.initializer if t.name == name)


def test_packed_weights_become_inputs(graph: Path) -> None:
    before = graph.read_bytes()
    model, names = weights_as_inputs(graph)
    assert names == PACKED and graph.read_bytes() == before
    plain = load_graph(graph).graph
    assert [value.name for value in model.graph.input] == [*(value.name for value in plain.input), *PACKED]
    assert {t.name for t in plain.initializer} - {t.name for t in model.graph.initializer} == set(PACKED)
    assert len(model.graph.node) == len(plain.node)


def test_places_and_mapped_arrays(graph: Path) -> None:
    where, arrays = places(graph, PACKED), mapped_weights(graph, PACKED)
    assert where[PACKED[0]]["shape"] == [EXPERTS, 2 * INNER, HIDDEN // 2] and where[PACKED[0]]["file"] == "experts.data"
    for name in PACKED:
        assert isinstance(arrays[name], np.memmap) and arrays[name].dtype == np.int8
        np.testing.assert_array_equal(arrays[name], _weight(graph, name))
        start, size = where[name]["offset"], where[name]["bytes"]
        assert (graph.parent / "experts.data").read_bytes()[start : start + size] == arrays[name].tobytes()


def test_what_cannot_be_inputs(tmp_path: Path, graph: Path) -> None:
    with pytest.raises(BuildError, match="no EcmfqRoutedMoE node with packed weights"):
        weights_as_inputs(decoder(tmp_path / "dense.onnx", moe=False))
    with pytest.raises(BuildError, match="no weight 'layers.9' in a file"):
        places(graph, ["layers.9"])
    with pytest.raises(BundleError, match="float16, the engine takes int8"):
        mapped_weights(graph, ["layers.0.router_weight"])


@pytest.mark.skipif(current_device() is not None, reason="this machine has a GPU: it might build")
def test_targets_that_trtexec_builds_for() -> None:
    require_weights(load_target("rtx"), "inputs")
    require_weights(load_target("jetson-orin"), "engine")
    with pytest.raises(BuildError, match="trtexec leaves expert weights in the engine"):
        require_weights(load_target("jetson-orin"), "inputs")
    with pytest.raises(UserError, match="expert weights 'outside'"):
        require_weights(load_target("rtx"), "outside")


@pytest.mark.tensorrt
def test_an_engine_without_them(graph: Path, library: Path) -> None:
    """The same network but for where weights are: the section of weights is smaller by just these."""
    infos = {}
    for choice in ("engine", "inputs"):
        infos[choice] = build_engine(graph, load_target("l4"), graph.with_name(f"{choice}.engine"), profiles=profiles(graph),
                                     plugin_library=library, expert_weights=choice)
        expect_plugin_nodes(infos[choice], 2)
    assert set(infos["inputs"].io_names) - set(infos["engine"].io_names) == set(PACKED)
    assert infos["inputs"].build["weight_inputs"] == places(graph, PACKED) and "weight_inputs" not in infos["engine"].build
    packed = sum(place["bytes"] for place in places(graph, PACKED).values())
    saved = infos["engine"].sections["WGHT"] - infos["inputs"].sections["WGHT"]
    assert abs(saved - packed) < 0.01 * packed, "a table of their names takes a few bytes"
    assert infos["inputs"].build["memory"] == infos["engine"].build["memory"], "the device needs them all the same"
