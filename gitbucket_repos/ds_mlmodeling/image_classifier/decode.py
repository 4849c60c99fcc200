"""Bytes → sample: the canonical pixels that preprocessing made as well."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from airloom.contract.pictures import decode_picture


def decode(content: bytes, *, image_size: int) -> NDArray[np.uint8]:
    """Decode a picture of any size into grayscale pixels (H, W), 0…255.

    Raises:
        InputRejectedError: the bytes are empty, truncated, too large or no picture.
    """
    return decode_picture(content, size=image_size, mode="L")
