"""Captions, questions and answers about a scene, and a few text-only questions.

Every item records its type, so that accuracy can be read by type. Yes/no items are balanced, and their negatives are
near-duplicates of something true (one colour, one kind or one position changed).
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from scenes import BACKGROUNDS, COLORS, DIGITS, SHAPES, Scene, SceneObject

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
CAPTION_PROMPT = "Describe the image."
MATCH_PROMPT = "Does this image show {text}?"

# The types, and how often the calibration pool draws each. Evaluation asks them about equally.
TYPE_WEIGHTS = {
    "color": 3,
    "kind": 3,
    "cell": 3,
    "position": 3,
    "count": 2,
    "count_which": 3,
    "exists": 2,
    "side": 2,
    "statement": 2,
    "match": 2,
    "background": 0.5,
    "caption": 2,
}
# Answered by free text of many tokens, so accuracy over these is exact match of a whole caption; reported apart.
LONG_TYPES = ("caption",)


@dataclass(frozen=True)
class QA:
    """A question with its answer; `needs_image` is False for text-only items."""

    question: str
    answer: str
    type: str
    needs_image: bool = True


def name(kind: str, color: str | None = None) -> str:
    """ "red circle", or "circle"; a digit is called by itself ("red 7")."""
    return kind if color is None else f"{color} {kind}"


def with_article(phrase: str) -> str:
    """ "a red circle", "an orange 7"."""
    return ("an " if phrase.startswith("orange") else "a ") + phrase


def plural(kind: str) -> str:
    return "crosses" if kind == "cross" else f"{kind}s"


def _caption_of(parts: list[tuple[str, str, str]]) -> str:
    return ", ".join(f"{with_article(name(kind, color))} at {place}" for kind, color, place in parts)


def _parts(scene: Scene) -> list[tuple[str, str, str]]:
    return [(o.kind, o.color, scene.position(o.row, o.col)) for o in scene.objects]


def caption(scene: Scene) -> str:
    """What the image shows, every object in reading order."""
    return _caption_of(_parts(scene))


def distractor(scene: Scene, rng: random.Random) -> str:
    """A near-duplicate of the scene's caption that is false: one colour, kind or place is changed."""
    parts = _parts(scene)
    i = rng.randrange(len(parts))
    kind, color, place = parts[i]
    change = rng.choice(("color", "kind", "place", "swap"))
    if change == "swap":
        j = rng.randrange(len(parts))
        if parts[j][1] != color:  # exchange the colours of two objects
            parts[i], parts[j] = (kind, parts[j][1], place), (parts[j][0], color, parts[j][2])
            return _caption_of(parts)
        change = "color"
    if change == "place":
        free = [(r, c) for r in range(scene.rows) for c in range(scene.cols) if scene.at(r, c) is None]
        if free:
            moved = [(o.row, o.col, o.kind, o.color) for o in scene.objects]
            moved[i] = (*rng.choice(free), kind, color)
            return _caption_of([(k, col, scene.position(r, c)) for r, c, k, col in sorted(moved)])
        change = "color"
    if change == "color":
        parts[i] = (kind, rng.choice([c for c in COLORS if c != color]), place)
    else:
        pool = DIGITS if kind in DIGITS else SHAPES
        parts[i] = (rng.choice([k for k in pool if k != kind]), color, place)
    return _caption_of(parts)


def _unique(scene: Scene, key) -> list[SceneObject]:
    keys = [key(o) for o in scene.objects]
    return [o for o in scene.objects if keys.count(key(o)) == 1]


def _color(scene: Scene, rng: random.Random) -> QA | None:
    objects = _unique(scene, lambda o: o.kind)
    if not objects:
        return None
    obj = rng.choice(objects)
    return QA(f"What color is the {obj.kind}?", obj.color, "color")


def _kind(scene: Scene, rng: random.Random) -> QA | None:
    objects = _unique(scene, lambda o: o.color)
    if not objects:
        return None
    obj = rng.choice(objects)
    return QA(f"What is the {obj.color} object?", obj.kind, "kind")


def _cell(scene: Scene, rng: random.Random) -> QA:
    if rng.random() < 0.15:
        row, col = rng.randrange(scene.rows), rng.randrange(scene.cols)
    else:
        obj = rng.choice(scene.objects)
        row, col = obj.row, obj.col
    obj = scene.at(row, col)
    return QA(f"What is at {scene.position(row, col)}?", name(obj.kind, obj.color) if obj else "nothing", "cell")


def _position(scene: Scene, rng: random.Random) -> QA | None:
    objects = _unique(scene, lambda o: (o.kind, o.color))
    if not objects:
        return None
    obj = rng.choice(objects)
    return QA(f"Where is the {name(obj.kind, obj.color)}?", scene.position(obj.row, obj.col), "position")


def _count(scene: Scene, rng: random.Random) -> QA:
    return QA("How many objects are there?", NUMBER_WORDS[len(scene.objects)], "count")


def _count_which(scene: Scene, rng: random.Random) -> QA:
    obj = rng.choice(scene.objects)
    absent = rng.random() < 0.15
    if rng.random() < 0.5 or obj.is_digit:
        color = rng.choice(tuple(COLORS)) if absent else obj.color
        count = sum(o.color == color for o in scene.objects)
        return QA(f"How many {color} objects are there?", NUMBER_WORDS[count], "count_which")
    kind = rng.choice(SHAPES) if absent else obj.kind
    count = sum(o.kind == kind for o in scene.objects)
    return QA(f"How many {plural(kind)} are there?", NUMBER_WORDS[count], "count_which")


def _exists(scene: Scene, rng: random.Random) -> QA:
    obj = rng.choice(scene.objects)
    kind, color = obj.kind, obj.color
    if rng.random() < 0.5:
        # Prefer what is nearly there: the colour or kind of another object of the same scene.
        other = rng.choice(scene.objects)
        if rng.random() < 0.5:
            color = other.color if other.color != color else rng.choice([c for c in COLORS if c != color])
        else:
            pool = DIGITS if obj.is_digit else SHAPES
            kind = other.kind if other.kind != kind else rng.choice([k for k in pool if k != kind])
    truth = any((o.kind, o.color) == (kind, color) for o in scene.objects)
    return QA(f"Is there {with_article(name(kind, color))}?", "yes" if truth else "no", "exists")


def _relation(scene: Scene, rng: random.Random) -> QA | None:
    objects = _unique(scene, lambda o: (o.kind, o.color))
    if len(objects) < 2:
        return None
    a, b = rng.sample(objects, 2)
    relations = []
    if a.col != b.col:
        relations += [("left of", a.col < b.col), ("right of", a.col > b.col)]
    if a.row != b.row:
        relations += [("above", a.row < b.row), ("below", a.row > b.row)]
    text, truth = rng.choice(relations)
    question = f"Is the {name(a.kind, a.color)} {text} the {name(b.kind, b.color)}?"
    return QA(question, "yes" if truth else "no", "relation")


def _match(scene: Scene, rng: random.Random) -> QA:
    truth = rng.random() < 0.5
    text = caption(scene) if truth else distractor(scene, rng)
    return QA(MATCH_PROMPT.format(text=text), "yes" if truth else "no", "match")


def _side(scene: Scene, rng: random.Random) -> QA | None:
    objects = _unique(scene, lambda o: (o.kind, o.color))
    if not objects:
        return None
    obj = rng.choice(objects)
    words = scene.position(obj.row, obj.col).split()
    axis = rng.randrange(2)
    names = {scene.position(r, c).split()[axis] for r in range(scene.rows) for c in range(scene.cols)}
    truth = rng.random() < 0.5
    word = words[axis] if truth else rng.choice(sorted(names - {words[axis]}))
    return QA(f"Is the {name(obj.kind, obj.color)} at the {word}?", "yes" if truth else "no", "side")


def _statement(scene: Scene, rng: random.Random) -> QA:
    # The match prompt about one or two of the objects: what a match must verify, a piece at a time.
    kept = sorted(rng.sample(range(len(scene.objects)), min(rng.randint(1, 2), len(scene.objects))))
    part = replace(scene, objects=tuple(scene.objects[i] for i in kept))
    text = caption(part) if rng.random() < 0.5 else distractor(part, rng)
    truth = set(text.split(", ")) <= set(caption(scene).split(", "))
    return QA(MATCH_PROMPT.format(text=text), "yes" if truth else "no", "statement")


def _background(scene: Scene, rng: random.Random) -> QA:
    return QA("What color is the background?", scene.background, "background")


def _caption(scene: Scene, rng: random.Random) -> QA:
    return QA(CAPTION_PROMPT, caption(scene), "caption")


_MAKERS = {
    "color": _color,
    "kind": _kind,
    "cell": _cell,
    "position": _position,
    "count": _count,
    "count_which": _count_which,
    "exists": _exists,
    "relation": _relation,
    "match": _match,
    "side": _side,
    "statement": _statement,
    "background": _background,
    "caption": _caption,
}


def ask(scene: Scene, rng: random.Random, type_: str) -> QA | None:
    """One question of a type, or None where the scene has none (no unique object, say)."""
    return _MAKERS[type_](scene, rng)


def ask_any(scene: Scene, rng: random.Random, exclude: tuple[str, ...] = (), type_weights: dict[str, float] | None = None) -> QA:
    """One question of a type drawn by `type_weights` (TYPE_WEIGHTS by default)."""
    table = type_weights or TYPE_WEIGHTS
    types = [t for t in table if t not in exclude]
    weights = [table[t] for t in types]
    while True:
        qa = ask(scene, rng, rng.choices(types, weights)[0])
        if qa is not None:
            return qa


_OPPOSITES = {"left": "right", "right": "left", "top": "bottom", "bottom": "top", "above": "below",
              "below": "above", "yes": "no", "no": "yes", "black": "white", "white": "black"}  # fmt: skip


def ask_text(rng: random.Random) -> QA:
    """A question that needs no image: sums to ten, what a word names, opposites."""
    choice = rng.randrange(3)
    if choice == 0:
        a = rng.randrange(11)
        b = rng.randrange(11 - a)
        return QA(f"What is {NUMBER_WORDS[a]} plus {NUMBER_WORDS[b]}?", NUMBER_WORDS[a + b], "text", False)
    if choice == 1:
        groups = {"color": (*COLORS, *BACKGROUNDS), "shape": SHAPES, "number": NUMBER_WORDS}
        group = rng.choice(tuple(groups))
        return QA(f"Is {rng.choice(groups[group])} a color, a shape or a number?", group, "text", False)
    word = rng.choice(tuple(_OPPOSITES))
    return QA(f"What is the opposite of {word}?", _OPPOSITES[word], "text", False)
