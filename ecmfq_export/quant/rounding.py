"""Rounding the weights behind one activation, by GPTQ or to nearest, with the scales' clip rule: one call for every method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ecmfq_export.quant import awq
from ecmfq_export.quant.faq import FaqSettings, quantize_faq
from ecmfq_export.quant.hessian import WeightedHessian, weighted_error
from ecmfq_export.quant.qtensor import QTensor, chunked
from ecmfq_export.quant.rtn import DEFAULT_MAX_BYTES, quantize_at, quantize_rtn


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
    weight: torch.Tensor, hessian: WeightedHessian, settings: RoundingSettings, target: torch.Tensor | None = None
) -> QTensor:
    """Quantize [E, N, K] as `settings` say; `target` as :func:`quantize_faq`.

    Rounding to nearest looks at the Hessian for the ``output`` clip only; its ``mse`` clip is that of the plain weights.
    """
    if settings.rounding == "gptq":
        return quantize_faq(weight, hessian, settings.faq, target=target)
    bits, group_size = settings.faq.num_bits, settings.faq.group_size
    if settings.clip == "output":
        scale, multiplier = awq.choose_clip(weight, hessian.matrix, bits, group_size, settings.faq.max_bytes)
        return quantize_at(weight, scale, multiplier, bits, group_size, settings.faq.max_bytes)
    return quantize_rtn(weight, bits, group_size, settings.clip, max_bytes=settings.faq.max_bytes)


def relative_error(weight: torch.Tensor, quantized: QTensor, matrix: torch.Tensor, max_bytes: int = DEFAULT_MAX_BYTES) -> torch.Tensor:
    """Each expert's weighted squared output error over that of its outputs, ``tr(D H D^T) / tr(W H W^T)`` with D = Q - W.

    Args:
        weight: floating [E, N, K].
        matrix: float32 [E, K, K].

    Returns:
        float32 [E]; 0 for an expert without tokens.
    """
    found = []
    for part in chunked(len(weight), 16 * weight[0].numel() + 4 * matrix[0].numel(), max_bytes):
        multiplier = None if quantized.group_multiplier is None else quantized.group_multiplier[part]
        some = QTensor(quantized.qvalue[part], quantized.scale[part], quantized.num_bits, quantized.group_size, multiplier)
        values = weight[part].float()
        error, whole = (weighted_error(v, matrix[part]).double().sum(-1) for v in (some.dequantize() - values, values))
        found.append(torch.where(whole > 0, error / whole.clamp_min(1e-300), torch.zeros_like(whole)))
    return torch.cat(found).float()
