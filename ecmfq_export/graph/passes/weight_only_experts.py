"""Routed experts with weights alone quantized, for ONNX Runtime: EcmfqMoE becomes com.microsoft's QMoE.

QMoE routes by itself, but takes apart what it selects by (``router_probs``) and what it weighs by (``router_weights``). Given 1 for
each expert that our router chose and 0 elsewhere, it selects exactly those; given their weights, it adds exactly what we add. So
every router works (softmax, sigmoid with selection bias, groups, shared experts), and none is computed twice. Slots that a token
leaves empty (negative ids) go to a column that is cut off; QMoE fills them with experts of weight 0.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from ecmfq_export.errors import UnsupportedError
from ecmfq_export.graph import ops
from ecmfq_export.graph.builder import SOURCE, GraphBuilder
from ecmfq_export.graph.passes.source import WeightOnlyCache
from ecmfq_export.graph.passes.weight_only_linears import WeightOnlySource
from ecmfq_export.quant.block_layout import by_block, common_block, interleave_gate_up, pack_pairs

F32, U8, I64 = ir.DataType.FLOAT, ir.DataType.UINT8, ir.DataType.INT64


class WeightOnlyExpertsPass(ir.passes.InPlacePass):
    """Replace each EcmfqMoE node.

    Args:
        source: of the weights; all experts must be int4.
        dtype: the graph's type.
    """

    def __init__(self, source: WeightOnlySource, dtype: ir.DataType) -> None:
        super().__init__()
        self.source, self.cached, self.dtype = source, WeightOnlyCache(source), dtype

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite `model`.

        Raises:
            UnsupportedError: experts that are not int4, or whose groups or order of columns QMoE has no form for.
        """
        nodes = [node for node in model.graph if node.domain == ops.DOMAIN and node.op_type == ops.FLOAT_MOE]
        for node in nodes:
            for weight in node.inputs[3:5]:
                if not self.source.has_int4(weight.meta[SOURCE]):
                    raise UnsupportedError(f"'{weight.meta[SOURCE]}' is not int4", "QMoE takes int4 experts: quantize the checkpoint first")
            self._rewrite(model.graph, node)
            model.graph.opset_imports[ops.MICROSOFT] = ops.MICROSOFT_VERSION
        return ir.passes.PassResult(model, bool(nodes))

    def _rewrite(self, graph: ir.Graph, node: ir.Node) -> None:
        b, (x, ids, weights, gate_up, down) = GraphBuilder(self.dtype), node.inputs
        experts, slots = (node.attributes[key].as_int() for key in ("num_experts", "top_k"))
        with b.scope(node.name):
            empty = any(value.name == "router_types" for value in graph.inputs)
            selected, mixing = self._routing(b, ids, weights, experts, slots, empty)
            first, second, block = self._weights(b, gate_up, down)
            no_third = [None, None, None]
            inputs = [x, selected, *first[:2], None, *second[:2], None, *no_third, first[2], second[2], None, mixing]
            attributes = {"block_size": block} if block else {}
            output = b.op(
                ops.WEIGHT_ONLY_MOE, *inputs, domain=ops.MICROSOFT, name="experts", k=slots, activation_type="swiglu", swiglu_fusion=1,
                activation_alpha=1.0, activation_beta=0.0, normalize_routing_weights=0, expert_weight_bits=4, accuracy_level=1,
                weights_prepacked=0, **attributes,
            )  # fmt: skip
        b.replace(graph, node, output)
        for weight in (gate_up, down):
            del graph.initializers[weight.name]

    def _routing(
        self, b: GraphBuilder, ids: ir.Value, weights: ir.Value, experts: int, slots: int, empty: bool
    ) -> tuple[ir.Value, ir.Value]:
        """[tokens, num_experts] each: 1 at the chosen experts, and their weights there; 0 elsewhere.

        Args:
            empty: whether ids may be negative, where types of tokens have experts of their own.
        """
        rows = b.shape_const(-1, slots)
        index = b.cast(b.op("Reshape", ids, rows, name="ids_2d"), I64, "ids_int64")
        if empty:
            is_empty = b.op("Less", index, b.const(0, I64, "no_expert"), name="is_empty")
            index = b.op("Where", is_empty, b.const(experts, I64, f"beyond_{experts}"), index, name="ids_in_range")
        values = b.op("Reshape", weights, rows, name="weights_2d")
        tokens = b.op("Shape", index, start=0, end=1, name="tokens")
        shape = b.op("Concat", tokens, b.shape_const(experts + empty), axis=0, name="dense_shape")
        zeros = b.op("Expand", b.const(0.0, F32, "zero_weight"), shape, name="unrouted")
        ones = b.op("Expand", b.const(1.0, F32, "unit_weight"), b.op("Shape", index, name="pairs_shape"), name="chosen")
        dense = [b.op("ScatterElements", zeros, index, v, axis=1, name=n) for v, n in ((ones, "selected"), (values, "mixing"))]
        if empty:
            bounds = [b.shape_const(size) for size in (0, experts, 1)]
            dense = [b.op("Slice", value, *bounds, bounds[2], name=f"{name}_experts")
                     for value, name in zip(dense, ("selected", "mixing"), strict=True)]
        if self.dtype != F32:
            dense = [b.cast(value, self.dtype, f"{name}_cast") for value, name in zip(dense, ("selected", "mixing"), strict=True)]
        return dense[0], dense[1]

    def _weights(self, b: GraphBuilder, gate_up: ir.Value, down: ir.Value) -> tuple[list[ir.Value | None], list[ir.Value | None], int]:
        names = [value.meta[SOURCE] for value in (gate_up, down)]
        facts = [self.cached.weight(name) for name in names]
        zeros = any(fact.zero_point is not None for fact in facts)
        whole = all(fact.num_groups == 1 for fact in facts) and not zeros
        columns = [int(gate_up.shape[2]), int(down.shape[2])]
        block = 0 if whole else common_block([fact.group_size for fact in facts], columns)
        if block is None:
            first, second = (f"'{name}' has groups of {fact.group_size} among {width} columns"
                             for name, fact, width in zip(names, facts, columns, strict=True))
            raise UnsupportedError(f"{first}, {second}", "QMoE takes blocks of 16, 32, 64 or 128 that divide both")
        if facts[0].group_index is not None:
            raise UnsupportedError(f"'{names[0]}' has columns in activation order (desc_act), another for each expert",
                                   "QMoE has no input for it: round the dequantized weights anew ('ecmfq-export quantize')")
        fold = names[1] if facts[1].group_index is not None else None
        parts: list[list[ir.Value | None]] = []
        for name, value, is_first in ((names[0], gate_up, True), (names[1], down, False)):
            parts.append(self._packed(b, name, [int(size) for size in value.shape], block, zeros, is_first, fold))
        return parts[0], parts[1], block

    def _packed(
        self, b: GraphBuilder, name: str, shape: list[int], block: int, zeros: bool, is_first: bool, fold: str | None
    ) -> list[ir.Value | None]:
        """Packed integers, scales and zero points. The first product's rows are gate 0, up 0, gate 1, ..., in the order that the
        second's columns were rounded in."""
        experts, rows, columns = shape

        def get() -> Any:
            if not is_first:
                return self.cached.ordered(name)
            return interleave_gate_up(self.cached.weight(name), None if fold is None else self.cached.order(fold))

        groups = [] if block == 0 else [columns // block]
        out: list[ir.Value | None] = [
            b.weight(f"{name}.qweight", U8, [experts, rows, columns // 2], lambda: pack_pairs(get().qvalue), name),
            b.weight(f"{name}.scale", self.dtype, [experts, rows, *groups],
                     lambda: by_block(get().scale, get(), block) if block else get().scale.squeeze(-1), name),
            None,
        ]
        if zeros:
            out[2] = b.weight(f"{name}.zero_point", U8, [experts, rows, -(-groups[0] // 2)],
                              lambda: pack_pairs(by_block(get().zeros(), get(), block)), name)
        return out
