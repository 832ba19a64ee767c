"""SmoothQuant."""

import pytest
import torch

from ecmfq_export.quant import smoothquant
from tests.quant.planted import CASES, D, degenerate, planted, unweighted


def peak(x: torch.Tensor) -> torch.Tensor:
    """Largest channel over the mean channel: what makes a token hard to quantize with one scale."""
    return x.abs().amax(0).max() / x.abs().amax(0).mean()


def test_difficulty_migrates_from_activations_to_weights():
    """The paper's claim: activations get flatter, weights steeper, and alpha says how far."""
    pairs, weight, _ = planted(0)
    flat = weight.clone()
    flat[..., :4] *= 30.0  # weights without a profile of their own
    rows = flat.flatten(0, 1)
    peaks = []
    for alpha in (0.0, 0.5, 0.8):
        s = smoothquant.smoothquant_scale(pairs.x, flat, alpha)
        peaks.append((float(peak(pairs.x / s)), float(peak(rows * s))))
    assert peaks[0][0] > 2 * peaks[1][0] > 2 * peaks[2][0]
    assert peaks[0][1] < peaks[1][1] < peaks[2][1]


def test_scale_is_the_paper_s_formula_over_all_experts():
    pairs, weight, _ = planted(0)
    s = smoothquant.smoothquant_scale(pairs.x, weight, 0.6)
    expected = pairs.x.abs().amax(0) ** 0.6 / weight.abs().amax((0, 1)) ** 0.4
    assert torch.allclose(s / s[0], expected / expected[0], rtol=1e-5)
    assert float(torch.log2(s).mean()) == pytest.approx(0.0, abs=1e-5)


def test_at_one_half_both_sides_get_the_same_maxima():
    """Eq. 4 at alpha = 0.5: ``max|x_j / s_j| = max|W_j s_j|`` up to the common factor."""
    pairs, weight, _ = planted(0)
    s = smoothquant.smoothquant_scale(pairs.x, weight, 0.5)
    ratio = (pairs.x / s).abs().amax(0) / (weight * s).abs().amax((0, 1))
    assert torch.allclose(ratio, ratio[0].expand(D), rtol=1e-4)


def test_result_lowers_the_output_error_of_planted_outliers_and_reports_it():
    pairs, weight, omega = planted(0)
    result = smoothquant.search_scale(unweighted(pairs), unweighted(planted(1)[0]), weight, omega, 4)
    assert result.accepted and result.label == "alpha=0.50"
    assert result.search_after < 0.5 * result.search_before and result.heldout_after < 0.5 * result.heldout_before


def test_losses_of_a_choice_for_the_model_are_those_of_each_alpha():
    pairs, weight, omega = planted(0)
    pairs = unweighted(pairs)
    losses = smoothquant.alpha_losses(pairs, weight, omega, 4)
    some = smoothquant.ALPHAS.index(0.5)
    assert losses[some] == smoothquant.search_scale(pairs, pairs, weight, omega, 4).search_after
    assert losses.min() < losses[-1]


def test_tied_channels_share_their_scale():
    pairs, weight, omega = planted(0)
    tie = torch.arange(D) % (D // 2)
    s = smoothquant.search_scale(pairs, pairs, weight, omega, 4, tie=tie).scale
    assert torch.equal(s[: D // 2], s[D // 2 :])


@pytest.mark.parametrize("case", CASES)
def test_degenerate_routing(case):
    pairs, (_, weight, omega) = degenerate(case), planted(0)
    result = smoothquant.search_scale(pairs, pairs, weight, omega, 4)
    assert bool(torch.isfinite(result.scale).all()) and bool((result.scale > 0).all())


def test_dead_channels_and_weights_get_finite_scales():
    pairs, weight, _ = planted(0)
    pairs.x[:, 7] = 0.0
    weight[..., 9] = 0.0
    s = smoothquant.smoothquant_scale(pairs.x, weight, 0.5)
    assert bool(torch.isfinite(s).all()) and bool((s > 0).all())
