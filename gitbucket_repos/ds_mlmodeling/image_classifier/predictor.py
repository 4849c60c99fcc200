"""The predictor: `airloom.contract.predictor.Predictor` for pictures and classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from image_classifier.config import CONFIG_FILE, WEIGHTS_FILE, ModelConfig
from image_classifier.decode import decode
from image_classifier.explain import activation_map, overlay
from image_classifier.network import Network
from image_classifier.transforms import normalise


class ImageClassifier:
    """Says what a picture shows. Shapes: N rows, H x W pixels, K features, L classes."""

    def __init__(self, config: ModelConfig, network: Network, device: torch.device) -> None:
        self.config = config
        self.device = device
        self._network = network.to(device).eval()

    def decode(self, content: bytes) -> NDArray[np.uint8]:
        """Picture bytes → pixels (H, W). Raises InputRejectedError."""
        return decode(content, image_size=self.config.image_size)

    def transform(self, sample: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Pixels (H, W) → input tensor (1, H, W)."""
        return normalise(sample, mean=self.config.pixel_mean, std=self.config.pixel_std)

    def predict(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """(N, 1, H, W) → probabilities (N, L)."""
        with torch.inference_mode():
            probabilities = self._network(self._tensor(batch)).softmax(dim=1)
        return probabilities.cpu().numpy()  # type: ignore[no-any-return]

    def encode(self, output: NDArray[np.float32]) -> dict[str, Any]:
        """One row of `predict` → label, its probability and every class's, to 4 decimals.

        What follows the fourth decimal depends on how many rows stood in the batch, and says nothing.
        """
        values = [round(value, 4) for value in output.tolist()]
        best = int(output.argmax())
        return {
            "label": self.config.classes[best],
            "probability": values[best],
            "probabilities": dict(zip(self.config.classes, values, strict=True)),
        }

    def embed(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """(N, 1, H, W) → features (N, K)."""
        with torch.inference_mode():
            return self._network.embed(self._tensor(batch)).cpu().numpy()  # type: ignore[no-any-return]

    def explain(self, sample: NDArray[np.uint8]) -> bytes:
        """PNG of the picture beside its heat map for the predicted class."""
        image = self._tensor(self.transform(sample)[np.newaxis])
        return overlay(sample, activation_map(self._network, image))

    def _tensor(self, batch: NDArray[np.float32]) -> torch.Tensor:
        return torch.from_numpy(batch).to(self.device)


def load(folder: Path) -> ImageClassifier:
    """Load the artifact in `folder`: what `entry` in model.json names."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = ModelConfig.read(folder / CONFIG_FILE)
    network = Network(config)
    network.load_state_dict(torch.load(folder / WEIGHTS_FILE, map_location=device, weights_only=True))
    return ImageClassifier(config, network, device)
