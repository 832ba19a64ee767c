"""Opset 23 and 24 operators in terms of opset 20: for parsers that predate them (TensorRT before 10.15).

Attention, TensorScatter, RotaryEmbedding and RMSNormalization become matrix products, Softmax, ScatterElements and elementwise
operators with the same inputs and outputs, so that hosts feed both forms alike.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from ecmfq_export.errors import UnsupportedError
from ecmfq_export.graph.builder import GraphBuilder

F32, I64 = ir.DataType.FLOAT, ir.DataType.INT64

OPSET, IR_VERSION = 21, 10
"""QuantizeLinear and DequantizeLinear with int4 need 21; nothing here needs more than 20."""


class DecomposeAttentionPass(ir.passes.InPlacePass):
    """Replace the four operators everywhere and lower the opset.

    The type of activations is read from the graph's first floating-point input.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite `model`.

        Raises:
            UnsupportedError: one of the operators in a form that the emitter and the tracer do not make.
        """
        rules: dict[str, Callable[[GraphBuilder, ir.Node], ir.Value]] = {
            "Attention": _attention, "TensorScatter": _tensor_scatter, "RotaryEmbedding": _rotary, "RMSNormalization": _rms_norm,
        }  # fmt: skip
        dtype = next(v.dtype for v in model.graph.inputs if v.dtype in (F32, ir.DataType.FLOAT16))
        modified = False
        for node in list(model.graph):
            rule = rules.get(node.op_type) if node.domain == "" else None
            if rule is None:
                continue
            builder = GraphBuilder(dtype)
            with builder.scope(node.name or node.op_type):
                output = rule(builder, node)
            builder.replace(model.graph, node, output)
            modified = True
        if modified:
            model.graph.opset_imports[""] = OPSET
            model.ir_version = IR_VERSION
        return ir.passes.PassResult(model, modified)


def _attention(b: GraphBuilder, node: ir.Node) -> ir.Value:
    """softmax(scale * Q K^T + mask) V; query heads of one key head are an axis of their own, so nothing is repeated."""
    extra = [i for i, v in enumerate(node.inputs) if v is not None and i > 3]
    used = [a for a in node.attributes if a not in ("scale", "is_causal", "qk_matmul_output_mode", "softcap", "softmax_precision")]
    causal = node.attributes["is_causal"].as_int() if "is_causal" in node.attributes else 0
    softcap = node.attributes["softcap"].as_float() if "softcap" in node.attributes else 0.0
    if extra or used or causal or softcap or len(node.inputs) < 4 or len(node.outputs) > 1 and node.outputs[1].uses():
        raise UnsupportedError(
            f"Attention node {node.name} has a form that older parsers cannot be given",
            "expected 4-D query, key, value and an additive mask, no causal flag, cache input or softcap",
        )
    query, key, value, mask = node.inputs[:4]
    scale = b.const(node.attributes["scale"].as_float(), b.dtype, f"{node.name}_scale")
    last = b.const([2], I64, "axis_2")
    batch_heads = b.op("Shape", key, start=0, end=2, name="kv_heads")
    tail = b.op("Shape", query, start=2, end=4, name="query_tail")
    grouped = b.op("Concat", batch_heads, b.const([-1], I64, "minus_one_1d"), tail, axis=0, name="grouped_shape")
    q = b.op("Reshape", b.op("Mul", query, scale, name="scaled_query"), grouped, name="grouped_query")
    k = b.op("Transpose", b.op("Unsqueeze", key, last, name="grouped_key"), perm=[0, 1, 2, 4, 3], name="key_transposed")
    scores = b.op("MatMul", q, k, name="scores")
    scores = b.op("Add", scores, b.op("Unsqueeze", mask, last, name="grouped_mask"), name="masked_scores")
    probabilities = b.op("Softmax", scores, axis=-1, name="probabilities")
    out = b.op("MatMul", probabilities, b.op("Unsqueeze", value, last, name="grouped_value"), name="context")
    # Values may have heads of another size than queries.
    rows = b.op("Shape", query, start=0, end=3, name="query_rows")
    merged = b.op("Concat", rows, b.op("Shape", value, start=3, end=4, name="value_size"), axis=0, name="context_shape")
    return b.op("Reshape", out, merged, name="merged_context")


def _tensor_scatter(b: GraphBuilder, node: ir.Node) -> ir.Value:
    """Slot ``write_indices + i`` of the cache takes row ``i`` of the update."""
    mode = node.attributes["mode"].as_string() if "mode" in node.attributes else "linear"
    if mode != "linear" or node.attributes["axis"].as_int() != 2 or node.inputs[2] is None:
        raise UnsupportedError(f"TensorScatter node {node.name} with mode '{mode}'", "expected a linear one on axis 2 with indices")
    past, update, write = node.inputs
    length = b.op("Squeeze", b.op("Shape", update, start=2, end=3, name="length_1d"), b.const([0], I64, "zero_1d"), name="length")
    rows = b.op("Range", b.const(0, I64, "zero"), length, b.const(1, I64, "one"), name="rows")
    rows = b.op("Reshape", rows, b.shape_const(1, 1, -1, 1), name="rows_4d")
    start = b.op("Reshape", write, b.shape_const(-1, 1, 1, 1), name="start_4d")
    slots = b.op("Add", start, rows, name="slots")
    slots = b.op("Expand", slots, b.op("Shape", update, name="update_shape"), name="slot_index")
    return b.op("ScatterElements", past, slots, update, axis=2, name="scattered")


def _rotary(b: GraphBuilder, node: ir.Node) -> ir.Value:
    """(x1 cos - x2 sin, x2 cos + x1 sin) on the two halves of the last axis, or on its pairs where interleaved."""
    interleaved = node.attributes["interleaved"].as_int() if "interleaved" in node.attributes else 0
    if len(node.inputs) != 3 or "rotary_embedding_dim" in node.attributes:
        raise UnsupportedError(f"RotaryEmbedding node {node.name} has a form that older parsers cannot be given")
    x, axes = node.inputs[0], [1, 4] if interleaved else [1]
    where = b.const(axes, I64, f"axes_{'_'.join(map(str, axes))}")
    cos, sin = (b.op("Unsqueeze", v, where, name=n) for v, n in zip(node.inputs[1:3], ("cos", "sin"), strict=True))
    if interleaved:
        x = b.op("Reshape", x, b.shape_const(0, 0, 0, -1, 2), name="pairs")
    first, second = b.ops("Split", x, axis=-1, num_outputs=2, outputs=2, name="halves")
    left = b.op("Sub", b.op("Mul", first, cos, name="first_cos"), b.op("Mul", second, sin, name="second_sin"), name="left")
    right = b.op("Add", b.op("Mul", second, cos, name="second_cos"), b.op("Mul", first, sin, name="first_sin"), name="right")
    rotated = b.op("Concat", left, right, axis=-1, name="rotated")
    return b.op("Reshape", rotated, b.shape_const(0, 0, 0, -1), name="joined_pairs") if interleaved else rotated


def _rms_norm(b: GraphBuilder, node: ir.Node) -> ir.Value:
    """x / sqrt(mean(x ** 2) + epsilon) * scale, in float32 up to the scale (stash_type 1)."""
    x, scale = node.inputs
    wide = x if b.dtype == F32 else b.cast(x, F32, "wide")
    axis = b.const([-1], I64, "minus_one_1d")
    mean = b.op("ReduceMean", b.op("Mul", wide, wide, name="square"), axis, keepdims=1, name="mean_square")
    epsilon = node.attributes["epsilon"].as_float()
    root = b.op("Sqrt", b.op("Add", mean, b.const(epsilon, F32, f"epsilon_{epsilon:.3g}"), name="shifted"), name="root")
    normed = b.op("Div", wide, root, name="normed")
    if b.dtype != F32:
        normed = b.cast(normed, b.dtype, "narrow")
    return b.op("Mul", normed, scale, name="scaled")
