"""Muon for the matrices, AdamW for the rest.

Muon (Jordan et al., 2024) orthogonalizes each matrix's momentum by a Newton-Schulz iteration. `torch.optim.Muon` takes
2-D parameters only; here the experts' [E, N, K] tensors are batches of matrices.
"""

from __future__ import annotations

import torch
from torch import nn

# Quintic iteration coefficients of the Muon reference implementation.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_STEPS = 5


def orthogonalize(update: torch.Tensor) -> torch.Tensor:
    """Nearly the orthogonal factor of each matrix in `update` [..., N, K]: singular values come near 1."""
    x = update if update.shape[-2] <= update.shape[-1] else update.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x if update.shape[-2] <= update.shape[-1] else x.mT


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay."""

    def __init__(self, params, lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = self.orthogonalized(p.grad.lerp(buffer, group["momentum"]))
                scale = max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)

    @staticmethod
    def orthogonalized(update: torch.Tensor) -> torch.Tensor:
        """:func:`orthogonalize` in the precision that this optimizer takes for it."""
        return orthogonalize(update)


def is_matrix(name: str, p: nn.Parameter) -> bool:
    """Whether Muon takes it: hidden matrices, but no embedding, head, router or patch projection."""
    return p.ndim in (2, 3) and not any(part in name for part in ("embed", "lm_head", "mlp.gate.weight"))


def build_optimizers(
    model: nn.Module, kind: str, lr: float, muon_lr: float, muon_class: type[Muon] = Muon
) -> list[torch.optim.Optimizer]:
    """`kind` is "muon" (with AdamW for what Muon does not take) or "adamw" for everything."""
    named = list(model.named_parameters())
    muon = [p for n, p in named if kind == "muon" and is_matrix(n, p)]
    taken = {id(p) for p in muon}
    rest = [(n, p) for n, p in named if id(p) not in taken]
    decayed = [p for n, p in rest if p.ndim > 1 and "embed" not in n]
    plain = [p for n, p in rest if not (p.ndim > 1 and "embed" not in n)]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)]
    if muon:
        optimizers.append(muon_class(muon, lr=muon_lr))
    return optimizers
