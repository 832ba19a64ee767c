"""A symmetric integer tensor with its scales: what every weight becomes and every reader of weights takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ecmfq_export.errors import UnsupportedError, UserError

GROUP = 128
"""Columns that share a group multiplier where ``group_size`` is not -1."""

SMALLEST_SCALE = 2.0**-24
"""Smallest positive float16; no scale is below it."""

LARGEST_SCALE = 65504.0
"""Largest float16."""


def grid_limit(num_bits: int) -> int:
    """Largest magnitude of the symmetric integer grid that weights are rounded to: 1, 3, 7 and 127 for 2, 3, 4 and 8 bits.

    Raises:
        UnsupportedError: another number of bits.
    """
    if num_bits not in (2, 3, 4, 8):
        raise UnsupportedError(f"num_bits = {num_bits} is not supported", "use 4 or 8")
    return (1 << (num_bits - 1)) - 1


@dataclass(frozen=True)
class QTensor:
    """Value ``qvalue * group_multiplier * scale`` (multiplier 1 where ``group_size`` is -1).

    The multipliers are integers, so a product with int8 activations stays integer until the one scale of a channel is applied.

    Attributes:
        qvalue: int8 [..., N, K], in [-8, 7] for 4 bits and [-127, 127] for 8 bits. What is rounded here stays in [-7, 7]; other
            quantizers use -8 as well, and packing, graphs and kernels carry it. See :func:`grid_limit`.
        scale: float32 [..., N], positive, each value exactly a float16 (so that a checkpoint stores 2 bytes a channel).
        num_bits: 4 or 8; 2 and 3 only until the weight is stored, see :meth:`in_storage`.
        group_size: -1, one scale an output channel; 128, plus ``group_multiplier``.
        group_multiplier: int8 [..., N, K / 128] in [1, 127], or None where ``group_size`` is -1.

    Raises:
        UserError: on construction, where any of this does not hold.
    """

    qvalue: torch.Tensor
    scale: torch.Tensor
    num_bits: int
    group_size: int = -1
    group_multiplier: torch.Tensor | None = None

    def __post_init__(self) -> None:
        limit = grid_limit(self.num_bits)
        if self.qvalue.dtype != torch.int8 or self.qvalue.ndim < 2:
            raise UserError(f"qvalue is {self.qvalue.dtype} {list(self.qvalue.shape)}, expected int8 [..., N, K]")
        if self.scale.dtype != torch.float32 or self.scale.shape != self.qvalue.shape[:-1]:
            expected = list(self.qvalue.shape[:-1])
            raise UserError(f"scale is {self.scale.dtype} {list(self.scale.shape)}, expected float32 {expected}")
        if self.qvalue.numel():
            low, high = (int(v) for v in torch.aminmax(self.qvalue))
            lowest = -8 if self.num_bits == 4 else -limit
            if low < lowest or high > limit:
                raise UserError(f"qvalue spans [{low}, {high}], outside [{lowest}, {limit}] of {self.num_bits} bits")
            low_scale, high_scale = (float(v) for v in torch.aminmax(self.scale))
            # NaN fails the comparison as well.
            if not (low_scale > 0.0 and high_scale <= LARGEST_SCALE):
                raise UserError(f"scales span [{low_scale}, {high_scale}], expected finite, positive float16 values")
            if not torch.equal(self.scale.half().float(), self.scale):
                raise UserError("scales are not float16 values", "round them with round_scale before quantizing against them")
        self._check_groups()

    def _check_groups(self) -> None:
        multiplier = self.group_multiplier
        if self.group_size == -1:
            if multiplier is not None:
                raise UserError("group_multiplier is given although group_size is -1")
            return
        groups = group_count(self.qvalue.shape[-1], self.group_size)
        expected = [*self.qvalue.shape[:-1], groups]
        if multiplier is None or multiplier.dtype != torch.int8 or list(multiplier.shape) != expected:
            seen = "None" if multiplier is None else f"{multiplier.dtype} {list(multiplier.shape)}"
            raise UserError(f"group_multiplier is {seen}, expected int8 {expected}")
        if multiplier.numel() and int(multiplier.min()) < 1:
            raise UserError(f"group_multiplier has {int(multiplier.min())}, expected values in [1, 127]")

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor it stands for, [..., N, K]."""
        return self.qvalue.shape

    def to(self, device: str) -> QTensor:
        """The same on `device`."""
        multiplier = None if self.group_multiplier is None else self.group_multiplier.to(device)
        return QTensor(self.qvalue.to(device), self.scale.to(device), self.num_bits, self.group_size, multiplier)

    def integer(self) -> torch.Tensor:
        """``qvalue * group_multiplier`` as int32 [..., N, K]: what integer products are made of."""
        wide = self.qvalue.int()
        if self.group_multiplier is None:
            return wide
        return wide * self.group_multiplier.int().repeat_interleave(GROUP, -1)

    def dequantize(self) -> torch.Tensor:
        """The float32 value [..., N, K]."""
        value = self.qvalue.float()
        if self.group_multiplier is not None:
            value.unflatten(-1, (-1, GROUP)).mul_(self.group_multiplier.float().unsqueeze(-1))
        return value.mul_(self.scale.unsqueeze(-1))

    def in_storage(self) -> QTensor:
        """The same values with the number of bits that they are stored in: 4 for a grid of fewer."""
        return self if self.num_bits >= 4 else replace(self, num_bits=4)

    def rows(self, start: int, stop: int) -> QTensor:
        """Output channels `start` to `stop` (along N), e.g. one part of a fused projection; no copy."""
        multiplier = None if self.group_multiplier is None else self.group_multiplier[..., start:stop, :]
        return QTensor(self.qvalue[..., start:stop, :], self.scale[..., start:stop], self.num_bits, self.group_size, multiplier)


def cat_rows(parts: list[QTensor]) -> QTensor:
    """Concatenate along N; the inverse of taking `rows`. All parts share bits, group size and K."""
    first = parts[0]
    multiplier = None
    if first.group_multiplier is not None:
        multiplier = torch.cat([part.group_multiplier for part in parts if part.group_multiplier is not None], -2)
    return QTensor(torch.cat([p.qvalue for p in parts], -2), torch.cat([p.scale for p in parts], -1),
                   first.num_bits, first.group_size, multiplier)


def cat_experts(parts: list[QTensor]) -> QTensor:
    """Concatenate along the first axis. All parts share bits, group size, N and K."""
    first = parts[0]
    if len(parts) == 1:
        return first
    multiplier = None
    if first.group_multiplier is not None:
        multiplier = torch.cat([part.group_multiplier for part in parts if part.group_multiplier is not None])
    return QTensor(torch.cat([p.qvalue for p in parts]), torch.cat([p.scale for p in parts]),
                   first.num_bits, first.group_size, multiplier)


def group_count(columns: int, group_size: int) -> int:
    """Number of groups of `columns` columns.

    Raises:
        UnsupportedError: another group size than 128, or columns that it does not divide.
    """
    if group_size != GROUP:
        raise UnsupportedError(f"group_size = {group_size} is not supported", f"use -1 (per channel) or {GROUP}")
    if columns % GROUP:
        raise UnsupportedError(f"group_size = {GROUP} does not divide {columns} columns", "use group_size = -1 for this model")
    return columns // GROUP


def round_scale(scale: torch.Tensor) -> torch.Tensor:
    """Round positive scales to float16 values, kept as float32; a zero (an all-zero channel) becomes 1.

    Scales below float16's normal range keep fewer bits but stay exact, since weights are quantized against the rounded value.

    Raises:
        UserError: a scale that is NaN or above float16's range.
    """
    scale = scale.float()
    if scale.numel() and not bool((scale <= LARGEST_SCALE).all()):
        raise UserError(f"a weight scale of {float(scale.max())} exceeds float16's largest value, {LARGEST_SCALE}",
                        "the checkpoint holds weights that no float16 scale can express")
    rounded = scale.clamp_min(SMALLEST_SCALE).half().float()
    return torch.where(scale > 0, rounded, torch.ones_like(rounded))


def chunked(count: int, bytes_each: int, max_bytes: int) -> Iterator[slice]:
    """Slices that cover range(count) so that a slice's working memory stays within `max_bytes` (at least one item each)."""
    step = max(1, min(count, max_bytes // max(1, bytes_each)))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))
