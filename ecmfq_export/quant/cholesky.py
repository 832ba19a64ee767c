"""Blocked Cholesky factors of many symmetric matrices at once.

LAPACK's factorization of one float32 matrix at a time runs at a fraction of the machine's matrix-product rate (a third to a sixth
on the CPUs measured). Here a batch of matrices is factored by row panels: all but the small diagonal blocks is a batched matrix
product, and the work stays on the upper triangle.
"""

from __future__ import annotations

import torch

PANEL = 64
"""Rows of a panel: LAPACK factors the diagonal blocks of this size, matrix products do the rest."""


def upper_cholesky(
    matrix: torch.Tensor, damping: torch.Tensor, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``U`` with ``U^T U = matrix + diag(damping)``.

    Args:
        matrix: float32 [E, K, K]; the upper triangle and the diagonal blocks of :data:`PANEL` columns are read.
        damping: float32 [E], added to the diagonal.
        out: float32 [E, K, K] to write to, or None.

    Returns:
        U float32 [E, K, K], whose strictly lower triangle is undefined (not zeroed), and bool [E]: matrices that are not
        positive definite, whose U is meaningless.
    """
    experts, columns = matrix.shape[:2]
    upper = torch.empty_like(matrix) if out is None else out
    failed = torch.zeros(experts, dtype=torch.bool)
    panels = torch.empty(experts * min(PANEL, columns) * columns)
    for start in range(0, columns, PANEL):
        end = min(start + PANEL, columns)
        width, rest = end - start, columns - start
        panel = panels[: experts * width * rest].view(experts, width, rest)
        panel.copy_(matrix[:, start:end, start:])
        panel.diagonal(dim1=-2, dim2=-1).add_(damping.unsqueeze(-1))
        if start:
            panel.baddbmm_(upper[:, :start, start:end].mT, upper[:, :start, start:], alpha=-1)
        lower, info = torch.linalg.cholesky_ex(panel[:, :, :width])
        failed |= (info != 0) | ~torch.isfinite(lower).flatten(1).all(1)
        inverse = torch.linalg.solve_triangular(lower, torch.eye(width).expand_as(lower), upper=False)
        # The diagonal block comes from LAPACK, the rest of the row from the product with its inverse.
        upper[:, start:end, start:end] = lower.mT
        if end < columns:
            upper[:, start:end, end:] = inverse @ panel[:, :, width:]
    return upper, failed


def solve_symmetric(upper: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``(U^T U)^-1 right`` for U as :func:`upper_cholesky` returns it and `right` [E, K, M]."""
    half = torch.linalg.solve_triangular(upper.mT, right, upper=False)
    return torch.linalg.solve_triangular(upper, half, upper=True)
