"""Routers in standard operators, read from a RouterSpec."""

from __future__ import annotations

import onnx_ir as ir

from ecmfq_export.errors import UnsupportedError
from ecmfq_export.graph.builder import GraphBuilder
from ecmfq_export.models.spec import MoESpec

F32 = ir.DataType.FLOAT


def emit_router(
    b: GraphBuilder, spec: MoESpec, x: ir.Value, weight: ir.Value, selection_bias: ir.Value | None, types: ir.Value | None = None
) -> tuple[ir.Value, ir.Value]:
    """Which experts take each token, and with what weight.

    Everything is float32 whatever the graph's type: the router is thousandths of a layer's work, and a rounding that swaps
    two experts costs more than any other rounding.

    With groups, a group's score is the sum of its two best selection scores (DeepSeek-V3), and experts outside the best
    ``top_groups`` groups are never selected.

    Args:
        x: [batch, seq, hidden] of the graph's type.
        weight: float32 [hidden, router_rows].
        selection_bias: float32 [router_rows], added for the selection only; None without.
        types: int64 [batch, seq], whose routed experts a token chooses from (``MoESpec.type_parts``); None where all share them.

    Returns:
        topk_ids [batch, seq, num_slots] int32 and topk_weights [batch, seq, num_slots] float32: best first, then the shared experts.
    """
    if b.dtype != F32:
        x = b.cast(x, F32, "input_cast")
    logits = b.op("MatMul", x, weight, name="router_logits")
    ids, weights = _choose(b, spec, logits, selection_bias) if types is None else _choose_by_type(b, spec, logits, selection_bias, types)
    return _append_shared(b, spec, ids, weights) if spec.num_shared_experts else (ids, weights)


def _choose(b: GraphBuilder, spec: MoESpec, logits: ir.Value, selection_bias: ir.Value | None) -> tuple[ir.Value, ir.Value]:
    """int32 ids and weights [batch, seq, picks] from logits [batch, seq, experts of one type]."""
    router, picks = spec.router, spec.picks
    scores = b.op("Softmax", logits, axis=-1, name="scores") if router.scoring == "softmax" else b.op("Sigmoid", logits, name="scores")
    choice = scores if selection_bias is None else b.op("Add", scores, selection_bias, name="selection_scores")
    if router.num_groups > 1:
        choice = _limit_groups(b, spec, choice)
    values, ids = b.ops("TopK", choice, b.const([picks], ir.DataType.INT64, f"top_{picks}"), axis=-1, outputs=2, name="topk")
    weights = values if choice is scores else b.op("GatherElements", scores, ids, axis=-1, name="topk_scores")
    if router.renormalize:
        total = b.op("ReduceSum", weights, b.const([-1], ir.DataType.INT64, "last_axis"), keepdims=1, name="topk_total")
        if router.renormalize_epsilon:
            total = b.op("Add", total, b.const(router.renormalize_epsilon, F32, f"epsilon_{router.renormalize_epsilon}"), name="topk_floor")
        if router.renormalize_floor:
            total = b.op("Max", total, b.const(router.renormalize_floor, F32, f"floor_{router.renormalize_floor}"), name="topk_at_least")
        weights = b.op("Div", weights, total, name="topk_normalized")
    if router.scaling != 1.0:
        weights = b.op("Mul", weights, b.const(router.scaling, F32, f"router_scaling_{router.scaling}"), name="topk_scaled")
    return b.cast(ids, ir.DataType.INT32, "topk_ids"), weights


def _choose_by_type(
    b: GraphBuilder, spec: MoESpec, logits: ir.Value, selection_bias: ir.Value | None, types: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """The pieces of each token's own experts in its slots; a slot without a piece has a negative id, which contributes nothing."""
    count, widest = len(spec.type_parts), max(spec.type_parts)
    sizes = b.const([spec.experts_per_type] * count, ir.DataType.INT64, f"router_rows_{spec.experts_per_type}_{count}")
    rows = b.ops("Split", logits, sizes, axis=-1, outputs=count, name="logits_by_type")
    biases = [None] * count if selection_bias is None else b.ops("Split", selection_bias, sizes, axis=0, outputs=count, name="bias_by_type")
    last, slots = b.const([-1], ir.DataType.INT64, "last_axis"), b.shape_const(0, 0, spec.top_k)
    found: tuple[ir.Value, ir.Value] | None = None
    start = 0
    for kind, (parts, own, bias) in enumerate(zip(spec.type_parts, rows, biases, strict=True)):
        with b.scope(f"type_{kind}"):
            ids, weights = _choose(b, spec, own, bias)
            # [picks, 1] times the pieces of an expert, plus where each piece stands.
            places = [start + piece if piece < parts else -(1 << 20) for piece in range(widest)]
            stride = b.const(parts, ir.DataType.INT32, f"pieces_{parts}")
            ids = b.op("Mul", b.op("Unsqueeze", ids, last, name="picks"), stride, name="first_piece")
            ids = b.op("Add", ids, b.const([[[places]]], ir.DataType.INT32, f"pieces_{kind}_{start}_{parts}_{widest}"), name="pieces")
            gates = b.const([[[[float(piece < parts) for piece in range(widest)]]]], F32, f"gates_{parts}_{widest}")
            weights = b.op("Mul", b.op("Unsqueeze", weights, last, name="pick_weights"), gates, name="piece_weights")
            ids, weights = (b.op("Reshape", v, slots, name=n) for v, n in ((ids, "slot_ids"), (weights, "slot_weights")))
            if found is not None:
                mine = b.op("Equal", types, b.const(kind, ir.DataType.INT64, f"type_{kind}"), name="is_own")
                mine = b.op("Unsqueeze", mine, last, name="is_own_slot")
                ids, weights = (b.op("Where", mine, v, old, name=n)
                                for v, old, n in zip((ids, weights), found, ("own_ids", "own_weights"), strict=True))
            found = ids, weights
        start += spec.experts_per_type * parts
    assert found is not None
    return found


def _append_shared(b: GraphBuilder, spec: MoESpec, ids: ir.Value, weights: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Slots for the experts that every token takes, with weight 1."""
    count = spec.num_shared_experts
    tokens = b.op("Shape", ids, start=0, end=2, name="tokens")
    shape = b.op("Concat", tokens, b.shape_const(count), axis=0, name="shared_shape")
    own = b.const([[list(range(spec.num_experts, spec.total_experts))]], ir.DataType.INT32, f"shared_ids_{spec.num_experts}_{count}")
    one = b.const([[[1.0] * count]], F32, f"shared_weights_{count}")
    ids = b.op("Concat", ids, b.op("Expand", own, shape, name="shared_ids"), axis=-1, name="slot_ids")
    return ids, b.op("Concat", weights, b.op("Expand", one, shape, name="shared_weights"), axis=-1, name="slot_weights")


def _limit_groups(b: GraphBuilder, spec: MoESpec, choice: ir.Value) -> ir.Value:
    groups, per_group = spec.router.num_groups, spec.num_experts // spec.router.num_groups
    if groups * per_group != spec.num_experts:
        raise UnsupportedError(f"{spec.num_experts} experts do not divide into {groups} groups")
    last = b.const([-1], ir.DataType.INT64, "last_axis")
    grouped = b.op("Reshape", choice, b.shape_const(0, 0, groups, per_group), name="grouped_scores")
    best_count = b.const([min(2, per_group)], ir.DataType.INT64, f"top_{min(2, per_group)}")
    best, _ = b.ops("TopK", grouped, best_count, axis=-1, outputs=2, name="group_best")
    group_scores = b.op("ReduceSum", best, last, keepdims=0, name="group_scores")
    top = b.const([spec.router.top_groups], ir.DataType.INT64, f"top_{spec.router.top_groups}")
    _, kept = b.ops("TopK", group_scores, top, axis=-1, outputs=2, name="group_topk")
    # A group is kept where one of the selected indices is its own; comparing avoids a scatter.
    index = b.const([[[[g] for g in range(groups)]]], ir.DataType.INT64, f"group_index_{groups}")
    same = b.op(
        "Equal",
        b.op("Unsqueeze", kept, b.const([2], ir.DataType.INT64, "axis_2"), name="group_kept"),
        index,
        name="group_equal",
    )
    hits = b.op("ReduceMax", b.cast(same, F32, "group_hits"), last, keepdims=1, name="group_mask")
    inside = b.op("Greater", hits, b.const(0.5, F32, "half"), name="group_inside")
    # -1e30 instead of -inf: never selected, and no NaN can come of it.
    limited = b.op("Where", inside, grouped, b.const(-1e30, F32, "never_selected"), name="limited_scores")
    return b.op("Reshape", limited, b.shape_const(0, 0, spec.num_experts), name="limited_flat")
