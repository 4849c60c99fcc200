"""Vary training pictures a little. Training alone uses this: nothing that is measured or served is augmented."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from modeling.params import TrainParams


def augment(images: Tensor, params: TrainParams, generator: torch.Generator) -> Tensor:
    """Turn, scale and shift each picture of (N, 1, H, W) by its own amounts, drawn from `generator`.

    What comes in from outside is filled with the nearest edge pixel: the mean-normalised zero would be gray.
    """
    rows = images.shape[0]
    # Drawn on the CPU, so that a GPU sees the same amounts.
    drawn = torch.rand((4, rows), generator=generator) * 2 - 1
    angle = drawn[0] * math.radians(params.max_rotation)
    scale = 1 + drawn[1] * params.max_scale
    # Affine coordinates run from -1 to 1 over the picture: twice the fraction.
    shift_x, shift_y = drawn[2] * 2 * params.max_shift, drawn[3] * 2 * params.max_shift
    cosine, sine = torch.cos(angle) * scale, torch.sin(angle) * scale
    matrices = torch.stack(
        [torch.stack([cosine, -sine, shift_x], dim=1), torch.stack([sine, cosine, shift_y], dim=1)], dim=1
    ).to(images.device)
    grid = functional.affine_grid(matrices, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
