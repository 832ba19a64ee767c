"""Muon (examples/tiny_vlm/optim.py) with its Newton-Schulz iteration in bfloat16, as Muon's reference implementation has it."""

from __future__ import annotations

import torch
from families import family_of as _  # noqa: F401  (puts the example's folder on the path)
from optim import Muon, is_matrix, orthogonalize
from torch import nn


class FastMuon(Muon):
    """Muon whose orthogonalization runs in bfloat16; parameters and momentum stay as they are."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalize(p.grad.lerp(buffer, group["momentum"]).bfloat16()).float()
                scale = max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


def build_optimizers(model: nn.Module, lr: float, muon_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for the rest (embeddings, head, routers, norms)."""
    named = list(model.named_parameters())
    muon = [p for n, p in named if is_matrix(n, p)]
    rest = [(n, p) for n, p in named if not is_matrix(n, p)]
    decayed = [p for n, p in rest if p.ndim > 1 and "embed" not in n]
    plain = [p for n, p in rest if not (p.ndim > 1 and "embed" not in n)]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    return [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True), FastMuon(muon, lr=muon_lr)]
