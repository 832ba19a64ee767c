"""How many experts at a time: Hessians of a whole layer are larger than its weights, so a chunk of experts has them at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ecmfq_export.errors import UserError
from ecmfq_export.quant.gptq import AT_ONCE, gptq_bytes
from ecmfq_export.quant.hessian import accumulation_bytes


@dataclass(frozen=True)
class ExpertPlan:
    """What fits.

    Attributes:
        chunk: experts whose Hessians exist at the same time.
        working_bytes: for rounding them, all threads together (``max_bytes`` of :class:`FaqSettings`).
        total_bytes: the most that is taken beside weights, activations and results.
    """

    chunk: int
    working_bytes: int
    total_bytes: int


def plan_experts(
    experts: int, rows: int, columns: int, *, cross: bool, shared: bool, own_target: bool, limit: int, on_host: bool = True
) -> ExpertPlan:
    """Chunks of E experts with weights [N, K] that stay within `limit` bytes.

    Args:
        cross: whether the cross term is kept.
        shared: whether there is a Hessian of the whole layer (and its cross term).
        own_target: whether each expert has a second Hessian that it is blended towards.
        on_host: whether the CPU rounds, each thread one expert at a time.

    Raises:
        UserError: not even one expert fits; with the bytes that it needs.
    """
    square, threads = 4 * columns * columns, torch.get_num_threads()
    fixed = shared * (1 + cross) * square
    kept = (1 + cross + own_target) * square
    # A thread blends and permutes one matrix at a time.
    each, scratch = gptq_bytes(rows, columns, cross), max(2 * square, accumulation_bytes(columns, cross))
    for at_once in range(1 if on_host else AT_ONCE, 0, -1):
        flying, workers = min(experts, threads * at_once), min(experts, threads)
        chunk = min(experts, (limit - fixed - workers * scratch - flying * each) // kept)
        if chunk >= flying:
            # Chunks of one size, or nearly.
            chunk = -(-experts // -(-experts // chunk))
            return ExpertPlan(chunk, flying * each, fixed + workers * scratch + flying * each + chunk * kept)
    chunk = (limit - fixed) // (kept + each + scratch)  # fewer than there are threads
    if chunk < 1:
        needed = fixed + kept + each + scratch
        raise UserError(
            f"rounding one expert of {rows} x {columns} takes {needed / 1e9:.3g} GB beside the weights; "
            f"expert_memory_gb allows {limit / 1e9:.3g}",
            f"set expert_memory_gb = {1.01 * needed / 1e9:.3g} or more",
        )
    return ExpertPlan(chunk, chunk * each, fixed + chunk * (kept + each + scratch))
