"""Show what the network looked at: a class activation map over the picture.

With a linear head on averaged features, the sum of the feature maps weighted by the head's row for a class
is exactly what that class's logit averages (Zhou et al. 2016, arXiv:1512.04150); Grad-CAM gives the same
map up to scale (Selvaraju et al. 2017, arXiv:1610.02391), and this needs no gradient.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from airloom.contract.pictures import encode_png
from image_classifier.network import Network

PANEL_SIZE = 224
GAP = 8

# Black, purple, orange, yellow: brightness rises throughout, so it reads in print and for the colour-blind.
_COLOURS = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]], dtype=np.float32)


def activation_map(network: Network, image: torch.Tensor) -> NDArray[np.float32]:
    """How much each place of an image (1, 1, H, W) speaks for the predicted class: (H, W) of 0…1."""
    with torch.inference_mode():
        maps = network.features(image)  # (1, K, h, w)
        predicted = int(network.head(maps.mean(dim=(2, 3))).argmax())
        evidence = torch.einsum("k,nkhw->nhw", network.head.weight[predicted], maps).clamp(min=0)
        peak = evidence.max()
        scaled = evidence / peak if peak > 0 else evidence
        large = functional.interpolate(scaled[None], size=image.shape[2:], mode="bilinear", align_corners=False)
    return large[0, 0].cpu().numpy().astype(np.float32)  # type: ignore[no-any-return]


def overlay(pixels: NDArray[np.uint8], heat: NDArray[np.float32]) -> bytes:
    """PNG of the picture and, beside it, the same picture under its heat map."""
    scale = max(1, PANEL_SIZE // pixels.shape[0])
    picture = np.repeat(np.repeat(pixels, scale, axis=0), scale, axis=1)
    plain = np.repeat(picture[..., np.newaxis], 3, axis=2).astype(np.float32)
    strength = _enlarge(heat, picture.shape[0])
    mixed = 0.35 * plain + 0.65 * _colour(strength)
    gap = np.full((picture.shape[0], GAP, 3), 255, dtype=np.float32)
    return encode_png(np.concatenate([plain, gap, mixed], axis=1).round().astype(np.uint8))


def _colour(strength: NDArray[np.float32]) -> NDArray[np.float32]:
    """0…1 → colours (…, 3) of 0…255."""
    stops = np.linspace(0, 1, len(_COLOURS))
    channels = [np.interp(strength, stops, _COLOURS[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).astype(np.float32)


def _enlarge(heat: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    large = functional.interpolate(torch.from_numpy(heat)[None, None], size=size, mode="bilinear", align_corners=False)
    return large[0, 0].numpy()  # type: ignore[no-any-return]
