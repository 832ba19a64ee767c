"""VEQ-ME's expert importance and VEQ-MA's token weights."""

import torch

from ecmfq_export.quant import veq
from ecmfq_export.quant.token_weights import TEXT, VISION, combine


def pairs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(6, (900,), generator=g), (torch.rand(900, generator=g) < 0.8).long()


def test_importance_is_the_paper_s_score():
    expert, types = pairs()
    text, vision = (torch.bincount(expert[types == m], minlength=6).double() for m in (TEXT, VISION))
    score = 22.4 * text + text.sum() / vision.sum() * vision
    assert torch.allclose(veq.expert_importance(expert, types, 6, 22.4).double(), score / score.mean(), rtol=1e-6)


def test_only_the_ratio_of_gamma_and_beta_matters():
    """Figure 7: the method does not depend on the absolute size of the scores."""
    expert, types = pairs()
    assert veq.expert_importance(expert, types, 6, 5.0).mean() == 1.0
    twice = veq.expert_importance(expert.repeat(2), types.repeat(2), 6, 5.0)
    assert torch.allclose(twice, veq.expert_importance(expert, types, 6, 5.0))


def test_text_experts_gain_with_gamma():
    expert = torch.tensor([0] * 10 + [1] * 90)
    types = torch.tensor([TEXT] * 10 + [VISION] * 90)
    low, high = (veq.expert_importance(expert, types, 2, gamma) for gamma in (0.1, 20.0))
    assert low[0] < low[1] and high[0] > high[1]


def test_one_modality_or_no_token_at_all():
    expert = torch.tensor([0, 0, 1])
    assert torch.allclose(veq.expert_importance(expert, torch.full((3,), VISION), 3, 9.0), torch.tensor([2.0, 1.0, 0.0]))
    assert torch.equal(veq.expert_importance(expert[:0], expert[:0], 3, 9.0), torch.ones(3))


def test_token_weight_is_the_router_s_probability_times_the_modality():
    probability, types = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([TEXT, VISION, TEXT])
    weight = veq.token_weight(probability, types, 22.4)
    assert torch.allclose(weight, torch.tensor([0.2 * 22.4, 0.5, 0.3 * 22.4]))
    rho = torch.where(types == TEXT, 22.4, 1.0)
    assert torch.equal(combine("rho_p", rho, torch.full((3,), 9.0), torch.full((3,), 9.0), 2.0, probability), weight)
