"""MBQ."""

import pytest
import torch

from ecmfq_export.quant import awq, mbq
from ecmfq_export.quant.sampled_outputs import Pairs
from ecmfq_export.quant.token_weights import TEXT, VISION
from tests.quant.planted import planted, rows


def by_modality(pairs: Pairs, text: float) -> Pairs:
    weight = torch.where(pairs.types[pairs.token] == TEXT, text, 1.0)
    return Pairs(pairs.x, pairs.token, pairs.expert, weight, pairs.types)


def two_modalities(seed: int) -> tuple[Pairs, torch.Tensor, torch.Tensor]:
    """Text and vision tokens whose outliers lie in different channels."""
    pairs, weight, omega = planted(seed, outliers=0)
    x = pairs.x.clone()
    x[pairs.types == TEXT, 0:3] *= 40
    x[pairs.types == VISION, 6:9] *= 40
    return Pairs(x, pairs.token, pairs.expert, pairs.weight, pairs.types), weight, omega


def test_equal_gradients_give_awq_s_search_with_absolute_errors():
    pairs, weight, omega = two_modalities(0)
    held = two_modalities(1)[0]
    ours = mbq.search_scale(by_modality(pairs, 1.0), by_modality(held, 1.0), weight, omega, 4)
    theirs = awq.search_scale(by_modality(pairs, 1.0), by_modality(held, 1.0), weight, omega, 4, power=1)
    assert torch.equal(ours.scale, theirs.scale) and ours == ours and ours.search_after == theirs.search_after
    inner = rows(by_modality(pairs, 1.0))
    assert torch.equal(mbq.search_per_expert(inner, inner, weight, 4).scale, awq.search_per_expert(inner, inner, weight, 4, power=1).scale)


def test_a_modality_s_loss_falls_with_its_weight():
    """The paper's point: what the loss is sensitive to decides. Text's own error never rises when text weighs more."""
    pairs, weight, omega = two_modalities(0)
    only_text = Pairs(pairs.x, pairs.token, pairs.expert, (pairs.types[pairs.token] == TEXT).float(), pairs.types)
    from ecmfq_export.quant.output_loss import OutputLoss

    loss = OutputLoss(only_text, weight, omega, 4, 1)
    errors = [loss.value(mbq.search_scale(by_modality(pairs, text), pairs, weight, omega, 4).scale) for text in (0.0, 1.0, 1e6)]
    assert errors[2] <= errors[1] <= errors[0] * 1.02 and errors[2] <= loss.value(torch.ones(weight.shape[-1]))


def test_text_weight_is_the_layer_s_ratio_bounded_by_the_median():
    ratios = [4.0, 10.0, 30.0, None]
    assert [mbq.text_weight(ratios, layer) for layer in range(4)] == [4.0, 10.0, 10.0, 10.0]


def test_sensitivity_needs_a_known_ratio():
    with pytest.raises(Exception, match="no median"):
        mbq.text_weight([None], 0)
