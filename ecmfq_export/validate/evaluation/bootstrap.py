"""Bootstrap over items: every statistic is resampled with the same draws, whole items at a time. Pure NumPy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ecmfq_export.validate.evaluate import PairedDifference

_CACHED_BYTES = 1 << 26


@dataclass(frozen=True)
class Interval:
    """A statistic and its 95% bootstrap interval (the 2.5% and 97.5% quantiles of the draws); NaN where it is undefined."""

    value: float
    low: float
    high: float


class Bootstrap:
    """Draws of `items` items with replacement (Efron 1979); two models that are judged on the same draws are paired.

    Args:
        items: how many there are, at least one.
        resamples: draws; 0 gives intervals of NaN.
        seed: of the draws; results are reproducible.
    """

    def __init__(self, items: int, resamples: int = 10_000, seed: int = 0) -> None:
        if items < 1:
            raise ValueError("no items to draw from")
        self._items, self._resamples, self._seed = items, resamples, seed

    def ratio(self, numerator: np.ndarray, denominator: np.ndarray) -> Interval:
        """sum(numerator) / sum(denominator) of [items] values each, drawn together."""
        value = _divide(float(numerator.sum()), float(denominator.sum()))
        return self._interval(value, self._sums(numerator, denominator, _divide))

    def mean(self, values: np.ndarray) -> Interval:
        """Mean of [items] values."""
        return self.ratio(values, np.ones(len(values)))

    def retention(self, reference: np.ndarray, other: np.ndarray) -> Interval:
        """mean(other) / mean(reference) of [items] scores of two models."""
        return self.ratio(other, reference)

    def difference(self, reference: np.ndarray, other: np.ndarray) -> PairedDifference:
        """mean(other) - mean(reference) of [items] scores, with a two-sided p-value (see ``validate.evaluate.paired_bootstrap``)."""
        delta = other.astype(np.float64) - reference.astype(np.float64)
        means = self._sums(delta, np.ones(len(delta)), _divide)
        if not len(means):
            return PairedDifference(float(delta.mean()), float("nan"), float("nan"), float("nan"))
        low, high = np.quantile(means, [0.025, 0.975])
        # Counting with a tolerance: a mean of 0 that comes out as 1e-18 is a mean of 0.
        p_value = min(1.0, 2.0 * min(float((means <= 1e-12).mean()), float((means >= -1e-12).mean())))
        return PairedDifference(float(delta.mean()), float(low), float(high), p_value)

    def _interval(self, value: float, draws: np.ndarray) -> Interval:
        draws = draws[np.isfinite(draws)]
        if not len(draws) or not np.isfinite(value):
            return Interval(value, float("nan"), float("nan"))
        low, high = np.quantile(draws, [0.025, 0.975])
        return Interval(value, float(low), float(high))

    def _sums(self, a: np.ndarray, b: np.ndarray, function) -> np.ndarray:
        if len(a) != self._items or len(b) != self._items:
            raise ValueError(f"{len(a)} and {len(b)} values for {self._items} items")
        pair = np.stack([a, b], axis=1).astype(np.float64)
        parts = [function(*(counts @ pair).T) for counts in _draws(self._items, self._resamples, self._seed)]
        return np.concatenate(parts) if parts else np.zeros(0)


def _divide(a, b):
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.true_divide(a, b) if isinstance(b, np.ndarray) else (a / b if b else float("nan"))


def _draws(items: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """[draws, items] float64, how often each item is drawn; in blocks, the same ones for the same arguments."""
    if items * resamples * 8 <= _CACHED_BYTES * 2:
        if resamples:
            yield _cached_draws(items, resamples, seed)
        return
    generator = np.random.default_rng(seed)
    step = max(1, _CACHED_BYTES // (8 * items))
    for start in range(0, resamples, step):
        yield _count(generator, items, min(step, resamples - start))


@lru_cache(maxsize=4)
def _cached_draws(items: int, resamples: int, seed: int) -> np.ndarray:
    return _count(np.random.default_rng(seed), items, resamples)


def _count(generator: np.random.Generator, items: int, draws: int) -> np.ndarray:
    chosen = generator.integers(0, items, (draws, items)) + np.arange(draws)[:, None] * items
    return np.bincount(chosen.reshape(-1), minlength=draws * items).reshape(draws, items).astype(np.float64)
