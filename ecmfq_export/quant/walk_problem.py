"""What the two ways to take GPTQ's walk share: its blocks, the order of columns, and what is done about a weak Hessian."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ecmfq_export.errors import UserError

SUPER, BLOCK = 512, 128
"""Columns rounded between two products with all the errors so far, and with those of the columns of the same stretch."""

RETRIES = 6
"""How often a matrix that cannot be factored gets ten times the damping."""


def walk_order(diagonal: torch.Tensor, descending: bool = True) -> torch.Tensor:
    """Columns [..., K] laid out for the walk (last first): the largest `diagonal` first, or the first column first."""
    if not descending:
        return torch.arange(diagonal.shape[-1] - 1, -1, -1).expand_as(diagonal)
    return torch.argsort(diagonal, dim=-1, descending=True, stable=True).flip(-1)


def blocks(columns: int, size: int = BLOCK) -> Iterator[tuple[int, int]]:
    """Start and end of each block, the last one first."""
    for start in range((columns - 1) // size * size, -1, -size):
        yield start, min(start + size, columns)


def mended_diagonal(diagonal: torch.Tensor) -> torch.Tensor:
    """`diagonal` [..., K] with the mean for columns that never carried anything, so that they round to nearest.

    Raises:
        UserError: NaN or infinity.
    """
    if not bool(torch.isfinite(diagonal).all()):
        raise UserError("a Hessian holds NaN or infinity", "check that the floating-point model is finite on the samples")
    mean = diagonal.mean(-1, keepdim=True)
    return torch.where(diagonal > 0, diagonal, torch.where(mean > 0, mean, torch.ones_like(mean)))


def not_positive(failed: int, percdamp: float) -> UserError:
    """Damping did not help."""
    return UserError(f"the Hessians of {failed} experts are not positive definite, even with damping {percdamp:g}",
                     "raise percdamp, or use more calibration samples")
