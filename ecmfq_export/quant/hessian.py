"""Weighted second moments of a linear layer's inputs, one matrix an expert.

``H_e = sum_t w_te xh_t xh_t^T`` with xh the quantized input, and the cross term ``D_e = sum_t w_te (x_t - xh_t) xh_t^T`` with x
the floating-point model's input at the same place (GPTAQ, arXiv 2504.02692): together they hold all that the objective
``sum_t w_te |W x_t - Q xh_t|^2`` says about Q.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ecmfq_export.errors import UserError
from ecmfq_export.quant.expert_threads import Threads, for_slices
from ecmfq_export.quant.workspace import Workspace

ROW_BLOCK = 1024
"""Tokens gathered at a time."""


class WeightedHessian:
    """Accumulates H, D and the weights' sums over batches of tokens.

    Args:
        cross: whether D is kept.
        threads: see :mod:`expert_threads`.
        memory: buffers of an earlier one that is not used any more, or None.

    Attributes:
        weight_sum, weight_square_sum: float64 [E].
        count: int64 [E], pairs seen.
    """

    def __init__(
        self, num_experts: int, columns: int, cross: bool = False, threads: Threads = "experts", memory: Workspace | None = None
    ) -> None:
        shape, memory = (num_experts, columns, columns), memory or Workspace()
        self._matrix = memory.take("hessian", shape)
        self._cross = memory.take("cross term", shape) if cross else None
        self._filled = [False] * num_experts
        self.weight_sum = torch.zeros(num_experts, dtype=torch.float64)
        self.weight_square_sum = torch.zeros(num_experts, dtype=torch.float64)
        self.count = torch.zeros(num_experts, dtype=torch.int64)
        self._threads: Threads = threads

    @property
    def matrix(self) -> torch.Tensor:
        """``sum w xh xh^T``, float32 [E, K, K]."""
        self._fill()
        return self._matrix

    @property
    def cross(self) -> torch.Tensor | None:
        """``sum w (x - xh) xh^T``, float32 [E, K, K], or None where it is not kept."""
        self._fill()
        return self._cross

    def _fill(self) -> None:
        """Zeros for experts that have seen nothing; the others' first product was their first write."""
        for expert, filled in enumerate(self._filled):
            if not filled:
                self._matrix[expert].zero_()
                if self._cross is not None:
                    self._cross[expert].zero_()
        self._filled = [True] * len(self._filled)

    def add(
        self, x: torch.Tensor, expert: torch.Tensor, weight: torch.Tensor,
        token: torch.Tensor | None = None, reference: torch.Tensor | None = None,
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
        if (reference is None) != (self._cross is None):
            raise UserError("the cross term needs reference inputs, and reference inputs need the cross term")
        num_experts = len(self._matrix)
        x, weight, reference = x.float(), weight.float(), None if reference is None else reference.float()
        self.count += torch.bincount(expert, minlength=num_experts)
        self.weight_sum.index_add_(0, expert, weight.double())
        self.weight_square_sum.index_add_(0, expert, weight.double().square())
        order = torch.argsort(expert, stable=True)
        ends = torch.bincount(expert, minlength=num_experts).cumsum(0).tolist()

        def accumulate(part: slice, work: Workspace) -> None:
            for index in range(part.start, part.stop):
                for pairs in order[ends[index - 1] if index else 0 : ends[index]].split(ROW_BLOCK):
                    self._add_rows(index, pairs if token is None else token[pairs], x, weight[pairs], reference, work)

        for_slices(num_experts, 1, accumulate, self._threads)

    def _add_rows(
        self, expert: int, rows: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, reference: torch.Tensor | None, work: Workspace
    ) -> None:
        """Add `rows` of `x` to one expert's sums."""
        shape = (len(rows), x.shape[1])
        block = torch.index_select(x, 0, rows, out=work.take("rows", shape))
        weighted = torch.mul(block, weight.unsqueeze(-1), out=work.take("weighted", shape))
        keep, self._filled[expert] = float(self._filled[expert]), True
        torch.addmm(self._matrix[expert], block.T, weighted, beta=keep, out=self._matrix[expert])
        if self._cross is not None and reference is not None:
            # D[a, b] = sum w (x - xh)_a xh_b
            missing = torch.index_select(reference, 0, rows, out=work.take("reference", shape)).sub_(block)
            torch.addmm(self._cross[expert], missing.T, weighted, beta=keep, out=self._cross[expert])

    @property
    def n_eff(self) -> torch.Tensor:
        """Effective number of tokens of each expert, ``(sum w)^2 / sum w^2``, float64 [E]; 0 where there is none."""
        return self.weight_sum.square() / self.weight_square_sum.clamp_min(1e-300)

    def pooled(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """H and D summed over experts, [K, K]: the layer's."""
        return self.matrix.sum(0), None if self.cross is None else self.cross.sum(0)


def accumulation_bytes(columns: int, cross: bool) -> int:
    """Working memory of :meth:`WeightedHessian.add` for each thread."""
    return 4 * ROW_BLOCK * columns * (2 + cross)


def shrinkage(n_eff: torch.Tensor, kappa: float) -> torch.Tensor:
    """Share b = kappa / (n_eff + kappa) of the shared Hessian, float32 [E]; 1 for an expert without tokens."""
    return torch.where(n_eff > 0, kappa / (n_eff + kappa), torch.ones_like(n_eff)).float()


@dataclass(frozen=True)
class Blend:
    """Each expert's H and D blended towards shared ones: ``(1 - b) H_e + b c H_target``, c matching the traces.

    Attributes:
        keep, factor: float [E], ``1 - b`` and ``b c``.
        target: [K, K], or [E, K, K] where experts have targets of their own.
        target_cross: the same for D, or None: D shrinks towards zero.
    """

    keep: list[float]
    factor: list[float]
    target: torch.Tensor
    target_cross: torch.Tensor | None = None

    @classmethod
    def of(cls, matrix: torch.Tensor, share: torch.Tensor, target: torch.Tensor, target_cross: torch.Tensor | None = None) -> Blend:
        """The blend of `matrix` [E, K, K] with `share` b, float [E]."""
        trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
        target_trace = target.diagonal(dim1=-2, dim2=-1).sum(-1)
        # An expert that saw nothing has no trace to match: take the target as it is (GPTQ does not depend on H's scale).
        match = torch.where(trace > 0, trace / target_trace.clamp_min(1e-30), torch.ones_like(trace))
        return cls((1.0 - share).tolist(), (share * match).tolist(), target, target_cross)

    def term(self, expert: int, cross: bool = False) -> tuple[float, float, torch.Tensor | None]:
        """Expert `expert`'s ``1 - b``, ``b c``, and what its H (its D with `cross`) is blended with, [K, K] or None."""
        target = self.target_cross if cross else self.target
        return self.keep[expert], self.factor[expert], target if target is None or target.ndim == 2 else target[expert]


def weighted_error(difference: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """``diag(difference H difference^T)``, each row's weighted squared output error: [..., N, K], [..., K, K] to [..., N]."""
    return ((difference @ matrix) * difference).sum(-1)
