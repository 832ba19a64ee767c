"""Image files to upright RGB, with limits."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ecmfq_export.errors import UserError

MAX_PIXELS = 64_000_000
"""Decoded pixels of one input image; a larger one is refused from its header, before it is decoded."""

SENT_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""What :func:`decode_rgb` reads: Pillow has dozens of decoders, and data from others get only those that images on the web need."""

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
    return _open(path, f"image {path}", max_pixels, None)


def decode_rgb(data: bytes, what: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The same for an image file's bytes, in one of SENT_FORMATS.

    Args:
        what: names the image in errors, e.g. ``"image 2"``.

    Raises:
        UserError: another format, damaged, cut short, or too large.
    """
    return _open(io.BytesIO(data), what, max_pixels, SENT_FORMATS)


def _open(source: Path | io.BytesIO, what: str, max_pixels: int, formats: tuple[str, ...] | None) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is the stricter one
            with Image.open(source, formats=formats) as opened:
                return _to_rgb(opened, what, max_pixels)
    except FileNotFoundError:
        raise UserError(f"no image file at {source}") from None
    except IsADirectoryError:
        raise UserError(f"{source} is a directory, not an image file") from None
    except UnidentifiedImageError:
        raise UserError(f"{what} is in no format that is read here, or damaged", "use PNG, JPEG, WebP, BMP or GIF") from None
    except Image.DecompressionBombError as error:
        raise UserError(f"{what} is too large: {error}", f"scale it below {max_pixels / 1e6:g} megapixels") from None
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError) as error:
        # Pillow's decoders raise any of these on truncated or inconsistent files.
        raise UserError(f"{what} cannot be read: {error}", "check that the file is complete") from None


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
