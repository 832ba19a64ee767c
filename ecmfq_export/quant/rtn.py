"""Choosing scales and rounding to nearest, batched over any leading dimensions (experts)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from ecmfq_export.errors import UserError
from ecmfq_export.quant.qtensor import QTensor, chunked, grid_limit, group_count, round_scale

Clip = Literal["absmax", "mse"]

CLIP_RATIOS = tuple(1.0 - 0.04 * step for step in range(16))
"""Fractions of a channel's largest magnitude that the clip search tries: 1.00 down to 0.40."""

DEFAULT_MAX_BYTES = 1 << 30


def quantize_rtn(
    weight: torch.Tensor, num_bits: int, group_size: int = -1, clip: Clip = "absmax",
    importance: torch.Tensor | None = None, max_bytes: int = DEFAULT_MAX_BYTES,
) -> QTensor:
    """Round `weight` to the nearest point of a per-channel (or two-level) grid.

    Args:
        weight: floating [..., N, K].
        clip: ``absmax`` puts the largest weight of a channel on the grid's end (the baseline's rule); ``mse`` searches
            :data:`CLIP_RATIOS` for the least squared error.
        importance: non-negative [..., K] weights of the squared error (the Hessian's diagonal); ``mse`` only.
        max_bytes: working memory; leading dimensions are processed in chunks that fit.

    Raises:
        UserError: NaN or infinity in `weight`.
    """
    scale, multiplier = choose_scale(weight, num_bits, group_size, clip, importance, max_bytes)
    return quantize_at(weight, scale, multiplier, num_bits, group_size, max_bytes)


def quantize_at(
    weight: torch.Tensor, scale: torch.Tensor, multiplier: torch.Tensor | None, num_bits: int, group_size: int = -1,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> QTensor:
    """Round `weight` [..., N, K] to the nearest point of the grid of these scales and group multipliers."""
    flat, steps = weight.reshape(-1, *weight.shape[-2:]), effective_scale(scale, multiplier, weight.shape[-1])
    steps = steps.reshape(flat.shape[0], flat.shape[1], -1)
    qvalue = torch.empty(flat.shape, dtype=torch.int8)
    for part in chunked(flat.shape[0], 12 * flat[0].numel() if len(flat) else 1, max_bytes):
        qvalue[part] = round_to_grid(flat[part].float(), steps[part], grid_limit(num_bits))
    return QTensor(qvalue.reshape(weight.shape), scale, num_bits, group_size, multiplier)


def choose_scale(
    weight: torch.Tensor, num_bits: int, group_size: int = -1, clip: Clip = "mse",
    importance: torch.Tensor | None = None, max_bytes: int = DEFAULT_MAX_BYTES,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales [..., N] (float32 holding float16 values) and group multipliers int8 [..., N, K / 128] or None.

    Arguments and errors as :func:`quantize_rtn`.
    """
    limit, columns = grid_limit(num_bits), weight.shape[-1]
    groups = 1 if group_size == -1 else group_count(columns, group_size)
    flat = weight.reshape(-1, *weight.shape[-2:])
    weights = None if importance is None else importance.float().expand(*weight.shape[:-2], columns).reshape(-1, columns)
    steps = torch.empty(*flat.shape[:-1], groups)
    for part in chunked(flat.shape[0], 20 * flat[0].numel() if len(flat) else 1, max_bytes):
        block = flat[part].float().unflatten(-1, (groups, columns // groups))
        absmax = block.abs().amax(-1)
        if not bool(torch.isfinite(absmax).all()):
            raise UserError(f"a weight of shape {list(weight.shape)} holds NaN or infinity",
                            "the checkpoint is damaged; download it again")
        if clip == "mse":
            cost = None if weights is None else weights[part].unflatten(-1, (groups, columns // groups)).unsqueeze(1)
            steps[part] = _search(block, absmax, limit, cost, CLIP_RATIOS)
        else:
            steps[part] = absmax / limit
    steps = steps.reshape(*weight.shape[:-1], groups)
    if group_size == -1:
        return round_scale(steps.squeeze(-1)), None
    return split_scale(steps)


def effective_scale(scale: torch.Tensor, multiplier: torch.Tensor | None, columns: int) -> torch.Tensor:
    """The step of the grid at each weight: [..., N, 1] per channel, [..., N, K] with group multipliers."""
    if multiplier is None:
        return scale.unsqueeze(-1)
    return (scale.unsqueeze(-1) * multiplier.float()).repeat_interleave(columns // multiplier.shape[-1], -1)


def round_to_grid(weight: torch.Tensor, step: torch.Tensor, limit: int) -> torch.Tensor:
    """int8 round-half-even of ``weight / step``, clipped to [-limit, limit]."""
    return torch.round(weight / step).clamp_(-limit, limit).to(torch.int8)


def _search(
    block: torch.Tensor, absmax: torch.Tensor, limit: int, cost: torch.Tensor | None, ratios: Sequence[float]
) -> torch.Tensor:
    """The step [..., N, G] of least (weighted) squared error for `block` [..., N, G, C]; ties keep the larger clip."""
    best_step, best_error = absmax / limit, torch.full_like(absmax, float("inf"))
    for ratio in ratios:
        # Against the rounded value: it is what weights are quantized with.
        step = round_scale(absmax * (ratio / limit))
        level = torch.div(block, step.unsqueeze(-1)).round_().clamp_(-limit, limit)
        error = level.mul_(step.unsqueeze(-1)).sub_(block).square_()
        total = (error if cost is None else error.mul_(cost)).sum(-1)
        better = total < best_error
        best_error = torch.where(better, total, best_error)
        best_step = torch.where(better, step, best_step)
    return torch.where(absmax > 0, best_step, torch.zeros_like(best_step))


def split_scale(steps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two levels for group steps [..., N, G]: one float16 scale a channel, int8 multipliers that come nearest."""
    scale = round_scale(steps.amax(-1) / 127.0)
    multiplier = torch.round(steps / scale.unsqueeze(-1)).clamp_(1, 127).to(torch.int8)
    return scale, multiplier
