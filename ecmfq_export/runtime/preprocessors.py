"""RGB images to patches, as ``preprocessor_config.json`` of a directory says; one class for each kind of image processor."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ecmfq_export.errors import CheckpointError, UnsupportedError, UserError
from ecmfq_export.json_file import read_json
from ecmfq_export.runtime.aria_images import AriaPreprocessor
from ecmfq_export.runtime.host_inputs import image_tokens
from ecmfq_export.runtime.images import MAX_PIXELS, ImageInput, load_rgb
from ecmfq_export.runtime.tiled_images import TilePreprocessor

PREPROCESSOR_CONFIG, PROCESSOR_CONFIG = "preprocessor_config.json", "processor_config.json"

_INERT = (
    "image_processor_type", "processor_class", "default_to_square", "device", "disable_grouping", "input_data_format",
    "return_tensors", "data_format", "crop_size", "do_center_crop", "do_pad", "pad_size", "image_processor",
    "feature_extractor_type", "video_processor_type", "auto_map",
    "chunk_length", "dither", "feature_size", "hop_length", "n_fft", "n_samples", "nb_max_frames", "padding_side", "padding_value",
    "return_attention_mask", "sampling_rate",
)  # fmt: skip
"""Settings of any image processor that do not change what it does here, and those of an audio processor in the same file."""


_MAX_PATCH = 512
"""Pixels a side of a patch, patches a side of a merged one, frames of a patch."""


class Preprocessor(Protocol):
    """What makes patches of images.

    Attributes:
        image_token: the placeholder that stands for one merged patch in this kind's prompts.
        reserved_tokens: placeholders that a text may not hold where the tokenizer knows them.
        around: the token before and the one behind an image, where the chat template leaves them to the processor.
    """

    image_token: str
    reserved_tokens: tuple[str, ...]
    around: tuple[str, ...]

    def __call__(self, images: list[ImageInput]) -> tuple[np.ndarray, np.ndarray]:
        """Patches [N, patch_features] float32 in the family's own order, and grids [len(images), 3] int64.

        Raises:
            UserError: an image that cannot be read, or whose shape is refused.
        """
        ...

    def num_tokens(self, grid: np.ndarray) -> int:
        """How many tokens stand for an image of a grid [3]."""
        ...


def load_preprocessor(directory: Path) -> Preprocessor:
    """The preprocessor that a directory's ``preprocessor_config.json`` describes, or ``processor_config.json`` without one.

    Raises:
        CheckpointError: the file is missing, damaged, or holds impossible settings.
        UnsupportedError: another image processor, or a setting that is not understood.
    """
    path, config = _read(Path(directory))
    kind = config.get("image_processor_type") if isinstance(config, dict) else None
    if kind is None and isinstance(config, dict) and isinstance(config.get("auto_map"), dict):
        # Files of models with remote code name the class there alone.
        kind = str(config["auto_map"].get("AutoImageProcessor")).rsplit(".", 1)[-1]
    for loader in _LOADERS:
        if kind in loader.KINDS:
            unknown = sorted(set(config) - set(loader.SETTINGS) - set(_INERT))
            if unknown:
                raise UnsupportedError(f"{path}: unknown settings {', '.join(unknown)}", "they could change what it does")
            return loader(config, path)
    known = ", ".join(name for loader in _LOADERS for name in loader.KINDS)
    raise UnsupportedError(f"{path}: image_processor_type {kind!r}", f"supported: {known}")


def _read(directory: Path) -> tuple[Path, Any]:
    """The image settings, and the file they are in: a file of their own, or a section of what transformers 5 saves for a processor."""
    path = directory / PREPROCESSOR_CONFIG
    section = not path.is_file() and (directory / PROCESSOR_CONFIG).is_file()
    path = directory / PROCESSOR_CONFIG if section else path
    try:
        config = read_json(path)
    except FileNotFoundError:
        raise CheckpointError(f"{directory} has no {PREPROCESSOR_CONFIG}", "copy it from the model") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if section:
        config = config.get("image_processor") if isinstance(config, dict) else None
        if not isinstance(config, dict):
            raise CheckpointError(f"{path} has no image_processor, and {directory} no {PREPROCESSOR_CONFIG}", "copy it from the model")
    return path, config


def _fits(key: str, value: Any) -> bool:
    """Whether a setting is of its kind and moderate: transformers computes with whatever it gets."""
    if key == "size":
        return isinstance(value, dict) and all(_fits("pixels", side) for side in value.values())
    if key in ("pixels", "min_pixels", "max_pixels"):
        return type(value) is int and 1 <= value <= MAX_PIXELS
    if key in ("patch_size", "temporal_patch_size", "merge_size"):
        return type(value) is int and 1 <= value <= _MAX_PATCH
    if key in ("image_mean", "image_std"):
        floor = 0.0 if key == "image_std" else -1e3
        return isinstance(value, list) and len(value) == 3 and all(type(v) in (int, float) and floor < v < 1e3 for v in value)
    if key == "resample":
        return type(value) is int and 0 <= value <= 5
    if key == "rescale_factor":
        return type(value) in (int, float) and 0 < value <= 1
    return type(value) is bool


class QwenPreprocessor:
    """Qwen2-VL's image processor (which Qwen3-VL uses): transformers' own, on PIL; patches in merge-block order."""

    KINDS = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil")
    SETTINGS = (
        "size", "min_pixels", "max_pixels", "patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std",
        "do_resize", "do_rescale", "do_normalize", "do_convert_rgb", "rescale_factor", "resample",
    )  # fmt: skip

    image_token = "<|image_pad|>"
    reserved_tokens = ("<|image_pad|>", "<|video_pad|>", "<|audio_pad|>")
    around = ()

    def __init__(self, config: dict[str, Any], path: Path) -> None:
        settings = {key: config[key] for key in self.SETTINGS if config.get(key) is not None}
        for key, value in settings.items():
            if not _fits(key, value):
                raise CheckpointError(f"{path}: {key} = {str(value)[:100]!r} is out of range", "copy the file from the model again")
        try:
            self._processor = self._build(settings)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: {error}") from None
        self.merge_size = int(self._processor.merge_size)

    @staticmethod
    def _build(settings: dict[str, Any]) -> Any:
        # The module itself, not transformers.AutoImageProcessor: that one insists on torchvision for the "Fast" name.
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        return Qwen2VLImageProcessorPil(**settings)

    def __call__(self, images: list[ImageInput]) -> tuple[np.ndarray, np.ndarray]:
        """As :class:`Preprocessor`; an image more than 200 times as long as it is wide is refused."""
        patches, grids = [], []
        for image in images:
            rgb = load_rgb(image)
            try:
                result = self._processor([rgb], return_tensors="np")
            except ValueError as error:
                name = image if isinstance(image, str | Path) else f"{rgb.width}x{rgb.height}"
                raise UserError(f"image {name} ({rgb.width}x{rgb.height}) is refused: {error}") from None
            patches.append(result["pixel_values"].astype(np.float32, copy=False))
            grids.append(result["image_grid_thw"].astype(np.int64, copy=False))
        return np.concatenate(patches), np.concatenate(grids)

    def num_tokens(self, grid: np.ndarray) -> int:
        return image_tokens(grid, self.merge_size)


class GlmPreprocessor(QwenPreprocessor):
    """GLM-4.1V's image processor, which GLM-4.5V and GLM-4.6V use: Qwen2-VL's with other rules for the size."""

    KINDS = tuple(f"{name}ImageProcessor{form}" for name in ("Glm4v", "Glm46V") for form in ("", "Fast", "Pil"))
    SETTINGS = tuple(name for name in QwenPreprocessor.SETTINGS if name not in ("min_pixels", "max_pixels"))

    image_token = "<|image|>"
    reserved_tokens = ("<|image|>", "<|video|>")

    @staticmethod
    def _build(settings: dict[str, Any]) -> Any:
        from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

        return Glm4vImageProcessorPil(**settings)


class ErniePreprocessor(GlmPreprocessor):
    """ERNIE-4.5-VL's image processor: Qwen2-VL's with patches of one frame."""

    KINDS = tuple(f"{name}ImageProcessor{form}" for name in ("Ernie4_5_VLMoe", "Ernie4_5_VL_Moe") for form in ("", "Fast", "Pil"))

    image_token = "<|IMAGE_PLACEHOLDER|>"
    reserved_tokens = ("<|IMAGE_PLACEHOLDER|>", "<|IMAGE_START|>", "<|IMAGE_END|>", "<|VIDEO_PLACEHOLDER|>")

    @staticmethod
    def _build(settings: dict[str, Any]) -> Any:
        from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import Ernie4_5_VLMoeImageProcessorPil

        return Ernie4_5_VLMoeImageProcessorPil(**settings)


class NavitPreprocessor:
    """Kimi's image processors: the image's own size, shrunk where it has too many patches, padded to whole merged patches.

    Patches are in raster order. The two kinds differ in their settings' names, and in what happens to an image that is too long
    on one side: the published one refuses it, transformers' one shrinks it.
    """

    KINDS = ("KimiVLImageProcessor", "Kimi_K25ImageProcessor")
    SETTINGS = (
        "patch_size", "merge_kernel_size", "merge_size", "in_token_limit", "max_patches", "size", "pad_input", "num_pooled_tokens",
        "image_mean", "image_std", "do_resize", "do_rescale", "do_normalize", "do_convert_rgb", "rescale_factor", "resample",
    )  # fmt: skip

    image_token = "<|media_pad|>"
    reserved_tokens = ("<|media_pad|>", "<|kimi_k25_video_placeholder|>")
    around = ()

    _MAX_SIDE = 512
    """Patches on a side that the published tower has rotary angles for."""

    def __init__(self, config: dict[str, Any], path: Path) -> None:
        fixed = {"pad_input": True, "do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True,
                 "rescale_factor": 1 / 255, "resample": int(Image.Resampling.BICUBIC)}
        for key, value in fixed.items():
            if config.get(key, value) != value:
                raise UnsupportedError(f"{path}: {key} = {config[key]!r}", f"supported: {value!r}")
        published = "in_token_limit" in config or "merge_kernel_size" in config
        if published and "pad_input" not in config:
            raise UnsupportedError(f"{path}: pad_input is not given, which means cropping", "supported: true")
        try:
            merge = config.get("merge_kernel_size", config.get("merge_size", 2))
            self.merge_size, *other = (int(side) for side in (merge if isinstance(merge, list) else [merge]))
            self.patch_size = int(config.get("patch_size", 14))
            self._max_patches = int(config.get("in_token_limit", 4096) if published else config.get("max_patches", 16384))
            side = self._MAX_SIDE if published else {int(n) for n in config.get("size", {"max_height": self._MAX_SIDE}).values()}
            self._shrinks_sides = not published
            self._max_side = side if isinstance(side, int) else side.pop()
            self._mean, self._std = (np.asarray(config.get(key, [0.5] * 3), np.float32) for key in ("image_mean", "image_std"))
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise CheckpointError(f"{path}: {error}") from None
        sizes = (self.merge_size, self.patch_size, self._max_patches, self._max_side)
        if any(o != self.merge_size for o in other) or not (isinstance(side, int) or not side) or min(sizes) < 1 or not (
            self._mean.shape == self._std.shape == (3,) and bool((self._std > 0).all())
        ):
            raise CheckpointError(f"{path}: merge {merge}, sizes {sizes}, mean {self._mean.tolist()}, std {self._std.tolist()}",
                                  "expected a square merge kernel, one side limit, positive sizes and three channels")

    def __call__(self, images: list[ImageInput]) -> tuple[np.ndarray, np.ndarray]:
        """As :class:`Preprocessor`; an image of 512 or more patches on a side is refused where it would not be shrunk."""
        patches, grids = [], []
        for image in images:
            rgb = load_rgb(image)
            width, height = self.resized(rgb.width, rgb.height)
            if (width, height) != rgb.size:
                rgb = rgb.resize((width, height), Image.Resampling.BICUBIC)
            unit = self.patch_size * self.merge_size
            rows, columns = (-(-side // unit) * self.merge_size for side in (height, width))
            if not self._shrinks_sides and max(rows, columns) >= self._max_side:
                raise UserError(f"an image of {width}x{height} makes {columns}x{rows} patches, {self._max_side - 1} a side are the limit",
                                "use an image that is less long")
            pixels = np.zeros((rows * self.patch_size, columns * self.patch_size, 3), np.uint8)
            pixels[:height, :width] = np.asarray(rgb)
            values = (pixels.astype(np.float32) / np.float32(255) - self._mean) / self._std
            blocks = values.reshape(rows, self.patch_size, columns, self.patch_size, 3).transpose(0, 2, 4, 1, 3)
            patches.append(blocks.reshape(rows * columns, -1))
            grids.append([1, rows, columns])
        return np.concatenate(patches), np.array(grids, np.int64)

    def num_tokens(self, grid: np.ndarray) -> int:
        return image_tokens(grid, self.merge_size)

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after shrinking, before padding."""
        count = max(1, width // self.patch_size) * max(1, height // self.patch_size)
        scale = min(1.0, math.sqrt(self._max_patches / count))
        if not self._shrinks_sides:
            return max(1, int(width * scale)), max(1, int(height * scale))
        longest = self._max_side * self.patch_size
        scale = min(scale, longest / width, longest / height)
        return (min(longest, max(1, int(width * scale))), min(longest, max(1, int(height * scale))))


_LOADERS = (QwenPreprocessor, GlmPreprocessor, ErniePreprocessor, NavitPreprocessor, AriaPreprocessor, TilePreprocessor)
