"""Weight-only int4 for integer kernels: the same integers under scales that int8 activations allow.

An integer product is scaled once a channel, so groups of columns may differ by an integer multiplier only (qtensor.py). One group
a channel is carried over exactly. For more groups the multipliers that come nearest are searched; what that costs is measured.
"""

from __future__ import annotations

import torch

from ecmfq_export.errors import UnsupportedError
from ecmfq_export.quant.qtensor import GROUP, LARGEST_SCALE, QTensor, chunked, round_scale
from ecmfq_export.quant.weight_only import WeightOnly

_LARGEST = 127
_TOPS = (1, *range(64, _LARGEST + 1))
"""Multipliers that a channel's largest scale may get: 1 keeps equal scales exact, the others cover every fraction of a step."""


def to_integer_scales(weight: WeightOnly, grouped: bool) -> tuple[QTensor, float]:
    """The integers of `weight` with one float16 scale a channel, and int8 multipliers of groups of 128 where `grouped`.

    Args:
        grouped: must be true where the weight has several groups; one group becomes several equal ones, which is exact.

    Returns:
        The weight, and the relative error of its values: the norm of their difference over their norm; 0 where nothing changed.

    Raises:
        UnsupportedError: zero points, columns in activation order, groups that are no multiple of 128, or scales that are negative
            or beyond float16.
    """
    if weight.zero_point is not None:
        raise UnsupportedError("zero points (asymmetric int4)", "integer kernels multiply symmetric int4")
    if weight.group_index is not None:
        raise UnsupportedError("columns in activation order (desc_act)", "integer kernels take groups of neighbouring columns")
    columns = weight.shape[-1]
    if grouped and (columns % GROUP or weight.num_groups > 1 and weight.group_size % GROUP):
        raise UnsupportedError(f"groups of {weight.group_size} among {columns} columns", f"integer kernels take groups of {GROUP}")
    if bool((weight.scale < 0).any()) or bool((weight.scale > LARGEST_SCALE).any()):
        raise UnsupportedError(f"scales from {float(weight.scale.min())} to {float(weight.scale.max())}",
                               "they must be positive float16 values")
    integer = weight.integer()
    if bool((weight.scale == 0).any()):
        # Such a group is zero, whatever its integers.
        integer = integer * (weight.scale != 0).repeat_interleave(weight.group_size, -1)[..., :columns].to(torch.int8)
    if grouped:
        mass = _squares(integer.unflatten(-1, (-1, GROUP)))
        wanted = weight.scale.repeat_interleave(max(1, weight.group_size // GROUP), -1)[..., : columns // GROUP]
        scale, multiplier = fit_multipliers(wanted, mass)
        result = QTensor(integer, scale, 4, GROUP, multiplier)
        used = scale.unsqueeze(-1) * multiplier.float()
    else:
        mass, wanted = _squares(integer).unsqueeze(-1), weight.scale
        result = QTensor(integer, round_scale(weight.scale.squeeze(-1)), 4)
        used = result.scale.unsqueeze(-1)
    lost, total = (mass * (used - wanted).square()).double().sum(), (mass * wanted.square()).double().sum()
    return result, float((lost / total).sqrt()) if float(total) else 0.0


def fit_multipliers(wanted: torch.Tensor, mass: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One scale a channel and integer multipliers nearest to the group scales `wanted`.

    Tries each of :data:`_TOPS` as the multiplier of a channel's largest scale and keeps the least ``sum(mass * (used - wanted)^2)``.

    Args:
        wanted: float32 [..., N, G], not negative.
        mass: float32 [..., N, G], squared integers of each group: what an error of its scale is multiplied by.

    Returns:
        scale float32 [..., N] (float16 values) and multiplier int8 [..., N, G].
    """
    largest = wanted.amax(-1)
    best_scale, best = round_scale(largest / _LARGEST), torch.full_like(largest, float("inf"))
    for top in _TOPS:
        scale = round_scale(largest / top)
        used = _multipliers(wanted, scale).mul_(scale.unsqueeze(-1))
        error = used.sub_(wanted).square_().mul_(mass).sum(-1)
        better = error < best
        best_scale, best = torch.where(better, scale, best_scale), torch.where(better, error, best)
    return best_scale, _multipliers(wanted, best_scale).to(torch.int8)


def _squares(integer: torch.Tensor) -> torch.Tensor:
    """Sums of squares over the last axis, float32; no wide copy of the whole is made."""
    flat = integer.reshape(-1, integer.shape[-1])
    out = torch.empty(len(flat))
    for part in chunked(len(flat), 4 * flat.shape[-1], 1 << 26):
        out[part] = flat[part].float().square_().sum(-1)
    return out.reshape(integer.shape[:-1])


def _multipliers(wanted: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.round(wanted / scale.unsqueeze(-1)).clamp_(1, _LARGEST)
