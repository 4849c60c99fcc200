"""Shards → tensors, through the model's own decode and transform: training and serving cannot disagree."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from airloom.contract import DataCard, StageInputError
from airloom.contract.card import CARD_FILE
from airloom.contract.shards import read_split
from image_classifier.config import ModelConfig
from image_classifier.decode import decode
from image_classifier.transforms import normalise


@dataclass(frozen=True)
class Examples:
    """One split in memory.

    Attributes:
        ids: N row ids.
        images: (N, 1, H, W) float32, as the network takes them.
        labels: (N,) int64, indices into the model's classes.
    """

    ids: list[str]
    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.ids)


def model_config(dataset: Path, *, width: int) -> ModelConfig:
    """The configuration of a network for this dataset, from its card.

    Raises:
        StageInputError: the card lacks what the network needs.
    """
    card = DataCard.read(dataset / CARD_FILE)
    missing = [name for name in ("image_size", "pixel_mean", "pixel_std") if name not in card.statistics]
    if missing:
        raise StageInputError(f"{dataset / CARD_FILE}: statistics lacks {', '.join(missing)}: found {card.statistics}")
    if card.statistics["pixel_std"] == 0:
        raise StageInputError(f"{dataset / CARD_FILE}: all training pixels are equal, so there is nothing to learn")
    return ModelConfig(
        classes=card.classes,
        image_size=int(card.statistics["image_size"]),
        width=width,
        pixel_mean=card.statistics["pixel_mean"],
        pixel_std=card.statistics["pixel_std"],
    )


def load_examples(dataset: Path, split: str, config: ModelConfig) -> Examples:
    """Read a split in its stored order.

    Raises:
        StageInputError: it is empty, or has a label that the model does not know.
        ContractError: there is no such split.
    """
    table = read_split(dataset, split, ["id", "image", "label"])
    if not table.num_rows:
        raise StageInputError(f"the split {split!r} of {dataset} has no rows")
    indices = {label: index for index, label in enumerate(config.classes)}
    labels = table["label"].to_pylist()
    unknown = sorted(set(labels) - set(indices))
    if unknown:
        raise StageInputError(f"the split {split!r} has labels that the card's classes lack: {', '.join(unknown)}")
    images = [
        normalise(decode(image, image_size=config.image_size), mean=config.pixel_mean, std=config.pixel_std)
        for image in table["image"].to_pylist()
    ]
    return Examples(
        ids=table["id"].to_pylist(),
        images=torch.from_numpy(np.stack(images)),
        labels=torch.tensor([indices[label] for label in labels]),
    )
