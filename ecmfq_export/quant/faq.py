"""FAQ: fusion-aware weighted GPTQ of one linear layer, all experts at once.

Ties together the weighted Hessians (:mod:`hessian`), their shrinkage for experts that saw few tokens, the damping rule, and
:mod:`gptq`. Which weighting built the Hessians is the caller's choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ecmfq_export.quant.expert_threads import Threads
from ecmfq_export.quant.gptq import quantize_gptq
from ecmfq_export.quant.hessian import Blend, WeightedHessian, shrinkage
from ecmfq_export.quant.qtensor import QTensor
from ecmfq_export.quant.rtn import DEFAULT_MAX_BYTES, Clip

FEW_TOKENS_DAMP = 5.0
"""Factor on percdamp for experts with fewer effective tokens than columns (0.05 at the default 0.01)."""


@dataclass(frozen=True)
class FaqSettings:
    """How a layer is quantized.

    Attributes:
        num_bits, group_size: the grid.
        percdamp: damping as a fraction of the mean diagonal, for experts with enough tokens.
        kappa: pseudo-count of the shared Hessian; 0 shares nothing (an expert without tokens is then rounded to nearest).
        cross_strength: trust in the correction for errors of earlier layers (GPTAQ), 0 to 1.
        clip: rule of the scales.
        descending: whether the columns with the largest diagonal are rounded first.
        max_bytes: working memory.
        threads: see :mod:`expert_threads`.
    """

    num_bits: int
    group_size: int = -1
    percdamp: float = 0.01
    kappa: float = 256.0
    cross_strength: float = 1.0
    clip: Clip = "mse"
    descending: bool = True
    max_bytes: int = DEFAULT_MAX_BYTES
    threads: Threads = "experts"


def quantize_faq(
    weight: torch.Tensor, hessian: WeightedHessian, settings: FaqSettings,
    target: torch.Tensor | None = None, target_cross: torch.Tensor | None = None,
) -> QTensor:
    """Quantize [E, N, K] against weighted Hessians.

    Args:
        weight: floating [E, N, K].
        hessian: of the same E and K.
        target, target_cross: what experts with few tokens shrink towards, [K, K] or [E, K, K]; None takes the sum over
            experts, which makes sense where all experts read the same channels (gate and up, not down).

    Raises:
        UserError: NaN or infinity in weights or Hessians.
    """
    n_eff = hessian.n_eff
    share = shrinkage(n_eff, settings.kappa)
    percdamp = settings.percdamp * torch.where(n_eff < weight.shape[-1], FEW_TOKENS_DAMP, 1.0).float()
    if settings.kappa == 0.0:
        target = target_cross = None
    elif target is None and weight.shape[0] > 1:
        target, target_cross = hessian.pooled()
    blend = None if target is None else Blend.of(hessian.matrix, share, target, target_cross)
    return quantize_gptq(weight, hessian.matrix, settings.num_bits, settings.group_size, percdamp=percdamp.clamp_max(1.0),
                         cross=hessian.cross, cross_strength=settings.cross_strength, clip=settings.clip,
                         descending=settings.descending, blend=blend, max_bytes=settings.max_bytes, threads=settings.threads)
