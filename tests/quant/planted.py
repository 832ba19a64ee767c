"""Routed tokens with planted outlier channels, and experts that read them: what the scale searches' tests share."""

from __future__ import annotations

import torch

from ecmfq_export.quant.sampled_outputs import Pairs

E, N, D, T = 6, 20, 48, 400


def planted(seed: int, outliers: int = 4, factor: float = 30.0, experts: int = E) -> tuple[Pairs, torch.Tensor, torch.Tensor]:
    """Tokens whose first channels are large, and experts that read them with small weights; the same planting for any seed."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(T, D, generator=g)
    x[:, :outliers] *= factor
    fixed = torch.Generator().manual_seed(99)
    weight = torch.randn(experts, N, D, generator=fixed)
    weight[..., :outliers] /= factor
    types = (torch.rand(T, generator=g) < 0.5).long()
    token = torch.arange(T).repeat(2)
    pairs = Pairs(x, token, torch.randint(experts, (2 * T,), generator=g), 0.1 + torch.rand(2 * T, generator=g), types)
    return pairs, weight, torch.full((experts,), 1.0 / experts)


def unweighted(pairs: Pairs) -> Pairs:
    """The same pairs, all with weight 1."""
    return Pairs(pairs.x, pairs.token, pairs.expert, torch.ones_like(pairs.weight), pairs.types)


def rows(pairs: Pairs) -> Pairs:
    """The same pairs with one row of x for each, as intermediates have."""
    return Pairs(pairs.x[pairs.token], torch.arange(len(pairs.token)), pairs.expert, pairs.weight, pairs.types[pairs.token])


def degenerate(case: str) -> Pairs:
    """Pairs of `planted(0)` with an expert without tokens, one token, all tokens on one expert, or no pair at all."""
    pairs, _, _ = planted(0)
    expert, keep = pairs.expert, torch.arange(len(pairs.expert))
    if case == "an expert without tokens":
        expert = torch.where(expert == 2, torch.tensor(3), expert)
    elif case == "one token":
        keep = torch.cat((torch.nonzero(expert == 2)[:1, 0], torch.nonzero(expert != 2)[:, 0]))
    elif case == "all on one expert":
        expert = torch.full_like(expert, 1)
    else:
        keep = keep[:0]
    return Pairs(pairs.x, pairs.token[keep], expert[keep], pairs.weight[keep], pairs.types)


CASES = ("an expert without tokens", "one token", "all on one expert", "no pairs")
