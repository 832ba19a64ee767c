"""GPTQ of one expert in one thread of the CPU: matrix products by PyTorch, everything between them by :mod:`host_kernels`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ecmfq_export.quant.cholesky import solve_symmetric
from ecmfq_export.quant.host_kernels import HostKernels, host_kernels
from ecmfq_export.quant.qtensor import grid_limit
from ecmfq_export.quant.rtn import Clip, choose_scale
from ecmfq_export.quant.walk_problem import BLOCK, RETRIES, SUPER, blocks, mended_diagonal, not_positive, walk_order
from ecmfq_export.quant.workspace import Workspace

_PANEL = 256
"""Rows of the factor that one product with all rows before them completes."""

Blended = tuple[torch.Tensor, float, float, torch.Tensor | None]
"""``keep own + factor target``: own [K, K], keep, factor, target [K, K] or None."""


@dataclass(frozen=True)
class ExpertProblem:
    """What GPTQ minimizes for one expert.

    Attributes:
        hessian: H, blended.
        percdamp: damping as a fraction of the mean diagonal.
        cross: D, blended, or None.
        cross_strength: factor on it.
        descending: round the columns with the largest diagonal first; else in their own order.
    """

    hessian: Blended
    percdamp: float
    cross: Blended | None
    cross_strength: float
    descending: bool


def quantize_expert(
    weight: torch.Tensor, problem: ExpertProblem, num_bits: int, group_size: int, clip: Clip, work: Workspace, out: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """GPTQ of `weight` [N, K], grid points written to `out` int8 [N, K]; scales [N] and group multipliers.

    Raises:
        UserError: see :func:`gptq.quantize_gptq`.
    """
    kernels, limit = host_kernels(), grid_limit(num_bits)
    rows, columns = weight.shape
    own, keep, factor, shared = problem.hessian
    diagonal = keep * own.diagonal()
    if shared is not None:
        diagonal += factor * shared.diagonal()
    order = walk_order(diagonal, problem.descending).contiguous()
    position = torch.empty_like(order).index_copy_(0, order, torch.arange(columns))
    upper = _damped_factor(kernels, problem, mended_diagonal(diagonal)[order], order, work)
    # What a column's rounding costs once the columns after it have made up for it.
    importance = upper.diagonal().square()[position]
    weight = weight.float().contiguous()
    if problem.cross is not None:
        weight = _moved(kernels, weight, problem.cross, problem.cross_strength, upper, order, position, work)
    scale, multiplier = choose_scale(weight, num_bits, group_size, clip, importance)
    grids = _Grids(limit)
    if multiplier is not None:
        steps = (scale.unsqueeze(-1) * multiplier.float()).T.contiguous()
        grids = _Grids(limit, steps, order // (columns // len(steps)))
    target, grid = work.take("target", (columns, rows)), work.take("grid", (columns, rows), torch.int8)
    # With one step a row the walk runs in units of it.
    kernels.to_columns(weight, position, target, scale if multiplier is None else None)
    nearest = _first_of_nearest(kernels, target, upper, grids, work)
    error = _walk(kernels, target, upper, grid, grids, work)
    out.zero_()  # fresh memory comes faster in its own order
    kernels.to_rows(grid, position, out)
    _keep_better_rows(kernels, out, error, nearest, weight, scale, order, position, upper, grids)
    return scale, multiplier


@dataclass(frozen=True)
class _Grids:
    """Points up to `limit` in magnitude; `steps` [G, N] and `group` int64 [K] where columns have steps of their own."""

    limit: int
    steps: torch.Tensor | None = None
    group: torch.Tensor | None = None

    def of(self, start: int, end: int) -> torch.Tensor | None:
        """`group` of these columns."""
        return None if self.group is None else self.group[start:end]

    def some(self, rows: torch.Tensor) -> _Grids:
        """Those of `rows` alone."""
        return self if self.steps is None else _Grids(self.limit, self.steps[:, rows].contiguous(), self.group)


def _damped_factor(
    kernels: HostKernels, problem: ExpertProblem, diagonal: torch.Tensor, order: torch.Tensor, work: Workspace
) -> torch.Tensor:
    """``U = L^T`` of the damped matrix in the walk's order, [K, K]; `diagonal` [K] is its diagonal, undamped. Below the diagonal U is
    zero inside blocks of :data:`BLOCK` columns and undefined elsewhere."""
    columns, percdamp = len(order), problem.percdamp
    own, keep, factor, shared = problem.hessian
    upper = work.take("factor", (columns, columns))
    for _ in range(RETRIES):
        kernels.blend_in_order(own, shared, keep, factor, order, BLOCK, upper)
        upper.diagonal().copy_(diagonal + percdamp * diagonal.mean())
        if _factor(kernels, upper):
            return upper
        percdamp *= 10
    raise not_positive(1, percdamp / 10)


def _factor(kernels: HostKernels, matrix: torch.Tensor) -> bool:
    """Turn the upper triangle of `matrix` [K, K] into its factor; False where it is not positive definite."""
    columns = len(matrix)
    for outer in range(0, columns, _PANEL):
        last = min(outer + _PANEL, columns)
        if outer:
            matrix[outer:last, outer:].addmm_(matrix[:outer, outer:last].T, matrix[:outer, outer:], alpha=-1)
        for start in range(outer, last, BLOCK):
            end = min(start + BLOCK, last)
            panel = matrix[start:end, start:]
            if start > outer:
                panel.addmm_(matrix[outer:start, start:end].T, matrix[outer:start, start:], alpha=-1)
            if not kernels.factor(panel):
                return False
    return True


def _moved(
    kernels: HostKernels, weight: torch.Tensor, cross: Blended, strength: float, upper: torch.Tensor, order: torch.Tensor,
    position: torch.Tensor, work: Workspace,
) -> torch.Tensor:
    """``W + strength W D H^-1``, [N, K]."""
    own, keep, factor, shared = cross
    columns = len(order)
    moved = work.take("cross", (columns, columns))
    kernels.blend_in_order(own, shared, strength * keep, strength * factor, order, columns, moved)
    target = work.take("target", weight.T.shape)
    kernels.to_columns(weight, position, target)
    target += solve_symmetric(upper, moved.T @ target)
    return target.T[:, position].contiguous()


def _walk(
    kernels: HostKernels, missing: torch.Tensor, upper: torch.Tensor, grid: torch.Tensor, grids: _Grids, work: Workspace
) -> torch.Tensor:
    """Round `missing` [K, N], the target, and leave target minus grid point in it; points go to `grid`. Each row's error [N]."""
    columns, rows = missing.shape
    error, product = torch.zeros(rows), work.take("product", (min(SUPER, columns), rows))
    for outer, last in blocks(columns, SUPER):
        if last < columns:
            # What all columns behind this stretch leave to be done in it, in one product with many rows.
            torch.mm(upper[outer:last, last:], missing[last:], out=product[: last - outer])
        for inner, stop in blocks(last - outer):
            start, end, part = outer + inner, outer + stop, product[inner:stop]
            if end < last:
                torch.addmm(part, upper[start:end, end:last], missing[end:last], beta=float(last < columns), out=part)
            kernels.walk(upper[start:end, start:end], part if end < columns else None, missing[start:end], grids.limit, grid[start:end],
                         error, grids.steps, grids.of(start, end))
    return error


def _first_of_nearest(
    kernels: HostKernels, target: torch.Tensor, upper: torch.Tensor, grids: _Grids, work: Workspace
) -> torch.Tensor:
    """What the first block of columns adds to each row's error where it is rounded to nearest, [N]."""
    columns, rows = target.shape
    missed, product = work.take("missed", (min(SUPER, columns), rows)), work.take("product", (min(BLOCK, columns), rows))
    for start, end in blocks(columns, SUPER):
        part = missed[: end - start]
        kernels.missed_by_nearest(target[start:end], grids.limit, part, grids.steps, grids.of(start, end))
        torch.addmm(product, upper[:BLOCK, start:end], part, beta=float(end < columns), out=product)
    return product.square_().sum(0)


def _keep_better_rows(
    kernels: HostKernels, out: torch.Tensor, error: torch.Tensor, total: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor,
    order: torch.Tensor, position: torch.Tensor, upper: torch.Tensor, grids: _Grids,
) -> None:
    """Rows of `out` [N, K] where rounding to nearest has the smaller error get it: rows are independent, and the walk is greedy.

    The error of rounding to nearest is a sum of squares over columns. The first columns have the largest weights and see the errors of
    all others, so they come first: once a row's sum so far (`total` [N], of the first block) exceeds what the walk reached, the row is
    settled, and columns go on with those that are not.
    """
    columns = len(upper)
    rows = (total < error).nonzero().squeeze(-1)
    if not len(rows):
        return
    total, some = total[rows], grids.some(rows)
    # From the weight's rows, which are contiguous.
    target = weight[rows].index_select(1, order)
    units: torch.Tensor | float = 1.0
    if some.steps is None or some.group is None:
        target /= scale[rows].unsqueeze(-1)
    else:
        units = some.steps[some.group]
    target = target.T.contiguous()
    missed = torch.empty_like(target)
    kernels.missed_by_nearest(target, grids.limit, missed, some.steps, some.group)
    nearest = ((target - missed) / units).round_().to(torch.int8)
    for start, end in reversed(list(blocks(columns))[:-1]):
        # Below the diagonal U holds zeros inside a block.
        total += (upper[start:end, start:] @ missed[start:]).square_().sum(0)
        keep = (total < error[rows]).nonzero().squeeze(-1)
        if not len(keep):
            return
        if 2 * len(keep) <= len(total):
            total, rows, missed, nearest = total[keep], rows[keep], missed[:, keep], nearest[:, keep]
    better = total < error[rows]
    out[rows[better]] = nearest[:, better].T[:, position]
