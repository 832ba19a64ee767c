"""Routed and dense MLPs seen alike: experts stacked along a first axis, a dense MLP as one expert that takes every token.

Shared experts are the last ones of the stack; every token's pairs with them have the gate 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ecmfq_export.models.spec import MoESpec
from ecmfq_export.models.torch_decoder import DecoderLayer, Dispatch, Routing
from ecmfq_export.quant.qtensor import QTensor


@dataclass(frozen=True)
class Routed:
    """Where T tokens go, as P rows sorted by expert.

    Attributes:
        token, expert: int64 [P].
        gate: float32 [P], final combine weights.
        dispatch: of the decoder; None for a dense MLP.
        routing: of the decoder; None for a dense MLP.
        rows: which rows these are of the whole layer's.
    """

    token: torch.Tensor
    expert: torch.Tensor
    gate: torch.Tensor
    dispatch: Dispatch | None
    routing: Routing | None
    rows: slice = field(default_factory=lambda: slice(None))


def num_experts(layer: DecoderLayer) -> int:
    """Experts of the layer's MLP, shared ones included, 1 where it is dense."""
    return layer.spec.mlp.total_experts if isinstance(layer.spec.mlp, MoESpec) else 1


def stacked_weights(layer: DecoderLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """gate over up [E, 2 I, d] and down [E, d, I] of a floating-point layer."""
    tensors = layer.tensors
    if isinstance(layer.spec.mlp, MoESpec):
        return tensors["mlp.experts.gate_up_proj"], tensors["mlp.experts.down_proj"]
    gate_up = torch.cat((tensors["mlp.gate_proj.weight"], tensors["mlp.up_proj.weight"]))
    return gate_up.unsqueeze(0), tensors["mlp.down_proj.weight"].unsqueeze(0)


def with_quantized(layer: DecoderLayer, weights: dict[str, QTensor]) -> DecoderLayer:
    """A layer that uses `weights` (by canonical suffix) in place of its floating ones; the rest is shared."""
    tensors = {name: tensor for name, tensor in layer.tensors.items() if name not in weights}
    return DecoderLayer(layer.spec, layer.eps, tensors, {**layer.quantized, **weights}, layer.down_block)


def named_gate_up(layer: DecoderLayer, weight: QTensor) -> dict[str, QTensor]:
    """A stacked gate-up weight under the layer's own names."""
    if isinstance(layer.spec.mlp, MoESpec):
        return {"mlp.experts.gate_up_proj": weight.in_storage()}
    flat, half = unstack(weight), weight.shape[1] // 2
    return {"mlp.gate_proj.weight": flat.rows(0, half), "mlp.up_proj.weight": flat.rows(half, 2 * half)}


def named_down(layer: DecoderLayer, weight: QTensor) -> dict[str, QTensor]:
    """A stacked down weight under the layer's own name."""
    if isinstance(layer.spec.mlp, MoESpec):
        return {"mlp.experts.down_proj": weight.in_storage()}
    return {"mlp.down_proj.weight": unstack(weight)}


def unstack(weight: QTensor) -> QTensor:
    """[1, N, K] to [N, K]."""
    multiplier = None if weight.group_multiplier is None else weight.group_multiplier[0]
    return QTensor(weight.qvalue[0], weight.scale[0], weight.num_bits, weight.group_size, multiplier)


def route(layer: DecoderLayer, x: torch.Tensor, types: torch.Tensor | None = None) -> Routed:
    """Route tokens x [T, d] as the layer does; types as for ``DecoderLayer.route``."""
    if not isinstance(layer.spec.mlp, MoESpec):
        return Routed(torch.arange(len(x)), torch.zeros(len(x), dtype=torch.int64), torch.ones(len(x)), None, None)
    routing = layer.route(x, types)
    where = layer.dispatch(routing)
    return Routed(where.token, where.expert, routing.topk_weights[where.token, where.slot], where, routing)


def only(routed: Routed, part: slice) -> Routed:
    """The rows of `routed` that go to the experts in `part`; their outputs alone cannot be combined."""
    if routed.dispatch is None:
        return routed
    where = routed.dispatch
    low, high = (int(where.offsets[expert]) for expert in (part.start, part.stop))
    rows = slice(low, high)
    some = Dispatch(where.token[rows], where.slot[rows], where.expert[rows], where.offsets.clamp(low, high) - low, where.inverse[:0])
    return Routed(some.token, some.expert, routed.gate[rows], some, routed.routing, rows)


def experts_alone(layer: DecoderLayer, routed: Routed, part: slice) -> tuple[DecoderLayer, Routed]:
    """A layer that has the experts in `part` alone, numbered from 0, for :func:`intermediate`, with their rows of `routed`; nothing is
    copied, and what is widened of a quantized weight is a few experts' and goes with the layer."""
    if routed.dispatch is None:
        return layer, routed
    name, some = "mlp.experts.gate_up_proj", only(routed, part)
    weight = layer.quantized.get(name)
    if weight is None:
        own = DecoderLayer(layer.spec, layer.eps, {name: layer.tensors[name][part]}, {}, layer.down_block)
    else:
        multiplier = None if weight.group_multiplier is None else weight.group_multiplier[part]
        sliced = QTensor(weight.qvalue[part], weight.scale[part], weight.num_bits, weight.group_size, multiplier)
        own = DecoderLayer(layer.spec, layer.eps, {}, {name: sliced}, layer.down_block)
    where = some.dispatch
    offsets = where.offsets[part.start : part.stop + 1]
    dispatch = Dispatch(where.token, where.slot, where.expert - part.start, offsets, where.inverse)
    return own, Routed(some.token, some.expert - part.start, some.gate, dispatch, some.routing, some.rows)


def route_everywhere(layer: DecoderLayer, x: torch.Tensor) -> Routed:
    """Every token to every expert, gates 1: how an expert would see tokens that are not its own."""
    if not isinstance(layer.spec.mlp, MoESpec):
        return route(layer, x)
    experts = layer.spec.mlp.total_experts
    ids = torch.arange(experts).expand(len(x), experts).contiguous()
    routing = Routing(torch.zeros(len(x), experts), torch.ones(len(x), experts), ids, torch.ones(len(x), experts))
    where = layer.dispatch(routing)
    return Routed(where.token, where.expert, torch.ones(len(where.token)), where, routing)


def probability(routed: Routed) -> torch.Tensor:
    """The router's score of each row's expert before renormalization, float32 [P]; 1 where no router chose."""
    if routed.routing is None:
        return torch.ones_like(routed.gate)
    scores = routed.routing.scores
    chosen = routed.expert < scores.shape[1]
    return torch.where(chosen, scores[routed.token, routed.expert.clamp_max(scores.shape[1] - 1)], torch.ones_like(routed.gate))


def intermediate(layer: DecoderLayer, x: torch.Tensor, routed: Routed) -> torch.Tensor:
    """What the down projection reads, ``silu(gate) * up`` behind the layer's Hadamard if it has one, [P, I], for tokens x [T, d] and
    rows as in `routed`."""
    if routed.dispatch is not None:
        return layer.expert_intermediate(x, routed.dispatch)
    return layer.dense_intermediate(x)


def output(layer: DecoderLayer, inner: torch.Tensor, routed: Routed) -> torch.Tensor:
    """The MLP's output [T, d] from its intermediate rows."""
    if routed.dispatch is None or routed.routing is None:
        return layer.linear(inner, "mlp.down_proj")
    return layer.combine(layer.expert_down(inner, routed.dispatch), routed.dispatch, routed.routing)
