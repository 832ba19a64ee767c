"""GPTQ batched over experts in PyTorch's operators, for GPUs; the steps are those of :mod:`gptq`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ecmfq_export.quant.cholesky import solve_symmetric, upper_cholesky
from ecmfq_export.quant.gptq_host import Blended
from ecmfq_export.quant.qtensor import grid_limit
from ecmfq_export.quant.rtn import Clip, choose_scale, effective_scale
from ecmfq_export.quant.walk_problem import RETRIES, SUPER, blocks, mended_diagonal, not_positive, walk_order
from ecmfq_export.quant.workspace import Workspace

TILE, STRIP = 16, 4
"""Columns of the finer blocks inside: a tile's columns of a few experts stay in a core's cache."""

_TRANSPOSE_COLUMNS = 32


@dataclass(frozen=True)
class Problem:
    """What GPTQ minimizes for E experts, columns laid out for the walk: the last is rounded first.

    Attributes:
        matrix: float32 [E, K, K].
        percdamp: float32 [E].
        order: int64 [E, K], the weight's column at each place.
        cross: float32 [E, K, K] in the same layout, its strength multiplied in, or None.
    """

    matrix: torch.Tensor
    percdamp: torch.Tensor
    order: torch.Tensor
    cross: torch.Tensor | None = None


def arrange(
    hessians: Sequence[Blended], percdamp: torch.Tensor, crosses: Sequence[Blended] | None, cross_strength: float, descending: bool,
    work: Workspace,
) -> Problem:
    """The problem of these experts, their matrices blended and put into the walk's order."""
    columns = len(hessians[0][0])
    shape = (len(hessians), columns, columns)
    matrix, order = work.take("matrix", shape), torch.empty(shape[:2], dtype=torch.int64)
    moved = None if crosses is None else work.take("cross", shape)
    for place, blended in enumerate(hessians):
        own = _blend(blended, work)
        order[place] = walk_order(own.diagonal(), descending)
        _permute(own, order[place], matrix[place], work)
        if moved is not None and crosses is not None:
            _permute(_blend(crosses[place], work), order[place], moved[place], work)
            moved[place] *= cross_strength
    return Problem(matrix, percdamp, order, moved)


def _blend(blended: Blended, work: Workspace) -> torch.Tensor:
    own, keep, factor, target = blended
    out = torch.mul(own, keep, out=work.take("blend", own.shape))
    return out if target is None else out.add_(target, alpha=factor)


def _permute(matrix: torch.Tensor, order: torch.Tensor, out: torch.Tensor, work: Workspace) -> None:
    """Write [K, K] with rows and columns in `order` [K] to `out`."""
    torch.index_select(torch.index_select(matrix, 0, order, out=work.take("permuted", matrix.shape)), 1, order, out=out)


def _damped_factor(problem: Problem, out: torch.Tensor) -> torch.Tensor:
    """U = L^T of the damped matrices, written to `out`; experts that fail get ten times the damping."""
    diagonal = problem.matrix.diagonal(dim1=-2, dim2=-1)
    diagonal.copy_(mended_diagonal(diagonal))
    mean, percdamp = diagonal.mean(-1), problem.percdamp
    for _ in range(RETRIES):
        upper, failed = upper_cholesky(problem.matrix, percdamp * mean, out)
        if not bool(failed.any()):
            return upper
        percdamp = torch.where(failed, percdamp * 10, percdamp)
    raise not_positive(int(failed.sum()), float(percdamp.max()) / 10)


def quantize_ordered(
    weight: torch.Tensor, problem: Problem, num_bits: int, group_size: int, clip: Clip, work: Workspace, out: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """GPTQ of `weight` [E, N, K] at once, grid points written to `out` int8 [E, N, K]; scales [E, N] and group multipliers.

    Raises:
        UserError: see :func:`gptq.quantize_gptq`.
    """
    limit, columns = grid_limit(num_bits), weight.shape[-1]
    position = torch.argsort(problem.order, dim=-1)
    upper = _damped_factor(problem, work.take("factor", problem.matrix.shape))
    # What a column's rounding costs once the columns after it have made up for it.
    importance = upper.diagonal(dim1=-2, dim2=-1).square().gather(1, position)
    weight = weight.float()
    target = work.take("target", (len(weight), columns, weight.shape[1]))
    if problem.cross is None:
        scale, multiplier = choose_scale(weight, num_bits, group_size, clip, importance)
        _to_columns(weight, position, target)
    else:
        _to_columns(weight, position, target)
        target += solve_symmetric(upper, problem.cross.mT @ target)
        scale, multiplier = choose_scale(_to_rows(target, position), num_bits, group_size, clip, importance)
    step = None
    if multiplier is None:
        # One step a row: the walk runs in units of it.
        target /= scale.unsqueeze(1)
    else:
        step = torch.empty_like(target)
        _to_columns(effective_scale(scale, multiplier, columns), position, step)
    weights = upper.diagonal(dim1=-2, dim2=-1).square()
    for start, end in blocks(columns):
        upper[:, start:end, start:] /= upper[:, start:end, start:].diagonal(dim1=-2, dim2=-1).unsqueeze(-1).clone()
    other = _missed_by_nearest(target, step, limit, work)
    qvalue, error = _walk(target, upper, weights, step, limit, work)
    _keep_better_rows(qvalue, error, target, other, upper, weights, step, limit)  # `target` holds what is missing now
    out.copy_(_to_rows(qvalue, position))
    return scale, multiplier


def _to_columns(weight: torch.Tensor, position: torch.Tensor, out: torch.Tensor) -> None:
    """Write float32 [E, N, K] to `out` [E, K, N], column k at row ``position[k]``, so that each column of a step is contiguous.

    A product with the identity: the matrix library packs its operands several times faster than a strided copy moves them.
    """
    experts, rows, columns = weight.shape
    flat, offset = out.view(-1, rows), columns * torch.arange(experts).unsqueeze(1)
    for start in range(0, columns, _TRANSPOSE_COLUMNS):
        end = min(start + _TRANSPOSE_COLUMNS, columns)
        part = torch.eye(end - start).expand(experts, -1, -1) @ weight[:, :, start:end].mT
        flat.index_copy_(0, (position[:, start:end] + offset).flatten(), part.view(-1, rows))


def _to_rows(values: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`_to_columns`, for any dtype."""
    experts, columns, rows = values.shape
    index = position + columns * torch.arange(experts).unsqueeze(1)
    return values.view(-1, rows).index_select(0, index.flatten()).view_as(values).mT.contiguous()


def _walk(
    values: torch.Tensor, unit: torch.Tensor, weights: torch.Tensor, step: torch.Tensor | None, limit: int, work: Workspace
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round `values` [E, K, N], the target, and leave target minus grid point in it.

    `unit` [E, K, K] is L^T, each row divided by its diagonal element, whose square is in `weights` [E, K]. `step` [E, K, N] is the
    grid's; None where `values` is in units of it.

    Returns:
        int8 grid points [E, K, N] and each row's weighted error [E, N].
    """
    experts, columns, rows = values.shape
    qvalue = work.take("qvalue", values.shape, torch.int8)
    error = torch.zeros(experts, rows)
    for outer, last in blocks(columns, SUPER):
        wide = values[:, outer:last]
        if last < columns:
            # What all columns behind this stretch leave to be done in it, in one product with many rows.
            wide = torch.baddbmm(wide, unit[:, outer:last, last:], values[:, last:], out=work.take("wide", wide.shape))
        for start, end in blocks(last - outer):
            start, end = outer + start, outer + end
            width = end - start
            block, inside = wide[:, start - outer : end - outer], values[:, start:end]
            if end < last:
                block = torch.baddbmm(block, unit[:, start:end, end:last], values[:, end:last],
                                      out=work.take("block", (experts, width, rows)))
            steps = None if step is None else step[:, start:end]
            for low in range((width - 1) // TILE * TILE, -1, -TILE):
                high = min(low + TILE, width)
                value, grid = (work.take(name, (experts, high - low, rows)) for name in ("value", "grid"))
                if high < width:
                    torch.baddbmm(block[:, low:high], unit[:, start + low : start + high, start + high : end], inside[:, high:], out=value)
                else:
                    value.copy_(block[:, low:high])
                _round_tile(value, grid, inside[:, low:high], unit[:, start + low : start + high, start + low : start + high],
                            None if steps is None else steps[:, low:high], limit)
                torch.sub(value, grid, out=value)
                error += value.square_().mul_(weights[:, start + low : start + high].unsqueeze(-1)).sum(1)
                qvalue[:, start + low : start + high] = grid if steps is None else grid.div_(steps[:, low:high]).round_()
    return qvalue, error


def _round_tile(
    value: torch.Tensor, grid: torch.Tensor, inside: torch.Tensor, unit: torch.Tensor, step: torch.Tensor | None, limit: int
) -> None:
    """Round a few columns [E, B, N], the last first.

    Args:
        value: what the columns after these leave to be done, completed here to v.
        grid: written, the grid's values.
        inside: the targets, turned into target minus grid.
        unit: [E, B, B] of L^T, each row divided by its diagonal element.
    """
    width = value.shape[1]
    for low in range((width - 1) // STRIP * STRIP, -1, -STRIP):
        high = min(low + STRIP, width)
        if high < width:
            value[:, low:high] += unit[:, low:high, high:] @ inside[:, high:]
        for column in range(high - 1, low - 1, -1):
            current, rounded = value[:, column], grid[:, column]
            for done in range(column + 1, high):
                current.addcmul_(inside[:, done], unit[:, column, done].unsqueeze(-1))
            if step is None:
                torch.round(current, out=rounded).clamp_(-limit, limit)
            else:
                torch.div(current, step[:, column], out=rounded).round_().clamp_(-limit, limit).mul_(step[:, column])
            inside[:, column] -= rounded


def _some_rows(values: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """[E, B, M] of [E, B, N]: `rows` [E, M] of each expert; all of them where it is None."""
    return values if rows is None else values.gather(2, rows.unsqueeze(1).expand(-1, values.shape[1], -1))


def _missed_by_nearest(target: torch.Tensor, step: torch.Tensor | None, limit: int, work: Workspace) -> torch.Tensor:
    """`target` [E, K, N] minus its nearest grid point."""
    other = work.take("nearest", target.shape)
    if step is None:
        torch.round(target, out=other).clamp_(-limit, limit)
    else:
        torch.div(target, step, out=other).round_().clamp_(-limit, limit).mul_(step)
    return torch.sub(target, other, out=other)


def _keep_better_rows(
    qvalue: torch.Tensor, error: torch.Tensor, missing: torch.Tensor, other: torch.Tensor, unit: torch.Tensor, weights: torch.Tensor,
    step: torch.Tensor | None, limit: int,
) -> None:
    """Rows where rounding to nearest has the smaller error get it: rows are independent, and the walk is greedy.

    The error of rounding to nearest is a sum of squares over columns. The first columns have the largest weights and see the errors of
    all others, so they come first: once a row's sum so far exceeds what the walk reached, the row is settled, and columns go on with
    those that are not.

    `missing` is the target minus the walk's grid point, `other` minus the nearest one; `unit` and `weights` as in :func:`_walk`.
    """
    rows: torch.Tensor | None = None  # those that are not settled, and a few others to fill up
    total = torch.zeros_like(error)
    for start, end in reversed(list(blocks(missing.shape[1]))):
        total += (unit[:, start:end, start:] @ other[:, start:]).square_().mul_(weights[:, start:end].unsqueeze(-1)).sum(1)
        unsettled = total < error
        most = int(unsettled.sum(1).max())
        if most == 0:
            return
        if 2 * most <= total.shape[1]:
            keep = torch.argsort(unsettled, dim=1, descending=True, stable=True)[:, :most]
            rows = keep if rows is None else rows.gather(1, keep)
            total, error, other = total.gather(1, keep), error.gather(1, keep), _some_rows(other, keep)
    walked, steps = _some_rows(qvalue, rows), None if step is None else _some_rows(step, rows)
    target = _some_rows(missing, rows) + (walked.float() if steps is None else walked * steps)
    nearest = (torch.round(target) if steps is None else target.div_(steps).round_()).clamp_(-limit, limit)
    chosen = torch.where((total < error).unsqueeze(1), nearest.to(torch.int8), walked)
    if rows is None:
        qvalue.copy_(chosen)
    else:
        qvalue.scatter_(2, rows.unsqueeze(1).expand_as(chosen), chosen)
