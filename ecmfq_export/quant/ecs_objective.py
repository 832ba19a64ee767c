"""The objective of expert-consensus smoothing: how badly experts compute with scaled, quantized weights and activations.

``r_e(s) = sum_t w_te h(|Q_w(W_e S) Q8(x_t / s) - W_e x_t|_1) / sum_t w_te |W_e x_t|_1``, h capping a token at five times the
expert's median, and ``J(s) = (1 - theta) sum_e omega_e r_e + theta CVaR_0.9(r_e)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ecmfq_export.quant.activation import fake_quantize_per_token
from ecmfq_export.quant.grouping import group_by_expert
from ecmfq_export.quant.qtensor import chunked
from ecmfq_export.quant.rtn import DEFAULT_MAX_BYTES, quantize_rtn

CAP = 5.0
THETA = 0.2
TAIL = 0.1


@dataclass(frozen=True)
class Pairs:
    """Which token went to which expert with which weight, for P pairs in a random order that the caller fixed.

    Attributes:
        x: float32 [T, d], inputs after the norm.
        token: int64 [P], row of `x`.
        expert: int64 [P].
        weight: float32 [P], w_te.
        types: int [T], 0 text, 1 vision.
    """

    x: torch.Tensor
    token: torch.Tensor
    expert: torch.Tensor
    weight: torch.Tensor
    types: torch.Tensor


class Objective:
    """J over at most `capacity` tokens of each of `experts`.

    Args:
        pairs: the tokens.
        weight: floating [E, N, d].
        omega: float [E], importance of the experts.
        num_bits: of the weights.
        capacity: tokens an expert.
        experts: int64 [E'], the experts to evaluate; None takes all.
        per_expert: whether scales are one an expert, [E, d] (down projections), instead of one for all, [d].
    """

    def __init__(
        self, pairs: Pairs, weight: torch.Tensor, omega: torch.Tensor, num_bits: int, capacity: int,
        experts: torch.Tensor | None = None, per_expert: bool = False, max_bytes: int = DEFAULT_MAX_BYTES,
    ) -> None:
        index, valid = group_by_expert(pairs.expert, weight.shape[0], capacity)
        chosen = torch.arange(weight.shape[0]) if experts is None else experts
        if pairs.expert.numel():
            self._rows = pairs.token[index[chosen]]
            self._token_weight = pairs.weight[index[chosen]] * valid[chosen]
        else:
            self._rows = torch.zeros(len(chosen), 1, dtype=torch.int64)
            self._token_weight = torch.zeros(len(chosen), 1)
        # Rows that no chosen expert reads need not be quantized again and again.
        used, self._rows = torch.unique(self._rows, return_inverse=True)
        self._x = pairs.x[used].float() if len(pairs.x) else torch.zeros(1, weight.shape[-1])
        self._weight, self._omega = weight[chosen].float(), omega[chosen].float()
        self._num_bits, self._per_expert, self._max_bytes = num_bits, per_expert, max_bytes
        self._experts = chosen
        rows, width = weight.shape[1], self._rows.shape[1]
        self._bytes_each = 4 * (4 * rows * weight.shape[-1] + 3 * width * rows + 2 * width * weight.shape[-1])
        keep = 4 * len(chosen) * width * rows <= max_bytes
        self._reference = self._outputs(slice(None)) if keep else None
        mass = [self._mass(part) for part in chunked(len(chosen), self._bytes_each, max_bytes)]
        self._denominator = torch.cat(mass)
        self.present = self._denominator > 0

    def _outputs(self, part: slice) -> torch.Tensor:
        return self._x[self._rows[part]] @ self._weight[part].mT

    def _target(self, part: slice) -> torch.Tensor:
        return self._outputs(part) if self._reference is None else self._reference[part]

    def _mass(self, part: slice) -> torch.Tensor:
        return (self._target(part).abs().sum(-1) * self._token_weight[part]).sum(-1)

    def ratios(self, scale: torch.Tensor) -> torch.Tensor:
        """r_e(s), float32 [E'], 0 for experts without tokens; `scale` is [d], or [E, d] where per expert."""
        if self._per_expert:
            scale = scale[self._experts]
        shared = None if self._per_expert else fake_quantize_per_token(self._x / scale)
        parts = []
        for part in chunked(len(self._experts), self._bytes_each, self._max_bytes):
            s = scale[part].unsqueeze(1) if self._per_expert else scale
            weight = quantize_rtn(self._weight[part] * s, self._num_bits, max_bytes=self._max_bytes).dequantize()
            rows = self._rows[part]
            inputs = fake_quantize_per_token(self._x[rows] / s) if shared is None else shared[rows]
            error = (inputs @ weight.mT).sub_(self._target(part)).abs_().sum(-1)
            token_weight = self._token_weight[part]
            seen = torch.where(token_weight > 0, error, torch.full_like(error, float("nan")))
            median = seen.nanmedian(-1, keepdim=True).values
            capped = torch.minimum(error, CAP * median.nan_to_num(0.0))
            parts.append((capped * token_weight).sum(-1) / self._denominator[part].clamp_min(1e-30))
        return torch.where(self.present, torch.cat(parts), torch.zeros(len(self._experts)))

    def value(self, scale: torch.Tensor) -> float:
        """J(s); 0 where no expert has a token."""
        ratios, omega = self.ratios(scale)[self.present].double(), self._omega[self.present].double()
        if ratios.numel() == 0:
            return 0.0
        tail = ratios.topk(max(1, round(TAIL * ratios.numel()))).values.mean()
        return float((1.0 - THETA) * (ratios * omega).sum() / omega.sum() + THETA * tail)


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
