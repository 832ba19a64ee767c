"""Seeded scenes of coloured shapes and digits, and how they are drawn.

A scene is a function of one integer seed. The splits are ranges of seeds that never overlap
(:data:`SPLITS`), so a held-out or calibration image is never an image that training has seen. Single-object
scenes of different splits can still agree in what they show (the set of captions is finite), never in pixels.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 30, 35),
    "green": (30, 150, 50),
    "blue": (40, 70, 230),
    "yellow": (240, 220, 40),
    "purple": (140, 40, 180),
    "orange": (245, 135, 20),
    "cyan": (50, 210, 220),
    "brown": (115, 65, 30),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "ring")
DIGITS = tuple("0123456789")
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "black": (12, 12, 12),
    "gray": (128, 128, 128),
}
# (height, width). The last three are not multiples of 16 (patch 8 × merge 2): the image processor resizes them.
IMAGE_SIZES = ((64, 64), (64, 96), (96, 64), (48, 80), (80, 80), (60, 76), (72, 56), (50, 84))
MAX_OBJECTS = 4
SUPERSAMPLE = 3

# Seed ranges, half open. Whoever adds a split adds it here, and tests/examples holds that none overlap.
SPLITS: dict[str, range] = {
    "train": range(0, 1_000_000_000),
    "calibration": range(1_000_000_000, 1_001_000_000),
    "validation": range(2_000_000_000, 2_001_000_000),
    "heldout": range(3_000_000_000, 3_001_000_000),
}

# Which of the seven segments a digit lights: top, top left, top right, middle, bottom left, bottom right, bottom.
_SEGMENTS = {
    "0": "1110111", "1": "0010010", "2": "1011101", "3": "1011011", "4": "0111010",
    "5": "1101011", "6": "1101111", "7": "1010010", "8": "1111111", "9": "1111011",
}  # fmt: skip


@dataclass(frozen=True)
class SceneObject:
    """One object: `kind` is a name of SHAPES or a digit; `row`, `col` its cell; the rest in pixels."""

    kind: str
    color: str
    row: int
    col: int
    center: tuple[float, float]  # (x, y)
    radius: float
    rgb: tuple[int, int, int]

    @property
    def is_digit(self) -> bool:
        return self.kind in DIGITS


@dataclass(frozen=True)
class Scene:
    """What an image shows. `objects` are in reading order (row by row); at most one a cell."""

    seed: int
    height: int
    width: int
    rows: int
    cols: int
    background: str
    background_rgb: tuple[int, int, int]
    objects: tuple[SceneObject, ...]

    def position(self, row: int, col: int) -> str:
        """The cell's name, such as "top left" or "middle right"."""
        vertical = ("top", "bottom") if self.rows == 2 else ("top", "middle", "bottom")
        horizontal = ("left", "right") if self.cols == 2 else ("left", "center", "right")
        return f"{vertical[row]} {horizontal[col]}"

    def at(self, row: int, col: int) -> SceneObject | None:
        """The object in a cell, or None."""
        return next((o for o in self.objects if (o.row, o.col) == (row, col)), None)


def _jitter(rgb: tuple[int, int, int], rng: random.Random, amount: int) -> tuple[int, int, int]:
    return tuple(min(255, max(0, c + rng.randint(-amount, amount))) for c in rgb)


def make_scene(seed: int, max_objects: int = MAX_OBJECTS, size: tuple[int, int] | None = None) -> Scene:
    """The scene of `seed`.

    Args:
        seed: Any integer of one of SPLITS.
        max_objects: At most this many objects (1 to 4); training begins with fewer.
        size: (height, width) to draw at; None chooses one of IMAGE_SIZES by the seed.
    """
    rng = random.Random(seed)
    chosen = rng.choice(IMAGE_SIZES)  # drawn even when not used, so that a size given leaves the rest of the scene
    height, width = size or chosen
    rows = 3 if height / width > 1.3 else 2
    cols = 3 if width / height > 1.3 else 2
    background = rng.choice(tuple(BACKGROUNDS))
    count = min(rng.choices((1, 2, 3, 4), weights=(15, 25, 30, 30))[0], max_objects)
    cells = sorted(rng.sample([(r, c) for r in range(rows) for c in range(cols)], count))
    cell_h, cell_w = height / rows, width / cols
    # Repeated colours and kinds are what make counting and "the red one" questions real: draw from a small palette.
    colors = rng.sample(tuple(COLORS), 3)
    kinds = rng.sample(SHAPES, 2) + [rng.choice(DIGITS if rng.random() < 0.75 else SHAPES)]
    objects = []
    for row, col in cells:
        radius = min(cell_h, cell_w) * rng.uniform(0.33, 0.43)
        slack_x, slack_y = max(0.0, cell_w / 2 - radius - 1), max(0.0, cell_h / 2 - radius - 1)
        color = rng.choice(colors)
        objects.append(
            SceneObject(
                kind=rng.choice(kinds),
                color=color,
                row=row,
                col=col,
                center=(
                    (col + 0.5) * cell_w + rng.uniform(-slack_x, slack_x),
                    (row + 0.5) * cell_h + rng.uniform(-slack_y, slack_y),
                ),
                radius=radius,
                rgb=_jitter(COLORS[color], rng, 12),
            )
        )
    return Scene(seed, height, width, rows, cols, background, _jitter(BACKGROUNDS[background], rng, 10), tuple(objects))


def _polygon(cx: float, cy: float, radii: list[float], start: float) -> list[tuple[float, float]]:
    step = 2 * math.pi / len(radii)
    return [(cx + r * math.cos(start + i * step), cy + r * math.sin(start + i * step)) for i, r in enumerate(radii)]


def _draw_digit(draw: ImageDraw.ImageDraw, digit: str, cx: float, cy: float, r: float, fill) -> None:
    # Seven segments instead of a font: the same pixels on every machine, whatever FreeType is there.
    w, t = r * 0.58, max(2.0, r * 0.30)
    x0, x1, ys = cx - w, cx + w, (cy - r, cy, cy + r)
    boxes = (
        (x0, ys[0], x1, ys[0] + t),
        (x0, ys[0], x0 + t, ys[1]),
        (x1 - t, ys[0], x1, ys[1]),
        (x0, ys[1] - t / 2, x1, ys[1] + t / 2),
        (x0, ys[1], x0 + t, ys[2]),
        (x1 - t, ys[1], x1, ys[2]),
        (x0, ys[2] - t, x1, ys[2]),
    )
    for lit, box in zip(_SEGMENTS[digit], boxes, strict=True):
        if lit == "1":
            draw.rectangle(box, fill=fill)


def _draw_object(draw: ImageDraw.ImageDraw, obj: SceneObject, scale: int, background) -> None:
    cx, cy, r = obj.center[0] * scale, obj.center[1] * scale, obj.radius * scale
    up = -math.pi / 2
    match obj.kind:
        case "circle":
            draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=obj.rgb)
        case "ring":
            draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=obj.rgb)
            hole = r * 0.55
            draw.ellipse((cx - hole, cy - hole, cx + hole, cy + hole), fill=background)
        case "square":
            s = r * 0.88
            draw.rectangle((cx - s, cy - s, cx + s, cy + s), fill=obj.rgb)
        case "triangle":
            draw.polygon([(cx, cy - r), (cx - r, cy + r * 0.85), (cx + r, cy + r * 0.85)], fill=obj.rgb)
        case "diamond":
            draw.polygon([(cx, cy - r), (cx + r * 0.8, cy), (cx, cy + r), (cx - r * 0.8, cy)], fill=obj.rgb)
        case "star":
            draw.polygon(_polygon(cx, cy, [r, r * 0.42] * 5, up), fill=obj.rgb)
        case "cross":
            t = r * 0.32
            draw.rectangle((cx - r, cy - t, cx + r, cy + t), fill=obj.rgb)
            draw.rectangle((cx - t, cy - r, cx + t, cy + r), fill=obj.rgb)
        case _:
            _draw_digit(draw, obj.kind, cx, cy, r, obj.rgb)


def render(scene: Scene) -> Image.Image:
    """Draw the scene as an RGB image of its own size (drawn larger, then reduced: smooth edges)."""
    image = Image.new("RGB", (scene.width * SUPERSAMPLE, scene.height * SUPERSAMPLE), scene.background_rgb)
    draw = ImageDraw.Draw(image)
    for obj in scene.objects:
        _draw_object(draw, obj, SUPERSAMPLE, scene.background_rgb)
    return image.reduce(SUPERSAMPLE)
