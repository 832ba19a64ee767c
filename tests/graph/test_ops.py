"""The operators' ONNX functions against NumPy."""

import functools

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecmfq_export.errors import UnsupportedError
from ecmfq_export.graph import ops
from ecmfq_export.models.spec import MoESpec, RouterSpec
from tests.graph import routed_reference as reference
from tests.graph.helpers import session


def moe(experts: int, top_k: int, hidden: int, intermediate: int) -> MoESpec:
    return MoESpec(hidden, intermediate, experts, top_k, RouterSpec("softmax", True))


@functools.cache
def routed_session(spec: MoESpec, group_size: int = -1, dtype: ir.DataType = ir.DataType.FLOAT):
    return session(reference.routed_moe_model(spec, group_size, dtype))


def random_weights(rng: np.random.Generator, spec: MoESpec, group_size: int = -1) -> dict[str, np.ndarray]:
    e, h, i = spec.num_experts, spec.hidden_size, spec.intermediate_size
    weights = {
        "gate_up": rng.integers(-8, 8, (e, 2 * i, h)), "gate_up_scale": rng.uniform(0.005, 0.02, (e, 2 * i)).astype(np.float32),
        "down": rng.integers(-8, 8, (e, h, i)), "down_scale": rng.uniform(0.005, 0.02, (e, h)).astype(np.float32),
    }  # fmt: skip
    if group_size != -1:
        weights["gate_up_multiplier"] = rng.integers(1, 128, (e, 2 * i, h // 128)).astype(np.int8)
        weights["down_multiplier"] = rng.integers(1, 128, (e, h, i // 128)).astype(np.int8)
        weights["gate_up_scale"] /= 64
        weights["down_scale"] /= 64
    return weights


def run(spec, x, ids, topk_weights, weights, group_size=-1, dtype=ir.DataType.FLOAT) -> np.ndarray:
    feeds = {"hidden_states": x[None], "topk_ids": ids[None].astype(np.int32), "topk_weights": topk_weights[None]}
    for name, value in weights.items():
        feeds[f"{name}_qweight" if name in ("gate_up", "down") else name] = reference.pack(value) if name in ("gate_up", "down") else value
    return routed_session(spec, group_size, dtype).run(None, feeds)[0][0]


def tolerance(spec: MoESpec, expected: np.ndarray, weights: dict[str, np.ndarray]) -> float:
    """float32 rounding of the largest value, plus a few one-step flips.

    Where silu(gate) * up, which the two sides round differently in the last bit, lies on a rounding boundary, its integer
    moves by one and an output by scale * 8 (* multiplier) * act_scale; act_scale is a 127th of the row's largest value.
    """
    step = float(weights["down_scale"].max()) * 8 * float(weights.get("down_multiplier", np.ones(1)).max())
    finite = np.abs(expected[np.isfinite(expected)])
    largest = float(finite.max()) if finite.size else 0.0
    return 1e-5 * max(largest, 1.0) + 3 * step * 0.02


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31), experts=st.integers(1, 6), hidden=st.sampled_from([2, 34, 128]),
    intermediate=st.sampled_from([2, 30, 96]), tokens=st.sampled_from([1, 2, 9]), data=st.data(),
)  # fmt: skip
def test_routed_equals_numpy(seed, experts, hidden, intermediate, tokens, data):
    spec = moe(experts, data.draw(st.integers(1, min(3, experts))), hidden, intermediate)
    rng = np.random.default_rng(seed)
    weights = random_weights(rng, spec)
    x = rng.normal(size=(tokens, hidden)).astype(np.float32)
    ids = np.argsort(rng.random((tokens, experts)))[:, : spec.top_k]
    topk = rng.random((tokens, spec.top_k)).astype(np.float32)
    expected = reference.routed_moe(x, ids, topk, **weights)
    got = run(spec, x, ids, topk, weights)
    np.testing.assert_allclose(got, expected, atol=tolerance(spec, expected, weights))
    # Flips are rare: nearly every value is equal to float32 rounding.
    close = np.isclose(got, expected, rtol=2e-5, atol=2e-5)
    assert close.mean() > 0.9 or close.size < 300


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**31), rows=st.integers(0, 5), outputs=st.integers(1, 9), groups=st.integers(1, 3),
    grouped=st.booleans(), wide=st.booleans(), extreme=st.booleans(),
)  # fmt: skip
def test_accumulators_are_exact_integers(seed, rows, outputs, groups, grouped, wide, extreme):
    """Also with no row, with every product at its largest, and in the form for rows beyond float32's exact range."""
    columns = 128 * groups
    rng = np.random.default_rng(seed)
    q = np.full((rows, columns), -127) if extreme else rng.integers(-127, 128, (rows, columns))
    w = np.full((outputs, columns), -8) if extreme else rng.integers(-8, 8, (outputs, columns))
    multiplier = (np.full((outputs, groups), 127) if extreme else rng.integers(1, 128, (outputs, groups))).astype(np.int8)
    acc = accumulator(grouped, 2**15 if wide else columns).run(None, {"q": q.astype(np.float32), "w": reference.pack(w), "m": multiplier})[
        0
    ]
    expected = q @ reference.integers(w, multiplier if grouped else None).T
    np.testing.assert_array_equal(acc, expected.astype(np.float32))


@functools.cache
def accumulator(grouped: bool, columns: int) -> ort.InferenceSession:
    """The function's own accumulation, apart."""
    body = ops._accumulate("a", "q", "w", "m", grouped, columns)
    model = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 24]>
        accumulate (float[n, k] q, int8[o, b] w, int8[o, g] m) => (float[n, o] a_acc) {{
            last = Constant <value_ints = [-1]> ()
            sixteen = Constant <value_float = 16.0> ()
            eight = Constant <value_float = 8.0> ()
            {body}
        }}""")
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


SPEC = moe(5, 2, 128, 96)


@pytest.fixture(scope="module")
def weights():
    return random_weights(np.random.default_rng(1), SPEC)


@pytest.mark.parametrize("case", ["one token", "one expert takes all", "an expert is empty", "a slot is padding"])
def test_routings(weights, case):
    rng = np.random.default_rng(2)
    tokens = 1 if case == "one token" else 11
    x = rng.normal(size=(tokens, 128)).astype(np.float32)
    ids = {
        "one token": np.array([[4, 0]]), "one expert takes all": np.tile([3, 3], (tokens, 1)),
        "an expert is empty": rng.integers(0, 4, (tokens, 2)), "a slot is padding": np.tile([2, -1], (tokens, 1)),
    }[case]  # fmt: skip
    topk = rng.random((tokens, 2)).astype(np.float32)
    expected = reference.routed_moe(x, ids, topk, **weights)
    np.testing.assert_allclose(run(SPEC, x, ids, topk, weights), expected, atol=tolerance(SPEC, expected, weights))


def test_group_multipliers():
    spec = moe(3, 2, 256, 128)
    rng = np.random.default_rng(3)
    grouped = random_weights(rng, spec, 128)
    x = rng.normal(size=(7, 256)).astype(np.float32)
    ids, topk = rng.integers(0, 3, (7, 2)), rng.random((7, 2)).astype(np.float32)
    expected = reference.routed_moe(x, ids, topk, **grouped)
    np.testing.assert_allclose(run(spec, x, ids, topk, grouped, 128), expected, atol=tolerance(spec, expected, grouped))


def test_float16_is_float32_inside(weights):
    rng = np.random.default_rng(4)
    x = rng.normal(size=(6, 128)).astype(np.float16)
    ids, topk = rng.integers(0, 5, (6, 2)), rng.random((6, 2)).astype(np.float32)
    got = run(SPEC, x, ids, topk, weights, dtype=ir.DataType.FLOAT16)
    expected = reference.routed_moe(x, ids, topk, **weights)
    assert got.dtype == np.float16
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=tolerance(SPEC, expected, weights))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_broken_token_stays_in_its_row(weights, bad):
    rng = np.random.default_rng(5)
    x = rng.normal(size=(4, 128)).astype(np.float32)
    ids, topk = np.tile([1, 2], (4, 1)), rng.random((4, 2)).astype(np.float32)
    clean = run(SPEC, x, ids, topk, weights)
    x[2, 7] = bad
    broken = run(SPEC, x, ids, topk, weights)
    np.testing.assert_array_equal(broken[[0, 1, 3]], clean[[0, 1, 3]])
    zero = np.zeros((2, 128), np.float32)
    assert not run(SPEC, zero, ids[:2], topk[:2], weights).any()


def test_float_experts_drop_what_was_not_selected():
    """An expert that overflows on a token that did not choose it must not reach that token."""
    spec = moe(3, 1, 4, 2)
    gate_up = np.ones((3, 4, 4), np.float32)
    gate_up[2] = 1e30
    down = np.ones((3, 4, 2), np.float32)
    shapes = {"hidden_states": [1, 2, 4], "topk_ids": [1, 2, 1], "topk_weights": [1, 2, 1], "gate_up_proj": [3, 4, 4],
              "down_proj": [3, 4, 2]}  # fmt: skip
    inputs = [
        ir.Value(name=n, shape=ir.Shape(s), type=ir.TensorType(ir.DataType.INT32 if n == "topk_ids" else ir.DataType.FLOAT))
        for n, s in shapes.items()
    ]
    node = ir.node(ops.FLOAT_MOE, inputs, ops.moe_attributes(spec), domain=ops.DOMAIN)
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(inputs, node.outputs, nodes=[node], name="g", opset_imports={"": 24, ops.DOMAIN: 1})
    x, ids = np.ones((1, 2, 4), np.float32), np.array([[[0], [1]]], np.int32)
    (y,) = session(ir.Model(graph, ir_version=12)).run(
        None, {"hidden_states": x, "topk_ids": ids, "topk_weights": np.full((1, 2, 1), 0.5, np.float32),
               "gate_up_proj": gate_up, "down_proj": down},
    )  # fmt: skip
    silu = 4 / (1 + np.exp(-4.0))
    np.testing.assert_allclose(y, np.full((1, 2, 4), 0.5 * 2 * silu * 4), rtol=1e-6)


def test_prepacked_weights_are_refused():
    model = reference.routed_moe_model(SPEC, -1, ir.DataType.FLOAT)
    next(iter(model.graph)).attributes["weight_layout"] = ir.AttrString("weight_layout", "mma_s8")
    with pytest.raises(UnsupportedError, match="mma_s8"):
        ops.attach_reference_functions(model)
