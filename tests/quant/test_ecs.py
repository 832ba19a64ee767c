"""Expert-consensus smoothing on planted outlier channels."""

import pytest
import torch

from ecmfq_export.errors import UserError
from ecmfq_export.quant import awq, eaquant, ecs
from ecmfq_export.quant.activation import fake_quantize_per_token
from ecmfq_export.quant.ecs_objective import Objective, expert_importance
from ecmfq_export.quant.hadamard import block_hadamard
from ecmfq_export.quant.rtn import quantize_rtn
from ecmfq_export.quant.sampled_outputs import Pairs
from tests.quant.planted import CASES, D, E, T, degenerate, planted, rows


def test_ratio_equals_its_definition():
    pairs, weight, omega = planted(0)
    scale = torch.exp2(torch.randint(-2, 3, (D,), generator=torch.Generator().manual_seed(1)).float())
    ratios = Objective(pairs, weight, omega, 4, 10_000).ratios(scale)
    e = 4
    mine = pairs.expert == e
    x, w = pairs.x[pairs.token[mine]], pairs.weight[mine]
    reference = x @ weight[e].T
    out = fake_quantize_per_token(x / scale) @ quantize_rtn(weight[e] * scale, 4).dequantize().T
    error = (out - reference).abs().sum(-1)
    error = error.clamp_max(5 * error.median())
    assert torch.allclose(ratios[e], (w * error).sum() / (w * reference.abs().sum(-1)).sum(), rtol=1e-4)
    value = Objective(pairs, weight, omega, 4, 10_000).value(scale)
    assert value == pytest.approx(0.8 * float(ratios.mean()) + 0.2 * float(ratios.max()), rel=1e-5)


def test_theta_weighs_the_worst_experts():
    pairs, weight, omega = planted(0)
    scale = torch.linspace(0.5, 2, D)
    ratios = Objective(pairs, weight, omega, 4, 64).ratios(scale)
    mean, tail = (Objective(pairs, weight, omega, 4, 64, theta=theta).value(scale) for theta in (0.0, 1.0))
    assert mean == pytest.approx(float(ratios.mean()), rel=1e-5) and tail == pytest.approx(float(ratios.max()), rel=1e-5)


@pytest.mark.parametrize("rounding", ["power_of_two", "real"])
def test_planted_outliers_are_smoothed_and_pass_the_gate(rounding):
    pairs, weight, omega = planted(0)
    result = ecs.search_scale(pairs, planted(1)[0], weight, omega, 4, rounding)
    assert result.accepted
    assert result.search_after < 0.7 * result.search_before and result.heldout_after < 0.7 * result.heldout_before
    assert bool((result.scale[:4] > result.scale[4:].max()).all())
    if rounding == "power_of_two":
        assert torch.equal(torch.log2(result.scale), torch.log2(result.scale).round())


@pytest.mark.parametrize("seed", range(4))
def test_search_never_ends_worse_than_no_scale_on_its_own_tokens(seed):
    pairs, weight, omega = planted(seed, outliers=0)
    result = ecs.search_scale(pairs, planted(seed + 50, outliers=0)[0], weight, omega, 4)
    assert result.search_after <= result.search_before


def test_gate_rejects_what_held_out_tokens_do_not_confirm():
    pairs, weight, omega = planted(0)
    other = planted(1)[0]
    reversed_x = other.x.flip(-1).clone()
    result = ecs.search_scale(pairs, Pairs(reversed_x, other.token, other.expert, other.weight, other.types), weight, omega, 4)
    assert result.search_after < result.search_before
    assert not result.accepted and torch.equal(result.scale, torch.ones(D))
    assert result.summary()["accepted"] is False


def test_result_does_not_depend_on_the_numbers_of_experts():
    pairs, weight, omega = planted(0)
    omega = torch.tensor([0.1, 0.3, 0.05, 0.15, 0.25, 0.15])
    omega[5] += 0.001  # no ties
    held = planted(1)[0]
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    def renumber(p):
        return Pairs(p.x, p.token, torch.argsort(order)[p.expert], p.weight, p.types)
    one = ecs.search_scale(pairs, held, weight, omega, 4)
    two = ecs.search_scale(renumber(pairs), renumber(held), weight[order], omega[order], 4)
    assert torch.equal(one.scale, two.scale)


def test_tied_channels_share_their_scale():
    pairs, weight, omega = planted(0)
    tie = torch.arange(D) % (D // 2)
    result = ecs.search_scale(pairs, planted(1)[0], weight, omega, 4, tie=tie)
    assert torch.equal(result.scale[: D // 2], result.scale[D // 2 :])


@pytest.mark.parametrize("case", CASES)
def test_degenerate_routing(case):
    _, weight, omega = planted(0)
    pairs = degenerate(case)
    result = ecs.search_scale(pairs, pairs, weight, omega, 4)
    assert bool(torch.isfinite(result.scale).all())
    assert result.accepted == (case != "no pairs")
    per_expert = ecs.search_per_expert(pairs, pairs, weight, 4)
    assert bool(torch.isfinite(per_expert.scale).all())
    if case == "an expert without tokens":
        assert not per_expert.accepted[2] and torch.equal(per_expert.scale[2], torch.ones(D))


def test_chunks_over_experts_do_not_change_the_objective():
    pairs, weight, omega = planted(0)
    scale = torch.linspace(0.5, 2, D)
    whole, parts = (Objective(pairs, weight, omega, 4, 64, max_bytes=limit) for limit in (1 << 30, 1))
    assert torch.allclose(whole.ratios(scale), parts.ratios(scale), rtol=1e-5)


def test_nan_is_refused():
    pairs, weight, omega = planted(0)
    pairs.x[3, 3] = float("nan")
    with pytest.raises(UserError, match="NaN"):
        ecs.search_scale(pairs, pairs, weight, omega, 4)


def test_per_expert_scales_differ_and_are_gated_one_by_one():
    pairs, weight, _ = planted(0, outliers=0)
    train_x = pairs.x[pairs.token].clone()
    train_x[pairs.expert == 1, 7] *= 40
    weight[1, :, 7] /= 40
    rows = torch.arange(2 * T)
    train = Pairs(train_x, rows, pairs.expert, pairs.weight, pairs.types[pairs.token])
    result = ecs.search_per_expert(train, train, weight, 4)
    assert bool(result.accepted[1])
    assert result.scale[1, 7] > 1 and bool((result.ratio_after <= result.ratio_before).all())


def test_expert_importance_is_floored_and_sums_to_one():
    mass = torch.tensor([[100.0, 0.0], [1.0, 50.0], [0.0, 0.0], [0.0, 0.0]])
    omega = expert_importance(mass)
    assert omega.sum() == pytest.approx(1.0) and float(omega.min()) > 0.02 and omega[2] == omega[3]


def test_finish_scale():
    scale = ecs.finish_scale(torch.tensor([1e6, 1.0, 1.0, 1e-6]), "power_of_two")
    assert scale.tolist() == [32.0, 1.0, 1.0, 2.0**-5]
    assert torch.log2(ecs.finish_scale(torch.rand(64) + 0.1, "real")).mean().abs() < 1e-5


def test_quantile_takes_the_larger_modality():
    x = torch.zeros(200, 2)
    types = torch.arange(200) % 2
    x[types == 1, 0] = 3.0
    x[types == 0, 1] = -5.0
    assert ecs.channel_quantile(x, types, 0.99).tolist() == [3.0, 5.0]


@pytest.mark.parametrize("module", [ecs, awq, eaquant])
def test_behind_a_rotation_scales_even_out_planted_channels(module):
    """A channel of large activations and small weights: the rotation alone makes it worse, a scale before the rotation heals it."""
    pairs, weight, _ = planted(0)
    inner = rows(pairs)
    rotation, ones = block_hadamard(D), torch.ones(E, D)
    plain, behind = (Objective(inner, weight, torch.ones(E), 4, 256, per_expert=True, rotation=r) for r in (None, rotation))
    assert behind.value(ones) > 1.5 * plain.value(ones)
    result = module.search_per_expert(inner, inner, weight, 4, "power_of_two", rotation=rotation)
    assert bool(result.accepted.all()) and bool((result.ratio_after < 0.7 * result.ratio_before).all())
    assert behind.value(result.scale) < 0.5 * behind.value(ones)


def test_rotated_errors_are_those_of_rotated_weights_and_inputs():
    pairs, weight, omega = planted(1)
    rotation, scale = block_hadamard(D), torch.linspace(0.5, 2, D)
    turned = Pairs(rotation.apply(pairs.x / scale), pairs.token, pairs.expert, pairs.weight, pairs.types)
    expected = Objective(turned, rotation.apply(weight * scale), omega, 4, 64).ratios(torch.ones(D))
    assert torch.allclose(Objective(pairs, weight, omega, 4, 64, rotation=rotation).ratios(scale), expected, rtol=1e-4)
