"""Intervals against what is known of them, and the same draws however they are made."""

from __future__ import annotations

import numpy as np
import pytest

from ecmfq_export.validate.evaluate import paired_bootstrap
from ecmfq_export.validate.evaluation import bootstrap
from ecmfq_export.validate.evaluation.bootstrap import Bootstrap


def test_identical_models() -> None:
    a = np.random.default_rng(0).random(50)
    same = Bootstrap(50).difference(a, a)
    assert (same.difference, same.low, same.high, same.p_value) == (0.0, 0.0, 0.0, 1.0)
    kept = Bootstrap(50).retention(a, a)
    assert (kept.value, kept.low, kept.high) == (1.0, 1.0, 1.0)


def test_agrees_with_the_plain_paired_bootstrap() -> None:
    rng = np.random.default_rng(1)
    a = rng.random(200) < 0.8
    b = a & (rng.random(200) < 0.95)
    mine, plain = Bootstrap(200).difference(a, b), paired_bootstrap(a, b)
    assert mine.difference == pytest.approx(plain.difference)
    assert (mine.low, mine.high) == pytest.approx((plain.low, plain.high), abs=0.006)


def test_interval_of_a_mean_has_the_normal_width() -> None:
    values = np.random.default_rng(2).standard_normal(400)
    found = Bootstrap(400).mean(values)
    half = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.05)


def test_ratio_draws_numerator_and_denominator_together() -> None:
    tokens = np.array([1.0, 10, 100] * 20)
    found = Bootstrap(60).ratio(3 * tokens, tokens)
    assert (found.value, found.low, found.high) == pytest.approx((3, 3, 3))


def test_blocks_and_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(3).random(30)
    assert Bootstrap(30, 500, 7).mean(values) == Bootstrap(30, 500, 7).mean(values) != Bootstrap(30, 500, 8).mean(values)
    whole = Bootstrap(30, 500, 7).mean(values)
    monkeypatch.setattr(bootstrap, "_CACHED_BYTES", 8 * 30 * 100)
    assert Bootstrap(30, 500, 7).mean(values) == whole, "drawn in blocks of 100"


def test_edges() -> None:
    none = Bootstrap(3, 0).mean(np.ones(3))
    assert none.value == 1.0 and np.isnan(none.low)
    assert np.isnan(Bootstrap(3, 0).difference(np.ones(3), np.ones(3)).p_value)
    lost = Bootstrap(3).retention(np.zeros(3), np.ones(3))
    assert np.isnan(lost.value) and np.isnan(lost.high), "nothing to retain"
    one = Bootstrap(1).mean(np.array([0.5]))
    assert (one.value, one.low, one.high) == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="no items"):
        Bootstrap(0)
    with pytest.raises(ValueError, match="2 and 2 values for 3 items"):
        Bootstrap(3).mean(np.ones(2))
