"""Turn one raw file into a row, or into the reason why it cannot be one."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from airloom.contract import RejectedRow, sha256_bytes
from airloom.contract.pictures import PictureRejectedError, decode_picture, encode_png
from preprocessing.source import Entry, label_of


@dataclass(frozen=True, slots=True)
class Row:
    """One picture that can be learned from.

    Attributes:
        image: canonical PNG: `image_size` squared, 8-bit grayscale.
        source: key of the raw file.
        content_digest: SHA-256 of the pixels. The split hangs on it and not on `image`'s bytes, which another
            version of the PNG encoder may write differently.
        pixel_sum, pixel_square_sum: over all pixels as 0…255, for the card's statistics.
    """

    image: bytes
    label: str
    source: str
    size_bytes: int
    content_digest: str
    pixel_sum: int
    pixel_square_sum: int

    @property
    def id(self) -> str:
        return self.content_digest[:16]


def decode_row(entry: Entry, content: bytes, *, prefix: str, image_size: int) -> Row | RejectedRow:
    """Decode a raw file. Equal bytes give an equal row."""
    label = label_of(entry.key, prefix)
    if label is None:
        found = entry.key.removeprefix(prefix)
        return _rejected(entry, "no_label", f"expected <label>/<file>, found {found}")
    try:
        pixels = decode_picture(content, size=image_size, mode="L")
    except PictureRejectedError as error:
        return _rejected(entry, error.fault.value, str(error))
    wide = pixels.astype(np.int64)
    return Row(
        image=encode_png(pixels),
        label=label,
        source=entry.key,
        size_bytes=entry.size_bytes,
        content_digest=hashlib.sha256(pixels.tobytes()).hexdigest(),
        pixel_sum=int(wide.sum()),
        pixel_square_sum=int((wide * wide).sum()),
    )


def image_digest(row: Row) -> str:
    """What the `sha256` column holds: of the bytes in the `image` column."""
    return sha256_bytes(row.image)


def _rejected(entry: Entry, reason: str, detail: str) -> RejectedRow:
    return RejectedRow(name=entry.key, reason=reason, detail=detail, size_bytes=entry.size_bytes)
