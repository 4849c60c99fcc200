"""The network. Shapes: N rows, C channels, H x W pixels, K features, L classes."""

from __future__ import annotations

from torch import Tensor, nn

from image_classifier.config import ModelConfig


class Network(nn.Module):  # type: ignore[misc]  # torch is untyped to this project's mypy
    """A small convolutional classifier: three blocks, each of half the size and twice the channels.

    The head is linear on averaged features, so that a class's activation map is a weighted sum of the
    feature maps (see `explain`).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        narrow, middle, wide = config.width, 2 * config.width, 4 * config.width
        self.features = nn.Sequential(
            *_block(1, narrow), nn.MaxPool2d(2), *_block(narrow, middle), nn.MaxPool2d(2), *_block(middle, wide)
        )
        self.head = nn.Linear(wide, len(config.classes))

    def embed(self, images: Tensor) -> Tensor:
        """(N, 1, H, W) → (N, K): features averaged over the picture."""
        # A plain mean: adaptive pooling has no deterministic gradient on a GPU.
        return self.features(images).mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """(N, 1, H, W) → (N, L): logits."""
        return self.head(self.embed(images))


def _block(channels_in: int, channels_out: int) -> list[nn.Module]:
    """Two 3 x 3 convolutions that keep the size."""
    layers: list[nn.Module] = []
    for channels in (channels_in, channels_out):
        layers += [
            # The bias would be undone by the normalisation after it.
            nn.Conv2d(channels, channels_out, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(inplace=True),
        ]
    return layers
