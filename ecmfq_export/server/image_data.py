"""Images of a request: ``data:`` URIs to RGB, with limits; nothing is ever fetched."""

from __future__ import annotations

import base64
import binascii
import re

from PIL import Image

from ecmfq_export.errors import UserError
from ecmfq_export.runtime.images import decode_rgb
from ecmfq_export.server.api_error import ApiError

_DATA = re.compile(r"data:image/(png|jpe?g|webp|gif|bmp);base64,", re.IGNORECASE)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,20}:")


def decode_image(url: str, param: str, max_pixels: int) -> Image.Image:
    """The image in a ``data:image/...;base64,`` URI, upright, on white, in RGB.

    Args:
        param: the field that holds it, for errors.
        max_pixels: a larger image is refused from its header, before it is decoded.

    Raises:
        ApiError: 400: another kind of URL, broken base64, or an image that is damaged, too large or in an unknown format.
    """
    match = _DATA.match(url)
    if match is None:
        scheme = _SCHEME.match(url)
        kind = "no URL" if scheme is None else f"'{scheme[0]}' URL"
        raise ApiError(400, f"'{param}' is a {kind}, and this server fetches nothing: send the image itself as "
                       "data:image/png;base64,... (png, jpeg, webp, gif or bmp)", param=param, code="invalid_image_url")
    try:
        data = base64.b64decode(url[match.end():], validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, f"'{param}' holds broken base64", param=param, code="invalid_base64") from None
    try:
        return decode_rgb(data, "the image", max_pixels)
    except UserError as error:
        raise ApiError(400, f"'{param}': {error.what}" + f" ({error.fix})" * bool(error.fix), param=param, code="invalid_image") from None
