"""How com.microsoft's MatMulNBits and QMoE hold int4 weights: blocks of columns, two values a byte, a scale and a zero point a block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from ecmfq_export.quant.weight_only import SYMMETRIC_ZERO, WeightOnly

BLOCKS = (128, 64, 32, 16)
"""Block sizes that both operators take, largest first."""


def block_size(group_size: int, columns: int) -> int | None:
    """The largest block whose columns share a scale; None where groups are no multiple of 16. One group alone takes any block."""
    return next((block for block in BLOCKS if group_size >= columns or group_size % block == 0), None)


def common_block(group_sizes: Sequence[int], columns: Sequence[int]) -> int | None:
    """The largest block that divides every row and every group (where a row has several); None without one."""
    def fits(block: int) -> bool:
        return all(width % block == 0 and (size >= width or size % block == 0) for size, width in zip(group_sizes, columns, strict=True))

    return next((block for block in BLOCKS if fits(block)), None)


def pack_pairs(values: torch.Tensor) -> torch.Tensor:
    """uint8 [..., K] in [0, 15] to uint8 [..., ceil(K / 2)], the even column in the low nibble; an odd one out is followed by 8."""
    values = F.pad(values, (0, values.shape[-1] % 2), value=SYMMETRIC_ZERO)
    return values[..., 0::2] | (values[..., 1::2] << 4)


def pack_blocks(values: torch.Tensor, block: int) -> torch.Tensor:
    """MatMulNBits' ``B``: uint8 [N, K] to uint8 [N, ceil(K / block), block / 2]; the last block is filled up with 8."""
    values = F.pad(values, (0, -values.shape[-1] % block), value=SYMMETRIC_ZERO)
    return pack_pairs(values).unflatten(-1, (-1, block // 2))


def by_block(part: torch.Tensor, weight: WeightOnly, block: int) -> torch.Tensor:
    """Scales or zero points [..., N, G] of `weight` (its columns in group order) as one a block, [..., N, ceil(K / block)]."""
    blocks = -(-weight.shape[-1] // block)
    if part.shape[-1] == 1:
        return part.expand(*part.shape[:-1], blocks).contiguous()
    return part.repeat_interleave(weight.group_size // block, -1)[..., :blocks].contiguous()


def interleave_gate_up(weight: WeightOnly, order: torch.Tensor | None = None) -> WeightOnly:
    """Rows gate 0, up 0, gate 1, up 1, ... of a fused weight [E, 2 I, K] with its gate rows first.

    Args:
        order: int64 [E, I], an order that both halves' rows are put into first.
    """
    half = weight.shape[-2] // 2
    first = torch.arange(half).expand(*weight.shape[:-2], half) if order is None else order
    return weight.take_rows(torch.stack((first, first + half), -1).flatten(-2))
