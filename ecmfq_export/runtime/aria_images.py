"""Aria's image processor: an image as large as a square canvas lets it be; patches of the canvas that it leaves free are left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ecmfq_export.errors import CheckpointError, UnsupportedError
from ecmfq_export.runtime.host_inputs import image_tokens
from ecmfq_export.runtime.images import ImageInput, load_rgb
from ecmfq_export.runtime.vision_facts import read_vision_facts

_CANVASES = (490, 980)
_DEFAULT_QUERIES = ((1225, 128), (4900, 256))


class AriaPreprocessor:
    """transformers' own processor, on PIL; patches in raster order."""

    KINDS = tuple(f"AriaImageProcessor{form}" for form in ("", "Fast", "Pil")) + ("AriaVisionProcessor",)
    SETTINGS = (
        "max_image_size", "min_image_size", "image_mean", "image_std", "do_resize", "do_rescale", "do_normalize", "do_convert_rgb",
        "rescale_factor", "resample", "split_image", "split_resolutions", "size",
    )  # fmt: skip
    _PASSED = ("max_image_size", "min_image_size", "image_mean", "image_std")

    image_token = "<|img|>"
    reserved_tokens = ("<|img|>",)
    around = ()

    def __init__(self, config: dict[str, Any], path: Path) -> None:
        fixed = {"split_image": False, "do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True,
                 "rescale_factor": 1 / 255, "resample": 3}
        for key, value in fixed.items():
            if config.get(key, value) not in (value, None):
                raise UnsupportedError(f"{path}: {key} = {config[key]!r}", f"supported: {value!r}")
        settings = {key: config[key] for key in self._PASSED if config.get(key) is not None}
        self._canvas, smallest = (settings.get(key, usual) for key, usual in (("max_image_size", 980), ("min_image_size", 336)))
        if self._canvas not in _CANVASES or type(smallest) is not int or not 1 <= smallest <= self._canvas:
            raise CheckpointError(f"{path}: max_image_size = {self._canvas!r}, min_image_size = {smallest!r}",
                                  f"expected a canvas of {' or '.join(map(str, _CANVASES))}, and no larger smallest side")
        for key in ("image_mean", "image_std"):
            value = settings.get(key, [0.5] * 3)
            if not isinstance(value, list) or len(value) != 3 or any(type(v) not in (int, float) or not abs(v) < 1e3 for v in value) or (
                key == "image_std" and min(value) <= 0
            ):
                raise CheckpointError(f"{path}: {key} = {str(value)[:100]}", "expected three numbers, of image_std positive ones")
        facts = read_vision_facts(path.parent)
        self._patch, self._queries = facts.patch_size, facts.queries or _DEFAULT_QUERIES
        if self._canvas % self._patch:
            raise CheckpointError(f"{path}: max_image_size = {self._canvas} in patches of {self._patch}", "patches must fill the canvas")
        side = self._canvas // self._patch
        image_tokens([1, side, side], 1, self._queries)
        from transformers.models.aria.image_processing_pil_aria import AriaImageProcessorPil

        self._processor = AriaImageProcessorPil(**settings)

    def __call__(self, images: list[ImageInput]) -> tuple[np.ndarray, np.ndarray]:
        """As :class:`ecmfq_export.runtime.preprocessors.Preprocessor`."""
        patches, grids = [], []
        for image in images:
            result = self._processor([load_rgb(image)], return_tensors="np")
            pixels, seen = result["pixel_values"][0].astype(np.float32, copy=False), np.asarray(result["pixel_mask"][0], bool)
            rows, columns = (-(-int(seen.any(axis=axis).sum()) // self._patch) for axis in (1, 0))
            blocks = pixels[:, : rows * self._patch, : columns * self._patch].reshape(-1, rows, self._patch, columns, self._patch)
            patches.append(blocks.transpose(1, 3, 0, 2, 4).reshape(rows * columns, -1))
            grids.append([1, rows, columns])
        return np.concatenate(patches), np.array(grids, np.int64)

    def num_tokens(self, grid: np.ndarray) -> int:
        """As many as queries read the canvas of an image of this grid [3]."""
        return image_tokens(grid, 1, self._queries)
