"""Weights rounded to nearest and back to floating point, in place: what a search does with hundreds of candidates."""

from __future__ import annotations

import torch

from ecmfq_export.errors import UserError
from ecmfq_export.quant.qtensor import grid_limit, group_count, round_scale
from ecmfq_export.quant.rtn import split_scale


def fake_quantize_rows_(weight: torch.Tensor, num_bits: int, group_size: int = -1) -> torch.Tensor:
    """The values of ``quantize_rtn(weight, num_bits, group_size).dequantize()`` with the largest weight on the grid's end, in the place
    of `weight`: no integers are kept and no second tensor of its size is made.

    Args:
        weight: float32 [..., N, K], contiguous; overwritten.

    Returns:
        `weight`.

    Raises:
        UserError: NaN or infinity in `weight`.
    """
    limit, columns = grid_limit(num_bits), weight.shape[-1]
    groups = 1 if group_size == -1 else group_count(columns, group_size)
    block = weight.unflatten(-1, (groups, columns // groups))
    # Two passes that make nothing: the magnitudes themselves would be a tensor of the weight's size.
    absmax = torch.maximum(block.amax(-1), block.amin(-1).neg_())
    if not bool(torch.isfinite(absmax).all()):
        raise UserError(f"a weight of shape {list(weight.shape)} holds NaN or infinity", "the checkpoint is damaged; download it again")
    if group_size == -1:
        scale = round_scale(absmax / limit)
        return block.div_(scale.unsqueeze(-1)).round_().clamp_(-limit, limit).mul_(scale.unsqueeze(-1)).view_as(weight)
    scale, multiplier = split_scale(absmax / limit)
    factor = multiplier.float()
    block.div_((scale.unsqueeze(-1) * factor).unsqueeze(-1)).round_().clamp_(-limit, limit)
    # The integer product first: it is exact, so that there is one rounding, as in QTensor.dequantize.
    return block.mul_(factor.unsqueeze(-1)).mul_(scale.unsqueeze(-1).unsqueeze(-1)).view_as(weight)
