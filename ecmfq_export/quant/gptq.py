"""Blocked GPTQ (arXiv 2210.17323) of all experts of a layer.

Columns are rounded one after the other, each to the grid point nearest to what the errors of the columns before it leave to be
done. This is Babai's nearest-plane walk on the lattice of H (arXiv 2507.18553): with ``H = L L^T``, L lower triangular, and
``d = w - q`` a row's errors so far, column k (from the last to the first) is rounded at

    ``v_k = w_k + sum_{j > k} d_j L_jk / L_kk``

and the row's weighted error comes out as ``sum_k L_kk^2 (v_k - q_k)^2``. GPTQ's textbook loop takes the same steps through the
Cholesky factor of H's inverse; this form needs neither the inverse nor a second factorization, and its products write 128
columns at a time instead of all that are left.

The cross term of GPTAQ enters in closed form: ``sum w |W x - Q xh|^2 = |(Q - W*) |^2_H + const`` with
``W* = W + W D H^-1``, so GPTQ is run on W*.

On the CPU each thread takes one expert at a time (:mod:`gptq_host`), on a GPU a batch of them goes through PyTorch's operators
(:mod:`gptq_device`). Both take the same steps; sums have another order.
"""

from __future__ import annotations

import torch

from ecmfq_export.quant import gptq_device, gptq_host
from ecmfq_export.quant.expert_threads import Threads, for_slices
from ecmfq_export.quant.hessian import Blend
from ecmfq_export.quant.qtensor import QTensor
from ecmfq_export.quant.rtn import DEFAULT_MAX_BYTES, Clip
from ecmfq_export.quant.walk_problem import BLOCK
from ecmfq_export.quant.workspace import Workspace

AT_ONCE = 8
"""Experts that a device rounds at once: enough to hide what a call costs."""

Scales = tuple[torch.Tensor, torch.Tensor | None]


def quantize_gptq(
    weight: torch.Tensor, hessian: torch.Tensor, num_bits: int, group_size: int = -1, *, percdamp: float | torch.Tensor = 0.01,
    cross: torch.Tensor | None = None, cross_strength: float = 1.0, clip: Clip = "mse", descending: bool = True,
    blend: Blend | None = None, max_bytes: int = DEFAULT_MAX_BYTES, threads: Threads = "experts",
) -> QTensor:
    """Quantize every expert's weight against its Hessian.

    Args:
        weight: floating [E, N, K].
        hessian: float32 [E, K, K], symmetric, positive semidefinite; its scale does not matter.
        percdamp: damping as a fraction of the mean diagonal, one for all or float [E].
        cross: D of :mod:`hessian`, [E, K, K], on the scale of `hessian`.
        cross_strength: factor on the correction ``W D H^-1``; 1 is the minimizer, less trusts the samples less.
        clip: rule of the scales; where it searches, a column weighs as in the walk's error, ``L_kk^2``.
        descending: round the columns with the largest diagonal first; else in their own order.
        blend: shared matrices that `hessian` and `cross` are blended towards first.
        max_bytes: working memory on a device; fewer experts are computed at a time where it is small (at least one). On the CPU a
            thread has one expert at a time.
        threads: see :mod:`expert_threads`.

    Returns:
        A QTensor of the same shape. No row has a larger H-weighted error than rounding it to nearest on the same grid. An expert's
        part does not depend on the experts beside it.

    Raises:
        UserError: NaN or infinity, or a matrix that is not positive semidefinite even with heavy damping.
    """
    damp = torch.as_tensor(percdamp, dtype=torch.float32).expand(len(weight))
    grid = torch.empty(weight.shape, dtype=torch.int8)
    crossed = cross if cross_strength else None

    def blended(own: torch.Tensor, expert: int, of_cross: bool = False) -> gptq_host.Blended:
        return (own[expert], 1.0, 0.0, None) if blend is None else (own[expert], *blend.term(expert, of_cross))

    def on_host(part: slice, work: Workspace) -> list[Scales]:
        return [gptq_host.quantize_expert(
            weight[expert],
            gptq_host.ExpertProblem(blended(hessian, expert), float(damp[expert]),
                                    None if crossed is None else blended(crossed, expert, True), cross_strength, descending),
            num_bits, group_size, clip, work, grid[expert]) for expert in range(part.start, part.stop)]

    def on_device(part: slice, work: Workspace) -> list[Scales]:
        numbers = range(part.start, part.stop)
        problem = gptq_device.arrange([blended(hessian, expert) for expert in numbers], damp[part],
                                      None if crossed is None else [blended(crossed, expert, True) for expert in numbers],
                                      cross_strength, descending, work)
        scale, multiplier = gptq_device.quantize_ordered(weight[part], problem, num_bits, group_size, clip, work, grid[part])
        return list(zip(scale, [None] * len(scale) if multiplier is None else multiplier, strict=True))

    if weight.device.type == "cpu":
        found = for_slices(len(weight), 1, on_host, threads)
    else:
        most = max_bytes // gptq_bytes(*weight.shape[1:], crossed is not None)
        found = for_slices(len(weight), max(1, min(AT_ONCE, most)), on_device, threads)
    scales, multipliers = zip(*(scales for part in found for scales in part), strict=True)
    return QTensor(grid, torch.stack(scales), num_bits, group_size, None if group_size == -1 else torch.stack(multipliers))


def gptq_bytes(rows: int, columns: int, cross: bool = False) -> int:
    """Working memory of :func:`quantize_gptq` for one expert, beside its Hessian, its weight and the result."""
    # The matrix in the walk's order, and its factor with panels; the weight, what is missing of it, and what rounding to nearest misses;
    # int8 values in both layouts; blocks. The cross term: itself, its product with the weight, and the solution. (On the CPU there is
    # one matrix less.)
    return (4 * (3 * columns * columns + 3 * rows * columns) + 2 * rows * columns + 4 * 3 * BLOCK * (rows + columns)
            + cross * 4 * (columns * columns + 3 * rows * columns))
