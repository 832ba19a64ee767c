"""Task accuracy, retrieval, and how sure of them one can be. Pure NumPy."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ecmfq_export.errors import UserError


@dataclass(frozen=True)
class Question:
    """One held-out item.

    Attributes:
        image: a file; None for a text-only question.
        answer: what exactly must come out.
        type: items are counted by it, ``"all"`` where the file has none.
    """

    image: Path | None
    question: str
    answer: str
    type: str


@dataclass(frozen=True)
class Caption:
    """An image, the text that describes it and no other image of the file, and near-duplicate texts that are false."""

    image: Path
    text: str
    distractors: tuple[str, ...] = ()


def load_questions(path: Path, limit: int = 0) -> list[Question]:
    """Read ``{"image": ..., "question": ..., "answer": ..., "type": ...}`` lines; image paths are relative to the file.

    Args:
        path: the JSONL file, or a directory that holds ``questions.jsonl``.
        limit: keep at most so many, evenly spread over the file (0: all), so that a file sorted by type keeps its mix.

    Raises:
        UserError: no such file, a line that is not such an object, or a missing image.
    """
    path = path / "questions.jsonl" if path.is_dir() else path
    rows = []
    for number, item in _json_lines(path):
        text = item.get("question", item.get("text"))
        answer = item.get("answer")
        if not isinstance(text, str) or not isinstance(answer, str) or not answer:
            raise UserError(
                f"{path}:{number} lacks a question or an answer",
                'a line is {"image": "a.png", "question": "...", "answer": "...", "type": "..."}',
            )
        image = _image(path, number, item.get("image"))
        rows.append(Question(image, text, answer, str(item.get("type", "all"))))
    if not rows:
        raise UserError(f"{path} has no questions")
    return _spread(rows, limit)


def load_captions(path: Path, limit: int = 0) -> list[Caption]:
    """Read ``{"image": ..., "text": ..., "distractors": [...]}`` lines, distractors optional; see :func:`load_questions`."""
    rows = []
    for number, item in _json_lines(path):
        text, image = item.get("text"), _image(path, number, item.get("image"))
        if not isinstance(text, str) or image is None:
            raise UserError(f"{path}:{number} lacks an image or a text", 'a line is {"image": "a.png", "text": "..."}')
        distractors = item.get("distractors", [])
        if not isinstance(distractors, list) or not all(isinstance(d, str) for d in distractors):
            raise UserError(f"{path}:{number}: distractors are not a list of texts")
        rows.append(Caption(image, text, tuple(distractors)))
    return _spread(rows, limit)


def _json_lines(path: Path):
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"no evaluation file at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number} is not JSON: {error}") from None
        if not isinstance(item, dict):
            raise UserError(f"{path}:{number} is a {type(item).__name__}, not an object")
        yield number, item


def _image(path: Path, number: int, name: object) -> Path | None:
    if name is None:
        return None
    image = path.parent / str(name)
    if not image.is_file():
        raise UserError(f"{path}:{number}: no image file at {image}", "image paths are relative to the JSONL file")
    return image


def _spread(rows: list, limit: int) -> list:
    if limit <= 0 or limit >= len(rows):
        return rows
    return [rows[i * len(rows) // limit] for i in range(limit)]


def exact_match(predicted: np.ndarray, answer: np.ndarray) -> bool:
    """Whether greedy decoding gives exactly `answer`, end-of-turn token included.

    `predicted` are the argmax tokens at the answer's positions with the answer itself as context (one forward pass). Greedy
    decoding reproduces the answer if and only if they are all equal: as long as they are, both see the same context.
    """
    return predicted.shape == answer.shape and bool((predicted == answer).all())


def wilson_interval(successes: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """95% interval (for the default z) of a proportion, Wilson 1927; never leaves [0, 1], unlike p +- z s."""
    if total == 0:
        return 0.0, 1.0
    p = successes / total
    scale = 1.0 + z * z / total
    center = (p + z * z / (2 * total)) / scale
    half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total)) / scale
    return max(0.0, center - half), min(1.0, center + half)


@dataclass(frozen=True)
class PairedDifference:
    """mean(b) - mean(a) over the same items, its 95% bootstrap interval, and a two-sided p-value against no difference."""

    difference: float
    low: float
    high: float
    p_value: float


def paired_bootstrap(a: np.ndarray, b: np.ndarray, resamples: int = 10_000, seed: int = 0) -> PairedDifference:
    """Compare two models item by item: whole items are drawn with replacement, so that both are judged on the same ones.

    Args:
        a, b: [items] scores of the two models (bool or float).
        resamples: bootstrap draws.
        seed: of the draws; results are reproducible.

    The p-value is twice the smaller of the fractions of draws with a mean difference of at most and at least 0 (at most 1).
    """
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"paired scores must be two [items] arrays, got {a.shape} and {b.shape}")
    delta = b.astype(np.float64) - a.astype(np.float64)
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, 4_000_000 // len(delta))  # at most 32 MB of indices at a time
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        means[start : start + count] = delta[generator.integers(0, len(delta), (count, len(delta)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    p_value = min(1.0, 2.0 * min(float((means <= 0).mean()), float((means >= 0).mean())))
    return PairedDifference(float(delta.mean()), float(low), float(high), p_value)


def accuracy_by_type(types: Sequence[str], correct: np.ndarray) -> dict[str, dict[str, float]]:
    """Accuracy of each type and of ``"all"`` with Wilson's 95% interval: {type: {accuracy, low, high, correct, total}}."""
    groups = {"all": np.ones(len(correct), bool)}
    for name in sorted(set(types) - {"all"}):
        groups[name] = np.array([t == name for t in types])
    out = {}
    for name, members in groups.items():
        hits, total = int(correct[members].sum()), int(members.sum())
        low, high = wilson_interval(hits, total)
        out[name] = {"accuracy": hits / total if total else 0.0, "low": low, "high": high, "correct": hits, "total": total}
    return out


def recalls(scores: np.ndarray, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Retrieval recall both ways from a score matrix [images, texts] whose diagonal holds the true pairs.

    ``image_to_text_r@k``: fraction of images whose own text is among the k best of all texts; ``text_to_image_r@k`` the same
    along the other axis; ``mean``: of all of them. A tie counts against the true pair. k beyond the list is left out.
    """
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1]:
        raise ValueError(f"scores must be [n, n], got {scores.shape}")
    true = scores.diagonal()
    ranks = {
        "image_to_text": (scores >= true[:, None]).sum(axis=1),
        "text_to_image": (scores >= true[None, :]).sum(axis=0),
    }
    out = {f"{way}_r@{k}": float((rank <= k).mean()) for way, rank in ranks.items() for k in ks if k < len(scores)}
    out["mean"] = float(np.mean(list(out.values()))) if out else float("nan")
    return out


def near_duplicate_choice(own: np.ndarray, distractors: Sequence[np.ndarray]) -> float:
    """Fraction of images whose own text scores above every one of their distractors; images without any are left out.

    Args:
        own: [images] scores of the true texts.
        distractors: for each image the scores of its false texts.
    """
    wins = [bool((score > others).all()) for score, others in zip(own, distractors, strict=True) if len(others)]
    return float(np.mean(wins)) if wins else float("nan")
