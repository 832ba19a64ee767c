"""ECS: one positive scale a channel that all experts behind a norm agree on, found by a gated search.

The norm's weight is divided by s, the columns of everything that reads it are multiplied by s: the floating-point model does
not change, but ``x / s`` is easier to quantize to 8 bits and ``W s`` hardly harder to 4. The activations are quantized once
for all experts, which is why the scale must be one.
"""

from __future__ import annotations

from typing import Literal

import torch

from ecmfq_export.quant.eaquant import merged_scale
from ecmfq_export.quant.ecs_objective import THETA, Objective
from ecmfq_export.quant.hadamard import Rotation
from ecmfq_export.quant.sampled_outputs import Pairs
from ecmfq_export.quant.scale_math import column_maximum, expert_maximum, positive, tied, tied_maximum
from ecmfq_export.quant.scale_result import PerExpertResult, ScaleResult
from ecmfq_export.quant.token_weights import TEXT, VISION

Rounding = Literal["power_of_two", "real"]

QUANTILES = (0.99, 0.999, 1.0)
ALPHAS = tuple(0.05 * step for step in range(20))
NORMS = (2.0, float("inf"))
LARGEST = 2.0**5
GATE = 0.005
"""Relative fall of J on held-out tokens that a scale must reach."""

COARSE_SHARE, COARSE_TOKENS, FINALISTS, FINE_TOKENS = 0.25, 64, 10, 256
COORDINATES = 32

COARSE_PRODUCTS, FINE_PRODUCTS, GATE_PRODUCTS = 1 << 28, 1 << 32, 1 << 35
"""Multiplications that one look of each of the three kinds may cost. Layers that would take more (a hundred experts of hidden size
2048) are looked at through some of each expert's rows; the gate, which decides, through most of them."""


def search_scale(
    train: Pairs, heldout: Pairs, weight: torch.Tensor, omega: torch.Tensor, num_bits: int,
    rounding: Rounding = "power_of_two", tie: torch.Tensor | None = None, *, theta: float = THETA, group_size: int = -1,
) -> ScaleResult:
    """Find s for one norm and everything quantized behind it.

    From cheap to dear: every candidate on a quarter of the experts and 64 tokens each, the ten best and s = 1 on all
    experts and 256 tokens each, then coordinate steps on the largest channels; the winner must beat s = 1 on held-out tokens.

    Args:
        train, heldout: tokens, of different samples.
        weight: floating [E, N, d], gate over up rows for experts; [1, N, d] for a dense layer.
        omega: float [E].
        num_bits, group_size: grid of the weights.
        tie: int64 [d], channels with the same number share a scale; None ties nothing.
        theta: share of the worst experts' mean in J.
    """
    tie = torch.arange(weight.shape[-1]) if tie is None else tie
    ones = torch.ones(weight.shape[-1])
    grid = {"group_size": group_size, "theta": theta}
    fine = Objective(train, weight, omega, num_bits, FINE_TOKENS, max_products=FINE_PRODUCTS, **grid)
    before = fine.value(ones)
    labelled = candidate_scales(train, weight, omega, tie, rounding)
    coarse = Objective(train, weight, omega, num_bits, COARSE_TOKENS, coarse_experts(omega, fine.present),
                       max_products=COARSE_PRODUCTS, **grid)
    ranked = sorted((coarse.value(scale), i) for i, (_, scale) in enumerate(labelled))
    finalists = [labelled[i] for _, i in ranked[:FINALISTS]]
    best_value, best_label, best = before, "one", ones
    for label, scale in finalists:
        value = fine.value(scale)
        if value < best_value:
            best_value, best_label, best = value, label, scale
    best_value, best = _coordinate_steps(fine, train.x, best, best_value, tie, rounding)
    del fine, coarse  # before the gate's samples are drawn
    gate = Objective(heldout, weight, omega, num_bits, FINE_TOKENS, max_products=GATE_PRODUCTS, **grid)
    gate_before, gate_after = gate.value(ones), gate.value(best)
    accepted = gate_after < (1.0 - GATE) * gate_before
    return ScaleResult(best if accepted else ones, accepted, best_label, before, best_value, gate_before, gate_after)


def coarse_experts(omega: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """A quarter of the experts with tokens, spread evenly over their order of importance (whatever their numbers are)."""
    order = torch.argsort(torch.where(present, omega, torch.full_like(omega, -1.0)), descending=True, stable=True)
    count = max(1, int(present.sum()))
    step = max(1, round(1 / COARSE_SHARE)) if count >= 1 / COARSE_SHARE else 1
    return order[:count:step]


def candidate_scales(
    pairs: Pairs, weight: torch.Tensor, omega: torch.Tensor, tie: torch.Tensor, rounding: Rounding
) -> list[tuple[str, torch.Tensor]]:
    """Labelled scales [d], without duplicates: a^alpha / b^(1 - alpha) over quantiles, norms and alphas, AWQ's a^alpha, and
    EAQuant's maximum over experts of per-expert scales."""
    column = column_maximum(weight)
    found: list[tuple[str, torch.Tensor]] = []
    norms = {nu: tied(column_norm(column, omega, nu), tie) for nu in NORMS}
    for u in QUANTILES:
        a = tied(channel_quantile(pairs.x, pairs.types, u), tie)
        for alpha in ALPHAS:
            found.append((f"awq u={u:g} alpha={alpha:.2f}", a**alpha))
            for nu, b in norms.items():
                found.append((f"a^alpha/b^(1-alpha) u={u:g} nu={nu:g} alpha={alpha:.2f}", a**alpha / b ** (1.0 - alpha)))
    found.append(("eaquant", tied(merged_scale(pairs, column, 0.5), tie)))
    unique: dict[bytes, tuple[str, torch.Tensor]] = {}
    for label, scale in found:
        finished = finish_scale(scale, rounding)
        unique.setdefault(finished.cpu().numpy().tobytes(), (label, finished))
    return list(unique.values())


def channel_quantile(x: torch.Tensor, types: torch.Tensor, u: float) -> torch.Tensor:
    """Larger one, over text and vision tokens, of the u-quantile of ``|x_j|``; positive float32 [d]."""
    parts = []
    for modality in (TEXT, VISION):
        values = x[types == modality].abs().float()
        if len(values):
            above = len(values) - min(len(values) - 1, int(u * (len(values) - 1) + 0.999999))
            parts.append(values.topk(above, dim=0).values[-1])
    largest = torch.stack(parts).amax(0) if parts else torch.ones(x.shape[-1])
    return positive(largest)


def column_norm(column: torch.Tensor, omega: torch.Tensor, nu: float) -> torch.Tensor:
    """b_j from ``max_i |W_e[i, j]|`` [E, d]: importance-weighted nu-norm over experts, their maximum for nu = inf."""
    if nu == float("inf"):
        return positive(column.amax(0))
    return positive((omega.unsqueeze(1) * column.pow(nu)).sum(0).pow(1.0 / nu))


def finish_scale(scale: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    """Divide by the geometric mean, clip to [1/32, 32], round to powers of two where asked; over the last dimension."""
    log = torch.log2(scale.double())
    log = (log - log.mean(-1, keepdim=True)).clamp(-5.0, 5.0)
    return torch.exp2(log.round() if rounding == "power_of_two" else log).float()


def _coordinate_steps(
    objective: Objective, x: torch.Tensor, scale: torch.Tensor, value: float, tie: torch.Tensor, rounding: Rounding
) -> tuple[float, torch.Tensor]:
    """Try to move the scales of the largest channels, one after the other, keeping every step that lowers J."""
    exponents = (-1.0, 1.0) if rounding == "power_of_two" else (-0.5, 0.5, -1.0, 1.0)
    groups = tied_maximum(x.abs().amax(0) if len(x) else torch.ones(x.shape[-1]), tie)
    for group in groups.argsort(descending=True, stable=True)[:COORDINATES].tolist():
        moved_best = scale
        for exponent in exponents:
            moved = torch.where(tie == group, scale * 2.0**exponent, scale).clamp(1.0 / LARGEST, LARGEST)
            tried = objective.value(moved)
            if tried < value:
                value, moved_best = tried, moved
        scale = moved_best
    return value, scale


def search_per_expert(
    train: Pairs, heldout: Pairs, weight: torch.Tensor, num_bits: int, rounding: Rounding = "power_of_two", *, group_size: int = -1,
    rotation: Rotation | None = None,
) -> PerExpertResult:
    """Scales of each expert's own intermediate channels, every expert with its own best alpha, all searched at once.

    Args:
        train, heldout: intermediate activations, one row a pair (``token`` is ``arange(P)``).
        weight: down projections, floating [E, H, I].
        rotation: between the scaled intermediate and its quantization, see
            :class:`ecmfq_export.quant.sampled_outputs.SampledOutputs`.
    """
    experts, _, columns = weight.shape
    omega = torch.ones(experts)
    fine, gate = (Objective(side, weight, omega, num_bits, FINE_TOKENS, per_expert=True, group_size=group_size, rotation=rotation,
                            max_products=products) for side, products in ((train, FINE_PRODUCTS), (heldout, GATE_PRODUCTS)))
    ones = torch.ones(experts, columns)
    a, b = positive(expert_maximum(train, experts)), positive(column_maximum(weight))
    best_ratio, best = fine.ratios(ones), ones
    for alpha in ALPHAS:
        for raw in (a**alpha, a**alpha / b ** (1.0 - alpha)):
            scale = finish_scale(raw, rounding)
            ratio = fine.ratios(scale)
            better = ratio < best_ratio
            best_ratio = torch.where(better, ratio, best_ratio)
            best = torch.where(better.unsqueeze(1), scale, best)
    before, after = gate.ratios(ones), gate.ratios(best)
    accepted = gate.present & (after < (1.0 - GATE) * before)
    return PerExpertResult(torch.where(accepted.unsqueeze(1), best, ones), accepted, before, after)
