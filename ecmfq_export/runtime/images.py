"""Image files to upright RGB, with limits, and RGB to patches by transformers' PIL image processor."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ecmfq_export.errors import CheckpointError, UnsupportedError, UserError

PREPROCESSOR_CONFIG = "preprocessor_config.json"
MAX_PIXELS = 64_000_000
"""Decoded pixels of one input image; a larger one is refused from its header, before it is decoded."""

_QWEN_PROCESSORS = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil")
_SETTINGS = (
    "size", "min_pixels", "max_pixels", "patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std",
    "do_resize", "do_rescale", "do_normalize", "do_convert_rgb", "rescale_factor", "resample",
)  # fmt: skip
_INERT = (
    "image_processor_type", "processor_class", "default_to_square", "device", "disable_grouping", "input_data_format",
    "return_tensors", "data_format", "crop_size", "do_center_crop", "do_pad", "pad_size", "image_processor",
    "feature_extractor_type", "video_processor_type", "auto_map",
)  # fmt: skip

ImageInput = str | Path | Image.Image | np.ndarray


def load_rgb(image: ImageInput, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open, check and convert one image; transparency goes onto white and EXIF orientation is applied.

    Args:
        image: a path, a PIL image, or an array [H, W], [H, W, 3] or [H, W, 4] of uint8.
        max_pixels: refuse an image of more pixels, from its header.

    Raises:
        UserError: no such file, no image, damaged, too large, or a pixel format without a defined 8-bit form.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))):
            raise UserError(
                f"image array of shape {list(image.shape)} and dtype {image.dtype}",
                "pass uint8 arrays [height, width], [height, width, 3] or [height, width, 4]",
            )
        image = Image.fromarray(image)
    if isinstance(image, Image.Image):
        return _to_rgb(image, f"image {image.width}x{image.height}", max_pixels)
    path = Path(image)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is the stricter one
            with Image.open(path) as opened:
                return _to_rgb(opened, f"image {path}", max_pixels)
    except FileNotFoundError:
        raise UserError(f"no image file at {path}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a directory, not an image file") from None
    except UnidentifiedImageError:
        raise UserError(
            f"image {path} is in no format that Pillow reads, or damaged", "use PNG, JPEG, WebP, BMP or GIF"
        ) from None
    except Image.DecompressionBombError as error:
        raise UserError(
            f"image {path} is too large: {error}", f"scale it below {max_pixels / 1e6:g} megapixels"
        ) from None
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError) as error:
        # Pillow's decoders raise any of these on truncated or inconsistent files.
        raise UserError(f"image {path} cannot be read: {error}", "check that the file is complete") from None


def _to_rgb(image: Image.Image, what: str, max_pixels: int) -> Image.Image:
    if image.width * image.height > max_pixels:
        raise UserError(
            f"{what} has {image.width}x{image.height} = {image.width * image.height / 1e6:.1f} megapixels, "
            f"more than the limit of {max_pixels / 1e6:g}",
            "scale it down first; the model sees far fewer pixels anyway",
        )
    if image.mode == "F":
        raise UserError(f"{what} holds floating-point pixels, which have no defined range", "convert it to 8 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own conversion clips 16-bit grey at 255, which turns most of it white.
        grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        image = Image.fromarray(grey)
    image = ImageOps.exif_transpose(image)
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
    return image.convert("RGB")


class ImagePreprocessor:
    """RGB images to patches, as ``preprocessor_config.json`` of a directory says.

    Attributes:
        patch_size, temporal_patch_size, merge_size: from the config.
    """

    def __init__(self, directory: Path) -> None:
        path = Path(directory) / PREPROCESSOR_CONFIG
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{directory} has no {PREPROCESSOR_CONFIG}", "copy it from the model") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None
        kind = config.get("image_processor_type") if isinstance(config, dict) else None
        if kind not in _QWEN_PROCESSORS:
            raise UnsupportedError(
                f"{path}: image_processor_type {kind!r}", f"supported: {', '.join(_QWEN_PROCESSORS)}"
            )
        unknown = sorted(set(config) - set(_SETTINGS) - set(_INERT))
        if unknown:
            raise UnsupportedError(f"{path}: unknown settings {', '.join(unknown)}", "they could change what it does")
        # The module itself, not transformers.AutoImageProcessor: that one insists on torchvision for the "Fast" name.
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        settings = {key: config[key] for key in _SETTINGS if config.get(key) is not None}
        try:
            self._processor = Qwen2VLImageProcessorPil(**settings)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: {error}") from None
        self.patch_size = int(self._processor.patch_size)
        self.temporal_patch_size = int(self._processor.temporal_patch_size)
        self.merge_size = int(self._processor.merge_size)

    def __call__(self, images: list[ImageInput]) -> tuple[np.ndarray, np.ndarray]:
        """Patches [N, patch_features] float32 and grids [len(images), 3] int64 of at least one image.

        Raises:
            UserError: an image that cannot be read, or one more than 200 times as long as it is wide.
        """
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
