"""Small parts that scale searches share: channel maxima by expert, tied channels, and keeping scales positive."""

from __future__ import annotations

import torch

from ecmfq_export.quant.sampled_outputs import Pairs

ROWS = 1 << 14
"""Pairs gathered at a time."""


def positive(values: torch.Tensor) -> torch.Tensor:
    """Dead channels take the smallest living one, so that logarithms and quotients exist."""
    living = values[values > 0]
    return values.clamp_min(float(living.min()) if living.numel() else 1.0)


def column_maximum(weight: torch.Tensor) -> torch.Tensor:
    """``max_i |W_e[i, j]|``, float32 [E, d] of floating [E, N, d], without a copy of the weight."""
    return torch.maximum(weight.amax(1), -weight.amin(1)).float()


def tied(values: torch.Tensor, tie: torch.Tensor) -> torch.Tensor:
    """Each channel's value [d] replaced by the maximum over the channels that share its number in `tie`, int64 [d]."""
    return tied_maximum(values, tie)[tie]


def tied_maximum(values: torch.Tensor, tie: torch.Tensor) -> torch.Tensor:
    """The maximum of each group of tied channels, float32 [groups]."""
    return torch.zeros(int(tie.max()) + 1).scatter_reduce_(0, tie, values.float(), "amax")


def expert_maximum(pairs: Pairs, num_experts: int) -> torch.Tensor:
    """``max_t |x_tj|`` over the tokens of each expert, float32 [E, d]; 0 for an expert without tokens."""
    largest = torch.zeros(num_experts, pairs.x.shape[-1])
    for rows in torch.arange(len(pairs.token)).split(ROWS):
        values = pairs.x[pairs.token[rows]].abs().float()
        largest.scatter_reduce_(0, pairs.expert[rows].unsqueeze(1).expand_as(values), values, "amax")
    return largest


def expert_mean(pairs: Pairs, num_experts: int) -> torch.Tensor:
    """Mean of ``|x_tj|`` over the tokens of each expert, float32 [E, d]; 0 for an expert without tokens."""
    total = torch.zeros(num_experts, pairs.x.shape[-1])
    for rows in torch.arange(len(pairs.token)).split(ROWS):
        total.index_add_(0, pairs.expert[rows], pairs.x[pairs.token[rows]].abs().float())
    return total / torch.bincount(pairs.expert, minlength=num_experts).clamp_min(1).unsqueeze(1)


def normalized(scale: torch.Tensor, rounding: str) -> torch.Tensor:
    """Divide by the geometric mean over the last dimension, and round to powers of two where asked; float32.

    Dividing all of a scale by one number changes nothing that is quantized; it keeps folded weights near their old size.
    Scales keep their range, up to 2^20 either way, since the published methods do not clip theirs.
    """
    log = torch.log2(scale.double())
    log = (log - log.mean(-1, keepdim=True)).clamp(-20.0, 20.0)
    return torch.exp2(log.round() if rounding == "power_of_two" else log).float()
