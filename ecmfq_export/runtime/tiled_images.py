"""InternVL's image processor: an image cut into tiles of one size, arranged nearest to its shape, and a small picture of all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ecmfq_export.errors import CheckpointError, UnsupportedError
from ecmfq_export.runtime.host_inputs import image_tokens
from ecmfq_export.runtime.images import ImageInput, load_rgb
from ecmfq_export.runtime.vision_facts import read_vision_facts

_MERGE = 2
_MAX_TILES, _MAX_SIDE = 100, 4096


class TilePreprocessor:
    """transformers' own processor (GOT-OCR2's), on PIL, with the cutting that InternVL's asks it for; patches in raster order.

    A grid is (tiles, rows of a tile, columns of a tile).
    """

    KINDS = tuple(f"GotOcr2ImageProcessor{form}" for form in ("", "Fast", "Pil"))
    SETTINGS = (
        "size", "min_patches", "max_patches", "image_mean", "image_std", "crop_to_patches", "do_resize", "do_rescale", "do_normalize",
        "do_convert_rgb", "rescale_factor", "resample",
    )  # fmt: skip
    _PASSED = ("size", "min_patches", "max_patches", "image_mean", "image_std")

    image_token = "<IMG_CONTEXT>"
    reserved_tokens = ("<IMG_CONTEXT>", "<img>", "</img>", "<video>")
    around = ("<img>", "</img>")

    def __init__(self, config: dict[str, Any], path: Path) -> None:
        # InternVL's processor has images cut whatever crop_to_patches says here.
        fixed = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "rescale_factor": 1 / 255,
                 "resample": 3}
        for key, value in fixed.items():
            if config.get(key, value) not in (value, None):
                raise UnsupportedError(f"{path}: {key} = {config[key]!r}", f"supported: {value!r}")
        settings = {key: config[key] for key in self._PASSED if config.get(key) is not None}
        size = settings.get("size")
        side = size.get("height") if isinstance(size, dict) and set(size) == {"height", "width"} else None
        if type(side) is not int or size != {"height": side, "width": side} or not 1 <= side <= _MAX_SIDE:
            raise CheckpointError(f"{path}: size = {str(size)[:100]}", "expected height and width of a tile, which are the same")
        fewest, most = (settings.get(key, usual) for key, usual in (("min_patches", 1), ("max_patches", 12)))
        if type(fewest) is not int or type(most) is not int or not 1 <= fewest <= most <= _MAX_TILES:
            raise CheckpointError(f"{path}: min_patches = {fewest!r}, max_patches = {most!r}", f"expected 1 to {_MAX_TILES} tiles")
        for key in ("image_mean", "image_std"):
            value = settings.get(key, [0.5] * 3)
            if not isinstance(value, list) or len(value) != 3 or any(type(v) not in (int, float) or not abs(v) < 1e3 for v in value) or (
                key == "image_std" and min(value) <= 0
            ):
                raise CheckpointError(f"{path}: {key} = {str(value)[:100]}", "expected three numbers, of image_std positive ones")
        self._patch = read_vision_facts(path.parent).patch_size
        if side % (_MERGE * self._patch):
            raise CheckpointError(f"{path}: size = {size} in patches of {self._patch}", "a tile must be whole merged patches")
        self._side = side // self._patch
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

        self._processor = GotOcr2ImageProcessorPil(**settings)

    def __call__(self, images: list[ImageInput]) -> tuple[np.ndarray, np.ndarray]:
        """As :class:`ecmfq_export.runtime.preprocessors.Preprocessor`."""
        patches, grids = [], []
        for image in images:
            result = self._processor([load_rgb(image)], crop_to_patches=True, return_tensors="np")
            tiles = np.asarray(result["pixel_values"], np.float32)
            side, patch = self._side, self._patch
            blocks = tiles.reshape(len(tiles), -1, side, patch, side, patch).transpose(0, 2, 4, 1, 3, 5)
            patches.append(blocks.reshape(len(tiles) * side * side, -1))
            grids.append([len(tiles), side, side])
        return np.concatenate(patches), np.array(grids, np.int64)

    def num_tokens(self, grid: np.ndarray) -> int:
        """Those of all tiles of a grid [3]."""
        return image_tokens(grid, _MERGE)
