"""Routers from their description, against NumPy."""

import itertools

import numpy as np
import onnx_ir as ir
import pytest
import torch

from ecmfq_export.errors import UnsupportedError
from ecmfq_export.graph.builder import GraphBuilder
from ecmfq_export.graph.router import emit_router
from ecmfq_export.models.spec import MoESpec, RouterSpec
from tests.graph.helpers import session

HIDDEN, EXPERTS, TOP_K = 16, 12, 3


def route(x, weight, bias, spec: RouterSpec) -> tuple[np.ndarray, np.ndarray]:
    """The description, word for word, in float64; stable order on ties."""
    logits = x.astype(np.float64) @ weight
    if spec.scoring == "softmax":
        scores = np.exp(logits - logits.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
    else:
        scores = 1 / (1 + np.exp(-logits))
    choice = scores + (0 if bias is None else bias)
    if spec.num_groups > 1:
        grouped = choice.reshape(*choice.shape[:-1], spec.num_groups, -1)
        group_scores = np.sort(grouped, -1)[..., -2:].sum(-1)
        kept = np.argsort(-group_scores, -1, kind="stable")[..., : spec.top_groups]
        mask = np.zeros(group_scores.shape, bool)
        np.put_along_axis(mask, kept, True, -1)
        choice = np.where(mask[..., None], grouped, -np.inf).reshape(choice.shape)
    ids = np.argsort(-choice, -1, kind="stable")[..., :TOP_K]
    weights = np.take_along_axis(scores, ids, -1)
    if spec.renormalize:
        weights = weights / weights.sum(-1, keepdims=True)
    return ids, weights * spec.scaling


def build(spec: RouterSpec, dtype: ir.DataType, weight: np.ndarray, bias: np.ndarray | None):
    b = GraphBuilder(dtype)
    x = ir.Value(name="x", shape=ir.Shape(["batch", "seq", HIDDEN]), type=ir.TensorType(dtype))
    w = b.weight("w", ir.DataType.FLOAT, weight.shape, lambda: torch.from_numpy(weight))
    s = None if bias is None else b.weight("bias", ir.DataType.FLOAT, bias.shape, lambda: torch.from_numpy(bias))
    ids, weights = emit_router(b, MoESpec(HIDDEN, 8, EXPERTS, TOP_K, spec), x, w, s)
    for value, name, kind in ((ids, "ids", ir.DataType.INT32), (weights, "weights", ir.DataType.FLOAT)):
        value.name, value.type = name, ir.TensorType(kind)
    graph = ir.Graph([x], [ids, weights], nodes=b.nodes, initializers=list(b.initializers.values()), name="router",
                     opset_imports={"": 24})  # fmt: skip
    return session(ir.Model(graph, ir_version=12), reference=False)


@pytest.mark.parametrize(
    ("scoring", "renormalize", "scaling", "biased", "groups"),
    list(itertools.product(["softmax", "sigmoid"], [True, False], [1.0, 2.5], [False, True], [(1, 1), (4, 2), (6, 3)])),
)  # fmt: skip
def test_equals_numpy(scoring, renormalize, scaling, biased, groups):
    rng = np.random.default_rng(0)
    spec = RouterSpec(scoring, renormalize, scaling, biased, *groups)
    weight = rng.normal(size=(HIDDEN, EXPERTS)).astype(np.float32)
    bias = rng.normal(size=EXPERTS).astype(np.float32) * 0.3 if biased else None
    x = rng.normal(size=(2, 9, HIDDEN)).astype(np.float32)
    ids, weights = build(spec, ir.DataType.FLOAT, weight, bias).run(None, {"x": x})
    expected_ids, expected = route(x, weight, bias, spec)
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(weights, expected, rtol=2e-6, atol=1e-7)


def test_float16_input_is_routed_in_float32():
    rng = np.random.default_rng(1)
    spec = RouterSpec("softmax", True)
    weight = rng.normal(size=(HIDDEN, EXPERTS)).astype(np.float32)
    x = rng.normal(size=(1, 50, HIDDEN)).astype(np.float16)
    ids, weights = build(spec, ir.DataType.FLOAT16, weight, None).run(None, {"x": x})
    expected_ids, expected = route(x, weight, None, spec)
    assert weights.dtype == np.float32
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(weights, expected, rtol=2e-6)


def test_groups_must_divide_the_experts():
    with pytest.raises(UnsupportedError, match="12 experts do not divide into 5 groups"):
        build(RouterSpec("softmax", True, num_groups=5, top_groups=2), ir.DataType.FLOAT, np.ones((HIDDEN, EXPERTS), np.float32), None)
