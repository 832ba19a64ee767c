"""Blocked Cholesky factors of many symmetric matrices at once.

LAPACK's factorization of one float32 matrix at a time runs at a fraction of the machine's matrix-product rate (a third to a sixth
on the CPUs measured). Here a batch of matrices is factored by row panels: all but the small diagonal blocks is a batched matrix
product, and the work stays on the upper triangle.
"""

from __future__ import annotations

import torch

PANELS = (256, 64)
"""Rows of a panel and of the panels inside it; LAPACK factors diagonal blocks of the last size."""


def upper_cholesky(
    matrix: torch.Tensor, damping: torch.Tensor, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``U`` with ``U^T U = matrix + diag(damping)``.

    Args:
        matrix: float32 [E, K, K]; the upper triangle is read.
        damping: float32 [E], added to the diagonal.
        out: float32 [E, K, K] to write to, or None.

    Returns:
        U float32 [E, K, K], and bool [E]: matrices that are not positive definite, whose U is meaningless. Below the diagonal
        U is zero inside the diagonal blocks of ``PANELS[0]`` columns and undefined elsewhere.
    """
    experts, columns = matrix.shape[:2]
    upper = torch.empty_like(matrix) if out is None else out
    failed = torch.zeros(experts, dtype=torch.bool)
    panels = torch.empty(experts * min(PANELS[0], columns) * columns)
    for start in range(0, columns, PANELS[0]):
        end = min(start + PANELS[0], columns)
        width, rest = end - start, columns - start
        panel = panels[: experts * width * rest].view(experts, width, rest)
        panel.copy_(matrix[:, start:end, start:])
        panel.diagonal(dim1=-2, dim2=-1).add_(damping.unsqueeze(-1))
        if start:
            panel.baddbmm_(upper[:, :start, start:end].mT, upper[:, :start, start:], alpha=-1)
        failed |= _factor(panel, PANELS[1:])
        panel[:, :, :width].triu_()
        upper[:, start:end, start:] = panel
    return upper, failed


def _factor(panel: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    """Turn ``panel`` [E, B, M], which starts with its diagonal block, into its rows of U in place; bool [E] where that fails."""
    width = panel.shape[1]
    if not sizes:
        block = panel[:, :, :width]
        # Only the upper triangle is valid; LAPACK is handed the lower one of the transpose.
        lower, info = torch.linalg.cholesky_ex(block.mT)
        inverse = torch.linalg.solve_triangular(lower, torch.eye(width).expand_as(lower), upper=False)
        # The diagonal block comes from LAPACK, the rest of the rows from a product with its inverse.
        block.copy_(lower.mT)
        panel[:, :, width:] = inverse @ panel[:, :, width:]
        return (info != 0) | ~torch.isfinite(lower).flatten(1).all(1)
    failed = torch.zeros(len(panel), dtype=torch.bool)
    for start in range(0, width, sizes[0]):
        rows = panel[:, start : start + sizes[0], start:]
        if start:
            rows -= panel[:, :start, start : start + sizes[0]].mT @ panel[:, :start, start:]
        failed |= _factor(rows, sizes[1:])
    return failed


def solve_symmetric(upper: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``(U^T U)^-1 right`` for U as :func:`upper_cholesky` returns it and `right` [E, K, M]."""
    half = torch.linalg.solve_triangular(upper.mT, right, upper=False)
    return torch.linalg.solve_triangular(upper, half, upper=True)
