"""AWQ: activation-aware weight quantization (arXiv 2306.00978), for weights and activations, over all experts at once.

Scales are ``s = a^alpha`` with a the channels' mean magnitude and alpha the best of twenty in [0, 1) by the output error
(Eq. 4 and 5), one for everything behind a norm; then each channel's (or group's) clip is the best by the output error too
(as in the authors' code). Adaptations: the error is that of the linear layers behind the norm, summed over every
expert's routed tokens, with inputs at 8 bits; the clip's error is exact, from the second moments of all tokens instead of
from a sample of 512.
"""

from __future__ import annotations

import torch

from ecmfq_export.quant.hadamard import Rotation
from ecmfq_export.quant.hessian import weighted_error
from ecmfq_export.quant.output_loss import OutputLoss
from ecmfq_export.quant.qtensor import chunked, grid_limit, group_count, round_scale
from ecmfq_export.quant.rtn import DEFAULT_MAX_BYTES, split_scale
from ecmfq_export.quant.sampled_outputs import Pairs
from ecmfq_export.quant.scale_math import expert_mean, normalized, positive, tied
from ecmfq_export.quant.scale_result import PerExpertResult, ScaleResult

ALPHAS = tuple(step / 20 for step in range(20))
CLIP_RATIOS = tuple(1.0 - step / 20 for step in range(11))
"""Fractions of a channel's largest weight that the clip search tries: 1.00 down to 0.50."""


def search_scale(
    train: Pairs, heldout: Pairs, weight: torch.Tensor, omega: torch.Tensor, num_bits: int, rounding: str = "real",
    tie: torch.Tensor | None = None, *, power: int = 2, group_size: int = -1,
) -> ScaleResult:
    """The best ``a^alpha`` for everything behind one norm; alpha = 0 is no scale, so the loss never rises.

    Args:
        train, heldout: tokens; held-out ones only report.
        weight: floating [E, N, d].
        omega: float [E], factor on each expert's error; AWQ itself has ones.
        num_bits, group_size: grid of the weights.
        tie: int64 [d], channels that share a scale (their largest a).
        power: of the error norm; AWQ itself has 2.
    """
    tie = torch.arange(weight.shape[-1]) if tie is None else tie
    loss = OutputLoss(train, weight, omega, num_bits, power, group_size=group_size)
    magnitude = train.x.abs().float().mean(0) if len(train.x) else torch.ones(weight.shape[-1])
    a = tied(positive(magnitude), tie)
    ones = torch.ones(weight.shape[-1])
    before = best = loss.value(ones)
    chosen, label = ones, "alpha=0"
    for alpha in ALPHAS[1:]:
        scale = normalized(a**alpha, rounding)
        value = loss.value(scale)
        if value < best:
            best, chosen, label = value, scale, f"alpha={alpha:.2f}"
    check = OutputLoss(heldout, weight, omega, num_bits, power, group_size=group_size)
    return ScaleResult(chosen, label != "alpha=0", label, before, best, check.value(ones), check.value(chosen))


def search_per_expert(
    train: Pairs, heldout: Pairs, weight: torch.Tensor, num_bits: int, rounding: str = "real", *,
    power: int = 2, group_size: int = -1, rotation: Rotation | None = None,
) -> PerExpertResult:
    """The same for the down projections [E, H, I], every expert with its own a and alpha.

    Args:
        train, heldout: intermediate activations, one row a pair (``token`` is ``arange(P)``).
        rotation: between the scaled intermediate and its quantization.
    """
    experts, _, columns = weight.shape
    loss, check = (OutputLoss(side, weight, torch.ones(experts), num_bits, power, per_expert=True, group_size=group_size,
                              rotation=rotation) for side in (train, heldout))
    mean = expert_mean(train, experts)
    a = positive(mean) if bool((mean > 0).any()) else torch.ones_like(mean)
    ones = torch.ones(experts, columns)
    best, chosen, accepted = loss.losses(ones), ones, torch.zeros(experts, dtype=torch.bool)
    for alpha in ALPHAS[1:]:
        scale = normalized(a**alpha, rounding)
        value = loss.losses(scale)
        better = value < best
        best, chosen = torch.where(better, value, best), torch.where(better.unsqueeze(1), scale, chosen)
        accepted = accepted | better
    return PerExpertResult(chosen, accepted, check.losses(ones).float(), check.losses(chosen).float())


def choose_clip(
    weight: torch.Tensor, hessian: torch.Tensor, num_bits: int, group_size: int = -1, max_bytes: int = DEFAULT_MAX_BYTES
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales [E, N] and group multipliers of the clips with the least output error ``(Q - W) H (Q - W)^T`` of each row.

    Groups of 128 are searched apart, each by its own block of H, as AWQ does.

    Args:
        weight: floating [E, N, K].
        hessian: float32 [E, K, K], second moments of the (quantized) inputs; zero for an expert without tokens, which keeps
            its largest weight on the grid's end.
    """
    experts, rows, columns = weight.shape
    limit = grid_limit(num_bits)
    groups = 1 if group_size == -1 else group_count(columns, group_size)
    width = columns // groups
    steps = torch.empty(experts, rows, groups)
    for part in chunked(experts, 4 * (4 * rows * columns + columns * width), max_bytes):
        # [E, G, N, C] against blocks [E, G, C, C]
        block = weight[part].float().unflatten(-1, (groups, width)).transpose(1, 2)
        moment = hessian[part].unflatten(1, (groups, width)).unflatten(3, (groups, width)).diagonal(dim1=1, dim2=3).movedim(-1, 1)
        absmax = block.abs().amax(-1)
        best_step, best_error = round_scale(absmax / limit), torch.full_like(absmax, float("inf"))
        for ratio in CLIP_RATIOS:
            step = round_scale(absmax * (ratio / limit))
            level = torch.round(block / step.unsqueeze(-1)).clamp_(-limit, limit).mul_(step.unsqueeze(-1)).sub_(block)
            error = weighted_error(level, moment)
            better = error < best_error
            best_error, best_step = torch.where(better, error, best_error), torch.where(better, step, best_step)
        steps[part] = torch.where(absmax > 0, best_step, torch.zeros_like(best_step)).transpose(1, 2)
    return (round_scale(steps.squeeze(-1)), None) if group_size == -1 else split_scale(steps)
