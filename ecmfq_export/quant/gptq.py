"""Blocked GPTQ (arXiv 2210.17323), batched over all experts of a layer at once.

Columns are rounded one after the other and each column's error is spread over the columns not yet rounded. With ``H = R R^T``,
R upper triangular, the update needs only ``U = R^-1`` (``H^-1 = U^T U``): one batched Cholesky (of H with its columns
reversed, which makes R upper) and one batched triangular inverse. The column loop runs over all experts and rows together.

The cross term of GPTAQ enters in closed form: ``sum w |W x - Q xh|^2 = |(Q - W*) |^2_H + const`` with
``W* = W + W D H^-1``, so GPTQ is run on W*.
"""

from __future__ import annotations

import torch

from ecmfq_export.errors import UserError
from ecmfq_export.quant.hessian import weighted_error
from ecmfq_export.quant.qtensor import QTensor, chunked, grid_limit
from ecmfq_export.quant.rtn import DEFAULT_MAX_BYTES, Clip, choose_scale, effective_scale, round_to_grid

BLOCK = 128
SUB_BLOCK = 16
_RETRIES = 6


def quantize_gptq(
    weight: torch.Tensor, hessian: torch.Tensor, num_bits: int, group_size: int = -1, *, percdamp: float | torch.Tensor = 0.01,
    cross: torch.Tensor | None = None, cross_strength: float = 1.0, clip: Clip = "mse", descending: bool = True,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> QTensor:
    """Quantize every expert's weight against its Hessian.

    Args:
        weight: floating [E, N, K].
        hessian: float32 [E, K, K], symmetric, positive semidefinite; its scale does not matter.
        percdamp: damping as a fraction of the mean diagonal, one for all or float [E].
        cross: D of :mod:`hessian`, [E, K, K], on the scale of `hessian`.
        cross_strength: factor on the correction ``W D H^-1``; 1 is the minimizer, less trusts the samples less.
        clip: rule of the scales, weighted by H's diagonal where it searches.
        descending: round the columns with the largest diagonal first.
        max_bytes: working memory; experts are processed in chunks that fit (at least one).

    Returns:
        A QTensor of the same shape. No row has a larger H-weighted error than rounding it to nearest on the same grid.

    Raises:
        UserError: NaN or infinity, or a matrix that is not positive semidefinite even with heavy damping.
    """
    experts, rows, columns = weight.shape
    damp = torch.as_tensor(percdamp, dtype=torch.float32).expand(experts)
    qvalue = torch.empty(weight.shape, dtype=torch.int8)
    scales, multipliers = [], []
    for part in chunked(experts, gptq_bytes(rows, columns), max_bytes):
        matrix, factor = _prepared(hessian[part])
        importance = matrix.diagonal(dim1=-2, dim2=-1)
        order = torch.argsort(importance, dim=-1, descending=True, stable=True) if descending else None
        back = None if order is None else torch.argsort(order, dim=-1)
        lower, damped = _damped_cholesky(_columns(_columns(matrix, order).mT, order), damp[part])
        target = _columns(weight[part].float(), order)
        if cross is not None and cross_strength:
            # (W D) H^-1 through the factorization of the reversed matrix.
            moved = _columns(_columns(cross[part] * factor, order).mT, order).mT
            product = (target @ moved).flip(-1).mT
            target = target + cross_strength * torch.cholesky_solve(product, lower).mT.flip(-1)
        scale, multiplier = choose_scale(_columns(target, back), num_bits, group_size, clip, importance, max_bytes)
        step = effective_scale(scale, multiplier, columns)
        step = step if step.shape[-1] == 1 else _columns(step, order)
        rounded = _round_columns(target, _upper_inverse(lower), step, grid_limit(num_bits))
        qvalue[part] = _columns(_keep_better_rows(rounded, target, damped, step, grid_limit(num_bits)), back)
        scales.append(scale)
        if multiplier is not None:
            multipliers.append(multiplier)
    return QTensor(qvalue, torch.cat(scales), num_bits, group_size, torch.cat(multipliers) if multipliers else None)


def gptq_bytes(rows: int, columns: int) -> int:
    """Working memory of :func:`quantize_gptq` for one expert."""
    return 4 * (6 * columns * columns + 5 * rows * columns)


def _prepared(hessian: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy scaled to mean diagonal 1, and the factor [E, 1, 1] that did it.

    Columns that never carried anything get a 1 on the diagonal, so that they round to nearest.
    """
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    if not bool(torch.isfinite(diagonal).all()):
        raise UserError("a Hessian holds NaN or infinity", "check that the floating-point model is finite on the samples")
    mean = diagonal.mean(-1)
    factor = torch.where(mean > 0, 1.0 / mean, torch.ones_like(mean))[:, None, None]
    matrix = hessian * factor
    scaled = matrix.diagonal(dim1=-2, dim2=-1)
    scaled.copy_(torch.where(scaled > 0, scaled, torch.ones_like(scaled)))
    return matrix, factor


def _damped_cholesky(matrix: torch.Tensor, damp: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lower factor of the column-reversed damped matrix and the damped matrix; experts that fail get ten times the damping."""
    damp = damp.clone()
    for _ in range(_RETRIES):
        damped = matrix.clone()
        damped.diagonal(dim1=-2, dim2=-1).add_(damp.unsqueeze(-1) * matrix.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True))
        lower, info = torch.linalg.cholesky_ex(damped.flip(-2, -1))
        failed = info != 0
        if not bool(failed.any()):
            return lower, damped
        damp = torch.where(failed, damp * 10, damp)
    raise UserError(
        f"the Hessians of {int(failed.sum())} experts are not positive definite, even with damping {float(damp.max()):g}",
        "raise percdamp, or use more calibration samples",
    )


def _upper_inverse(lower: torch.Tensor) -> torch.Tensor:
    """U = R^-1 with R = reversed `lower`, so that H^-1 = U^T U, U upper triangular."""
    identity = torch.eye(lower.shape[-1]).expand_as(lower)
    return torch.linalg.solve_triangular(lower.flip(-2, -1), identity, upper=True)


def _columns(values: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """Columns of [E, N, K] in each expert's own `order` [E, K]; as they are where it is None."""
    return values if order is None else values.gather(2, order.unsqueeze(1).expand_as(values))


def _round_columns(weight: torch.Tensor, upper: torch.Tensor, step: torch.Tensor, limit: int) -> torch.Tensor:
    """int8 [E, N, K]: the column loop, in blocks of 128 columns with sub-blocks of 16.

    Columns lie as rows (transposed) so that each one is contiguous; within a sub-block errors are spread column by column,
    across sub-blocks and blocks by one matrix product each, which keeps the loop's memory traffic small.
    """
    columns = weight.shape[-1]
    work = weight.mT.contiguous()
    steps = step.mT.expand_as(work) if step.shape[-1] == 1 else step.mT.contiguous()
    errors = torch.empty_like(work)
    result = torch.empty(work.shape, dtype=torch.int8)
    for block in range(0, columns, BLOCK):
        block_end = min(block + BLOCK, columns)
        for sub in range(block, block_end, SUB_BLOCK):
            sub_end = min(sub + SUB_BLOCK, block_end)
            for column in range(sub, sub_end):
                value = torch.round(work[:, column] / steps[:, column]).clamp_(-limit, limit)
                result[:, column] = value.to(torch.int8)
                error = (work[:, column] - value * steps[:, column]) / upper[:, column, column].unsqueeze(-1)
                errors[:, column] = error
                if column + 1 < sub_end:
                    work[:, column + 1 : sub_end] -= upper[:, column, column + 1 : sub_end].unsqueeze(-1) * error.unsqueeze(1)
            _spread(work, errors, upper, sub, sub_end, block_end)
        _spread(work, errors, upper, block, block_end, columns)
    return result.mT


def _spread(work: torch.Tensor, errors: torch.Tensor, upper: torch.Tensor, start: int, end: int, stop: int) -> None:
    """Spread the errors of columns start..end over columns end..stop."""
    if end < stop:
        work[:, end:stop] -= upper[:, start:end, end:stop].mT @ errors[:, start:end]


def _keep_better_rows(
    qvalue: torch.Tensor, target: torch.Tensor, matrix: torch.Tensor, step: torch.Tensor, limit: int
) -> torch.Tensor:
    """Rows where rounding to nearest has the smaller error keep it: rows are independent, and GPTQ's order is greedy."""
    nearest = round_to_grid(target, step, limit)
    ours = weighted_error(qvalue.float() * step - target, matrix)
    theirs = weighted_error(nearest.float() * step - target, matrix)
    return torch.where((theirs < ours).unsqueeze(-1), nearest, qvalue)
