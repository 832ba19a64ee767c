"""Dense projections with integer weights become standard quantize/dequantize nodes.

    sx = max(max(abs(x)), 1e-30) / 127              per token, float32
    DequantizeLinear(QuantizeLinear(x / sx, 1), 1)  int8 activations
    MatMul with DequantizeLinear(int8 or int4 weight, scale per output channel), then * sx

TensorRT builds an int8 matrix product of it, with the quantization fused into the kernel before and the scales into the one after.
Everything between the input and the output is float32 whatever the graph's type: scales and roundings are then the same as in
quant/activation.py, a product of up to 127 times the output cannot overflow float16, and the fused kernels are the same ones.
"""

from __future__ import annotations

from typing import Protocol

import onnx_ir as ir

from ecmfq_export.errors import UnsupportedError
from ecmfq_export.graph.builder import SOURCE, GraphBuilder
from ecmfq_export.graph.passes.source import OneAtATime
from ecmfq_export.quant.qtensor import QTensor

F32 = ir.DataType.FLOAT
WEIGHT_TYPES = {"w8a8": ir.DataType.INT8, "w4a8": ir.DataType.INT4}


class QuantizedSource(Protocol):
    """The part of models.moe_vlm.MoEVLM that quantization reads."""

    def recipe(self, name: str) -> str: ...

    def qtensor(self, name: str) -> QTensor: ...


class QuantizeLinearsPass(ir.passes.InPlacePass):
    """Replace each MatMul whose weight the checkpoint quantized; projections of one input share its quantization.

    Args:
        source: of recipes and weights.
        dtype: the graph's type.
    """

    def __init__(self, source: QuantizedSource, dtype: ir.DataType) -> None:
        super().__init__()
        self.source, self.cached, self.dtype = source, OneAtATime(source), dtype

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite `model`.

        Raises:
            UnsupportedError: a dense weight with group multipliers, which TensorRT cannot combine with int8 activations.
        """
        quantized: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        modified = False
        for node in list(model.graph):
            recipe = self._recipe(node)
            if recipe == "float":
                continue
            builder = GraphBuilder(self.dtype)
            x = node.inputs[0]
            with builder.scope(node.name):
                if x not in quantized:
                    quantized[x] = self._quantize(builder, x)
                output = self._product(builder, node, *quantized[x], recipe)
            weight = node.inputs[1]
            builder.replace(model.graph, node, output)
            if not weight.uses():
                del model.graph.initializers[weight.name]
            modified = True
        return ir.passes.PassResult(model, modified)

    def _recipe(self, node: ir.Node) -> str:
        if node.op_type != "MatMul" or node.inputs[1] is None or SOURCE not in node.inputs[1].meta:
            return "float"
        return self.source.recipe(node.inputs[1].meta[SOURCE])

    def _quantize(self, b: GraphBuilder, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Integer activations as float32, and their scale [..., 1]."""
        if self.dtype != F32:
            x = b.cast(x, F32, "input_cast")
        axis = b.const([-1], ir.DataType.INT64, "last_axis")
        absmax = b.op("ReduceMax", b.op("Abs", x, name="abs"), axis, keepdims=1, name="absmax")
        absmax = b.op("Max", absmax, b.const(1e-30, F32, "tiny_absmax"), name="absmax_floor")
        scale = b.op("Div", absmax, b.const(127.0, F32, "int8_limit"), name="act_scale")
        one = b.const(1.0, F32, "unit_scale")
        scaled = b.op("Div", x, scale, name="act_scaled")
        integer = b.op("QuantizeLinear", scaled, one, b.const(0, ir.DataType.INT8, "int8_zero"), name="act_quantize")
        return b.op("DequantizeLinear", integer, one, name="act_dequantize"), scale

    def _product(self, b: GraphBuilder, node: ir.Node, x: ir.Value, act_scale: ir.Value, recipe: str) -> ir.Value:
        old = node.inputs[1]
        source, (columns, rows) = old.meta[SOURCE], old.shape
        get = self.cached.qtensor

        def values():
            qtensor = get(source)
            if qtensor.group_size != -1:
                raise UnsupportedError(
                    f"{source} is quantized with group_size {qtensor.group_size}", "dense projections take one scale a channel"
                )
            return qtensor.qvalue.T

        weight = b.weight(f"{old.name}.qvalue", WEIGHT_TYPES[recipe], [columns, rows], values, source)
        scale = b.weight(f"{old.name}.scale", F32, [rows], lambda: get(source).scale, source)
        dequantized = b.op("DequantizeLinear", weight, scale, axis=1, name="weight_dequantize")
        product = b.op("MatMul", x, dequantized, name="matmul")
        output = b.op("Mul", product, act_scale, name="rescale")
        return output if self.dtype == F32 else b.cast(output, self.dtype, "output_cast")
