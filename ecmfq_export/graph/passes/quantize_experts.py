"""Experts with integer weights: EcmfqMoE becomes EcmfqRoutedMoE, with weights packed two int4 a byte, row-major."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from ecmfq_export.errors import UnsupportedError
from ecmfq_export.graph import ops
from ecmfq_export.graph.builder import SOURCE, GraphBuilder
from ecmfq_export.graph.passes.quantize_linears import QuantizedSource
from ecmfq_export.graph.passes.source import OneAtATime
from ecmfq_export.quant.pack import pack_int4

F32, I8 = ir.DataType.FLOAT, ir.DataType.INT8


class QuantizeExpertsPass(ir.passes.InPlacePass):
    """Replace each EcmfqMoE node whose experts the checkpoint quantized.

    Args:
        source: of recipes and weights.
        group_size: of the checkpoint's experts, -1 or 128.
    """

    def __init__(self, source: QuantizedSource, group_size: int = -1) -> None:
        super().__init__()
        self.source, self.cached, self.group_size = source, OneAtATime(source), group_size

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite `model`.

        Raises:
            UnsupportedError: experts of which one matrix is quantized and the other not, or 8-bit ones.
        """
        modified = False
        for node in [n for n in model.graph if n.domain == ops.DOMAIN and n.op_type == ops.FLOAT_MOE]:
            weights = node.inputs[3:5]
            recipes = [self.source.recipe(w.meta[SOURCE]) for w in weights]
            if recipes == ["float", "float"]:
                continue
            if recipes != ["w4a8", "w4a8"]:
                raise UnsupportedError(
                    f"{weights[0].meta[SOURCE]} is {recipes[0]}, {weights[1].meta[SOURCE]} is {recipes[1]}",
                    "routed experts are W4A8 or floating point as a whole",
                )
            self._rewrite(model.graph, node)
            modified = True
        return ir.passes.PassResult(model, modified)

    def _rewrite(self, graph: ir.Graph, node: ir.Node) -> None:
        builder = GraphBuilder(F32)
        parts = [self._parts(builder, weight) for weight in node.inputs[3:5]]
        inputs = [*node.inputs[:3], *parts[0][:2], *parts[1][:2]]
        inputs += [part[2] for part in parts if len(part) == 3]
        attributes: dict[str, Any] = {key: attribute.value for key, attribute in node.attributes.items()}
        attributes |= ops.plugin_attributes(self.group_size, "row_major")
        routed = ir.node(ops.ROUTED_MOE, inputs, attributes, domain=ops.DOMAIN, name=node.name)
        for value in builder.initializers.values():
            graph.register_initializer(value)
        old, new, weights = node.outputs[0], routed.outputs[0], node.inputs[3:5]
        graph.insert_before(node, routed)
        new.name, new.shape, new.type = old.name, old.shape, old.type
        ir.convenience.replace_all_uses_with(old, new)
        graph.remove(node, safe=True)
        for weight in weights:
            del graph.initializers[weight.name]

    def _parts(self, b: GraphBuilder, weight: ir.Value) -> list[ir.Value]:
        source, (experts, rows, columns) = weight.meta[SOURCE], weight.shape
        get = self.cached.qtensor

        def checked():
            qtensor = get(source)
            if qtensor.group_size != self.group_size or qtensor.num_bits != 4:
                raise UnsupportedError(
                    f"{source} has {qtensor.num_bits} bits and group_size {qtensor.group_size}",
                    f"all experts of a model have 4 bits and one group_size, here {self.group_size}",
                )
            return qtensor

        parts = [
            b.weight(f"{source}.qweight", I8, [experts, rows, columns // 2], lambda: pack_int4(checked().qvalue), source),
            b.weight(f"{source}.scale", F32, [experts, rows], lambda: checked().scale, source),
        ]
        if self.group_size != -1:
            shape = [experts, rows, columns // self.group_size]
            parts.append(b.weight(f"{source}.multiplier", I8, shape, lambda: checked().group_multiplier, source))
        return parts
