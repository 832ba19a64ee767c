"""VEQ (arXiv 2602.01037): expert importance for AWQ's search (VEQ-ME) and token weights for GPTQ's Hessian (VEQ-MA).

gamma is the ratio of the mean gradient magnitudes of text and vision tokens, used as it is: neither clipped nor balanced.
Its code is not public and its equations were read in notes on the paper. The authors evaluate VEQ-ME on AWQ and VEQ-MA on GPTQ,
apart; together they are VEQ-ME's scales followed by VEQ-MA's rounding.
They quantize the experts only; attention projections, which have no router, get the modality's weight alone.
"""

from __future__ import annotations

import torch

from ecmfq_export.quant.token_weights import TEXT, VISION


def expert_importance(expert: torch.Tensor, types: torch.Tensor, num_experts: int, gamma: float) -> torch.Tensor:
    """VEQ-ME's ``S_e = gamma N_e^text + beta N_e^vision``, beta = all text pairs / all vision pairs; float32 [E].

    The result is divided by its mean. Without pairs of one modality beta is 1; without any pair S is all ones.

    Args:
        expert: int64 [P], expert of each routed pair.
        types: int [P], modality of its token.
    """
    text, vision = (torch.bincount(expert[types == modality], minlength=num_experts).double() for modality in (TEXT, VISION))
    beta = float(text.sum() / vision.sum()) if bool(text.sum() > 0) and bool(vision.sum() > 0) else 1.0
    score = gamma * text + beta * vision
    return (score / score.mean() if bool(score.sum() > 0) else torch.ones_like(score)).float()


def token_weight(probability: torch.Tensor, types: torch.Tensor, gamma: float) -> torch.Tensor:
    """VEQ-MA's diagonal C, ``c_j = p_j alpha_j`` with alpha gamma for text and 1 for vision: the Hessian is ``X C X^T``.

    Args:
        probability: float [P], the router's probability of each pair's expert, before any renormalization.
        types: int [P].
    """
    return probability * torch.where(types == TEXT, torch.full_like(probability, gamma), torch.ones_like(probability))
