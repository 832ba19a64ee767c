"""EcmfqRoutedMoE in plain NumPy, token by token: the independent reading of docs/graph.md that the ONNX function is held to."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ecmfq_export.graph import ops


def quantize(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Integer values (as float32, NaN where the input is) and scales [..., 1]."""
    scale = (np.maximum(np.abs(x).max(-1, keepdims=True), np.float32(1e-30)) / np.float32(127)).astype(np.float32)
    return np.clip(np.round((x / scale).astype(np.float32)), -127, 127), scale


def integers(qvalue: np.ndarray, multiplier: np.ndarray | None) -> np.ndarray:
    """[N, K] int64, group multipliers applied."""
    wide = qvalue.astype(np.int64)
    return wide if multiplier is None else wide * np.repeat(multiplier.astype(np.int64), 128, axis=-1)


def routed_moe(x, ids, weights, gate_up, gate_up_scale, down, down_scale, gate_up_multiplier=None, down_multiplier=None):
    """Unpacked int8 weights [E, N, K]; x [T, hidden] of float32 or float16; result float32 [T, hidden]."""
    tokens, slots = ids.shape
    out = np.zeros((tokens, x.shape[-1]), np.float32)
    qx, sx = quantize(x.astype(np.float32))
    for t in range(tokens):
        for j in range(slots):
            e = int(ids[t, j])
            if not 0 <= e < len(gate_up):
                continue
            acc = integers(gate_up[e], None if gate_up_multiplier is None else gate_up_multiplier[e]) @ qx[t].astype(np.int64)
            h = acc.astype(np.float32) * sx[t] * gate_up_scale[e]
            gate, up = np.split(h, 2)
            gate64 = gate.astype(np.float64)
            h = ((gate64 / (1 + np.exp(-gate64))).astype(np.float32) * up).astype(np.float32)
            hq, hs = quantize(h)
            acc = integers(down[e], None if down_multiplier is None else down_multiplier[e]) @ hq.astype(np.int64)
            out[t] += acc.astype(np.float32) * hs * down_scale[e] * np.float32(weights[t, j])
    return out


def pack(values: np.ndarray) -> np.ndarray:
    """[..., K] in [-8, 7] to [..., K / 2] int8, low nibble first."""
    low, high = values[..., 0::2].astype(np.int16), values[..., 1::2].astype(np.int16)
    return ((low & 15) | ((high & 15) << 4)).astype(np.uint8).view(np.int8)


def routed_moe_model(spec, group_size: int, dtype: ir.DataType) -> ir.Model:
    """A graph of one EcmfqRoutedMoE node whose weights are inputs."""
    e, h, i, k = spec.num_experts, spec.hidden_size, spec.intermediate_size, spec.top_k
    f32, i32, i8 = ir.DataType.FLOAT, ir.DataType.INT32, ir.DataType.INT8
    shapes = {
        "hidden_states": (dtype, ["batch", "seq", h]), "topk_ids": (i32, ["batch", "seq", k]), "topk_weights": (f32, ["batch", "seq", k]),
        "gate_up_qweight": (i8, [e, 2 * i, h // 2]), "gate_up_scale": (f32, [e, 2 * i]), "down_qweight": (i8, [e, h, i // 2]),
        "down_scale": (f32, [e, h]),
    }  # fmt: skip
    if group_size != -1:
        shapes["gate_up_multiplier"] = (i8, [e, 2 * i, h // 128])
        shapes["down_multiplier"] = (i8, [e, h, i // 128])
    inputs = [ir.Value(name=n, type=ir.TensorType(t), shape=ir.Shape(s)) for n, (t, s) in shapes.items()]
    attributes = ops.moe_attributes(spec) | ops.plugin_attributes(group_size, "row_major")
    node = ir.node(ops.ROUTED_MOE, inputs, attributes, domain=ops.DOMAIN)
    output = node.outputs[0]
    output.name, output.type, output.shape = "output", ir.TensorType(dtype), ir.Shape(["batch", "seq", h])
    graph = ir.Graph(inputs, [output], nodes=[node], name="routed", opset_imports={"": 24, ops.DOMAIN: ops.VERSION})
    return ir.Model(graph, ir_version=12)
