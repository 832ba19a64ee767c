"""Retrieval between images and texts where an image may have several true texts: ranks and recalls. Pure NumPy.

A rank counts from 1, and a tie counts against the true pair. Image to text: the rank of an image's best own text among the texts
of other images, which is the usual reading of R@k with five captions an image. Text to image: the rank of its image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ecmfq_export.errors import UserError
from ecmfq_export.validate.evaluate import wilson_interval

KS = (1, 5, 10)
_BLOCK_BYTES = 1 << 26


@dataclass(frozen=True)
class Ranks:
    """Where the true pairs stand.

    Attributes:
        images: int64 [images], rank of each image's best own text; its own other texts are not counted.
        texts: int64 [true texts], rank of each text's image.
        gallery: (images, texts) that were ranked, near-duplicates included.
    """

    images: np.ndarray
    texts: np.ndarray
    gallery: tuple[int, int]


def rank_scores(scores: np.ndarray, owner: Sequence[int] | np.ndarray) -> Ranks:
    """Ranks from a matrix [images, texts]; columns beyond ``len(owner)`` are texts that are true of no image."""
    return rank(lambda start, stop: scores[start:stop], scores.shape, owner)


def rank_embeddings(images: np.ndarray, texts: np.ndarray, owner: Sequence[int] | np.ndarray) -> Ranks:
    """Ranks by cosine similarity of [images, hidden] and [texts, hidden]."""
    first, second = _directions(images), _directions(texts)
    # Products in float64, rounded once: equal texts tie whatever block they are computed in.
    return rank(lambda start, stop: (first[start:stop] @ second.T).astype(np.float32), (len(first), len(second)), owner)


def rank(block: Callable[[int, int], np.ndarray], shape: tuple[int, int], owner: Sequence[int] | np.ndarray) -> Ranks:
    """Ranks from scores that are made a few images at a time, so that the matrix is never held.

    Args:
        block: scores [stop - start, texts] of images `start` to `stop`; it is called twice for each.
        shape: (images, texts).
        owner: int [true texts], each text's image; every image has one at least.

    Raises:
        UserError: a score that is NaN or infinite.
    """
    count, width = shape
    owner = np.asarray(owner, np.int64)
    if sorted(set(owner.tolist())) != list(range(count)) or len(owner) > width:
        raise ValueError(f"{len(owner)} true texts do not cover {count} images of {width} texts")
    step = max(1, _BLOCK_BYTES // (8 * max(width, 1)))
    own = np.full(width, -1, np.int64)
    own[: len(owner)] = owner
    images, true = np.zeros(count, np.int64), np.full(len(owner), -np.inf)
    for start in range(0, count, step):
        scores = np.asarray(block(start, min(start + step, count)))
        if not np.isfinite(scores).all():
            raise UserError(f"{int((~np.isfinite(scores)).sum())} retrieval scores are NaN or infinite",
                            "an activation overflowed its type, or a weight file is damaged; see 'validate'")
        mine = own[None, :] == np.arange(start, start + len(scores))[:, None]
        best = np.where(mine, scores, -np.inf).max(axis=1)
        images[start : start + len(scores)] = 1 + ((scores >= best[:, None]) & ~mine).sum(axis=1)
        here = np.flatnonzero((owner >= start) & (owner < start + len(scores)))
        true[here] = scores[owner[here] - start, here]
    texts = np.ones(len(owner), np.int64)
    for start in range(0, count, step):
        scores = np.asarray(block(start, min(start + step, count)))[:, : len(owner)]
        other = owner[None, :] != np.arange(start, start + len(scores))[:, None]
        texts += ((scores >= true[None, :]) & other).sum(axis=0)
    return Ranks(images, texts, (count, width))


def recalls(ranks: Ranks, ks: Sequence[int] = KS) -> dict[str, dict[str, float]]:
    """``image_to_text_r@k`` and ``text_to_image_r@k`` with Wilson's 95% intervals: {name: {recall, low, high, hits, total}}.

    A k that is not smaller than the list says nothing and is left out.
    """
    out = {}
    for way, places, size in (("image_to_text", ranks.images, ranks.gallery[1]), ("text_to_image", ranks.texts, ranks.gallery[0])):
        for k in ks:
            if k < size:
                hits, total = int((places <= k).sum()), len(places)
                low, high = wilson_interval(hits, total)
                out[f"{way}_r@{k}"] = {"recall": hits / total, "low": low, "high": high, "hits": hits, "total": total}
    return out


def image_scores(ranks: Ranks, owner: Sequence[int] | np.ndarray, ks: Sequence[int] = KS) -> np.ndarray:
    """[images] scores whose mean is the mean of all recalls: an image's own hits and those of its texts.

    Images are what is drawn in a bootstrap, with all their texts, because texts of one image are not independent.
    """
    count, total = len(ranks.images), len(ranks.texts)
    ways = [k for k in ks if k < ranks.gallery[1]], [k for k in ks if k < ranks.gallery[0]]
    scores = np.zeros(count)
    for k in ways[0]:
        scores += ranks.images <= k
    for k in ways[1]:
        scores += np.bincount(np.asarray(owner), weights=ranks.texts <= k, minlength=count) * (count / total)
    return scores / max(1, len(ways[0]) + len(ways[1]))


def _directions(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-300)
