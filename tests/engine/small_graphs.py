"""Small ONNX graphs as the exporter writes them: static KV cache, attention, router, one plugin node a MoE layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ecmfq_export.engine.profiles import profile_shapes

RANGES = {"batch": (1, 1, 2), "seq": (1, 16, 32)}
HIDDEN, INNER, EXPERTS, TOP_K, HEADS, KV_HEADS, CACHE = 128, 128, 8, 2, 4, 2, 64


def decoder(path: Path, *, layers: int = 2, moe: bool = True, group_size: int = -1,
            change: Callable[[onnx.GraphProto], None] | None = None) -> Path:
    """Write a decoder of `layers` layers in fp16, opset 24. `change` may spoil the graph before it is saved."""
    graph = _Graph()
    x = "hidden"
    for layer in range(layers):
        x = graph.attention(f"layers.{layer}", x)
        if moe:
            x = graph.moe(f"layers.{layer}", x, group_size)
    graph.node("Identity", [x], ["logits"])
    graph.outputs.insert(0, helper.make_tensor_value_info("logits", TensorProto.FLOAT16, ["batch", "seq", HIDDEN]))
    proto = helper.make_graph(graph.nodes, "decoder", graph.inputs, graph.outputs, graph.initializers)
    if change is not None:
        change(proto)
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("ecmfq", 1)]
    onnx.save(helper.make_model(proto, opset_imports=opsets, ir_version=10), path)
    return path


def profiles(path: Path) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    return profile_shapes(path, RANGES)


class _Graph:
    def __init__(self) -> None:
        self.random = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        value = helper.make_tensor_value_info
        self.inputs = [
            value("hidden", TensorProto.FLOAT16, ["batch", "seq", HIDDEN]),
            value("mask", TensorProto.FLOAT16, ["batch", 1, "seq", CACHE]),
            value("write_indices", TensorProto.INT64, ["batch"]),
        ]
        self.outputs: list[onnx.ValueInfoProto] = []

    def node(self, op: str, inputs: list[str], outputs: list[str], **attributes: object) -> str:
        self.nodes.append(helper.make_node(op, inputs, outputs, name=f"{outputs[0]}_{op}", **attributes))
        return outputs[0]

    def constant(self, name: str, array: np.ndarray) -> str:
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def weight(self, name: str, *shape: int) -> str:
        return self.constant(name, (self.random.normal(size=shape) * 0.1).astype(np.float16))

    def attention(self, p: str, x: str) -> str:
        size = HIDDEN // HEADS
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            y = self.node("MatMul", [x, self.weight(f"{p}.{name}_weight", HIDDEN, heads * size)], [f"{p}.{name}"])
            y = self.node("Reshape", [y, self.constant(f"{p}.{name}_shape", np.array([0, -1, heads, size]))], [f"{p}.{name}_heads"])
            self.node("Transpose", [y], [f"{p}.{name}_t"], perm=[0, 2, 1, 3])
        shape = ["batch", KV_HEADS, CACHE, size]
        for name in "kv":
            past, present = f"{p}.past_{name}", f"{p}.present_{name}"
            self.inputs.append(helper.make_tensor_value_info(past, TensorProto.FLOAT16, shape))
            self.outputs.append(helper.make_tensor_value_info(present, TensorProto.FLOAT16, shape))
            self.node("TensorScatter", [past, f"{p}.{name}_t", "write_indices"], [present], axis=2)
        y = self.node("Attention", [f"{p}.q_t", f"{p}.present_k", f"{p}.present_v", "mask"], [f"{p}.attended"])
        y = self.node("Transpose", [y], [f"{p}.attended_t"], perm=[0, 2, 1, 3])
        y = self.node("Reshape", [y, self.constant(f"{p}.merge", np.array([0, 0, HIDDEN]))], [f"{p}.merged"])
        return self.node("Add", [x, y], [f"{p}.after_attention"])

    def moe(self, p: str, x: str, group_size: int) -> str:
        logits = self.node("MatMul", [x, self.weight(f"{p}.router_weight", HIDDEN, EXPERTS)], [f"{p}.router_logits"])
        wide = self.node("Cast", [logits], [f"{p}.router_fp32"], to=TensorProto.FLOAT)
        probabilities = self.node("Softmax", [wide], [f"{p}.probabilities"], axis=-1)
        self.node("TopK", [probabilities, self.constant(f"{p}.top_k", np.array([TOP_K]))], [f"{p}.topk_weights", f"{p}.topk_int64"])
        ids = self.node("Cast", [f"{p}.topk_int64"], [f"{p}.topk_ids"], to=TensorProto.INT32)
        inputs = [x, ids, f"{p}.topk_weights"]
        for name, rows, columns in (("gate_up", 2 * INNER, HIDDEN), ("down", HIDDEN, INNER)):
            weight = self.random.integers(-128, 128, (EXPERTS, rows, columns // 2), dtype=np.int8)
            inputs.append(self.constant(f"{p}.{name}_qweight", weight))
            inputs.append(self.constant(f"{p}.{name}_scale", self.random.random((EXPERTS, rows), dtype=np.float32) * 0.01))
        if group_size > 0:
            for name, rows, columns in (("gate_up", 2 * INNER, HIDDEN), ("down", HIDDEN, INNER)):
                multiplier = self.random.integers(1, 128, (EXPERTS, rows, columns // group_size), dtype=np.int8)
                inputs.append(self.constant(f"{p}.{name}_multiplier", multiplier))
        self.nodes.append(helper.make_node(
            "EcmfqRoutedMoE", inputs, [f"{p}.moe_out"], name=f"{p}.moe", domain="ecmfq", num_experts=EXPERTS, top_k=TOP_K,
            hidden_size=HIDDEN, intermediate_size=INNER, activation="silu_glu", group_size=group_size,
            weight_layout="row_major", abi_version=1))
        return self.node("Add", [x, f"{p}.moe_out"], [f"{p}.after_moe"])
