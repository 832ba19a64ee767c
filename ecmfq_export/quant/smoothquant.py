"""SmoothQuant (arXiv 2211.10438): ``s_j = max|x_j|^alpha / max|W_j|^(1 - alpha)`` (Eq. 4) for everything behind a norm.

With routed experts the largest weight is taken over all of them, since they share the norm. alpha = 0.5 is the paper's value for
most models; it can also be chosen for the whole model, as the paper does for its hardest ones, by the output error.
As in the paper only inputs that come from a norm are smoothed: neither values nor down projections.
"""

from __future__ import annotations

import torch

from ecmfq_export.quant.output_loss import OutputLoss
from ecmfq_export.quant.sampled_outputs import Pairs
from ecmfq_export.quant.scale_math import normalized, positive, tied
from ecmfq_export.quant.scale_result import ScaleResult

ALPHAS = tuple(step / 20 for step in range(6, 19))
"""Candidates of a choice for the whole model: 0.30 to 0.90."""


def smoothquant_scale(
    x: torch.Tensor, weight: torch.Tensor, alpha: float, rounding: str = "real", tie: torch.Tensor | None = None
) -> torch.Tensor:
    """s, float32 [d], of inputs [T, d] and weights [E, N, d], divided by its geometric mean."""
    tie = torch.arange(weight.shape[-1]) if tie is None else tie
    largest = x.abs().float().amax(0) if len(x) else torch.ones(weight.shape[-1])
    a, b = tied(positive(largest), tie), tied(positive(weight.abs().float().amax((0, 1))), tie)
    return normalized(a**alpha / b ** (1.0 - alpha), rounding)


def search_scale(
    train: Pairs, heldout: Pairs, weight: torch.Tensor, omega: torch.Tensor, num_bits: int, rounding: str = "real",
    tie: torch.Tensor | None = None, *, alpha: float = 0.5, group_size: int = -1,
) -> ScaleResult:
    """The scale of one alpha; losses (AWQ's, arXiv 2306.00978 Eq. 4) are reported only. Arguments as :func:`awq.search_scale`."""
    scale, ones = smoothquant_scale(train.x, weight, alpha, rounding, tie), torch.ones(weight.shape[-1])
    losses = [OutputLoss(side, weight, omega, num_bits, 2, group_size=group_size) for side in (train, heldout)]
    values = [loss.value(s) for loss in losses for s in (ones, scale)]
    return ScaleResult(scale, True, f"alpha={alpha:.2f}", *values)


def alpha_losses(
    train: Pairs, weight: torch.Tensor, omega: torch.Tensor, num_bits: int, rounding: str = "real",
    tie: torch.Tensor | None = None, *, group_size: int = -1,
) -> torch.Tensor:
    """Relative output loss of one group at each of :data:`ALPHAS`, float64; the model's alpha has the least sum over groups."""
    loss = OutputLoss(train, weight, omega, num_bits, 2, group_size=group_size)
    return torch.tensor([loss.value(smoothquant_scale(train.x, weight, alpha, rounding, tie)) for alpha in ALPHAS],
                        dtype=torch.float64)
