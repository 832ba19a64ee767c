"""An MLP's weights rounded a chunk of experts at a time: the chunk's Hessians from all batches, its weights, then the next chunk.

Every expert comes out the same, bit for bit, however many are in a chunk. Batches are read again for each chunk; what costs more than
reading, the experts' own computations, is done for the chunk's experts alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from ecmfq_export.models.spec import MoESpec
from ecmfq_export.models.torch_decoder import DecoderLayer
from ecmfq_export.quant.activation import fake_quantize_per_token
from ecmfq_export.quant.expert_memory import plan_experts
from ecmfq_export.quant.expert_threads import Threads, for_slices
from ecmfq_export.quant.hessian import WeightedHessian
from ecmfq_export.quant.qtensor import QTensor, cat_experts
from ecmfq_export.quant.rounding import RoundingSettings, quantize_weight, relative_error
from ecmfq_export.quant.workspace import Workspace
from ecmfq_export.stages import mlp_view
from ecmfq_export.stages.mlp_view import Routed
from ecmfq_export.stages.ranks import ALONE, Ranks

_EXPERTS = 16
"""Experts that a thread computes between two looks at what is left."""


@dataclass(frozen=True)
class RoutedBatch:
    """A batch as the MLP sees it.

    Attributes:
        x, reference: [T, d], inputs of the quantized and of the floating-point model.
        routed: where the quantized model's tokens go.
        weight: float32 [P], of each routed pair.
    """

    x: torch.Tensor
    reference: torch.Tensor
    routed: Routed
    weight: torch.Tensor


Batches = Callable[[], Iterable[RoutedBatch]]
"""Reads all batches anew."""


@dataclass(frozen=True)
class ChunkSettings:
    """How an MLP is rounded.

    Attributes:
        rounding: its rule.
        cross: whether the cross term is kept.
        shrinks: whether experts with few tokens lean on others.
        memory: bytes beside weights, activations and results; where the layer has one MLP only it takes what it needs.
        ranks: processes that share the experts; each builds its own experts' Hessians, and every one gets all results.
    """

    rounding: RoundingSettings
    cross: bool
    shrinks: bool
    memory: int
    ranks: Ranks = ALONE


def round_gate_up(layer: DecoderLayer, weight: torch.Tensor, batches: Batches, settings: ChunkSettings) -> tuple[QTensor, torch.Tensor]:
    """Gate over up [E, 2 I, d] rounded, and each expert's relative output error, float32 [E]."""
    shared = _whole_layer(weight, batches, settings) if settings.shrinks and _threads(layer) == "experts" else None

    def hessian(part: slice, memory: Workspace) -> WeightedHessian:
        found = _empty(layer, weight, part, settings, memory)
        for batch in batches():
            some = mlp_view.only(batch.routed, part)
            found.add(fake_quantize_per_token(batch.x), some.expert - part.start, batch.weight[some.rows], some.token,
                      batch.reference if settings.cross else None)
        return found

    def target(part: slice, memory: Workspace) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return (None, None) if shared is None else (shared.matrix[0], None if shared.cross is None else shared.cross[0])

    return _round(layer, weight, hessian, target, settings, shared=shared is not None, own_target=False)


def round_down(
    layer: DecoderLayer, floating: DecoderLayer, weight: torch.Tensor, batches: Batches, spread: torch.Tensor | None,
    settings: ChunkSettings,
) -> tuple[QTensor, torch.Tensor]:
    """Down [E, d, I] rounded behind a quantized gate and up, and each expert's relative output error, float32 [E].

    Args:
        layer: with gate and up quantized.
        floating: with none.
        spread: inputs [T, d] that every expert computes: an expert with few tokens leans on what it would see of all tokens, since
            experts have channels of their own there. None where nothing shrinks.
    """

    def hessian(part: slice, memory: Workspace) -> WeightedHessian:
        found = _empty(layer, weight, part, settings, memory)
        for batch in batches():
            some = mlp_view.only(batch.routed, part)
            found.add(fake_quantize_per_token(_intermediate(layer, batch.x, batch.routed, part)), some.expert - part.start,
                      batch.weight[some.rows],
                      reference=_intermediate(floating, batch.reference, batch.routed, part) if settings.cross else None)
        return found

    def target(part: slice, memory: Workspace) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if spread is None:
            return None, None
        total = WeightedHessian(part.stop - part.start, weight.shape[-1], threads=_threads(layer), memory=memory)
        for some in spread.split(64):
            routed = mlp_view.route_everywhere(layer, some)
            inner = fake_quantize_per_token(_intermediate(layer, some, routed, part))
            total.add(inner, mlp_view.only(routed, part).expert - part.start, torch.ones(len(inner)))
        return total.matrix, None

    return _round(layer, weight, hessian, target, settings, shared=False, own_target=spread is not None)


def _round(
    layer: DecoderLayer, weight: torch.Tensor, hessian: Callable[[slice, Workspace], WeightedHessian],
    target: Callable[[slice, Workspace], tuple[torch.Tensor | None, torch.Tensor | None]], settings: ChunkSettings, *, shared: bool,
    own_target: bool,
) -> tuple[QTensor, torch.Tensor]:
    quantized, errors = [], []
    # A chunk's matrices go where the last one's were.
    memory, target_memory = Workspace(), Workspace()
    for part, rounding in _chunks(layer, weight, settings, shared, own_target):
        found = hessian(part, memory)
        matrix, cross = target(part, target_memory)
        quantized.append(quantize_weight(weight[part], found, rounding, matrix, cross))
        errors.append(relative_error(weight[part], quantized[-1], found.matrix, rounding.faq.max_bytes, rounding.faq.threads))
        del found, matrix, cross  # before the next chunk's take their place
    whole = cat_experts(quantized), torch.cat(errors)
    return whole if settings.ranks.size == 1 or not isinstance(layer.spec.mlp, MoESpec) else _gathered(*whole, len(weight), settings.ranks)


def _gathered(own: QTensor, errors: torch.Tensor, experts: int, ranks: Ranks) -> tuple[QTensor, torch.Tensor]:
    """All ranks' experts in their order."""
    multiplier = None if own.group_multiplier is None else ranks.gather(own.group_multiplier, experts)
    quantized = QTensor(ranks.gather(own.qvalue, experts), ranks.gather(own.scale, experts), own.num_bits, own.group_size, multiplier)
    return quantized, ranks.gather(errors, experts)


def _chunks(
    layer: DecoderLayer, weight: torch.Tensor, settings: ChunkSettings, shared: bool, own_target: bool
) -> Iterator[tuple[slice, RoundingSettings]]:
    """Chunks of experts, and how each is rounded."""
    experts, rows, columns = weight.shape
    rounding = replace(settings.rounding, faq=replace(settings.rounding.faq, threads=_threads(layer)))
    if not isinstance(layer.spec.mlp, MoESpec):
        yield slice(0, experts), rounding
        return
    plan = plan_experts(experts, rows, columns, cross=settings.cross, shared=shared, own_target=own_target, limit=settings.memory,
                        on_host=_threads(layer) == "experts")
    rounding = replace(rounding, faq=replace(rounding.faq, max_bytes=plan.working_bytes))
    mine = settings.ranks.share(experts)
    for start in range(mine.start, mine.stop, plan.chunk):
        yield slice(start, min(start + plan.chunk, mine.stop)), rounding


def _threads(layer: DecoderLayer) -> Threads:
    on_host = all(tensor.device.type == "cpu" for tensor in layer.tensors.values())
    return "experts" if on_host and isinstance(layer.spec.mlp, MoESpec) else "operators"


def _empty(layer: DecoderLayer, weight: torch.Tensor, part: slice, settings: ChunkSettings, memory: Workspace) -> WeightedHessian:
    return WeightedHessian(part.stop - part.start, weight.shape[-1], settings.cross, _threads(layer), memory)


def _whole_layer(weight: torch.Tensor, batches: Batches, settings: ChunkSettings) -> WeightedHessian:
    """The sum over all experts, from each token's sum of weights: its [1, K, K] is what experts with few tokens lean on."""
    total = WeightedHessian(1, weight.shape[-1], settings.cross, "operators")
    for batch in batches():
        token_weight = torch.zeros(len(batch.x)).index_add_(0, batch.routed.token, batch.weight)
        total.add(fake_quantize_per_token(batch.x), torch.zeros(len(batch.x), dtype=torch.int64), token_weight,
                  reference=batch.reference if settings.cross else None)
    return total


def _intermediate(layer: DecoderLayer, x: torch.Tensor, routed: Routed, part: slice) -> torch.Tensor:
    """What the down projection of the experts in `part` reads, rows as in ``only(routed, part)``.

    Quantized experts are widened a few at a time: all of a layer's would be as many bytes as its floating-point experts, beside them.
    """
    if routed.dispatch is None:
        return mlp_view.intermediate(layer, x, routed)

    def some(few: slice, _: object) -> torch.Tensor:
        own, rows = mlp_view.experts_alone(layer, routed, slice(part.start + few.start, part.start + few.stop))
        return mlp_view.intermediate(own, x, rows)

    return torch.cat(for_slices(part.stop - part.start, _EXPERTS, some))
