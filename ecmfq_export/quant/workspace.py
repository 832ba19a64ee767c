"""Buffers that are used again from one chunk of experts to the next: fresh memory costs a page fault every few kilobytes."""

from __future__ import annotations

import math

import torch


class Workspace:
    """Named buffers, each as large as the largest use of its name so far."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """An uninitialized tensor; it shares memory with what `name` was taken for before."""
        items = math.prod(shape)
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < items:
            buffer = self._buffers[name, dtype] = torch.empty(items, dtype=dtype)
        return buffer[:items].view(shape)
