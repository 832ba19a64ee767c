"""Metrics against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ecmfq_export.errors import UserError
from ecmfq_export.validate.compare import (
    Difference,
    LogitComparison,
    decisive,
    kl_divergence,
    log_softmax,
    top1_agreement,
)


def test_sqnr_and_cosine_by_hand():
    difference = Difference()
    difference.add(np.array([[3.0, 4.0]]), np.array([[3.0, 3.5]]))  # signal 25, noise 0.25: 20 dB
    assert difference.sqnr_db == pytest.approx(20.0)
    assert difference.cosine == pytest.approx((9 + 14) / (5 * math.sqrt(9 + 12.25)))
    assert difference.max_abs == 0.5
    assert difference.median_error == pytest.approx(0.1)


def test_batches_add_up_to_the_whole():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(6, 5, 8)).astype(np.float32)
    y = x + 0.1 * generator.normal(size=x.shape).astype(np.float32)
    whole, parts = Difference(), Difference()
    whole.add(x, y)
    for i in range(6):
        parts.add(x[i], y[i])
    assert parts.as_dict() == pytest.approx(whole.as_dict())


def test_median_error_shows_the_typical_row():
    x = np.ones((5, 4))
    y = x.copy()
    y[2] = 100.0
    difference = Difference()
    difference.add(x, y)
    assert difference.median_error == 0.0 and difference.sqnr_db < 0


def test_equal_and_zero_tensors():
    difference = Difference()
    difference.add(np.zeros((2, 3)), np.zeros((2, 3)))
    assert difference.sqnr_db == math.inf and difference.cosine == 1.0
    difference.add(np.zeros((2, 3)), np.ones((2, 3)))
    assert difference.sqnr_db == -math.inf and difference.cosine == 0.5


def test_large_half_precision_values_do_not_overflow():
    difference = Difference()
    x = np.full((1, 4), 60000, np.float16)
    difference.add(x, x)
    assert difference.signal == 4 * 60000.0**2 and difference.noise == 0.0


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="shapes differ"):
        Difference().add(np.zeros((2, 3)), np.zeros((3, 2)))


def test_kl_by_hand():
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.5, 0.25])
    expected = 0.5 * math.log(2) - 0.25 * math.log(2)
    assert kl_divergence(np.log(p) + 7, np.log(q) - 3) == pytest.approx(expected)
    assert kl_divergence(np.log(p), np.log(p)) == 0.0


def test_kl_of_certain_models_is_finite():
    reference, other = np.array([[1000.0, 0.0]]), np.array([[0.0, 1000.0]])
    assert kl_divergence(reference, other)[0] == pytest.approx(1000.0)
    assert np.isfinite(log_softmax(reference)).all()


def test_top1_agreement():
    a = np.array([[0.0, 1.0], [2.0, 1.0]])
    assert top1_agreement(a, np.array([[0.0, 9.0], [1.0, 2.0]])).tolist() == [True, False]


def test_logit_comparison_summary():
    comparison = LogitComparison("float vs quantized")
    a = np.log(np.array([[0.5, 0.5], [0.9, 0.1]]))
    comparison.add(a, a)
    comparison.add(a[:1] + [0, 0.11], a[:1])
    summary = comparison.as_dict()
    assert summary["positions"] == 3 and summary["top1_disagreements"] == 1
    assert summary["top1_agreement"] == pytest.approx(2 / 3)
    assert summary["kl_median"] == 0.0 and summary["kl_max"] > 0
    # Rows by margin: 0, log 9 and 0.11 nats; the last two are decisive and the last one flips.
    assert summary["decisive_positions"] == 2 and summary["decisive_disagreements"] == 1
    assert summary["top1_decisive"] == 0.5


def test_decisive_positions():
    logits = np.array([[3.0, 2.95, 1.0], [3.0, 2.0, 2.0], [1.0, 1.0, 0.0]], np.float32)
    assert decisive(logits).tolist() == [False, True, False]


def test_nan_logits_are_an_error_that_names_the_comparison():
    with pytest.raises(UserError, match="float vs quantized: 1 logits of the other model"):
        LogitComparison("float vs quantized").add(np.zeros((1, 2)), np.array([[0.0, np.nan]]))


def test_nothing_compared_is_an_error():
    with pytest.raises(ValueError, match="nothing"):
        LogitComparison("x").as_dict()
