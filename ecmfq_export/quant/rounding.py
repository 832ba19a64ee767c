"""Rounding the weights behind one activation, by GPTQ or to nearest, with the scales' clip rule: one call for every method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ecmfq_export.quant import awq
from ecmfq_export.quant.expert_threads import Threads, for_slices
from ecmfq_export.quant.faq import FaqSettings, quantize_faq
from ecmfq_export.quant.hessian import WeightedHessian
from ecmfq_export.quant.qtensor import QTensor
from ecmfq_export.quant.rtn import DEFAULT_MAX_BYTES, quantize_at, quantize_rtn
from ecmfq_export.quant.sampled_outputs import sampled_rows
from ecmfq_export.quant.workspace import Workspace

_AT_ONCE, _COLUMNS = 4, 256

ERROR_PRODUCTS = 1 << 30
"""Multiplications that an expert's error is worth, which is reported and chooses nothing: of weights where all rows would take more
(1536 x 2048), as many rows as that are drawn."""


@dataclass(frozen=True)
class RoundingSettings:
    """How weights are rounded.

    Attributes:
        rounding: ``gptq``, or ``rtn`` to nearest.
        clip: ``absmax``, ``mse``, or with ``rtn`` only ``output``.
        faq: the grid, and GPTQ's own settings.
    """

    rounding: Literal["gptq", "rtn"]
    clip: Literal["absmax", "mse", "output"]
    faq: FaqSettings


def quantize_weight(
    weight: torch.Tensor, hessian: WeightedHessian, settings: RoundingSettings, target: torch.Tensor | None = None,
    target_cross: torch.Tensor | None = None,
) -> QTensor:
    """Quantize [E, N, K] as `settings` say; `target` and `target_cross` as :func:`quantize_faq`.

    Rounding to nearest looks at the Hessian for the ``output`` clip only; its ``mse`` clip is that of the plain weights.
    """
    if settings.rounding == "gptq":
        return quantize_faq(weight, hessian, settings.faq, target, target_cross)
    bits, group_size = settings.faq.num_bits, settings.faq.group_size
    if settings.clip == "output":
        scale, multiplier = awq.choose_clip(weight, hessian.matrix, bits, group_size, settings.faq.max_bytes)
        return quantize_at(weight, scale, multiplier, bits, group_size, settings.faq.max_bytes)
    return quantize_rtn(weight, bits, group_size, settings.clip, max_bytes=settings.faq.max_bytes)


def relative_error(weight: torch.Tensor, quantized: QTensor, matrix: torch.Tensor, max_bytes: int = DEFAULT_MAX_BYTES,
                   threads: Threads = "experts") -> torch.Tensor:
    """Each expert's weighted squared output error over that of its outputs, ``tr(D H D^T) / tr(W H W^T)`` with D = Q - W; over some of
    the rows where the weight is large, see :data:`ERROR_PRODUCTS`.

    Args:
        weight: floating [E, N, K].
        matrix: float32 [E, K, K].

    Returns:
        float32 [E]; 0 for an expert without tokens.
    """
    # The same rows of each expert, since these may be any experts of the layer.
    drawn = sampled_rows((1, weight.shape[1]), ERROR_PRODUCTS // weight.shape[2] ** 2, weight.device.type)
    rows = slice(None) if drawn is None else drawn[0]

    def errors(part: slice, _: Workspace) -> torch.Tensor:
        multiplier = None if quantized.group_multiplier is None else quantized.group_multiplier[part][:, rows]
        some = QTensor(quantized.qvalue[part][:, rows], quantized.scale[part][:, rows], quantized.num_bits, quantized.group_size,
                       multiplier)
        seen = weight[part][:, rows]
        error, whole = (_weighted_square(torch.sub(some.dequantize(), seen), matrix[part]), _weighted_square(seen.float(), matrix[part]))
        return torch.where(whole > 0, error / whole.clamp_min(1e-300), torch.zeros_like(whole))

    each = max_bytes // (torch.get_num_threads() * 16 * weight[0].numel())
    return torch.cat(for_slices(len(weight), max(1, min(_AT_ONCE, each)), errors, threads)).float()


def _weighted_square(value: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """``tr(value matrix value^T)`` of each expert, float64 [E], for [E, N, K] and symmetric [E, K, K], whose upper triangle is read."""
    total = torch.zeros(len(value), dtype=torch.float64)
    for start in range(0, value.shape[-1], _COLUMNS):
        part, place = value[..., start : start + _COLUMNS], slice(start, start + _COLUMNS)
        product = part @ matrix[:, place, place]
        if start:
            product.baddbmm_(value[..., :start], matrix[:, :start, place], alpha=2)
        total += product.mul_(part).sum(-1).double().sum(-1)
    return total
