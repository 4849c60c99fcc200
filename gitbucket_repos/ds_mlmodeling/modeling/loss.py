"""What training makes small."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def classification_loss(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of logits (N, L) against class indices (N,), in nats."""
    return functional.cross_entropy(logits, labels, label_smoothing=label_smoothing)
