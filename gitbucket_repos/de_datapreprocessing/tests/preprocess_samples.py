"""Sample pictures, and the name that the `preprocess` fixture's type has in tests."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from airloom.contract import StageResult

REPO = Path(__file__).parent.parent

Preprocess = Callable[..., StageResult]


def png(seed: int, size: tuple[int, int] = (28, 28), mode: str = "L") -> bytes:
    """A random picture that is the same for the same seed."""
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, *channels), dtype=np.uint8)
    return encoded(Image.fromarray(pixels))


def encoded(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """A picture's bytes in some format."""
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return buffer.getvalue()
