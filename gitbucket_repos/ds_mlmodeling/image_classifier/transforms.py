"""Sample → input tensor."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def normalise(pixels: NDArray[np.uint8], *, mean: float, std: float) -> NDArray[np.float32]:
    """Pixels (H, W) of 0…255 → (1, H, W) with the training pixels' mean at 0 and deviation at 1."""
    unit = pixels.astype(np.float32) / np.float32(255)
    return ((unit - np.float32(mean)) / np.float32(std))[np.newaxis]
