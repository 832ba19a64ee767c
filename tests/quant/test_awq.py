"""AWQ: scales and clips."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ecmfq_export.quant import awq
from ecmfq_export.quant.hessian import WeightedHessian, weighted_error
from ecmfq_export.quant.output_loss import OutputLoss
from ecmfq_export.quant.rtn import choose_scale, effective_scale, quantize_at, quantize_rtn
from tests.quant.planted import CASES, D, E, N, T, degenerate, planted, rows, unweighted


def test_loss_equals_its_definition_with_sampled_tokens_scaled_up():
    pairs, weight, omega = planted(0)
    scale = torch.linspace(0.5, 2, D)
    loss = OutputLoss(pairs, weight, omega, 4, 2)
    from ecmfq_export.quant.activation import fake_quantize_per_token

    inputs, quantized = fake_quantize_per_token(pairs.x / scale), quantize_rtn(weight * scale, 4).dequantize()
    error, whole = 0.0, 0.0
    for token, expert, w in zip(pairs.token.tolist(), pairs.expert.tolist(), pairs.weight.tolist(), strict=True):
        reference = weight[expert] @ pairs.x[token]
        error += w * float((quantized[expert] @ inputs[token] - reference).square().sum())
        whole += w * float(reference.square().sum())
    assert loss.value(scale) == pytest.approx(error / whole, rel=1e-4)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("power", [1, 2])
def test_never_worse_than_no_scale_and_protects_salient_channels(seed, power):
    """The paper's claim: channels that activations make salient are scaled up, and the output error falls."""
    pairs, weight, _ = planted(seed)
    weight[..., :4] *= 30.0  # salience is the activations' alone
    ones = torch.ones(E)
    result = awq.search_scale(unweighted(pairs), unweighted(planted(seed + 9)[0]), weight, ones, 4, power=power)
    assert result.search_after < 0.9 * result.search_before and result.heldout_after < result.heldout_before
    assert bool((result.scale[:4] > result.scale[4:].max()).all())


def test_flat_activations_never_end_worse():
    pairs, weight, omega = planted(3, outliers=0)
    result = awq.search_scale(pairs, pairs, weight, omega, 4)
    assert result.search_after <= result.search_before
    assert result.accepted == (not torch.equal(result.scale, torch.ones(D)))


def test_scale_is_a_power_of_mean_magnitudes():
    pairs, weight, omega = planted(0)
    result = awq.search_scale(pairs, pairs, weight, omega, 4)
    alpha = float(result.label.removeprefix("alpha="))
    log_s, log_a = torch.log(result.scale), torch.log(pairs.x.abs().mean(0))
    assert torch.allclose(log_s, alpha * (log_a - log_a.mean()), atol=1e-4)


def test_per_expert_scales_differ_and_none_is_worse_on_its_own_tokens():
    pairs, weight, _ = planted(0, outliers=0)
    inner = rows(unweighted(pairs))
    inner.x[inner.expert == 1, 7] *= 40
    result = awq.search_per_expert(inner, inner, weight, 4)
    assert bool(result.accepted[1]) and result.scale[1, 7] > result.scale[0, 7]
    assert bool((result.ratio_after <= result.ratio_before + 1e-9).all())


@pytest.mark.parametrize("case", CASES)
def test_degenerate_routing(case):
    pairs, (_, weight, omega) = degenerate(case), planted(0)
    assert bool(torch.isfinite(awq.search_scale(pairs, pairs, weight, omega, 4).scale).all())
    result = awq.search_per_expert(rows(pairs), rows(pairs), weight, 4)
    assert bool(torch.isfinite(result.scale).all())
    if case == "an expert without tokens":
        assert not result.accepted[2] and torch.equal(result.scale[2], torch.ones(D))


def moments(columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """H [E, K, K] of outlier-heavy inputs and W [E, N, K] with heavy tails, one expert without tokens."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(T, columns, generator=g) * torch.exp(torch.randn(columns, generator=g))
    expert = torch.randint(E - 1, (T,), generator=g)
    h = WeightedHessian(E, columns)
    h.add(x, expert, torch.ones(T))
    weight = torch.randn(E, N, columns, generator=g)
    weight[torch.rand(weight.shape, generator=g) < 0.02] *= 4
    return h.matrix, weight


@pytest.mark.parametrize("group_size", [-1, 128])
def test_clip_has_the_least_output_error_of_its_candidates(group_size):
    matrix, weight = moments(256)
    scale, multiplier = awq.choose_clip(weight, matrix, 4, group_size)
    ours = quantize_at(weight, scale, multiplier, 4, group_size).dequantize()
    largest = quantize_rtn(weight, 4, group_size).dequantize()
    by_weights = quantize_rtn(weight, 4, group_size, "mse").dequantize()
    error = [weighted_error(q - weight, matrix) for q in (ours, largest, by_weights)]
    if group_size == -1:
        assert bool((error[0] <= error[1] * (1 + 1e-5) + 1e-3).all())
    # Groups are searched apart and their scales split in two levels: better in sum, not group by group.
    assert error[0].sum() < 0.9 * error[1].sum() and error[0].sum() < error[2].sum()
    assert torch.allclose(scale[-1], choose_scale(weight[-1:], 4, group_size, "absmax")[0][0], rtol=2e-3)  # no token, no clip


@given(st.integers(1, 24), st.integers(0, 99))
def test_clip_of_any_width(columns, seed):
    matrix, weight = moments(columns, seed)
    scale, multiplier = awq.choose_clip(weight, matrix, 4, max_bytes=1)
    assert multiplier is None and torch.equal(scale, awq.choose_clip(weight, matrix, 4)[0])
    assert bool((effective_scale(scale, None, columns) > 0).all())
