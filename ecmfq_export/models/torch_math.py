"""The arithmetic of a decoder layer on plain tensors: norms, rotary embedding, attention, routing, routed experts.

Everything takes gradients where its inputs do, and nothing loops over experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ecmfq_export.models.spec import AttentionSpec, MoESpec, RouterSpec
from ecmfq_export.quant.activation import quantize_per_token
from ecmfq_export.quant.qtensor import GROUP, QTensor, grid_limit

_EXACT = (1 << 24) - 1
"""Integers up to here, and so sums that stay below it, are exact in float32 whatever the order of summation."""


_OTHER_TYPE = -1e4
"""Logit of experts that a token's type cannot choose: no probability in a softmax, and finite."""


@dataclass(frozen=True)
class Routing:
    """Where T tokens go.

    Attributes:
        logits: [T, num_experts].
        scores: float32 [T, num_experts], ``scoring(logits)``.
        topk_ids: int64 [T, num_slots], routed experts by descending score (plus selection bias), then the shared ones; -1 in a
            slot that the token leaves empty.
        topk_weights: float32 [T, num_slots], what each expert's output is multiplied by.
    """

    logits: torch.Tensor
    scores: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor


@dataclass(frozen=True)
class Dispatch:
    """Routed (token, slot) pairs sorted by expert; a row is one pair, T · num_slots of them without empty slots.

    Attributes:
        token: int64 [rows], the token of each row.
        slot: int64 [rows], its slot in ``topk_ids``.
        expert: int64 [rows], ascending; equal experts keep token order.
        offsets: int64 [total_experts + 1]; expert ``e`` owns rows ``offsets[e]`` to ``offsets[e + 1]``.
        inverse: int64 [T * num_slots], the row of pair ``token * num_slots + slot``; 0 for an empty slot, whose weight is 0.
    """

    token: torch.Tensor
    slot: torch.Tensor
    expert: torch.Tensor
    offsets: torch.Tensor
    inverse: torch.Tensor


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm over the last axis, computed in float32, as transformers orders it: scaled, cast back, times weight."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding in the rotate-half form of the first channels: x [B, heads, S, head_dim], cos and sin [B, S, rotated]."""
    if cos.shape[-1] < x.shape[-1]:
        return torch.cat((rotate(x[..., : cos.shape[-1]], cos, sin), x[..., cos.shape[-1] :]), dim=-1)
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)


def pairs_to_halves(x: torch.Tensor) -> torch.Tensor:
    """Channels (x0, x1), (x2, x3), ... in the order that :func:`rotate` takes: x0 x2 ... x1 x3 ..."""
    return torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, spec: AttentionSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of [B, heads, S, key_head_dim] over [B, kv_heads, S_kv, key_head_dim].

    Args:
        value: [B, kv_heads, S_kv, value_head_dim].
        mask: additive [B, 1, S, S_kv].

    Returns:
        context [B, S, heads * value_head_dim] and probabilities [B, heads, S, S_kv].
    """
    batch, heads, length, head_dim = query.shape
    # Query heads of one key/value head become rows of one product, so that keys and values are not repeated in memory.
    grouped = query.reshape(batch, spec.num_kv_heads, -1, head_dim)
    logits = torch.matmul(grouped, key.transpose(2, 3)) * spec.scale
    logits = logits.view(batch, heads, length, -1) + mask
    probs = torch.softmax(logits, dim=-1, dtype=torch.float32).to(query.dtype)
    context = torch.matmul(probs.view(*grouped.shape[:-1], -1), value).view(batch, heads, length, value.shape[-1])
    return context.transpose(1, 2).reshape(batch, length, -1), probs


def route(
    x: torch.Tensor, weight: torch.Tensor, spec: RouterSpec, top_k: int, selection_bias: torch.Tensor | None = None,
    num_shared: int = 0,
) -> Routing:
    """Route tokens x [T, hidden] by router weight [num_experts, hidden].

    Args:
        selection_bias: [num_experts], added to the scores for the selection only.
        num_shared: experts that every token takes with weight 1; their ids follow the routed ones'.
    """
    logits = F.linear(x, weight)
    wide = logits.float()
    scores = torch.softmax(wide, dim=-1) if spec.scoring == "softmax" else torch.sigmoid(wide)
    choice = scores if selection_bias is None else scores + selection_bias.float()
    if spec.num_groups > 1:
        choice = limit_groups(choice, spec)
    topk_ids = torch.topk(choice, top_k, dim=-1).indices
    topk_weights = scores.gather(-1, topk_ids)
    if spec.renormalize:
        total = topk_weights.sum(-1, keepdim=True) + spec.renormalize_epsilon
        topk_weights = topk_weights / (total.clamp_min(spec.renormalize_floor) if spec.renormalize_floor else total)
    if spec.scaling != 1.0:
        topk_weights = topk_weights * spec.scaling
    return Routing(logits, scores, *_with_shared(topk_ids, topk_weights, len(weight), num_shared))


def route_by_type(
    x: torch.Tensor, weight: torch.Tensor, mlp: MoESpec, types: torch.Tensor, selection_bias: torch.Tensor | None = None
) -> Routing:
    """Route tokens x [T, hidden] where each type has routed experts of its own (``MoESpec.type_parts``).

    Logits and scores are those of pieces, [T, num_experts]: an expert's at each of its pieces, no score and a logit of -10000 at
    pieces of the other type's experts.

    Args:
        weight: [router_rows, hidden], the types' routers one behind the other; selection_bias: [router_rows].
        types: int64 [T].
    """
    widest, tokens = max(mlp.type_parts), len(x)
    logits = x.new_full((tokens, mlp.num_experts), _OTHER_TYPE)
    scores = torch.zeros(tokens, mlp.num_experts, device=x.device)
    ids = torch.full((tokens, mlp.top_k), -1, device=x.device)
    gates = torch.zeros(tokens, mlp.top_k, device=x.device)
    column, piece = torch.arange(mlp.num_experts, device=x.device), torch.arange(widest, device=x.device)
    biases = [None] * len(mlp.type_parts) if selection_bias is None else selection_bias.chunk(len(mlp.type_parts))
    start = 0
    for kind, (parts, rows, bias) in enumerate(zip(mlp.type_parts, weight.chunk(len(mlp.type_parts)), biases, strict=True)):
        routing = route(x, rows, mlp.router, mlp.picks, bias)
        pieces = torch.where(piece < parts, start + routing.topk_ids.unsqueeze(-1) * parts + piece, -1)
        own = (types == kind).unsqueeze(-1)
        ids = torch.where(own, pieces.flatten(1), ids)
        gates = torch.where(own, (routing.topk_weights.unsqueeze(-1) * (piece < parts)).flatten(1), gates)
        stop = start + mlp.experts_per_type * parts
        span = (column >= start) & (column < stop)
        place = ((column - start) // parts).clamp(0, mlp.experts_per_type - 1)
        scores = torch.where(own & span, routing.scores[:, place], scores)
        logits = torch.where(own & span, routing.logits[:, place], logits)
        start = stop
    return Routing(logits, scores, *_with_shared(ids, gates, mlp.num_experts, mlp.num_shared_experts))


def _with_shared(ids: torch.Tensor, weights: torch.Tensor, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots for `count` experts from `first` on, with weight 1."""
    if not count:
        return ids, weights
    shared = torch.arange(first, first + count, device=ids.device).expand(len(ids), count)
    return torch.cat((ids, shared), -1), torch.cat((weights, weights.new_ones(len(ids), count)), -1)


def chosen(topk_ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Which of `num_experts` experts each token takes, bool [T, num_experts], from ids [T, slots] of which -1 is an empty slot."""
    marks = torch.zeros(len(topk_ids), num_experts + 1, dtype=torch.bool, device=topk_ids.device)
    return marks.scatter_(1, topk_ids.remainder(num_experts + 1), True)[:, :num_experts]


def limit_groups(choice: torch.Tensor, spec: RouterSpec) -> torch.Tensor:
    """Selection scores [T, num_experts], -inf outside the ``top_groups`` groups with the largest sum of two best scores."""
    grouped = choice.unflatten(-1, (spec.num_groups, -1))
    best = grouped.topk(2, dim=-1).values.sum(-1).topk(spec.top_groups, dim=-1).indices
    inside = torch.zeros(grouped.shape[:-1], dtype=torch.bool, device=best.device).scatter_(-1, best, True)
    return grouped.masked_fill(~inside.unsqueeze(-1), float("-inf")).flatten(-2)


def dispatch(topk_ids: torch.Tensor, num_experts: int, empty_slots: bool = False) -> Dispatch:
    """Sort the pairs of topk_ids [T, num_slots] by expert; `num_experts` counts shared ones too.

    Args:
        empty_slots: whether ids may be -1, which makes no pair.
    """
    flat = topk_ids.reshape(-1)
    expert, order = torch.sort(flat, stable=True)
    empty = int((flat < 0).sum()) if empty_slots else 0
    expert, order = expert[empty:], order[empty:]
    inverse = torch.zeros_like(flat)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    offsets = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat.device)
    offsets[1:] = torch.bincount(expert, minlength=num_experts).cumsum(0)
    return Dispatch(order // topk_ids.shape[1], order % topk_ids.shape[1], expert, offsets, inverse)


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """``x[rows of e] @ weight[e].T`` for every expert: x [rows, K] sorted by expert, weight [E, N, K] to [rows, N]."""
    if not x.shape[0]:
        return x.new_zeros(0, weight.shape[1])
    if x.dtype == torch.float64:  # not among grouped_mm's types
        return _padded_linear(x, weight, offsets)
    return F.grouped_mm(x, weight.transpose(1, 2), offs=offsets[1:].int())


def _padded_linear(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    counts = offsets.diff()
    expert = torch.repeat_interleave(torch.arange(len(counts), device=x.device), counts)
    place = torch.arange(x.shape[0], device=x.device) - offsets[:-1][expert]
    padded = x.new_zeros(len(counts), int(counts.max()), x.shape[1]).index_put((expert, place), x)
    return torch.bmm(padded, weight.transpose(1, 2))[expert, place]


def combine(rows: torch.Tensor, where: Dispatch, topk_weights: torch.Tensor) -> torch.Tensor:
    """Weighted sum of the experts' outputs, rows [T * num_slots, hidden] to [T, hidden], in ascending slot order."""
    tokens, num_slots = topk_weights.shape
    slots = rows[where.inverse].view(tokens, num_slots, rows.shape[-1])
    weights = topk_weights.to(rows.dtype)
    total = slots[:, 0] * weights[:, 0, None]
    for slot in range(1, num_slots):
        total = total + slots[:, slot] * weights[:, slot, None]
    return total


@dataclass(frozen=True)
class IntegerWeight:
    """A quantized weight ready for exact integer products in float32 arithmetic.

    Attributes:
        values: float32 [..., N, K], the integers (group multipliers included).
        scale: float32 [..., N].
        parts: column slices whose products with int8 activations stay below 2^24, so that float32 sums are exact.
    """

    values: torch.Tensor
    scale: torch.Tensor
    parts: tuple[slice, ...]

    @classmethod
    def of(cls, weight: QTensor) -> IntegerWeight:
        """Widen `weight`; four bytes a value."""
        values, largest = weight.qvalue.float(), 8 if weight.num_bits == 4 else grid_limit(weight.num_bits)
        if weight.group_multiplier is not None:
            values.unflatten(-1, (-1, GROUP)).mul_(weight.group_multiplier.float().unsqueeze(-1))
            largest *= int(weight.group_multiplier.max())
        # Grouped products want rows that start at multiples of 16 bytes.
        step = max(4, _EXACT // (127 * largest) // 4 * 4)
        columns = values.shape[-1]
        parts = tuple(slice(start, min(start + step, columns)) for start in range(0, columns, step))
        return cls(values, weight.scale, parts)


def quantized_linear(x: torch.Tensor, weight: QTensor | IntegerWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Dynamic per-token int8 activations times an integer weight: ``(acc * act_scale) * weight_scale``, float32.

    Args:
        x: floating [..., K].
        weight: of shape [N, K].
        bias: [N], added last.

    Raises:
        UserError: NaN or infinity in `x`.
    """
    weight = IntegerWeight.of(weight) if isinstance(weight, QTensor) else weight
    qx, act_scale = quantize_per_token(x)
    acc = _exact_sum(torch.matmul(qx[..., part].float(), weight.values[:, part].t()) for part in weight.parts)
    out = acc * act_scale * weight.scale
    return out if bias is None else out + bias.float()


def quantized_grouped_linear(qx: torch.Tensor, act_scale: torch.Tensor, weight: IntegerWeight, where: Dispatch) -> torch.Tensor:
    """:func:`quantized_linear` for routed rows that are quantized already.

    Args:
        qx: int8 [rows, K], rows as in `where`; act_scale: float32 [rows, 1].
        weight: [E, N, K].

    Returns:
        float32 [rows, N].
    """
    acc = _exact_sum(grouped_linear(qx[:, part].float(), weight.values[:, :, part], where.offsets) for part in weight.parts)
    return acc * act_scale * weight.scale[where.expert]


def _exact_sum(products: Iterable[torch.Tensor]) -> torch.Tensor:
    """Sum of integer-valued float32 tensors, rounded to float32 once, as an int32 accumulator is when it is converted."""
    first, *others = products
    if not others:
        return first
    total = first.double()
    for product in others:
        total += product
    return total.float()
