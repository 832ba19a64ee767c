"""Rows of tokens gathered by the expert they go to, without a loop over experts."""

from __future__ import annotations

import torch


def group_by_expert(expert: torch.Tensor, num_experts: int, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `capacity` pairs of each expert, in the order given.

    Args:
        expert: int64 [P], expert of each (token, expert) pair.

    Returns:
        index int64 [E, M] into the P pairs (0 where there is none) and valid bool [E, M]; M is the fullest expert's count,
        at most `capacity` and at least 1.
    """
    order = torch.argsort(expert, stable=True)
    counts = torch.bincount(expert, minlength=num_experts)
    starts = counts.cumsum(0) - counts
    width = max(1, min(capacity, int(counts.max()) if num_experts else 0))
    column = torch.arange(width)
    valid = column < counts.unsqueeze(1)
    position = (starts.unsqueeze(1) + column).clamp_max(max(0, expert.numel() - 1))
    if expert.numel() == 0:
        return torch.zeros(num_experts, width, dtype=torch.int64), valid
    return torch.where(valid, order[position], torch.zeros_like(position)), valid
