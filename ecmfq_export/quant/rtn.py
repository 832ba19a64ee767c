"""Choosing scales and rounding to nearest, batched over any leading dimensions (experts)."""

from __future__ import annotations

from typing import Literal

import torch

from ecmfq_export.errors import UserError
from ecmfq_export.quant.expert_threads import for_slices
from ecmfq_export.quant.host_kernels import host_kernels
from ecmfq_export.quant.qtensor import QTensor, chunked, grid_limit, group_count, round_scale
from ecmfq_export.quant.workspace import Workspace

Clip = Literal["absmax", "mse"]

CLIP_RATIOS = tuple(1.0 - 0.04 * step for step in range(16))
"""Fractions of a channel's largest magnitude that the clip search tries: 1.00 down to 0.40."""

DEFAULT_MAX_BYTES = 1 << 30

_ROWS = 1024
"""Most rows that a thread of the host searches between two looks at what is left."""

_SEARCH_ITEMS = 1 << 17
"""Weights searched at a time on a device: what the search reads again and again stays in its cache."""


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
        some, cost = flat[part].float(), None if weights is None else weights[part]
        if clip == "mse" and weight.device.type == "cpu":
            steps[part] = _search_on_host(some, groups, limit, cost)
        else:
            block = some.unflatten(-1, (groups, columns // groups))
            absmax = block.abs().amax(-1)
            steps[part] = absmax / limit
            if clip == "mse" and bool(torch.isfinite(absmax).all()):
                costs = None if cost is None else cost.unflatten(-1, (groups, columns // groups)).unsqueeze(1)
                steps[part] = _search(block, absmax, limit, costs)
        if not bool(torch.isfinite(steps[part]).all()):
            raise UserError(f"a weight of shape {list(weight.shape)} holds NaN or infinity",
                            "the checkpoint is damaged; download it again")
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


def _search_on_host(weight: torch.Tensor, groups: int, limit: int, cost: torch.Tensor | None) -> torch.Tensor:
    """:func:`_search` for `weight` [B, N, K] and `cost` [B, K], by the host's kernel; [B, N, G], not finite where `weight` is not."""
    kernels, ratios = host_kernels(), torch.tensor(CLIP_RATIOS)
    count, rows, _ = weight.shape
    weight, cost = weight.contiguous(), None if cost is None else cost.contiguous()
    steps = torch.empty(count, rows, groups)

    def search(part: slice, _: Workspace) -> None:
        # Rows of all matrices in one sequence.
        for index in range(part.start // rows, -(-part.stop // rows)):
            some = slice(max(part.start - index * rows, 0), min(part.stop - index * rows, rows))
            kernels.search_steps(weight[index, some], groups, None if cost is None else cost[index], ratios, limit, steps[index, some])

    for_slices(count * rows, _ROWS, search)
    return steps


def _search(block: torch.Tensor, absmax: torch.Tensor, limit: int, cost: torch.Tensor | None) -> torch.Tensor:
    """The step [B, N, G] of least squared error for `block` [B, N, G, C], weighted by `cost` [B, 1, G, C]; ties keep the larger clip.

    The error is close to convex in the clip: every third of :data:`CLIP_RATIOS` is tried, then the best one's neighbours.
    """
    if not block.numel():
        return torch.zeros_like(absmax)
    # Against the rounded value: it is what weights are quantized with.
    steps = round_scale(absmax.unsqueeze(-1) * (torch.tensor(CLIP_RATIOS) / limit))
    safe = torch.where(absmax > 0, absmax, torch.ones_like(absmax))
    best = torch.empty(absmax.shape, dtype=torch.int64)
    outer = max(1, _SEARCH_ITEMS // block[0].numel())
    inner = max(1, _SEARCH_ITEMS // (outer * block[0, 0].numel()))
    for first in range(0, len(block), outer):
        for second in range(0, block.shape[1], inner):
            part = (slice(first, first + outer), slice(second, second + inner))
            unit = safe[part] / limit
            # Magnitudes in units of the widest grid's step: the grid is symmetric.
            level = block[part].abs().div_(unit.unsqueeze(-1))
            best[part] = _best_ratio(level, steps[part] / unit.unsqueeze(-1), limit, None if cost is None else cost[part[0]])
    return torch.where(absmax > 0, steps.gather(-1, best.unsqueeze(-1)).squeeze(-1), torch.zeros_like(absmax))


def _best_ratio(level: torch.Tensor, steps: torch.Tensor, limit: int, cost: torch.Tensor | None) -> torch.Tensor:
    """Index of the step of least error, of `steps` [B, N, G, number of ratios] for magnitudes `level` [B, N, G, C]."""
    scaled, nearest, inverse = torch.empty_like(level), torch.empty_like(level), steps.reciprocal()

    def error(index: torch.Tensor) -> torch.Tensor:
        # In units of the step: fewer passes over the weights.
        torch.mul(level, inverse.gather(-1, index), out=scaled)
        torch.round(scaled, out=nearest).clamp_(max=limit)
        torch.ops.aten.mse_loss.out(nearest, scaled, 0, out=scaled)  # (nearest - scaled)^2 in one pass
        if cost is None:
            total = scaled.sum(-1, keepdim=True)
        elif scaled.shape[2] == 1:
            total = (scaled.squeeze(2) @ cost.reshape(len(cost), -1, 1)).unsqueeze(2)
        else:
            total = scaled.mul_(cost).sum(-1, keepdim=True)
        return total * steps.gather(-1, index).square_()

    start = torch.zeros_like(steps[..., :1], dtype=torch.int64)
    coarse = torch.arange(0, len(CLIP_RATIOS), 3)
    errors = torch.cat([error(start + int(ratio)) for ratio in coarse], -1)
    least, which = errors.min(-1, keepdim=True)
    index = coarse[which]
    below, above = (index - 1).clamp_min(0), (index + 1).clamp_max(len(CLIP_RATIOS) - 1)
    near = torch.cat((below, index, above), -1)  # the smaller index, which is the larger clip, first
    errors = torch.cat((error(below), least, error(above)), -1)
    return near.gather(-1, errors.argmin(-1, keepdim=True)).squeeze(-1)


def split_scale(steps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two levels for group steps [..., N, G]: one float16 scale a channel, int8 multipliers that come nearest."""
    scale = round_scale(steps.amax(-1) / 127.0)
    multiplier = torch.round(steps / scale.unsqueeze(-1)).clamp_(1, 127).to(torch.int8)
    return scale, multiplier
