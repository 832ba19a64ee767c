"""Dense projections with weights alone quantized, for ONNX Runtime: MatMul becomes com.microsoft's MatMulNBits.

int4 weights keep their integers, scales and zero points; columns in activation order are put in the order of their groups, and the
projection's input with them. int8 weights are cast and scaled before the MatMul.
"""

from __future__ import annotations

from typing import Any, Protocol

import onnx_ir as ir

from ecmfq_export.errors import UnsupportedError
from ecmfq_export.graph import ops
from ecmfq_export.graph.builder import SOURCE, GraphBuilder
from ecmfq_export.graph.passes.source import OneAtATime, WeightOnlyCache
from ecmfq_export.quant.block_layout import block_size, by_block, pack_blocks, pack_pairs

F32, U8, I8, I64 = ir.DataType.FLOAT, ir.DataType.UINT8, ir.DataType.INT8, ir.DataType.INT64


class WeightOnlySource(Protocol):
    """The part of models.moe_vlm.MoEVLM that the weight-only passes read."""

    def has_int4(self, name: str) -> bool: ...

    def has_int8(self, name: str) -> bool: ...

    def weight_only_tensor(self, name: str) -> Any: ...

    def qtensor(self, name: str) -> Any: ...


class WeightOnlyLinearsPass(ir.passes.InPlacePass):
    """Replace each MatMul whose weight the checkpoint holds as int4 or int8.

    Args:
        source: of the weights.
        dtype: the graph's type.
    """

    def __init__(self, source: WeightOnlySource, dtype: ir.DataType) -> None:
        super().__init__()
        self.source, self.dtype = source, dtype
        self.cached, self.int8 = WeightOnlyCache(source), OneAtATime(source)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite `model`.

        Raises:
            UnsupportedError: groups that are no multiple of 16 columns, the operator's smallest block.
        """
        modified = False
        for node in list(model.graph):
            weight = node.inputs[1] if node.op_type == "MatMul" else None
            name = None if weight is None else weight.meta.get(SOURCE)
            if weight is None or name is None or not (self.source.has_int4(name) or self.source.has_int8(name)):
                continue
            builder = GraphBuilder(self.dtype)
            with builder.scope(node.name):
                output = self._int4(builder, node, name) if self.source.has_int4(name) else self._int8(builder, node, name)
            builder.replace(model.graph, node, output)
            if not weight.uses():
                del model.graph.initializers[weight.name]
            model.graph.opset_imports[ops.MICROSOFT] = ops.MICROSOFT_VERSION
            modified = True
        return ir.passes.PassResult(model, modified)

    def _int4(self, b: GraphBuilder, node: ir.Node, name: str) -> ir.Value:
        x, old = node.inputs
        columns, rows = old.shape
        # Which tensors there are and how many groups decides nodes, so this one weight is read now.
        facts = self.cached.weight(name)
        block = block_size(facts.group_size, columns)
        if block is None:
            raise UnsupportedError(f"'{name}' has groups of {facts.group_size} columns", "MatMulNBits takes blocks of 16, 32, 64 or 128")
        blocks, get = -(-columns // block), self.cached.ordered
        if facts.group_index is not None:
            order = b.weight(f"{name}.order", I64, [columns], lambda: self.cached.order(name), name)
            x = b.op("Gather", x, order, axis=-1, name="group_order")
        parts = [
            b.weight(f"{name}.qweight", U8, [rows, blocks, block // 2], lambda: pack_blocks(get(name).qvalue, block), name),
            b.weight(f"{name}.scale", self.dtype, [rows, blocks], lambda: by_block(get(name).scale, get(name), block), name),
        ]
        if facts.zero_point is not None:
            parts.append(b.weight(f"{name}.zero_point", U8, [rows, -(-blocks // 2)],
                                  lambda: pack_pairs(by_block(get(name).zero_point, get(name), block)), name))
        # Level 1 keeps products in float32; an unset level may be read as a wish for int8 activations.
        return b.op(ops.WEIGHT_ONLY_MATMUL, x, *parts, domain=ops.MICROSOFT, name="matmul", K=columns, N=rows, bits=4, block_size=block,
                    accuracy_level=1)

    def _int8(self, b: GraphBuilder, node: ir.Node, name: str) -> ir.Value:
        x, old = node.inputs
        columns, rows = old.shape

        def read() -> Any:
            weight = self.int8.qtensor(name)
            if weight.group_size != -1:
                raise UnsupportedError(f"'{name}' has 8 bits and groups of {weight.group_size}",
                                       "dense projections take one scale a channel")
            return weight

        weight = b.weight(f"{name}.qvalue", I8, [columns, rows], lambda: read().qvalue.T, name)
        scale = b.weight(f"{name}.scale", self.dtype, [rows], lambda: read().scale, name)
        # Not a DequantizeLinear: ONNX Runtime fuses that with the MatMul into one that rounds activations to int8.
        wide = b.op("Mul", b.cast(weight, self.dtype, "weight_cast"), scale, name="weight_dequantize")
        return b.op("MatMul", x, wide, name="matmul")
