"""MoEQuant: balanced selection and affinity-guided Hessians."""

import pytest
import torch

from ecmfq_export.errors import UserError
from ecmfq_export.quant.faq import FaqSettings, quantize_faq
from ecmfq_export.quant.hessian import WeightedHessian, weighted_error
from ecmfq_export.quant.macs import PoolScores, random_indices, select
from ecmfq_export.quant.moequant import balanced_samples, usage_deviation
from ecmfq_export.quant.token_weights import combine

PLAIN = FaqSettings(4, kappa=0.0, cross_strength=0.0)


def pool(size: int = 60, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Skewed usage [N, 2, 8], losses and token counts."""
    g = torch.Generator().manual_seed(seed)
    tokens = (torch.rand(size, 2, 8, generator=g).pow(6) * 60).long()
    predicted = torch.randint(5, 30, (size,), generator=g)
    return tokens, (1 + torch.rand(size, generator=g)) * predicted, predicted


def test_selection_is_more_balanced_than_random_ones():
    tokens, loss, predicted = pool()
    chosen = balanced_samples(tokens, loss, predicted, 12)
    assert len(set(chosen)) == 12
    ours = usage_deviation(tokens[chosen].sum(0))
    for seed in range(5):
        assert ours < 0.7 * usage_deviation(tokens[random_indices(60, 12, seed)].sum(0))


def test_tau_trades_balance_for_likelihood():
    tokens, loss, predicted = pool()
    def figures(tau):
        chosen = balanced_samples(tokens, loss, predicted, 12, tau)
        return float(usage_deviation(tokens[chosen].sum(0))), float(loss[chosen].sum() / predicted[chosen].sum())
    balanced, likely = figures(0.05), figures(100.0)
    assert balanced[0] < likely[0] and balanced[1] > likely[1]


def test_first_choice_minimizes_the_criterion():
    tokens, loss, predicted = pool()
    criterion = loss / predicted + usage_deviation(tokens) / 1.2
    assert balanced_samples(tokens, loss, predicted, 1) == [int(criterion.argmin())]


def test_select_takes_the_whole_of_a_small_pool_and_refuses_nan():
    tokens, loss, predicted = pool(5)
    scores = PoolScores(tokens.float().unsqueeze(-1).expand(-1, -1, -1, 2), tokens, torch.rand(5), torch.randn(5, 16), loss, predicted)
    assert sorted(select(scores, 9, 2, 0, "balanced").indices) == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match="perplexities"):
        balanced_samples(tokens, loss.fill_(float("nan")), predicted, 2)


def hessians(gates: torch.Tensor) -> tuple[WeightedHessian, torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(800, 40, generator=g) @ (torch.eye(40) + 0.3 * torch.randn(40, 40, generator=g))
    expert = torch.randint(4, (800,), generator=g)
    ones = torch.ones(800)
    h = WeightedHessian(4, 40)
    h.add(x, expert, combine("g", 7.0 * ones, gates, 3.0 * ones))
    return h, torch.randn(4, 12, 40, generator=g), x, expert


def test_equal_gates_give_gptq():
    one, weight, x, expert = hessians(torch.ones(800))
    plain = WeightedHessian(4, 40)
    plain.add(x, expert, torch.ones(800))
    same, scaled = hessians(torch.full((800,), 0.25))[0], quantize_faq(weight, plain, PLAIN)
    assert torch.equal(quantize_faq(weight, one, PLAIN).qvalue, scaled.qvalue)
    assert torch.equal(quantize_faq(weight, same, PLAIN).qvalue, scaled.qvalue)  # GPTQ knows no scale of H


def test_affine_tokens_are_computed_better_than_by_plain_gptq():
    gates = torch.where(torch.arange(800) % 5 == 0, 0.9, 0.02)
    affine, weight, x, expert = hessians(gates)
    plain = WeightedHessian(4, 40)
    plain.add(x, expert, torch.ones(800))
    ours, theirs = (quantize_faq(weight, h, PLAIN).dequantize() - weight for h in (affine, plain))
    assert weighted_error(ours, affine.matrix).sum() < 0.95 * weighted_error(theirs, affine.matrix).sum()
