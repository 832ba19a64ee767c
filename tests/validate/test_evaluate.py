"""Accuracy, intervals and retrieval against values worked out by hand; reading of item files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from ecmfq_export.errors import UserError
from ecmfq_export.validate.evaluate import (
    accuracy_by_type,
    exact_match,
    load_captions,
    load_questions,
    near_duplicate_choice,
    paired_bootstrap,
    recalls,
    wilson_interval,
)


def test_wilson_interval_known_values():
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson_interval(29, 29) == pytest.approx((0.8830, 1.0), abs=1e-4)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_paired_bootstrap():
    a = np.array([1, 1, 1, 0, 0, 1, 1, 1] * 20, bool)
    same = paired_bootstrap(a, a)
    assert (same.difference, same.low, same.high, same.p_value) == (0.0, 0.0, 0.0, 1.0)
    worse = paired_bootstrap(a, a & (np.arange(len(a)) % 4 > 0))
    assert worse.difference == -20 / 160 and worse.high < 0 and worse.p_value < 1e-3
    assert paired_bootstrap(a, ~a, seed=3) == paired_bootstrap(a, ~a, seed=3)
    with pytest.raises(ValueError, match="paired"):
        paired_bootstrap(a, a[1:])


def test_paired_interval_is_narrower_than_the_items_vary():
    # 100 items, two of them differ: the standard error is that of the two, not of the accuracy itself.
    a = np.zeros(100, bool)
    a[:50] = True
    b = a.copy()
    b[0] = False
    b[50] = True
    result = paired_bootstrap(a, b)
    assert result.difference == 0.0 and result.high - result.low < 0.07


def test_accuracy_by_type():
    result = accuracy_by_type(["color", "count", "color", "count"], np.array([1, 1, 1, 0], bool))
    assert result["all"]["correct"] == 3 and result["all"]["total"] == 4
    assert result["color"]["accuracy"] == 1.0 and result["count"]["accuracy"] == 0.5
    assert result["color"]["low"] < 1.0


def test_exact_match():
    answer = np.array([5, 6, 2])
    assert exact_match(answer.copy(), answer)
    assert not exact_match(np.array([5, 7, 2]), answer)
    assert not exact_match(answer[:2], answer)


def test_recalls_by_hand():
    scores = np.array([[9.0, 1, 2], [8, 7, 0], [1, 2, 3]])
    result = recalls(scores, ks=(1, 2))
    assert result["image_to_text_r@1"] == pytest.approx(2 / 3)  # image 1 prefers text 0
    assert result["image_to_text_r@2"] == 1.0
    assert result["text_to_image_r@1"] == 1.0
    assert result["mean"] == pytest.approx((2 / 3 + 3) / 4)


def test_ties_count_against_the_true_pair():
    result = recalls(np.zeros((4, 4)), ks=(1, 3, 10))
    assert result == {"image_to_text_r@1": 0.0, "image_to_text_r@3": 0.0, "text_to_image_r@1": 0.0,
                      "text_to_image_r@3": 0.0, "mean": 0.0}  # fmt: skip


def test_near_duplicate_choice():
    assert near_duplicate_choice(np.array([2.0, 1.0, 9.0]), [np.array([1.0, 0.0]), np.array([1.0]), np.array([])]) == 0.5
    assert np.isnan(near_duplicate_choice(np.array([1.0]), [np.array([])]))


def _write(path, rows):
    path.write_text("\n".join(json.dumps(r) for r in rows) + "\n\n")
    return path


def test_load_questions(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    rows = [{"image": "a.png", "question": f"q{i}", "answer": "a", "type": "t" if i % 2 else "u"} for i in range(10)]
    rows.append({"question": "no image", "answer": "b"})
    path = _write(tmp_path / "questions.jsonl", rows)
    items = load_questions(path)
    assert len(items) == 11 and items[0].image == tmp_path / "a.png" and items[-1].image is None
    assert items[-1].type == "all" and load_questions(tmp_path) == items
    assert [i.question for i in load_questions(path, limit=3)] == ["q0", "q3", "q7"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q"}, ":1 lacks a question or an answer"),
        ({"question": "q", "answer": 3}, ":1 lacks"),
        ({"question": "q", "answer": "a", "image": "gone.png"}, "no image file at .*gone.png"),
        ([1], ":1 is a list"),
    ],
)
def test_bad_items_are_named(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        load_questions(_write(tmp_path / "items.jsonl", [row]))


def test_unreadable_item_files(tmp_path):
    with pytest.raises(UserError, match="no evaluation file"):
        load_questions(tmp_path / "none.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"question": "q", "answer": "a"}\n{oops')
    with pytest.raises(UserError, match=r"bad\.jsonl:2 is not JSON"):
        load_questions(tmp_path / "bad.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match="no questions"):
        load_questions(tmp_path / "empty.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        load_questions(tmp_path / "binary.jsonl")


def test_load_captions(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    assert load_captions(_write(tmp_path / "c.jsonl", [{"image": "a.png", "text": "x"}]))[0].text == "x"
    row = {"image": "a.png", "text": "x", "distractors": ["y", "z"]}
    assert load_captions(_write(tmp_path / "c.jsonl", [row]))[0].distractors == ("y", "z")
    with pytest.raises(UserError, match="not a list of texts"):
        load_captions(_write(tmp_path / "c.jsonl", [{**row, "distractors": "y"}]))
    with pytest.raises(UserError, match="lacks an image"):
        load_captions(_write(tmp_path / "d.jsonl", [{"text": "x"}]))
