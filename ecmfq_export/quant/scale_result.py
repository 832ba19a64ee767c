"""What every search for smoothing scales returns, whatever the method."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ScaleResult:
    """One scale shared by everything behind a norm.

    Attributes:
        scale: float32 [d] that divides what the linear layers read and multiplies their columns; all ones where rejected.
        accepted: whether it is to be folded; methods without a held-out gate always accept what they found.
        label: the candidate it came from.
        search_before, search_after: the method's objective on the search tokens at s = 1 and at the best scale.
        heldout_before, heldout_after: the same on held-out tokens (reported by every method, a gate only for ECS).
    """

    scale: torch.Tensor
    accepted: bool
    label: str
    search_before: float
    search_after: float
    heldout_before: float
    heldout_after: float

    def summary(self) -> dict[str, object]:
        """Everything but the scale itself, for manifests."""
        return {key: value for key, value in vars(self).items() if key != "scale"}


@dataclass(frozen=True)
class PerExpertResult:
    """Scales of the down projections, every expert with its own.

    Attributes:
        scale: float32 [E, I] that divides the rows of up; ones where an expert has none.
        accepted: bool [E].
        ratio_before, ratio_after: held-out objective of each expert at s = 1 and at its scale, float32 [E].
    """

    scale: torch.Tensor
    accepted: torch.Tensor
    ratio_before: torch.Tensor
    ratio_after: torch.Tensor
