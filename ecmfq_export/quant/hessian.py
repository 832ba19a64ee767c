"""Weighted second moments of a linear layer's inputs, one matrix an expert.

``H_e = sum_t w_te xh_t xh_t^T`` with xh the quantized input, and the cross term ``D_e = sum_t w_te (x_t - xh_t) xh_t^T`` with x
the floating-point model's input at the same place (GPTAQ, arXiv 2504.02692): together they hold all that the objective
``sum_t w_te |W x_t - Q xh_t|^2`` says about Q.
"""

from __future__ import annotations

import torch

from ecmfq_export.errors import UserError
from ecmfq_export.quant.grouping import blocks_by_expert

ROW_BLOCK = 256


class WeightedHessian:
    """Accumulates H, D and the weights' sums over batches of tokens.

    Attributes:
        matrix: float32 [E, K, K], ``sum w xh xh^T``.
        cross: float32 [E, K, K], ``sum w (x - xh) xh^T``, or None.
        weight_sum, weight_square_sum: float64 [E].
        count: int64 [E], pairs seen.
    """

    def __init__(self, num_experts: int, columns: int, cross: bool = False) -> None:
        self.matrix = torch.zeros(num_experts, columns, columns)
        self.cross = torch.zeros(num_experts, columns, columns) if cross else None
        self.weight_sum = torch.zeros(num_experts, dtype=torch.float64)
        self.weight_square_sum = torch.zeros(num_experts, dtype=torch.float64)
        self.count = torch.zeros(num_experts, dtype=torch.int64)

    def add(
        self, x: torch.Tensor, expert: torch.Tensor, weight: torch.Tensor,
        token: torch.Tensor | None = None, reference: torch.Tensor | None = None, max_bytes: int = 1 << 28,
    ) -> None:
        """Add P (token, expert) pairs.

        Args:
            x: float [T, K], quantized inputs.
            expert: int64 [P].
            weight: float [P], non-negative.
            token: int64 [P], row of `x` of each pair; None where row p belongs to pair p (T = P).
            reference: float [T, K], floating-point inputs; needed where the cross term is kept.

        Raises:
            UserError: NaN or infinity in the inputs or weights, or a negative weight.
        """
        if not (bool(torch.isfinite(x).all()) and bool(torch.isfinite(weight).all())):
            raise UserError("calibration activations hold NaN or infinity",
                            "check that the floating-point model is finite on these samples")
        if weight.numel() and float(weight.min()) < 0:
            raise UserError(f"a token weight is negative: {float(weight.min())}")
        if (reference is None) != (self.cross is None):
            raise UserError("the cross term needs reference inputs, and reference inputs need the cross term")
        num_experts, columns = self.matrix.shape[:2]
        weight = weight.float()
        self.count += torch.bincount(expert, minlength=num_experts)
        self.weight_sum.index_add_(0, expert, weight.double())
        self.weight_square_sum.index_add_(0, expert, weight.double().square())
        max_active = max(1, max_bytes // (4 * columns * (columns + 3 * ROW_BLOCK)))
        for experts, index, valid in blocks_by_expert(expert, num_experts, ROW_BLOCK, max_active):
            rows = index if token is None else token[index]
            block = x[rows].float()
            weighted = block * (weight[index] * valid).unsqueeze(-1)
            self.matrix.index_add_(0, experts, weighted.mT @ block)
            if self.cross is not None and reference is not None:
                # D[a, b] = sum w (x - xh)_a xh_b
                self.cross.index_add_(0, experts, (reference[rows].float() - block).mT @ weighted)

    @property
    def n_eff(self) -> torch.Tensor:
        """Effective number of tokens of each expert, ``(sum w)^2 / sum w^2``, float64 [E]; 0 where there is none."""
        return self.weight_sum.square() / self.weight_square_sum.clamp_min(1e-300)

    def pooled(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """H and D summed over experts, [K, K]: the layer's."""
        return self.matrix.sum(0), None if self.cross is None else self.cross.sum(0)


def shrinkage(n_eff: torch.Tensor, kappa: float) -> torch.Tensor:
    """Share b = kappa / (n_eff + kappa) of the shared Hessian, float32 [E]; 1 for an expert without tokens."""
    return torch.where(n_eff > 0, kappa / (n_eff + kappa), torch.ones_like(n_eff)).float()


def shrink(
    matrix: torch.Tensor, cross: torch.Tensor | None, target: torch.Tensor, target_cross: torch.Tensor | None,
    share: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Blend each expert's H and D towards a shared one: ``(1 - b) H_e + b c H_target``, c matching the traces.

    Args:
        matrix, cross: [E, K, K]; `cross` may be None.
        target, target_cross: [K, K] or [E, K, K]; where `target_cross` is None the cross term shrinks towards zero.
        share: b, float [E].
    """
    trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
    target_trace = target.diagonal(dim1=-2, dim2=-1).sum(-1)
    # An expert that saw nothing has no trace to match: take the target as it is (GPTQ does not depend on H's scale).
    match = torch.where(trace > 0, trace / target_trace.clamp_min(1e-30), torch.ones_like(trace))
    factor = (share * match)[:, None, None]
    keep = (1.0 - share)[:, None, None]
    blended = keep * matrix + factor * target
    if cross is None:
        return blended, None
    return blended, keep * cross + (factor * target_cross if target_cross is not None else 0.0)


def weighted_error(difference: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """``diag(difference H difference^T)``, each row's weighted squared output error: [..., N, K], [..., K, K] to [..., N]."""
    return ((difference @ matrix) * difference).sum(-1)
