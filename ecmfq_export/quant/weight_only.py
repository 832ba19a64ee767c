"""Weight-only int4: integers with a floating scale and a zero point a group of columns, for floating-point activations (W4A16)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ecmfq_export.errors import UserError
from ecmfq_export.quant.qtensor import QTensor

SYMMETRIC_ZERO = 8
"""The zero point of symmetric int4 in its unsigned form."""


@dataclass(frozen=True)
class WeightOnly:
    """Value ``(qvalue - zero_point) * scale``, column k with the scale and zero point of its group.

    Attributes:
        qvalue: uint8 [..., N, K] in [0, 15].
        scale: float32 [..., N, G].
        zero_point: uint8 [..., N, G] in [0, 15], or None for 8 everywhere (symmetric).
        group_size: columns of a group; the last one of a row may be shorter.
        group_index: int64 [..., K], the group of each column, where columns of a group are not neighbours (GPTQ's activation
            order); None where column k is of group ``k // group_size``.

    Raises:
        UserError: on construction, shapes that do not belong together, or a group index beyond G.
    """

    qvalue: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    group_size: int
    group_index: torch.Tensor | None = None

    def __post_init__(self) -> None:
        groups = -(-self.qvalue.shape[-1] // self.group_size)
        expected = (*self.qvalue.shape[:-1], groups)
        for name, part in (("scale", self.scale), ("zero_point", self.zero_point)):
            if part is not None and tuple(part.shape) != expected:
                raise UserError(f"{name} is {list(part.shape)}, expected {list(expected)} for groups of {self.group_size} columns")
        index = self.group_index
        if index is not None and (index.shape[-1] != self.qvalue.shape[-1] or int(index.min()) < 0 or int(index.max()) >= groups):
            raise UserError(f"group indices {list(index.shape)} span [{int(index.min())}, {int(index.max())}]",
                            f"expected one of {groups} groups for each of {self.qvalue.shape[-1]} columns")

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor it stands for, [..., N, K]."""
        return self.qvalue.shape

    @property
    def num_groups(self) -> int:
        return self.scale.shape[-1]

    def zeros(self) -> torch.Tensor:
        """Zero points uint8 [..., N, G], given or not."""
        return torch.full(self.scale.shape, SYMMETRIC_ZERO, dtype=torch.uint8) if self.zero_point is None else self.zero_point

    def integer(self) -> torch.Tensor:
        """``qvalue - zero_point`` as int8 [..., N, K]: in [-8, 7] where symmetric, in [-15, 15] otherwise."""
        if self.zero_point is None:
            return self.qvalue.to(torch.int8) - SYMMETRIC_ZERO
        return self.qvalue.to(torch.int8) - self._by_column(self.zero_point.to(torch.int8))

    def dequantize(self) -> torch.Tensor:
        """The float32 value [..., N, K]."""
        return self.integer().float().mul_(self._by_column(self.scale))

    def in_group_order(self) -> tuple[WeightOnly, torch.Tensor | None]:
        """The same weight with each group's columns side by side, and where they came from.

        Returns:
            A weight W' without `group_index`, and the order int64 [..., K]: column k of W' is column ``order[k]`` of this one. The
            order is None where nothing had to move.

        Raises:
            UserError: groups that do not hold `group_size` columns each.
        """
        if self.group_index is None:
            return self, None
        columns = self.qvalue.shape[-1]
        order = torch.sort(self.group_index, dim=-1, stable=True).indices
        if not torch.equal(self.group_index.gather(-1, order), (torch.arange(columns) // self.group_size).expand_as(order)):
            raise UserError(f"groups do not hold {self.group_size} columns each", "the checkpoint's group indices are damaged")
        wide = order.unsqueeze(-2).expand(self.qvalue.shape)
        return replace(self, qvalue=self.qvalue.gather(-1, wide), group_index=None), order

    def take_rows(self, order: torch.Tensor) -> WeightOnly:
        """Output channels in another order: row n of the result is row ``order[..., n]`` of this one.

        Args:
            order: int64 [..., N] (leading dimensions as the weight's, or none).
        """
        def moved(part: torch.Tensor | None) -> torch.Tensor | None:
            return None if part is None else part.gather(-2, order.unsqueeze(-1).expand(part.shape))

        return replace(self, qvalue=moved(self.qvalue), scale=moved(self.scale), zero_point=moved(self.zero_point))

    def rows(self, start: int, stop: int) -> WeightOnly:
        """Output channels `start` to `stop` (along N); no copy."""
        zero = None if self.zero_point is None else self.zero_point[..., start:stop, :]
        return replace(self, qvalue=self.qvalue[..., start:stop, :], scale=self.scale[..., start:stop, :], zero_point=zero)

    def _by_column(self, part: torch.Tensor) -> torch.Tensor:
        """[..., N, G] to what each column has, [..., N, K] (or [..., N, 1] where there is one group)."""
        if part.shape[-1] == 1:
            return part
        if self.group_index is None:
            return part.repeat_interleave(self.group_size, -1)[..., : self.qvalue.shape[-1]]
        return part.gather(-1, self.group_index.unsqueeze(-2).expand(self.qvalue.shape))


def of_qtensor(weight: QTensor) -> WeightOnly:
    """A 4-bit weight of the integer kernels as a weight-only one: the same values, the two levels of scales multiplied out.

    Raises:
        ValueError: 8 bits.
    """
    if weight.num_bits != 4:
        raise ValueError(f"{weight.num_bits} bits")
    scale = weight.scale.unsqueeze(-1)
    if weight.group_multiplier is not None:
        scale = scale * weight.group_multiplier.float()
    group_size = weight.shape[-1] if weight.group_multiplier is None else weight.group_size
    return WeightOnly((weight.qvalue + SYMMETRIC_ZERO).to(torch.uint8), scale, None, group_size)
