"""EAQuant (arXiv 2506.13329): smoothing merged over experts, calibration balanced by expert, routing kept consistent.

- Smoothing: each expert's SmoothQuant scale ``s_e = max|x_e|^alpha / max|W_e|^(1 - alpha)`` over the tokens routed to it, merged
  by ``max_e s_e`` so that no expert gets less than it needs; alpha = 0.6 as in the authors' code. Their router is quantized and
  may enter the maximum; ours stays in floating point and does not. Down projections: only outlier channels are scaled, by
  ``(max|x_j| / largest normal)^0.7``, a channel being an outlier beyond the fence ``Q + 1.5 (Q - q)`` of the 0.8 and 0.2 quantiles of
  the channels' maxima (the code's rule without its second pass by Otsu's threshold).
- Calibration: samples are added until every expert has twice the average number of tokens, within the sample budget
  (:func:`ecmfq_export.quant.macs.top_up`).
- Routing: the authors choose the 8-bit router's weight clips by the KL divergence of the top-k router probabilities. With a
  floating-point router the error that reaches it comes from the attention before it, so the clip rule of the attention's output
  projection is chosen by that divergence. (Choosing among their hundred clip ratios instead, we found, fits the router at the
  cost of the output, and quintuples the example's divergence.)

Left out: DuQuant's rotations, on which the authors build; they need a rotation at run time before every projection, which no
method gets here.
"""

from __future__ import annotations

from typing import Literal

import torch

from ecmfq_export.quant.hadamard import Rotation
from ecmfq_export.quant.output_loss import OutputLoss
from ecmfq_export.quant.sampled_outputs import Pairs
from ecmfq_export.quant.scale_math import column_maximum, expert_maximum, normalized, positive, tied
from ecmfq_export.quant.scale_result import PerExpertResult, ScaleResult

ALPHA = 0.6
OUTLIER_QUANTILES, OUTLIER_FENCE, OUTLIER_POWER = (0.2, 0.8), 1.5, 0.7
CLIP_RULES: tuple[Literal["absmax", "mse", "output"], ...] = ("mse", "output", "absmax")
"""Clip rules that the routing alignment chooses from; the first one is every other weight's."""


def merged_scale(pairs: Pairs, column: torch.Tensor, alpha: float = ALPHA) -> torch.Tensor:
    """``max_e max_t |x_tj|^alpha / max_i |W_e[i, j]|^(1 - alpha)`` over the tokens of each expert; positive float32 [d].

    Args:
        column: ``max_i |W_e[i, j]|``, float32 [E, d].
    """
    return positive(expert_scales(pairs, column, alpha).amax(0))


def expert_scales(pairs: Pairs, column: torch.Tensor, alpha: float = ALPHA) -> torch.Tensor:
    """What each expert needs by itself, float32 [E, d]; 0 for an expert without tokens."""
    return expert_maximum(pairs, len(column)) ** alpha / positive(column) ** (1.0 - alpha)


def search_scale(
    train: Pairs, heldout: Pairs, weight: torch.Tensor, omega: torch.Tensor, num_bits: int, rounding: str = "real",
    tie: torch.Tensor | None = None, *, group_size: int = -1,
) -> ScaleResult:
    """The merged scale; losses are reported only. Arguments as :func:`ecmfq_export.quant.awq.search_scale`."""
    tie = torch.arange(weight.shape[-1]) if tie is None else tie
    scale, ones = tied(merged_scale(train, column_maximum(weight)), tie), torch.ones(weight.shape[-1])
    scale = normalized(scale, rounding)
    losses = [OutputLoss(side, weight, omega, num_bits, 2, group_size=group_size) for side in (train, heldout)]
    values = [loss.value(s) for loss in losses for s in (ones, scale)]
    return ScaleResult(scale, True, "max over experts", *values)


def search_per_expert(
    train: Pairs, heldout: Pairs, weight: torch.Tensor, num_bits: int, rounding: str = "real", *, group_size: int = -1,
    rotation: Rotation | None = None,
) -> PerExpertResult:
    """Scales of outlier channels of each expert's intermediate; arguments as :func:`ecmfq_export.quant.awq.search_per_expert`."""
    experts, _, columns = weight.shape
    scale = outlier_scale(expert_maximum(train, experts))
    if rounding == "power_of_two":
        scale = torch.exp2(torch.log2(scale).round())
    ones = torch.ones(experts, columns)
    check = OutputLoss(heldout, weight, torch.ones(experts), num_bits, 2, per_expert=True, group_size=group_size, rotation=rotation)
    return PerExpertResult(scale, (scale != 1.0).any(1), check.losses(ones).float(), check.losses(scale).float())


def outlier_scale(largest: torch.Tensor) -> torch.Tensor:
    """Scales [E, I] of channel maxima [E, I]: 1 but for outliers, ``(max / largest normal)^0.7``."""
    low, high = torch.quantile(largest, torch.tensor(OUTLIER_QUANTILES), dim=1, keepdim=True)
    outlier = largest > high + OUTLIER_FENCE * (high - low)
    normal = torch.where(outlier, torch.zeros_like(largest), largest).amax(1, keepdim=True)
    scaled = (largest / normal.clamp_min(1e-30)) ** OUTLIER_POWER
    return torch.where(outlier & (normal > 0), scaled, torch.ones_like(largest))


def routing_divergence(reference: torch.Tensor, logits: torch.Tensor, top_k: int) -> float:
    """Mean over tokens of the KL divergence of router probabilities, over the reference's `top_k` experts only.

    Args:
        reference, logits: router logits [T, E] of the floating-point and of the quantized model.
    """
    best = reference.topk(top_k, dim=-1).indices
    ours, theirs = (values.double().log_softmax(-1).gather(-1, best) for values in (reference, logits))
    return float((ours.exp() * (ours - theirs)).sum(-1).mean()) if len(reference) else 0.0
