"""Output reconstruction loss of scaled, quantized experts: the objective of AWQ, MBQ and VEQ-ME.

``L(s) = sum_e omega_e sum_t w_te |Q_w(W_e S) Q8(x_t / s) - W_e x_t|_p^p``. AWQ (arXiv 2306.00978, Eq. 4) has p = 2 and no
weights; MBQ (arXiv 2412.19509) p = 1 and a weight for each modality; VEQ-ME (arXiv 2602.01037) p = 2 and a weight for each
expert. Inputs are quantized too, as they are when the model runs (MBQ's form for weights and activations).
"""

from __future__ import annotations

import torch

from ecmfq_export.quant.hadamard import Rotation
from ecmfq_export.quant.sampled_outputs import Pairs, SampledOutputs

TOKENS = 256
"""Tokens of each expert that are evaluated; sums are scaled up to all of its tokens."""

PRODUCTS = 1 << 33
"""Multiplications that the loss at one scale may cost: of layers where all rows of all experts would take more, some are drawn."""


class OutputLoss:
    """L over a sample of each expert's tokens.

    Args:
        pairs: tokens with their weights w_te.
        weight: floating [E, N, d].
        omega: float [E].
        num_bits, group_size: grid of the weights.
        power: p, 1 or 2.
        per_expert: whether scales are one an expert, [E, d].
        rotation: what scaled inputs and columns go through before they are quantized; None for nothing.
    """

    def __init__(
        self, pairs: Pairs, weight: torch.Tensor, omega: torch.Tensor, num_bits: int, power: int,
        per_expert: bool = False, group_size: int = -1, rotation: Rotation | None = None,
    ) -> None:
        self._samples = SampledOutputs(pairs, weight, num_bits, TOKENS, per_expert=per_expert, group_size=group_size, rotation=rotation,
                                       max_products=PRODUCTS)
        self._power = power
        self._factor = omega.double() * self._samples.counts / self._samples.taken.clamp_min(1.0)
        self._reference = torch.cat([self._total(seen.error.clone(), seen.token_weight) for seen in self._samples.references()])

    def losses(self, scale: torch.Tensor) -> torch.Tensor:
        """Each expert's part of L relative to the same norm of its floating-point outputs, float64 [E]; 0 without tokens."""
        return self._losses(scale) / self._reference.clamp_min(1e-30)

    def value(self, scale: torch.Tensor) -> float:
        """L(s) relative to the same norm of the floating-point outputs; 0 where no expert has a token."""
        whole = float((self._reference * self._factor).sum())
        return float((self._losses(scale) * self._factor).sum()) / whole if whole > 0 else 0.0

    def _losses(self, scale: torch.Tensor) -> torch.Tensor:
        return torch.cat([self._total(seen.error, seen.token_weight) for seen in self._samples.errors(scale)])

    def _total(self, error: torch.Tensor, token_weight: torch.Tensor) -> torch.Tensor:
        error = error.abs_() if self._power == 1 else error.square_()
        return (error.sum(-1) * token_weight).sum(-1).double()
