"""Turn the bytes of any picture into canonical pixels: the one implementation that preprocessing and models share.

A model's `decode` calls this on what a client sends, and preprocessing on what it packs into shards, so
that a raw file and its packed form become the same tensor. Everything here is integer arithmetic: equal
bytes give equal pixels.
"""

from __future__ import annotations

import io
from enum import StrEnum
from typing import TYPE_CHECKING, Literal

from airloom.contract.predictor import InputRejectedError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

Mode = Literal["L", "RGB"]

MEDIA_TYPES = ("image/png", "image/jpeg", "image/webp", "image/bmp", "image/gif")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")

# A small file can unpack to gigabytes; 64 megapixels is more than any camera that we know of takes.
MAX_PIXELS = 64_000_000


class PictureFault(StrEnum):
    """Why bytes are no usable picture."""

    EMPTY = "empty"
    NOT_AN_IMAGE = "not_an_image"
    TRUNCATED = "truncated"
    TOO_LARGE = "too_large"
    UNSUPPORTED_MODE = "unsupported_mode"


class PictureRejectedError(InputRejectedError):
    """Bytes that are no usable picture; `fault` says which kind, for counting."""

    def __init__(self, fault: PictureFault, message: str) -> None:
        super().__init__(message)
        self.fault = fault


def decode_picture(content: bytes, *, size: int, mode: Mode = "L") -> NDArray[np.uint8]:
    """Decode a picture into `size` x `size` canonical pixels: (H, W) for mode `L`, (H, W, 3) in the order R, G, B.

    Turned as its EXIF tag says, transparent parts on black, 16 bits reduced to 8, the first frame of several,
    scaled to the square without keeping the aspect ratio. Canonical pixels come back unchanged.

    Raises:
        PictureRejectedError: the bytes are empty, truncated, too large or no picture.
    """
    import numpy as np
    from PIL import Image

    picture = _as_eight_bit(_open(content), mode)
    if picture.size != (size, size):
        picture = picture.resize((size, size), Image.Resampling.BILINEAR)
    return np.array(picture, dtype=np.uint8)


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """Encode canonical pixels as a PNG without metadata: equal pixels give equal bytes with the same Pillow."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()


def _open(content: bytes) -> Image.Image:
    """Open and load every pixel: a header alone proves nothing."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not content:
        raise PictureRejectedError(PictureFault.EMPTY, "the picture is empty (0 bytes)")
    try:
        picture = Image.open(io.BytesIO(content), formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise PictureRejectedError(PictureFault.TOO_LARGE, f"the picture is too large: {error}") from error
    except UnidentifiedImageError as error:
        raise PictureRejectedError(
            PictureFault.NOT_AN_IMAGE,
            f"{len(content)} bytes that are no picture; allowed are {', '.join(MEDIA_TYPES)}",
        ) from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise PictureRejectedError(PictureFault.TRUNCATED, f"the picture is broken: {error}") from error
    if picture.width * picture.height > MAX_PIXELS:
        raise PictureRejectedError(
            PictureFault.TOO_LARGE,
            f"the picture has {picture.width} x {picture.height} pixels; at most {MAX_PIXELS:,} are allowed",
        )
    try:
        picture.load()
        return ImageOps.exif_transpose(picture)
    # Pillow's plugins raise all of these on broken files, depending on where the file breaks off.
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError) as error:
        raise PictureRejectedError(PictureFault.TRUNCATED, f"the picture is broken or truncated: {error}") from error


def _as_eight_bit(picture: Image.Image, mode: Mode) -> Image.Image:
    import numpy as np
    from PIL import Image

    if picture.mode == mode:
        return picture
    if picture.mode.startswith("I;16"):
        # Pillow's own conversion clips 16-bit values at 255 and so turns most of a picture white.
        high_bytes = (np.asarray(picture).astype(np.uint16) >> 8).astype(np.uint8)
        return Image.fromarray(high_bytes).convert(mode)
    if picture.mode in {"I", "F"}:
        raise PictureRejectedError(
            PictureFault.UNSUPPORTED_MODE, f"pixels of mode {picture.mode!r} have no known range; use 8 or 16 bits"
        )
    if picture.has_transparency_data:
        coloured = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", coloured.size, (0, 0, 0, 255)), coloured).convert(mode)
    return picture.convert(mode)
