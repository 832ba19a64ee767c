"""Images on their way into a model: read when needed, their features kept for the next model with the same vision tower."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ecmfq_export.models.inputs import run_vision
from ecmfq_export.models.moe_vlm import MoEVLM
from ecmfq_export.runtime import host_inputs
from ecmfq_export.runtime.processor import Processor

_CALL_PATCHES = 4096
"""Patches of a vision call; one image at least."""
FEATURES_LIMIT = 1 << 30
"""Bytes of features that are kept between evaluations."""


@dataclass(frozen=True)
class ImageFeatures:
    """What a vision tower makes of one image.

    Attributes:
        grid: int64 [1, 3], patches along time, height and width before merging.
        features: float32 [1 + DeepStack layers, tokens, hidden]; the first row goes into the embeddings.
    """

    grid: np.ndarray
    features: torch.Tensor

    @property
    def tokens(self) -> int:
        return self.features.shape[1]


class ImageStore:
    """The images of an evaluation.

    Patches are never kept. Features are kept up to `limit` bytes for every tower that was used, the towers told apart by their
    weights, so that models which differ in the decoder only share them.

    Args:
        processor: makes patches.
        paths: the images, by index.
        limit: bytes of features that may be kept.
    """

    def __init__(self, processor: Processor, paths: Sequence[Path], limit: int = FEATURES_LIMIT) -> None:
        self.processor = processor
        self.paths = list(paths)
        self._limit, self._held = limit, 0
        self._kept: dict[str, dict[int, ImageFeatures]] = {}

    def opened(self, model: MoEVLM) -> ModelImages:
        """The images as `model` sees them."""
        return ModelImages(self, model, self._kept.setdefault(vision_key(model), {}))

    def patches(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """pixel_values [patches, patch_features] and grid [1, 3] of one image.

        Raises:
            UserError: an image that cannot be used.
        """
        return self.processor.preprocess([self.paths[index]])

    def keep(self, kept: dict[int, ImageFeatures], index: int, features: ImageFeatures) -> None:
        """Keep features if they fit; where they do not, another tower's are dropped for them."""
        size = features.features.numel() * 4
        for key, others in list(self._kept.items()):
            if self._held + size > self._limit and others is not kept:
                self._held -= sum(f.features.numel() * 4 for f in others.values())
                del self._kept[key]
        if self._held + size <= self._limit:
            kept[index] = features
            self._held += size


class ModelImages:
    """Features of images by one model; made by :meth:`ImageStore.opened`. Its vision tower is loaded at the first new image."""

    def __init__(self, store: ImageStore, model: MoEVLM, kept: dict[int, ImageFeatures]) -> None:
        self._store, self._model, self._kept = store, model, kept
        self._tower: torch.nn.Module | None = None

    def load(self, indices: Sequence[int]) -> dict[int, ImageFeatures]:
        """Features of the images `indices`.

        Raises:
            UserError: an image that cannot be used.
        """
        out = {index: self._kept[index] for index in indices if index in self._kept}
        waiting: list[tuple[int, np.ndarray, np.ndarray]] = []
        for index in dict.fromkeys(indices):
            if index in out:
                continue
            patches, grid = self._store.patches(index)
            if waiting and sum(len(w[1]) for w in waiting) + len(patches) > _CALL_PATCHES:
                self._run(waiting, out)
                waiting = []
            waiting.append((index, patches, grid))
        if waiting:
            self._run(waiting, out)
        return out

    def _run(self, waiting: list[tuple[int, np.ndarray, np.ndarray]], out: dict[int, ImageFeatures]) -> None:
        if self._tower is None:
            self._tower = self._model.vision_module()
        grids = np.concatenate([grid for _, _, grid in waiting])
        features, deepstack = run_vision(self._tower, np.concatenate([patches for _, patches, _ in waiting]), grids)
        vision = self._model.spec.vision
        counts = [host_inputs.image_tokens(grid, vision.spatial_merge_size, vision.queries) for grid in grids]
        parts = torch.stack([features, *deepstack]).float().split(counts, dim=1)
        for (index, _, grid), part in zip(waiting, parts, strict=True):
            out[index] = ImageFeatures(grid, part.contiguous())
            self._store.keep(self._kept, index, out[index])


def vision_key(model: MoEVLM) -> str:
    """A hash of the vision tower's weights as they are computed with; towers with the same one give the same features."""
    digest = hashlib.sha256()
    for name in model.names():
        if name.startswith("vision."):
            digest.update(name.encode())
            digest.update(model.tensor(name).float().contiguous().numpy())
    return digest.hexdigest()
