"""One MoE layer of Qwen3-VL-30B-A3B's shape: weights, tokens, routing and token weights, from a seed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, TOKENS = 128, 8, 2048, 768, 4096


@dataclass(frozen=True)
class Layer:
    """What every side gets. Rows of the routed pairs are sorted by expert.

    Attributes:
        gate_up: float32 [E, 2 I, d]; down: float32 [E, d, I].
        x: float32 [T, d]; inner: float32 [P, I], what down reads.
        token, expert: int64 [P]; weight: float32 [P].
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    x: torch.Tensor
    inner: torch.Tensor
    token: torch.Tensor
    expert: torch.Tensor
    weight: torch.Tensor


def make_layer(experts: int, seed: int = 0) -> Layer:
    """The layer, or its first `experts` experts with as many tokens each (so that time goes with their number)."""
    random = torch.Generator().manual_seed(seed)
    tokens = TOKENS * experts // EXPERTS
    # Channels that go together and differ in size, as hidden states do: a covariance with eigenvalues that fall like 1 / k.
    x = torch.randn(tokens, HIDDEN, generator=random) @ _spectrum(HIDDEN, random)
    # Some experts are wanted more than others: a top-k draw without replacement in proportion to popularity.
    popularity = 0.5 * torch.randn(experts, generator=random)
    keys = popularity - torch.log(-torch.log(torch.rand(tokens, experts, generator=random).clamp(1e-9, 1 - 1e-7)))
    ids = keys.topk(TOP_K, dim=1).indices
    expert, order = torch.sort(ids.flatten(), stable=True)
    gate = torch.rand(tokens, TOP_K, generator=random)
    weight = (gate / gate.sum(1, keepdim=True)).flatten()[order] * torch.where(torch.rand(len(order), generator=random) < 0.2, 4.0, 1.0)
    # silu(gate) * up of Gaussian gates and ups, with channels that go together.
    inner = torch.nn.functional.silu(torch.randn(len(order), INTERMEDIATE, generator=random)) @ _spectrum(INTERMEDIATE, random)
    gate_up = torch.randn(experts, 2 * INTERMEDIATE, HIDDEN, generator=random).mul_(0.02)
    down = torch.randn(experts, HIDDEN, INTERMEDIATE, generator=random).mul_(0.02)
    return Layer(gate_up, down, x, inner, order // TOP_K, expert, weight)


def _spectrum(size: int, random: torch.Generator) -> torch.Tensor:
    scale = torch.arange(1, size + 1).rsqrt().unsqueeze(1)
    return scale * torch.randn(size, size, generator=random) + 0.02 * torch.eye(size)
