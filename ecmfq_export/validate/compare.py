"""How far two computations of the same thing lie apart. Pure NumPy; all sums in float64."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ecmfq_export.errors import UserError


@dataclass
class Difference:
    """SQNR and cosine of one tensor, gathered over batches without keeping them.

    For reference x and other y, rows being the last axis (one token):

    - ``sqnr_db`` = 10 log10(sum x^2 / sum (x - y)^2) over everything seen, in decibels; +inf where equal.
    - ``cosine`` = mean over rows of x.y / (|x| |y|); a row of zeros counts 1 against zeros and 0 against anything else.
    - ``max_abs`` = max |x - y|.
    - ``median_error`` = median over rows of |x - y| / |x|. Where a few tokens differ by one step of an int8 rounding and all
      others by nothing, this one shows the others, and the SQNR the few.
    """

    signal: float = 0.0
    noise: float = 0.0
    max_abs: float = 0.0
    rows: int = 0
    _cosines: float = field(default=0.0, repr=False)
    _errors: list[np.ndarray] = field(default_factory=list, repr=False)

    def add(self, reference: np.ndarray, other: np.ndarray) -> None:
        """Take in two arrays [..., features] of one shape and any floating dtype."""
        if reference.shape != other.shape:
            raise ValueError(f"shapes differ: reference {reference.shape}, other {other.shape}")
        if reference.size == 0:
            return
        x = reference.reshape(-1, reference.shape[-1]).astype(np.float64)
        y = other.reshape(-1, other.shape[-1]).astype(np.float64)
        delta = x - y
        self.signal += float((x * x).sum())
        self.noise += float((delta * delta).sum())
        self.max_abs = max(self.max_abs, float(np.abs(delta).max()))
        lengths = np.linalg.norm(x, axis=1)
        errors = np.linalg.norm(delta, axis=1)
        self._errors.append(np.where(errors > 0, errors / np.maximum(lengths, 1e-30), 0.0))
        norms = lengths * np.linalg.norm(y, axis=1)
        dots = (x * y).sum(axis=1)
        equal = ~x.any(axis=1) & ~y.any(axis=1)
        self._cosines += float(np.where(norms > 0, dots / np.where(norms > 0, norms, 1.0), equal).sum())
        self.rows += len(x)

    @property
    def sqnr_db(self) -> float:
        if self.noise == 0.0:
            return float("inf")
        return float(10.0 * np.log10(self.signal / self.noise)) if self.signal > 0 else float("-inf")

    @property
    def cosine(self) -> float:
        return self._cosines / self.rows if self.rows else float("nan")

    @property
    def median_error(self) -> float:
        return float(np.median(np.concatenate(self._errors))) if self._errors else float("nan")

    def as_dict(self) -> dict[str, float]:
        return {"sqnr_db": self.sqnr_db, "cosine": self.cosine, "max_abs": self.max_abs, "median_error": self.median_error}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural log of the softmax along the last axis, float64."""
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def kl_divergence(reference_logits: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """KL(softmax(reference) || softmax(other)) of each row, in nats: how many the other model wastes on the reference's words.

    Args:
        reference_logits, logits: [..., vocab] of one shape.

    Returns:
        [...] float64, never negative.
    """
    p, q = log_softmax(reference_logits), log_softmax(logits)
    return np.maximum((np.exp(p) * (p - q)).sum(axis=-1), 0.0)


def top1_agreement(reference_logits: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Whether each row's largest logit is the same one: [...] bool of two [..., vocab]."""
    return reference_logits.argmax(axis=-1) == logits.argmax(axis=-1)


DECISIVE_MARGIN = 0.1
"""Nats by which a reference must prefer its first token to its second for a disagreement to mean more than rounding."""


def decisive(reference_logits: np.ndarray) -> np.ndarray:
    """Where the largest logit leads the second by :data:`DECISIVE_MARGIN` or more: [...] bool of [..., vocab]."""
    second, first = np.moveaxis(np.partition(reference_logits.astype(np.float64), -2, axis=-1)[..., -2:], -1, 0)
    return first - second >= DECISIVE_MARGIN


@dataclass
class LogitComparison:
    """KL and top-1 agreement of two models' logits, row by row over everything seen; memory is three numbers a row."""

    name: str
    kl: list[np.ndarray] = field(default_factory=list, repr=False)
    agree: list[np.ndarray] = field(default_factory=list, repr=False)
    decisive: list[np.ndarray] = field(default_factory=list, repr=False)

    def add(self, reference_logits: np.ndarray, logits: np.ndarray) -> None:
        """Take in two [rows, vocab].

        Raises:
            UserError: a logit is NaN or infinite; such a model has no answer to compare.
        """
        for which, values in (("reference", reference_logits), ("other", logits)):
            if not np.isfinite(values).all():
                raise UserError(
                    f"{self.name}: {int((~np.isfinite(values)).sum())} logits of the {which} model are NaN or infinite",
                    "an activation overflowed its type (float16 ends at 65504), or a weight file is damaged",
                )
        self.kl.append(kl_divergence(reference_logits, logits))
        self.agree.append(top1_agreement(reference_logits, logits))
        self.decisive.append(decisive(reference_logits))

    def values(self) -> tuple[np.ndarray, np.ndarray]:
        """KL [rows] float64 and agreement [rows] bool so far."""
        if not self.kl:
            return np.zeros(0), np.zeros(0, bool)
        return np.concatenate(self.kl), np.concatenate(self.agree)

    def as_dict(self) -> dict[str, float | int]:
        """mean, median, 95th percentile and largest KL (nats), top-1 agreement (0 to 1) over all rows and over the decisive
        ones (1 where there are none), and how many rows of each kind there are."""
        kl, agree = self.values()
        if not len(kl):
            raise ValueError(f"{self.name}: nothing was compared")
        sure = np.concatenate(self.decisive)
        return {
            "kl_mean": float(kl.mean()),
            "kl_median": float(np.median(kl)),
            "kl_p95": float(np.quantile(kl, 0.95)),
            "kl_max": float(kl.max()),
            "top1_agreement": float(agree.mean()),
            "top1_disagreements": int((~agree).sum()),
            "positions": len(kl),
            "top1_decisive": float(agree[sure].mean()) if sure.any() else 1.0,
            "decisive_disagreements": int((~agree[sure]).sum()),
            "decisive_positions": int(sure.sum()),
        }
