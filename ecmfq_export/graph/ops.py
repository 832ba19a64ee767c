"""The custom operators: names, attributes, and their meaning as ONNX functions of standard operators.

The functions are the executable definition. They are attached to a copy for ONNX Runtime only (:func:`attach_reference_functions`):
TensorRT's parser prefers a local function to a plugin of the same name, so ``model.onnx`` must not hold one.

``EcmfqMoE``: floating-point routed experts. Inputs hidden_states [..., hidden] T, topk_ids [..., top_k] int32,
topk_weights [..., top_k] float32, gate_up_proj [num_experts, 2 * intermediate, hidden] T (gate rows first),
down_proj [num_experts, hidden, intermediate] T. Output as hidden_states.

``EcmfqRoutedMoE``: the W4A8 operator that the TensorRT plugin implements; same first three inputs, then gate_up_qweight int8
[num_experts, 2 * intermediate, hidden / 2] (two int4 a byte, low nibble first), gate_up_scale float32, down_qweight int8
[num_experts, hidden, intermediate / 2], down_scale float32, and with ``group_size`` 128 int8 multipliers [..., columns / 128]
for each. An id outside [0, num_experts) contributes nothing.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from ecmfq_export.errors import UnsupportedError
from ecmfq_export.models.spec import MoESpec

DOMAIN, VERSION = "ecmfq", 1
FLOAT_MOE, ROUTED_MOE = "EcmfqMoE", "EcmfqRoutedMoE"
MICROSOFT, MICROSOFT_VERSION = "com.microsoft", 1
WEIGHT_ONLY_MOE, WEIGHT_ONLY_MATMUL = "QMoE", "MatMulNBits"
"""ONNX Runtime's own operators, in graphs for it alone (passes/weight_only_experts.py, weight_only_linears.py)."""
ACTIVATIONS = ("silu_glu",)
ABI_VERSION = 1
"""ECMFQ_ABI_VERSION of plugins/capi/ecmfq.h."""

GROUP = 128

_EXACT_COLUMNS = 2**24 // (127 * 8)
"""Widest row whose int8 x int4 products add up below 2 ** 24 in magnitude, where every float32 sum is exact."""


def moe_attributes(spec: MoESpec) -> dict[str, Any]:
    """Attributes that both operators carry; to them a shared expert is one more expert in one more slot."""
    return {
        "num_experts": spec.total_experts,
        "top_k": spec.num_slots,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "activation": spec.activation,
    }


def plugin_attributes(group_size: int, weight_layout: str) -> dict[str, Any]:
    """Attributes that EcmfqRoutedMoE carries besides, for the plugin and its creator."""
    return {
        "group_size": group_size,
        "weight_layout": weight_layout,
        "abi_version": ABI_VERSION,
        "plugin_version": "1",
        "plugin_namespace": "",
    }


def attach_reference_functions(model: ir.Model) -> None:
    """Give the model's custom nodes their bodies, in place. Weights must be row-major.

    Raises:
        UnsupportedError: a node whose weights are prepacked for a kernel, or nodes of different group sizes.
    """
    nodes = [node for node in model.graph if node.domain == DOMAIN]
    routed = [node for node in nodes if node.op_type == ROUTED_MOE]
    for node in routed:
        layout = node.attributes["weight_layout"].as_string()
        if layout != "row_major":
            raise UnsupportedError(f"node {node.name} has weight_layout '{layout}'", "the reference reads row_major only")
    group_sizes = {node.attributes["group_size"].as_int() for node in routed}
    if len(group_sizes) > 1:
        raise UnsupportedError(f"EcmfqRoutedMoE nodes with group sizes {sorted(group_sizes)} in one graph")
    functions = []
    if any(node.op_type == FLOAT_MOE for node in nodes):
        functions.append(float_moe_function())
    if routed:
        columns = max(max(node.attributes[key].as_int() for key in ("hidden_size", "intermediate_size")) for node in routed)
        functions.append(routed_moe_function(group_sizes.pop(), columns))
    for function in functions:
        # The bodies need no operator newer than 20; a model of an older opset than theirs must not mix two.
        function.opset_imports[""] = model.graph.opset_imports[""]
        model.functions[function.identifier()] = function


def float_moe_function() -> ir.Function:
    """EcmfqMoE: every expert on every token, unselected results dropped by Where (so that an overflow there cannot leak).

    Weights are the left operands, hence no transposed copy of them, and no data-dependent shape: TensorRT builds it too.
    """
    return _function(f"""
        <ir_version: 10, opset_import: ["" : 24]> unused (float x) => (float y) {{ y = Identity(x) }}
        <domain: "{DOMAIN}", opset_import: ["" : 24]>
        {FLOAT_MOE} <num_experts, top_k, hidden_size, intermediate_size, activation>
        (hidden_states, topk_ids, topk_weights, gate_up_proj, down_proj) => (output) {{
            shape = Shape (hidden_states)
            hidden = Shape <start = -1> (hidden_states)
            slots = Shape <start = -1> (topk_ids)
            all = Constant <value_ints = [-1]> ()
            rows = Concat <axis = 0> (all, hidden)
            x = Reshape (hidden_states, rows)
            xt = Transpose <perm = [1, 0]> (x)
            gate_up = MatMul (gate_up_proj, xt)
            gate, up = Split <axis = 1, num_outputs = 2> (gate_up)
            sigmoid = Sigmoid (gate)
            silu = Mul (gate, sigmoid)
            activated = Mul (silu, up)
            expert_out = MatMul (down_proj, activated)
            pairs = Concat <axis = 0> (all, slots)
            ids = Reshape (topk_ids, pairs)
            weights = Reshape (topk_weights, pairs)
            expert_count = Shape <start = 0, end = 1> (gate_up_proj)
            no_axes = Constant <value_ints = [0]> ()
            count = Squeeze (expert_count, no_axes)
            zero = Constant <value_int = 0> ()
            one = Constant <value_int = 1> ()
            experts64 = Range (zero, count, one)
            experts32 = Cast <to = 6> (experts64)
            three_d = Constant <value_ints = [-1, 1, 1]> ()
            experts = Reshape (experts32, three_d)
            hit = Equal (experts, ids)
            hit_float = Cast <to = 1> (hit)
            hit_weight = Mul (hit_float, weights)
            slot_axis = Constant <value_ints = [2]> ()
            weight_sum = ReduceSum <keepdims = 0> (hit_weight, slot_axis)
            hits = ReduceMax <keepdims = 0> (hit_float, slot_axis)
            zero_float = Constant <value_float = 0.0> ()
            chosen2d = Greater (hits, zero_float)
            middle = Constant <value_ints = [1]> ()
            chosen = Unsqueeze (chosen2d, middle)
            weight3d = Unsqueeze (weight_sum, middle)
            weight_typed = CastLike (weight3d, hidden_states)
            zero_typed = CastLike (zero_float, hidden_states)
            weighted = Mul (expert_out, weight_typed)
            kept = Where (chosen, weighted, zero_typed)
            first = Constant <value_ints = [0]> ()
            summed = ReduceSum <keepdims = 0> (kept, first)
            transposed = Transpose <perm = [1, 0]> (summed)
            output = Reshape (transposed, shape)
        }}""")


def routed_moe_function(group_size: int, columns: int = GROUP) -> ir.Function:
    """EcmfqRoutedMoE with ``weight_layout = "row_major"``: a Scan over experts, each on the tokens that chose it; an expert that no
    token chose is not unpacked.

    Integer accumulators are exact: float32 products of integers that stay below 2 ** 24, MatMulInteger for wider rows than
    that, int32 sums over groups. Slots are added in ascending order by a second Scan, since ReduceSum promises no order.

    Args:
        group_size: -1 or 128.
        columns: the widest row (hidden or intermediate size) of the model.
    """
    grouped = group_size != -1
    extra = ", gate_up_multiplier, down_multiplier" if grouped else ""
    scanned_extra = ", gum, dm" if grouped else ""
    gate_up = _accumulate("gu", "xq", "gu_packed", "gum", grouped, columns)
    down = _accumulate("d", "hq", "d_packed", "dm", grouped, columns)
    return _function(f"""
        <ir_version: 10, opset_import: ["" : 24]> unused (float x) => (float y) {{ y = Identity(x) }}
        <domain: "{DOMAIN}", opset_import: ["" : 24]>
        {ROUTED_MOE} <num_experts, top_k, hidden_size, intermediate_size, activation, group_size, weight_layout, abi_version,
                      plugin_version, plugin_namespace>
        (hidden_states, topk_ids, topk_weights, gate_up_qweight, gate_up_scale, down_qweight, down_scale{extra}) => (output) {{
            shape = Shape (hidden_states)
            hidden = Shape <start = -1> (hidden_states)
            slots = Shape <start = -1> (topk_ids)
            all = Constant <value_ints = [-1]> ()
            rows = Concat <axis = 0> (all, hidden)
            x_typed = Reshape (hidden_states, rows)
            x = Cast <to = 1> (x_typed)
            last = Constant <value_ints = [-1]> ()
            tiny = Constant <value_float = 1e-30> ()
            limit = Constant <value_float = 127.0> ()
            low = Constant <value_float = -127.0> ()
            {_quantize("x", "qx", "sx")}
            ids = Reshape (topk_ids, all)
            column = Constant <value_ints = [-1, 1]> ()
            weights = Reshape (topk_weights, column)
            pair_count = Shape (ids)
            pair_shape = Concat <axis = 0> (pair_count, hidden)
            empty = ConstantOfShape <value = float[1] {{0.0}}> (pair_shape)
            expert_count = Shape <start = 0, end = 1> (gate_up_qweight)
            axis0 = Constant <value_ints = [0]> ()
            count = Squeeze (expert_count, axis0)
            zero = Constant <value_int = 0> ()
            one = Constant <value_int = 1> ()
            experts64 = Range (zero, count, one)
            experts = Cast <to = 6> (experts64)
            sixteen = Constant <value_float = 16.0> ()
            eight = Constant <value_float = 8.0> ()
            pairs = Scan <num_scan_inputs = {7 if grouped else 5}, body = expert (buffer, e, gu_packed, gus, d_packed, ds{scanned_extra})
                => (buffer_next) {{
                    hit = Equal (ids, e)
                    found = NonZero (hit)
                    pair = Reshape (found, all)
                    pair_total = Size (pair)
                    any_pair = Greater (pair_total, zero)
                    buffer_next = If <then_branch = chosen () => (buffer_then) {{
                    token = Div (pair, slots)
                    xq = Gather <axis = 0> (qx, token)
                    xs = Gather <axis = 0> (sx, token)
                    {gate_up}
                    gu_act = Mul (gu_acc, xs)
                    gu_out = Mul (gu_act, gus)
                    gate, up = Split <axis = -1, num_outputs = 2> (gu_out)
                    sigmoid = Sigmoid (gate)
                    silu = Mul (gate, sigmoid)
                    h = Mul (silu, up)
                    {_quantize("h", "hq", "hs")}
                    {down}
                    d_act = Mul (d_acc, hs)
                    d_out = Mul (d_act, ds)
                    w = Gather <axis = 0> (weights, pair)
                    y = Mul (d_out, w)
                    index = Reshape (pair, column)
                    buffer_then = ScatterND (buffer, index, y)
                    }}, else_branch = idle () => (buffer_else) {{ buffer_else = Identity (buffer) }}> (any_pair)
                }}>
                (empty, experts, gate_up_qweight, gate_up_scale, down_qweight, down_scale{extra})
            slot_shape = Concat <axis = 0> (all, slots, hidden)
            by_token = Reshape (pairs, slot_shape)
            by_slot = Transpose <perm = [1, 0, 2]> (by_token)
            rows_now = Shape (x)
            start = ConstantOfShape <value = float[1] {{0.0}}> (rows_now)
            summed = Scan <num_scan_inputs = 1, body = slot (total, part) => (total_next) {{ total_next = Add (total, part) }}>
                (start, by_slot)
            typed = CastLike (summed, hidden_states)
            output = Reshape (typed, shape)
        }}""")


def _quantize(x: str, q: str, scale: str) -> str:
    """quant.activation.quantize_per_token on the last axis; `q` keeps integer values in float32."""
    return f"""
            {x}_abs = Abs ({x})
            {x}_max = ReduceMax <keepdims = 1> ({x}_abs, last)
            {x}_floor = Max ({x}_max, tiny)
            {scale} = Div ({x}_floor, limit)
            {x}_scaled = Div ({x}, {scale})
            {x}_round = Round ({x}_scaled)
            {q} = Clip ({x}_round, low, limit)"""


def _accumulate(name: str, q: str, packed: str, multiplier: str, grouped: bool, columns: int) -> str:
    """``{name}_acc`` = integer product of `q` [n, K] with the packed int4 rows [N, K / 2], exact, as float32 [n, N]."""
    # A byte is 16 * high + low with high in [-8, 7] and low in [0, 15]; low becomes signed by taking 16 off from 8 on.
    unpack = f"""
                    {name}_byte = Cast <to = 1> ({packed})
                    {name}_sixteenth = Div ({name}_byte, sixteen)
                    {name}_high = Floor ({name}_sixteenth)
                    {name}_high16 = Mul ({name}_high, sixteen)
                    {name}_low_raw = Sub ({name}_byte, {name}_high16)
                    {name}_low_eighth = Div ({name}_low_raw, eight)
                    {name}_low_floor = Floor ({name}_low_eighth)
                    {name}_low_wrap = Mul ({name}_low_floor, sixteen)
                    {name}_low = Sub ({name}_low_raw, {name}_low_wrap)
                    {name}_low3 = Unsqueeze ({name}_low, last)
                    {name}_high3 = Unsqueeze ({name}_high, last)
                    {name}_both = Concat <axis = -1> ({name}_low3, {name}_high3)"""
    if grouped:
        return (
            unpack
            + f"""
                    {name}_grouping = Constant <value_ints = [0, -1, {GROUP}]> ()
                    {name}_w = Reshape ({name}_both, {name}_grouping)
                    {name}_wt = Transpose <perm = [1, 2, 0]> ({name}_w)
                    {name}_x_columns = Shape <start = 1, end = 2> ({q})
                    {name}_group = Constant <value_ints = [{GROUP}]> ()
                    {name}_groups = Div ({name}_x_columns, {name}_group)
                    {name}_x_rows = Shape <start = 0, end = 1> ({q})
                    {name}_x_shape = Concat <axis = 0> ({name}_x_rows, {name}_groups, {name}_group)
                    {name}_xg = Reshape <allowzero = 1> ({q}, {name}_x_shape)
                    {name}_xt = Transpose <perm = [1, 0, 2]> ({name}_xg)
                    {name}_part = MatMul ({name}_xt, {name}_wt)
                    {name}_part32 = Cast <to = 6> ({name}_part)
                    {name}_m = Transpose <perm = [1, 0]> ({multiplier})
                    {name}_m32 = Cast <to = 6> ({name}_m)
                    {name}_axis1 = Constant <value_ints = [1]> ()
                    {name}_m3 = Unsqueeze ({name}_m32, {name}_axis1)
                    {name}_scaled = Mul ({name}_part32, {name}_m3)
                    {name}_axis0 = Constant <value_ints = [0]> ()
                    {name}_acc32 = ReduceSum <keepdims = 0> ({name}_scaled, {name}_axis0)
                    {name}_acc = Cast <to = 1> ({name}_acc32)"""
        )
    flat = (
        unpack
        + f"""
                    {name}_flat = Constant <value_ints = [0, -1]> ()
                    {name}_w = Reshape ({name}_both, {name}_flat)
                    {name}_wt = Transpose <perm = [1, 0]> ({name}_w)"""
    )
    if columns <= _EXACT_COLUMNS:
        return (
            flat
            + f"""
                    {name}_acc = MatMul ({q}, {name}_wt)"""
        )
    return (
        flat
        + f"""
                    {name}_q8 = Cast <to = 3> ({q})
                    {name}_w8 = Cast <to = 3> ({name}_wt)
                    {name}_acc32 = MatMulInteger ({name}_q8, {name}_w8)
                    {name}_acc = Cast <to = 1> ({name}_acc32)"""
    )


def _function(text: str) -> ir.Function:
    model = ir.from_onnx_text(text)
    (function,) = model.functions.values()
    return function
