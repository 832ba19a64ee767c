"""Two int4 values in one byte, the canonical row-major form of checkpoints and graphs."""

from __future__ import annotations

import torch

from ecmfq_export.errors import UserError


def pack_int4(values: torch.Tensor) -> torch.Tensor:
    """Pack int8 [..., K] with values in [-8, 7] into int8 [..., K / 2]; the low nibble is the even index.

    Raises:
        UserError: another dtype, an odd K, or a value outside [-8, 7].
    """
    if values.dtype != torch.int8 or values.ndim < 1 or values.shape[-1] % 2:
        raise UserError(f"cannot pack {values.dtype} {list(values.shape)} as int4", "expected int8 [..., K] with an even K")
    if values.numel():
        low, high = (int(v) for v in torch.aminmax(values))
        if low < -8 or high > 7:
            raise UserError(f"values span [{low}, {high}], int4 holds [-8, 7]")
    pairs = values.contiguous().view(torch.uint8).unflatten(-1, (-1, 2))
    return ((pairs[..., 0] & 0xF) | (pairs[..., 1] << 4)).view(torch.int8)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`pack_int4`: int8 or uint8 [..., K / 2] to int8 [..., K].

    Raises:
        UserError: another dtype.
    """
    if packed.dtype not in (torch.int8, torch.uint8):
        raise UserError(f"cannot unpack {packed.dtype} as int4", "expected int8 or uint8 bytes")
    signed = packed.contiguous().view(torch.int8)
    # Arithmetic right shift of a signed byte extends the nibble's sign; the low nibble is moved up first.
    low = (signed.view(torch.uint8) << 4).view(torch.int8) >> 4
    return torch.stack((low, signed >> 4), -1).flatten(-2)
