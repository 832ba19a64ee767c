"""Ranks and recalls with several true texts an image, against matrices worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecmfq_export.errors import UserError
from ecmfq_export.validate import evaluate
from ecmfq_export.validate.evaluation import retrieval
from ecmfq_export.validate.evaluation.retrieval import image_scores, rank_embeddings, rank_scores, recalls


def test_five_captions_by_hand() -> None:
    """COCO's protocol on 3 images with 2, 1 and 2 texts, and one text that is true of none."""
    owner = [0, 0, 1, 2, 2]
    scores = np.array([
        [0.1, 0.9, 0.5, 0.2, 0.0, 0.8],   # image 0: best own text first
        [0.3, 0.6, 0.5, 0.4, 0.1, 0.7],   # image 1: texts 1 and the foreign one are better: rank 3
        [0.2, 0.0, 0.1, 0.1, 0.2, 0.0],   # image 2: text 0 ties with its best: rank 2
    ])  # fmt: skip
    ranks = rank_scores(scores, owner)
    assert ranks.images.tolist() == [1, 3, 2]
    # By columns: text 0 wants image 0 (0.1; 0.3 and 0.2 are better), text 2 ties with image 0, text 3 is behind both.
    assert ranks.texts.tolist() == [3, 1, 2, 3, 1]
    found = recalls(ranks, ks=(1, 2, 5))
    assert {name: row["recall"] for name, row in found.items()} == pytest.approx({
        "image_to_text_r@1": 1 / 3, "image_to_text_r@2": 2 / 3, "image_to_text_r@5": 1.0,
        "text_to_image_r@1": 2 / 5, "text_to_image_r@2": 3 / 5})  # fmt: skip
    mean = np.mean([row["recall"] for row in found.values()])
    assert image_scores(ranks, owner, (1, 2, 5)).mean() == pytest.approx(mean)


def test_ties_count_against_the_true_pair() -> None:
    ranks = rank_scores(np.zeros((4, 4)), range(4))
    assert ranks.images.tolist() == ranks.texts.tolist() == [4] * 4
    same = rank_embeddings(np.ones((3, 8), np.float32), np.ones((3, 8), np.float32), range(3))
    assert same.images.tolist() == same.texts.tolist() == [3] * 3


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.integers(0, 2**32 - 1))
def test_one_text_an_image_is_the_plain_recall(size: int, seed: int) -> None:
    scores = np.random.default_rng(seed).integers(0, 5, (size, size)).astype(float)
    mine, plain = recalls(rank_scores(scores, range(size))), evaluate.recalls(scores)
    assert {name: row["recall"] for name, row in mine.items()} == {k: v for k, v in plain.items() if k != "mean"}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_order_of_images_and_texts_means_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    owner = np.concatenate([np.arange(6), rng.integers(0, 6, 5)])
    images, texts = rng.standard_normal((6, 4)), rng.standard_normal((11, 4))
    ranks = rank_embeddings(images, texts, owner)
    p, q = rng.permutation(6), rng.permutation(11)
    moved = rank_embeddings(images[p], texts[q], np.argsort(p)[owner[q]])
    assert moved.images.tolist() == ranks.images[p].tolist() and moved.texts.tolist() == ranks.texts[q].tolist()
    assert image_scores(moved, np.argsort(p)[owner[q]]).mean() == pytest.approx(image_scores(ranks, owner).mean())


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    images, texts = rng.standard_normal((7, 5)), rng.standard_normal((9, 5))
    texts[7:] = texts[5:7]  # equal texts of images in different blocks
    whole = rank_embeddings(images, texts, [*range(7), 0, 1])
    monkeypatch.setattr(retrieval, "_BLOCK_BYTES", 8 * 9 * 2)
    parts = rank_embeddings(images, texts, [*range(7), 0, 1])
    assert whole.images.tolist() == parts.images.tolist() and whole.texts.tolist() == parts.texts.tolist()


def test_useless_input_is_refused() -> None:
    with pytest.raises(UserError, match="1 retrieval scores are NaN"):
        rank_scores(np.array([[0.0, np.nan], [1.0, 0.0]]), range(2))
    with pytest.raises(ValueError, match="do not cover"):
        rank_scores(np.zeros((3, 3)), [0, 1, 1])
