"""TensorRT-RTX parses and builds what the graph package writes: every recipe, both attention forms, logits of one position."""

import dataclasses
from pathlib import Path

import onnx_ir as ir
import pytest

from ecmfq_export.engine.build import build_engine
from ecmfq_export.engine.plugin_library import PluginLibrary, find_plugin_library, read_plugin_library
from ecmfq_export.engine.profiles import profile_shapes
from ecmfq_export.errors import BuildError
from ecmfq_export.graph import ops, pipeline
from ecmfq_export.graph.decoder import emit_decoder
from ecmfq_export.graph.passes.decompose_attention import DecomposeAttentionPass
from ecmfq_export.graph.passes.quantize_experts import QuantizeExpertsPass
from ecmfq_export.graph.passes.quantize_linears import QuantizeLinearsPass
from ecmfq_export.graph.vision import trace_vision
from ecmfq_export.graph.weights import externalize
from ecmfq_export.target import Target, load_target
from tests.graph.checkpoints import quantized_checkpoint
from tests.tiny_glm import make_glm
from tests.tiny_kimi import make_kimi_vl

pytestmark = pytest.mark.tensorrt
pytest.importorskip("tensorrt_rtx")

F16 = ir.DataType.FLOAT16
RANGES = pipeline.dim_ranges(pipeline.Sizes(max_seq_len=64, max_batch=2, max_image_patches=64), 2)


@pytest.fixture(scope="module")
def library() -> PluginLibrary:
    try:
        return read_plugin_library(find_plugin_library())
    except BuildError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def target(library) -> Target:
    """A target of one capability that the library at hand has kernels for: what is tested is the graph."""
    capability = next((sm for sm in (86, 89, 120, 80) if sm in library.compute_capabilities), None)
    if capability is None:
        pytest.skip(f"{library.path} has kernels for {library.compute_capabilities} only")
    return dataclasses.replace(load_target("rtx"), compute_capabilities=(capability,))


FAMILIES = {"Qwen3-VL-MoE": {"mlp_only_layers": [1]}, "Kimi-VL": {"make": make_kimi_vl}, "GLM-4.5V": {"make": make_glm}}
"""Two layers each, one of them dense."""


@pytest.fixture(scope="module", params=FAMILIES)
def models(request, tmp_path_factory):
    return quantized_checkpoint(tmp_path_factory.mktemp("m"), dense=4, lm_head=8, num_hidden_layers=2, **FAMILIES[request.param])


def build(graph: ir.Model, directory: Path, target: Target, library: PluginLibrary):
    externalize(graph, directory, lambda _: "weights.data")
    path = directory / "model.onnx"
    ir.save(graph, path)
    ranges = {name: tuple(values) for name, values in RANGES.items()}
    return build_engine(path, target, directory / "model.engine", profiles=profile_shapes(path, ranges), plugin_library=library.path)


@pytest.mark.parametrize("form", ["opset 24", "decomposed"])
def test_quantized_decoder(models, tmp_path, target, library, form):
    graph = emit_decoder(models[1], 64, F16, "last")
    QuantizeLinearsPass(models[1], F16)(graph)
    QuantizeExpertsPass(models[1])(graph)
    if form == "decomposed":
        DecomposeAttentionPass()(graph)
    engine = build(graph, tmp_path, target, library)
    assert [node.plugin for node in engine.plugin_nodes] == ["EcmfqRoutedMoE"]


def test_floating_point_decoder_builds_with_its_function(models, tmp_path, target, library):
    """No plugin is named EcmfqMoE, so the parser takes the function: the reference graph is the fp16 baseline's engine."""
    graph = emit_decoder(models[0], 64, F16)
    ops.attach_reference_functions(graph)
    assert build(graph, tmp_path, target, library).plugin_nodes == ()


def test_vision_tower(models, tmp_path, target, library):
    graph = trace_vision(models[0].vision_module(), models[0].spec.vision, F16)
    assert build(graph, tmp_path, target, library).plugin_nodes == ()
