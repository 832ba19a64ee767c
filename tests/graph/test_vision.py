"""The traced vision graph equals transformers' tower for mixed image sizes in one call."""

import numpy as np
import onnx_ir as ir
import pytest
import torch

from ecmfq_export.errors import CheckpointError, UnsupportedError
from ecmfq_export.graph.vision import hosted_tower, trace_vision
from ecmfq_export.runtime.host_inputs import vision_inputs
from tests.graph.helpers import session, spec_of
from tests.tiny_models import build_qwen3_vl_moe, qwen3_vl_moe_config


@pytest.fixture(scope="module")
def tower():
    model = build_qwen3_vl_moe(qwen3_vl_moe_config(vision={"depth": 3, "deepstack_visual_indexes": [0, 2]}))
    return model.model.visual, spec_of(model).vision


@pytest.fixture(scope="module")
def graph(tower) -> ir.Model:
    return trace_vision(*tower, ir.DataType.FLOAT)


@pytest.fixture(scope="module")
def runner(graph):
    return session(graph, reference=False)


@pytest.mark.parametrize("grids", [[[1, 4, 6]], [[1, 2, 2]], [[1, 4, 6], [1, 8, 2], [2, 4, 4], [1, 2, 2]]])
def test_equals_transformers(tower, runner, grids):
    visual, spec = tower
    grid = np.array(grids)
    patches = torch.randn(int(grid.prod(1).sum()), spec.patch_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = visual(patches, torch.from_numpy(grid))
    ours = runner.run(None, {"patches": patches.numpy(), **vision_inputs(grid, spec)})
    for got, want in zip(ours, [expected.pooler_output, *expected.deepstack_features], strict=True):
        np.testing.assert_allclose(got, want.numpy(), atol=1e-5)


def test_images_do_not_see_each_other(tower, runner):
    _, spec = tower
    grid = np.array([[1, 4, 4], [1, 2, 6]])
    patches = np.random.default_rng(0).normal(size=(28, spec.patch_features)).astype(np.float32)
    changed = patches.copy()
    changed[16:] = 50.0
    first = runner.run(None, {"patches": patches, **vision_inputs(grid, spec)})[0]
    second = runner.run(None, {"patches": changed, **vision_inputs(grid, spec)})[0]
    np.testing.assert_array_equal(first[:4], second[:4])
    assert np.abs(first[4:] - second[4:]).max() > 0.1


def test_contract(graph):
    assert [v.name for v in graph.graph.inputs] == [
        "patches",
        "interp_indices",
        "interp_weights",
        "rope_positions",
        "segment_ids",
    ]
    assert [v.name for v in graph.graph.outputs] == ["image_features", "deepstack_0", "deepstack_1"]
    assert {str(v.shape[0]) for v in graph.graph.inputs} == {"num_patches"}
    assert all(name.startswith(("vision.", "v")) for name in graph.graph.initializers)
    text = ir.to_proto(graph)
    assert b"site-packages" not in text.SerializeToString()
    assert not {n.op_type for n in graph.graph} & {"NonZero", "Loop", "If", "Scan"}


def test_another_tower_is_refused():
    with pytest.raises(UnsupportedError, match="Linear is of no known kind .*no patch_embed.*MoonVit"):
        hosted_tower(torch.nn.Linear(1, 1))


def test_a_weight_beyond_float16_is_refused():
    model = build_qwen3_vl_moe(qwen3_vl_moe_config())
    model.model.visual.merger.norm.weight.data[1] = 1e6
    with pytest.raises(CheckpointError, match=r"vision\.merger\.norm\.weight"):
        trace_vision(model.model.visual, spec_of(model).vision, ir.DataType.FLOAT16)
