"""What a network is built from: stored beside its weights."""

from __future__ import annotations

from pydantic import Field

from airloom.contract import Frozen

CONFIG_FILE = "weights/config.json"
WEIGHTS_FILE = "weights/network.pt"


class ModelConfig(Frozen):
    """`weights/config.json`.

    Attributes:
        classes: labels in the order of the network's outputs.
        image_size: side of the square input in pixels.
        width: channels of the first block; each further block doubles them.
        pixel_mean, pixel_std: of the training pixels as 0…1.
    """

    classes: list[str] = Field(min_length=2)
    image_size: int = Field(ge=8)
    width: int = Field(ge=1)
    pixel_mean: float
    pixel_std: float = Field(gt=0)
