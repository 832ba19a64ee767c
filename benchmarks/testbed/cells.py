"""Seeded scenes of cells with continuous attributes, their names, and how they are drawn.

A scene is a small grid; every cell is 16 pixels wide, which is one merged vision token (patch 8, merge 2), and shows one
shape with a hue, a size and a clock hand. Hue, size and hand are drawn from continuous uniform distributions and named by
bins, so a share of the cells always lies near a border: a model answers those with small margins, which is what makes
rounding errors visible in accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CELL = 16
"""Pixels along a cell's side."""

HUES = (
    "red", "orange", "amber", "yellow", "lime", "green", "mint", "teal",
    "cyan", "sky", "azure", "blue", "violet", "purple", "pink", "rose",
)  # fmt: skip
HOURS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
SIZES = ("tiny", "small", "medium", "large", "huge", "giant")
SHAPES = ("disk", "square", "diamond")
GRIDS = ((1, 2), (2, 1), (1, 3), (3, 1), (2, 2), (2, 3), (3, 2))
"""(rows, columns) of a scene."""

# Half-open seed ranges of the splits. Every set of images takes seeds from one of them alone.
SPLITS: dict[str, range] = {
    "train": range(0, 1_000_000_000),
    "calibration": range(1_000_000_000, 1_001_000_000),
    "validation": range(2_000_000_000, 2_001_000_000),
    "test": range(3_000_000_000, 3_001_000_000),
}

_SMALLEST, _LARGEST = 2.8, 6.2  # radius in pixels of a disk; the other shapes have the disk's area


@dataclass(frozen=True)
class Scene:
    """What an image shows, cells in reading order.

    Attributes:
        hue, size, hand: [cells] in [0, 1); `hand` turns clockwise, its first twelfth is named twelve, its second one, ...
        shape: [cells] indices of SHAPES.
        nuisance: [cells, 4] in [0, 1): brightness, saturation, shift right, shift down; nothing asks for them.
        background: grey level in [0, 1).
    """

    rows: int
    cols: int
    hue: np.ndarray
    size: np.ndarray
    hand: np.ndarray
    shape: np.ndarray
    nuisance: np.ndarray
    background: float

    @property
    def cells(self) -> int:
        """Number of cells."""
        return self.rows * self.cols

    def hue_name(self, i: int) -> str:
        """Name of cell i's hue."""
        return HUES[int(self.hue[i] * len(HUES))]

    def size_name(self, i: int) -> str:
        """Name of cell i's size."""
        return SIZES[int(self.size[i] * len(SIZES))]

    def hour_name(self, i: int) -> str:
        """The hour that cell i's hand points to (nearest)."""
        return HOURS[(int(self.hand[i] * len(HOURS)) - 1) % len(HOURS)]

    def shape_name(self, i: int) -> str:
        """Name of cell i's shape."""
        return SHAPES[self.shape[i]]

    def position(self, i: int) -> str:
        """Where cell i is: "top left", or one word in a single row or column."""
        row, col = divmod(i, self.cols)
        vertical = {1: ("",), 2: ("top", "bottom"), 3: ("top", "middle", "bottom")}[self.rows][row]
        horizontal = {1: ("",), 2: ("left", "right"), 3: ("left", "center", "right")}[self.cols][col]
        return f"{vertical} {horizontal}".strip()


def make_scene(seed: int, grid: tuple[int, int] | None = None) -> Scene:
    """The scene of `seed` (an integer of one of SPLITS); `grid` fixes (rows, columns), else the seed chooses."""
    rng = np.random.default_rng(seed)
    chosen = GRIDS[rng.integers(len(GRIDS))]
    rows, cols = grid or chosen
    n = rows * cols
    values = rng.random((3, n))
    shape = rng.integers(len(SHAPES), size=n)
    return Scene(rows, cols, values[0], values[1], values[2], shape, rng.random((n, 4)), float(rng.random()))


ATTRIBUTES = {"hue": len(HUES), "size": len(SIZES), "shape": len(SHAPES)}
"""What a caption names, with the number of classes."""


def vary(scene: Scene, rng: np.random.Generator, bins: int) -> Scene:
    """A near-duplicate: one caption attribute of one cell moved by 1 to `bins` classes, everything else equal."""
    cell = int(rng.integers(scene.cells))
    name = tuple(ATTRIBUTES)[rng.integers(len(ATTRIBUTES))]
    step, sign = int(rng.integers(1, bins + 1)), 1 if rng.random() < 0.5 else -1
    values = {key: getattr(scene, key).copy() for key in ATTRIBUTES}
    if name == "shape":
        values["shape"][cell] = (values["shape"][cell] + (1 if sign > 0 else 2)) % len(SHAPES)
    elif name == "hue":
        values["hue"][cell] = (values["hue"][cell] + sign * step / len(HUES)) % 1.0
    else:
        moved = values["size"][cell] + sign * min(step, 2) / len(SIZES)
        if not 0 <= moved < 1:
            moved = values["size"][cell] - sign * min(step, 2) / len(SIZES)
        values["size"][cell] = moved
    return Scene(scene.rows, scene.cols, hand=scene.hand, nuisance=scene.nuisance, background=scene.background, **values)


def _rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """[..., 3] in [0, 1] of HSV arrays (Foley and van Dam's hexcone)."""
    k = (np.array([5.0, 3.0, 1.0]) + hue[..., None] * 6) % 6
    return value[..., None] * (1 - saturation[..., None] * np.clip(np.minimum(k, 4 - k), 0, 1))


def render(scenes: Sequence[Scene]) -> np.ndarray:
    """Images of scenes of one grid: [B, 16·rows, 16·cols, 3] uint8."""
    rows, cols = scenes[0].rows, scenes[0].cols
    stack = {key: np.stack([getattr(s, key) for s in scenes]) for key in ("hue", "size", "hand", "shape", "nuisance")}
    background = np.array([s.background for s in scenes])
    nuisance = stack["nuisance"]
    axis = np.arange(CELL) + 0.5 - CELL / 2
    x = axis - (nuisance[..., 2, None] - 0.5) * 1.2  # [B, n, 16]
    y = axis - (nuisance[..., 3, None] - 0.5) * 1.2
    x, y = x[..., None, :], y[..., :, None]  # [B, n, 1, 16], [B, n, 16, 1]
    radius = (_SMALLEST + (_LARGEST - _SMALLEST) * stack["size"])[..., None, None]
    shape = stack["shape"][..., None, None]
    disk = np.hypot(x, y) - radius
    square = np.maximum(abs(x), abs(y)) - radius * 0.8862
    diamond = (abs(x) + abs(y) - radius * 1.2533) * 0.7071
    distance = np.where(shape == 0, disk, np.where(shape == 1, square, diamond))
    inside = np.clip(0.5 - distance, 0, 1)[..., None]
    colour = _rgb(stack["hue"], 0.75 + 0.25 * nuisance[..., 1], 0.7 + 0.3 * nuisance[..., 0])[..., None, None, :]
    image = (0.05 + 0.15 * background)[:, None, None, None, None] * (1 - inside) + colour * inside
    # Bins are centred on the hours: hand 0 is half a bin before twelve.
    turn = 2 * np.pi * (stack["hand"] - 0.5 / len(HOURS))[..., None, None]
    along = x * np.sin(turn) - y * np.cos(turn)
    across = abs(x * np.cos(turn) + y * np.sin(turn))
    hand = np.clip(1.2 - across, 0, 1) * np.clip(along + 0.5, 0, 1) * np.clip(7.5 - along, 0, 1)
    image = image * (1 - hand[..., None]) + hand[..., None]
    image = image.reshape(len(scenes), rows, cols, CELL, CELL, 3).transpose(0, 1, 3, 2, 4, 5)
    return np.round(image.reshape(len(scenes), rows * CELL, cols * CELL, 3) * 255).astype(np.uint8)
