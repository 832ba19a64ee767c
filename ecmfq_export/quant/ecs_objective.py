"""The objective of expert-consensus smoothing: how badly experts compute with scaled, quantized weights and activations.

``r_e(s) = sum_t w_te h(|Q_w(W_e S) Q8(x_t / s) - W_e x_t|_1) / sum_t w_te |W_e x_t|_1``, h capping a token at five times the
expert's median, and ``J(s) = (1 - theta) sum_e omega_e r_e + theta CVaR_0.9(r_e)``.
"""

from __future__ import annotations

import torch

from ecmfq_export.quant.hadamard import Rotation
from ecmfq_export.quant.rtn import DEFAULT_MAX_BYTES
from ecmfq_export.quant.sampled_outputs import UNLIMITED, Pairs, SampledOutputs

CAP = 5.0
THETA = 0.2
TAIL = 0.1


class Objective:
    """J over at most `capacity` tokens of each of `experts`.

    Args:
        pairs: the tokens.
        weight: floating [E, N, d].
        omega: float [E], importance of the experts.
        num_bits, group_size: grid of the weights.
        capacity: tokens an expert.
        experts: int64 [E'], the experts to evaluate; None takes all.
        per_expert: whether scales are one an expert, [E, d] (down projections), instead of one for all, [d].
        theta: share of the tail mean (CVaR) in J.
        rotation: what scaled inputs and columns go through before they are quantized; None for nothing.
        max_products: multiplications that one scale may cost; see :class:`ecmfq_export.quant.sampled_outputs.SampledOutputs`.
    """

    def __init__(
        self, pairs: Pairs, weight: torch.Tensor, omega: torch.Tensor, num_bits: int, capacity: int,
        experts: torch.Tensor | None = None, per_expert: bool = False, group_size: int = -1, theta: float = THETA,
        max_bytes: int = DEFAULT_MAX_BYTES, rotation: Rotation | None = None, max_products: int = UNLIMITED,
    ) -> None:
        self._samples = SampledOutputs(pairs, weight, num_bits, capacity, experts, per_expert, group_size, max_bytes, rotation,
                                       max_products)
        self._omega, self._theta = (omega if experts is None else omega[experts]).float(), theta
        self._denominator = torch.cat([(seen.error.abs().sum(-1) * seen.token_weight).sum(-1) for seen in self._samples.references()])
        self.present = self._denominator > 0

    def ratios(self, scale: torch.Tensor) -> torch.Tensor:
        """r_e(s), float32 [E'], 0 for experts without tokens; `scale` is [d], or [E, d] where per expert."""
        parts = []
        for seen in self._samples.errors(scale):
            error = seen.error.abs_().sum(-1)
            counted = torch.where(seen.token_weight > 0, error, torch.full_like(error, float("nan")))
            median = counted.nanmedian(-1, keepdim=True).values
            capped = torch.minimum(error, CAP * median.nan_to_num(0.0))
            parts.append((capped * seen.token_weight).sum(-1) / self._denominator[seen.part].clamp_min(1e-30))
        return torch.where(self.present, torch.cat(parts), torch.zeros(self._samples.num_experts))

    def value(self, scale: torch.Tensor) -> float:
        """J(s); 0 where no expert has a token."""
        ratios, omega = self.ratios(scale)[self.present].double(), self._omega[self.present].double()
        if ratios.numel() == 0:
            return 0.0
        tail = ratios.topk(max(1, round(TAIL * ratios.numel()))).values.mean()
        return float((1.0 - self._theta) * (ratios * omega).sum() / omega.sum() + self._theta * tail)


def expert_importance(mass: torch.Tensor, num_shared: int = 0) -> torch.Tensor:
    """omega_e from the routed score mass [E, 2] (text, vision): sum over modalities of the square root of the expert's share,
    normalized, floored at ``0.1 / E``; float32 [E + S], sum 1.

    Args:
        num_shared: S experts behind the routed ones that every token takes: their share is 1.
    """
    share = mass.double() / mass.double().sum(0, keepdim=True).clamp_min(1e-30)
    share = torch.cat((share, share.new_ones(num_shared, share.shape[1])))
    omega = share.sqrt().sum(1)
    floor = 0.1 / len(share)
    omega = (omega / omega.sum().clamp_min(1e-30)).clamp_min(floor)
    return (omega / omega.sum()).float()
