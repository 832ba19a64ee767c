"""What each decoder layer weighs and at which precision, of a graph and of a checkpoint: from shapes and types, no weight is read."""

from __future__ import annotations

import math
import re
from typing import Any

import onnx

from ecmfq_export.engine.graph_file import tensor_bytes
from ecmfq_export.models.moe_vlm import MoEVLM
from ecmfq_export.quant.qtensor import GROUP

PRECISIONS = ("int4", "int8", "scales", "float")
_LAYER = re.compile(r"layers\.(\d{1,5})\.(self_attn|mlp)?")
_PARTS = {"self_attn": "attention", "mlp": "mlp"}
_RECIPES = {"w4a8": "int4", "w8a8": "int8", "float": "float"}
_BITS = {"int4": 4, "int8": 8}


class _Layers:
    """Rows {layer, bytes {precision: bytes}, attention, mlp} that weights are added to, and the bytes outside of layers."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, Any]] = {}
        self.outside = 0

    def add(self, name: str, kind: str, size: int) -> None:
        match = _LAYER.match(name)
        if match is None:
            self.outside += size
            return
        index = int(match[1])
        row = self.rows.setdefault(index, {"layer": index, "bytes": dict.fromkeys(PRECISIONS, 0), "attention": "", "mlp": ""})
        row["bytes"][kind] += size
        part = _PARTS.get(match[2] or "")
        # A norm or a router beside quantized projections does not make a part floating point.
        if part and (kind in _BITS or (not row[part] and kind == "float" and "_proj" in name)):
            row[part] = kind

    def result(self) -> tuple[list[dict[str, Any]], int]:
        return [self.rows[index] for index in sorted(self.rows)], self.outside


def graph_layers(graph: onnx.GraphProto) -> tuple[list[dict[str, Any]], int]:
    """Rows by layer of a decoder's graph, [] of another graph; and the bytes of all other weights."""
    layers = _Layers()
    for tensor in graph.initializer:
        layers.add(tensor.name, precision_of(tensor.name, tensor.data_type), tensor_bytes(tensor.data_type, tensor.dims, tensor.name))
    return layers.result()


def precision_of(name: str, data_type: int) -> str:
    """How a weight of a graph is kept: one of ``PRECISIONS``, by its name's ending and its type."""
    if name.endswith((".scale", ".multiplier")):
        return "scales"
    if name.endswith(".qweight") or data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
        return "int4"
    return "int8" if name.endswith(".qvalue") else "float"


def model_layers(model: MoEVLM) -> tuple[list[dict[str, Any]], int]:
    """Rows by layer of a checkpoint, and the bytes of all other weights; scales take two bytes, group multipliers one."""
    layers = _Layers()
    group_size = model.quantization.group_size if model.quantization is not None else -1
    for name in model.names():
        shape = model.shape(name)
        count, kind = math.prod(shape), _RECIPES[model.recipe(name)]
        if kind == "float":
            layers.add(name, kind, count * model.stored_dtype(name).itemsize)
            continue
        layers.add(name, kind, count * _BITS[kind] // 8)
        layers.add(name, "scales", 2 * count // shape[-1] + (count // GROUP if kind == "int4" and group_size != -1 else 0))
    return layers.result()
