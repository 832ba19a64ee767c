"""How other quantizers pack int4 into 32-bit words: GPTQ along inputs, AWQ along outputs in an order of its own.

Words are int32, eight nibbles each; nibble j is bits 4 j to 4 j + 3. All results are unsigned, [0, 15], as [outputs, inputs] and
[outputs, groups].
"""

from __future__ import annotations

import torch

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Nibble j of one of AWQ's words is column ``AWQ_ORDER[j]`` of the word's eight (AutoAWQ's GEMM form)."""

_ALL_ONES = 0x11111111


def nibbles(words: torch.Tensor) -> torch.Tensor:
    """int32 [...] to uint8 [..., 8], lowest nibble first."""
    data = words.contiguous().unsqueeze(-1).view(torch.uint8)  # words are little-endian, in memory as in safetensors
    return torch.stack((data & 0xF, data >> 4), -1).flatten(-2)


def unpack_gptq_weight(qweight: torch.Tensor) -> torch.Tensor:
    """GPTQ's ``qweight`` int32 [K / 8, N], a word down eight inputs, to uint8 [N, K]."""
    return nibbles(qweight).permute(1, 0, 2).flatten(1).contiguous()


def unpack_gptq_zeros(qzeros: torch.Tensor, minus_one: bool) -> torch.Tensor:
    """GPTQ's ``qzeros`` int32 [G, N / 8], a word along eight outputs, to uint8 [N, G].

    Args:
        minus_one: whether zero points are stored less one (format ``gptq``) or as they are (``gptq_v2``). Writers subtract
            0x11111111 from whole words, so that a zero point of 0 borrows from its neighbour; adding it to whole words undoes that.
    """
    words = qzeros
    if minus_one:
        total = (qzeros.long() + _ALL_ONES) & 0xFFFFFFFF
        words = torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)
    return nibbles(words).flatten(1).t().contiguous()


def unpack_awq(words: torch.Tensor) -> torch.Tensor:
    """AWQ's ``qweight`` int32 [K, N / 8] to uint8 [N, K], or its ``qzeros`` [G, N / 8] to [N, G]."""
    inverse = torch.tensor(AWQ_ORDER).argsort()
    return nibbles(words)[..., inverse].flatten(1).t().contiguous()


def unpack_rows(words: torch.Tensor, columns: int) -> torch.Tensor:
    """compressed-tensors' ``weight_packed`` int32 [N, ceil(K / 8)], offset binary, to uint8 [N, K]: the nibbles as they are."""
    return nibbles(words).flatten(1)[:, :columns].contiguous()


def unpack_columns(words: torch.Tensor, rows: int) -> torch.Tensor:
    """compressed-tensors' ``weight_zero_point`` int32 [ceil(N / 8), G], packed down the outputs, to uint8 [N, G]."""
    return nibbles(words).permute(0, 2, 1).flatten(0, 1)[:rows].contiguous()
