"""Rows of tokens gathered by the expert they go to, without a loop over experts."""

from __future__ import annotations

from collections.abc import Iterator

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


def blocks_by_expert(
    expert: torch.Tensor, num_experts: int, block: int, max_active: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Cover all pairs in padded blocks of `block` rows of at most `max_active` experts at a time.

    Work stays proportional to the number of pairs however unevenly they are spread: an expert with one pair costs one block.

    Yields:
        experts int64 [A], index int64 [A, block] into the pairs (0 where padded), valid bool [A, block].
    """
    order = torch.argsort(expert, stable=True)
    counts = torch.bincount(expert, minlength=num_experts)
    starts = counts.cumsum(0) - counts
    column = torch.arange(block)
    for first in range(0, int(counts.max()) if expert.numel() else 0, block):
        active = torch.nonzero(counts > first).squeeze(1)
        for some in active.split(max_active):
            offset = first + column
            valid = offset < counts[some].unsqueeze(1)
            position = (starts[some].unsqueeze(1) + offset).clamp_max(expert.numel() - 1)
            yield some, torch.where(valid, order[position], torch.zeros_like(position)), valid
