"""The model that every server serves: a small residual network on 32 x 32 pictures, with fixed random weights.

This file is the `code/` of a model artifact, as training writes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from airloom.contract.pictures import decode_picture, encode_png

SIZE = 32
CLASSES = [f"class_{index}" for index in range(10)]


class Block(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels_in, channels, 3, stride, 1)
        self.second = nn.Conv2d(channels, channels, 3, 1, 1)
        self.shortcut = nn.Conv2d(channels_in, channels, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.second(functional.relu(self.first(x))) + self.shortcut(x))


class SmallResNet(nn.Sequential):
    """Three stages of two blocks with 16, 32 and 64 channels (ResNet-14)."""

    def __init__(self) -> None:
        blocks: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1), nn.ReLU()]
        channels = 16
        for width in (16, 32, 64):
            for _ in range(2):
                blocks.append(Block(channels, width, 2 if width > channels else 1))
                channels = width
        super().__init__(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, len(CLASSES)))


class ResNetPredictor:
    def __init__(self, folder: Path) -> None:
        self.network = SmallResNet()
        self.network.load_state_dict(torch.load(folder / "weights" / "weights.pt", weights_only=True))
        self.network.eval()

    def decode(self, content: bytes) -> Any:
        return decode_picture(content, size=SIZE, mode="RGB")

    def transform(self, sample: Any) -> Any:
        return (sample.astype(np.float32) / 127.5 - 1).transpose(2, 0, 1)

    def predict(self, batch: Any) -> Any:
        with torch.inference_mode():
            return torch.softmax(self.network(torch.from_numpy(np.ascontiguousarray(batch))), 1).numpy()

    def encode(self, output: Any) -> dict[str, Any]:
        values = [round(float(value), 6) for value in output]
        return {"label": CLASSES[int(output.argmax())], "probabilities": dict(zip(CLASSES, values, strict=True))}

    def embed(self, batch: Any) -> Any:
        with torch.inference_mode():
            return self.network[:-1](torch.from_numpy(batch)).numpy()

    def explain(self, sample: Any) -> bytes:
        """How much each pixel moves the likeliest class's logit: the gradient's size, the largest of three channels."""
        pixels = torch.from_numpy(self.transform(sample))[None].requires_grad_()
        self.network(pixels).max().backward()
        seen = pixels.grad[0].abs().amax(dim=0)
        return encode_png((255 * seen / seen.max()).numpy().astype(np.uint8))


def load(folder: Path) -> ResNetPredictor:
    return ResNetPredictor(folder)
