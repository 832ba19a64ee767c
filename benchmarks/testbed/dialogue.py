"""Captions, questions and answers about scenes, and text-only questions."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from cells import HOURS, HUES, SHAPES, SIZES, Scene, vary

CAPTION_PROMPT = "Describe the image."
MATCH_PROMPT = "Does this image show {text}?"
IMAGE_EMBEDDING_PROMPT = "Summarize the image in one word."
TEXT_EMBEDDING_PROMPT = "{text} Summarize the sentence in one word."


@dataclass(frozen=True)
class QA:
    """One exchange; `type` is what accuracy is reported by."""

    question: str
    answer: str
    type: str
    needs_image: bool = True


def caption(scene: Scene) -> str:
    """Size, hue and shape of every cell in reading order; rows are parted by a slash."""
    names = [f"{scene.size_name(i)} {scene.hue_name(i)} {scene.shape_name(i)}" for i in range(scene.cells)]
    rows = [names[r * scene.cols : (r + 1) * scene.cols] for r in range(scene.rows)]
    return " / ".join(", ".join(row) for row in rows)


def different_caption(scene: Scene, rng: np.random.Generator, bins: int, changes: int = 1) -> str:
    """The caption of a near-duplicate (`changes` attributes moved by at most `bins` classes), never the scene's own."""
    own = caption(scene)
    while True:
        other = scene
        for _ in range(changes):
            other = vary(other, rng, bins)
        if (text := caption(other)) != own:
            return text


def _cell(name: str, value):
    def ask(scene: Scene, rng: np.random.Generator) -> QA:
        i = int(rng.integers(scene.cells))
        return QA(f"What is the {name} at {scene.position(i)}?", value(scene, i), name)

    return ask


def _list(name: str, value):
    def ask(scene: Scene, rng: np.random.Generator) -> QA:
        return QA(f"List the {name}.", " ".join(value(scene, i) for i in range(scene.cells)), f"list_{name}")

    return ask


def _two(scene: Scene, rng: np.random.Generator) -> tuple[int, int]:
    i, j = rng.permutation(scene.cells)[:2]
    return int(i), int(j)


def _larger(scene: Scene, rng: np.random.Generator) -> QA:
    i, j = _two(scene, rng)
    answer = "yes" if scene.size[i] > scene.size[j] else "no"
    return QA(f"Is {scene.position(i)} larger than {scene.position(j)}?", answer, "larger")


def _extreme(scene: Scene, rng: np.random.Generator) -> QA:
    which, pick = ("largest", np.argmax) if rng.random() < 0.5 else ("smallest", np.argmin)
    return QA(f"Which is the {which}?", scene.position(int(pick(scene.size))), "extreme")


def _where(scene: Scene, rng: np.random.Generator) -> QA:
    i = int(rng.integers(scene.cells))
    words = [
        [scene.hue_name(c), scene.shape_name(c), scene.size_name(c), scene.hour_name(c)] for c in range(scene.cells)
    ]
    for k in rng.permutation(4):
        if sum(w[k] == words[i][k] for w in words) == 1:
            what = ("{} cell", "{}", "{} cell", "hand at {}")[k].format(words[i][k])
            return QA(f"Where is the {what}?", scene.position(i), "where")
    return _extreme(scene, rng)


def _count(scene: Scene, rng: np.random.Generator) -> QA:
    shape = int(rng.integers(len(SHAPES)))
    return QA(f"How many {SHAPES[shape]}s?", str(int((scene.shape == shape).sum())), "count")


def _count_larger(scene: Scene, rng: np.random.Generator) -> QA:
    i = int(rng.integers(scene.cells))
    return QA(f"How many are larger than {scene.position(i)}?", str(int((scene.size > scene.size[i]).sum())), "rank")


def _match(scene: Scene, rng: np.random.Generator) -> QA:
    true = rng.random() < 0.5
    text = caption(scene) if true else different_caption(scene, rng, bins=4, changes=(1, 1, 2, 5)[rng.integers(4)])
    return QA(MATCH_PROMPT.format(text=text), "yes" if true else "no", "match")


def _caption(scene: Scene, rng: np.random.Generator) -> QA:
    return QA(CAPTION_PROMPT, caption(scene), "caption")


QUESTIONS = {
    "hue": _cell("hue", Scene.hue_name),
    "hour": _cell("hour", Scene.hour_name),
    "size": _cell("size", Scene.size_name),
    "shape": _cell("shape", Scene.shape_name),
    "list_hues": _list("hues", Scene.hue_name),
    "list_hours": _list("hours", Scene.hour_name),
    "list_sizes": _list("sizes", Scene.size_name),
    "larger": _larger,
    "extreme": _extreme,
    "where": _where,
    "count": _count,
    "rank": _count_larger,
    "match": _match,
    "caption": _caption,
}
"""What can be asked of a scene: type to a function of (scene, generator)."""


def _facts() -> dict[tuple[str, str], str]:
    """The memorized table: every (hue, hour) has a code of two words that follows no rule."""
    rng = np.random.default_rng(20_261_125)
    return {
        (hue, hour): f"{SIZES[rng.integers(len(SIZES))]} {SHAPES[rng.integers(len(SHAPES))]}" for hue in HUES for hour in HOURS
    }


FACTS = _facts()


def ask_text(rng: np.random.Generator) -> QA:
    """A question without an image: a memorized code, or addition on the clock."""
    if rng.random() < 0.6:
        hue, hour = HUES[rng.integers(len(HUES))], HOURS[rng.integers(len(HOURS))]
        return QA(f"What is the code of {hue} {hour}?", FACTS[hue, hour], "fact", needs_image=False)
    start, after = int(rng.integers(12)), int(rng.integers(12))
    answer = HOURS[(start + after + 1) % 12]
    return QA(f"What hour is {HOURS[after]} after {HOURS[start]}?", answer, "clock", needs_image=False)


def distinct(texts: list[str]) -> bool:
    """Whether no text occurs twice."""
    return not texts or Counter(texts).most_common(1)[0][1] == 1
