"""Muon (examples/tiny_vlm/optim.py) with its Newton-Schulz iteration in bfloat16, as Muon's reference implementation has it."""

from __future__ import annotations

import torch
from families import family_of as _  # noqa: F401  (puts the example's folder on the path)
from optim import Muon, orthogonalize


class FastMuon(Muon):
    """Muon whose orthogonalization runs in bfloat16; parameters and momentum stay as they are."""

    @staticmethod
    def orthogonalized(update: torch.Tensor) -> torch.Tensor:
        return orthogonalize(update.bfloat16()).float()
