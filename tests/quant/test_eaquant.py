"""EAQuant: merged scales, outlier scales, topped-up calibration, routing divergence."""

import pytest
import torch

from ecmfq_export.quant import eaquant
from ecmfq_export.quant.macs import PoolScores, random_indices, select
from tests.quant.planted import CASES, D, E, degenerate, planted, rows, unweighted


def test_merged_scale_covers_every_expert_s_need_and_nothing_more():
    pairs, weight, _ = planted(0)
    column = weight.abs().amax(1)
    merged, needs = eaquant.merged_scale(pairs, column), eaquant.expert_scales(pairs, column)
    assert needs.shape == (E, D) and bool((merged >= needs).all())
    assert torch.equal(merged, needs.amax(0))


def test_expert_s_need_is_smoothquant_s_formula_on_its_own_tokens():
    pairs, weight, _ = planted(0)
    e = 3
    mine = pairs.x[pairs.token[pairs.expert == e]].abs().amax(0)
    expected = mine**0.6 / weight[e].abs().amax(0) ** 0.4
    assert torch.allclose(eaquant.expert_scales(pairs, weight.abs().amax(1))[e], expected, rtol=1e-5)


def test_one_expert_s_outlier_reaches_the_shared_scale():
    pairs, weight, omega = planted(0, outliers=0)
    pairs = unweighted(pairs)
    pairs.x[pairs.token[pairs.expert == 4], 11] *= 50
    result = eaquant.search_scale(pairs, pairs, weight, omega, 4)
    assert result.accepted and int(result.scale.argmax()) == 11
    assert result.search_after < result.search_before


def test_only_outlier_channels_of_an_intermediate_are_scaled():
    largest = torch.rand(3, 64, generator=torch.Generator().manual_seed(0)) + 1
    largest[1, 5] = 60.0
    scale = eaquant.outlier_scale(largest)
    others = torch.ones_like(scale, dtype=torch.bool)
    others[1, 5] = False
    assert bool((scale[others] == 1).all())
    normal = largest[1].clone()
    normal[5] = 0
    assert scale[1, 5] == pytest.approx(float((60.0 / normal.max()) ** 0.7))


def test_per_expert_result():
    pairs, weight, _ = planted(0, outliers=0)
    inner = rows(unweighted(pairs))
    inner.x[inner.expert == 1, 7] *= 40
    result = eaquant.search_per_expert(inner, inner, weight, 4)
    assert bool(result.accepted[1]) and int(result.scale.argmax()) == D + 7 and result.scale[1, 7] > 5
    assert result.ratio_after[1] < result.ratio_before[1]


@pytest.mark.parametrize("case", CASES)
def test_degenerate_routing(case):
    pairs, (_, weight, omega) = degenerate(case), planted(0)
    assert bool(torch.isfinite(eaquant.search_scale(pairs, pairs, weight, omega, 4).scale).all())
    assert bool(torch.isfinite(eaquant.search_per_expert(rows(pairs), rows(pairs), weight, 4).scale).all())


def test_calibration_is_topped_up_for_experts_below_twice_the_average():
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 15, (60, 2, 8), generator=g)
    tokens[:, :, 6] = 0
    kept = random_indices(60, 16, 0)[:12]
    rare = [i for i in range(60) if i not in kept][:8]
    tokens[rare, :, 6] = 30
    mass = tokens.float().unsqueeze(-1).expand(-1, -1, -1, 2)
    chosen = select(PoolScores(mass, tokens, torch.rand(60), torch.randn(60, 16)), 16, 2, 0, "topped_up")
    assert len(chosen.indices) == len(set(chosen.indices)) == 16 and chosen.topped_up == 4
    assert set(kept) <= set(chosen.indices) and len(set(rare) & set(chosen.indices)) == 4


def test_routing_divergence_is_zero_for_equal_logits_and_grows_with_the_error():
    g = torch.Generator().manual_seed(0)
    logits, noise = torch.randn(50, 8, generator=g), torch.randn(50, 8, generator=g)
    values = [eaquant.routing_divergence(logits, logits + size * noise, 8) for size in (0.0, 0.1, 0.5)]
    assert values[0] == 0.0 < values[1] < values[2]
    expected = torch.nn.functional.kl_div((logits + noise).double().log_softmax(-1), logits.double().softmax(-1), reduction="batchmean")
    assert eaquant.routing_divergence(logits, logits + noise, 8) == pytest.approx(float(expected))
    assert eaquant.routing_divergence(logits[:0], logits[:0], 2) == 0.0
