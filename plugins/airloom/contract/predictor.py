"""The interface of the code that every model artifact carries: one implementation from training to serving.

Shape legend: `N` rows in a batch, the rest is the model's own affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class InputRejectedError(ValueError):
    """The bytes of a request cannot be used: the message may be shown to whoever sent them."""


@runtime_checkable
class Predictor(Protocol):
    """Decode → transform → predict → encode, and what drift and explanations need.

    `decode` and `transform` handle one item and may be called from several threads at once.
    `predict` and `embed` take a batch and are called from one thread at a time.
    """

    def decode(self, content: bytes) -> Any:
        """Turn what a client sends, or what a shard holds, into a sample.

        Raises:
            InputRejectedError: the bytes are empty, truncated, too large or of another type.
        """
        ...

    def transform(self, sample: Any) -> NDArray[np.float32]:
        """Turn a sample into the model's input tensor, without the batch axis."""
        ...

    def predict(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """Turn a batch (N, …) into raw outputs (N, …)."""
        ...

    def encode(self, output: NDArray[np.float32]) -> dict[str, Any]:
        """Turn one row of `predict`'s outputs into the JSON object that a client gets."""
        ...

    def embed(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """Turn a batch (N, …) into feature vectors (N, D): what drift is measured on."""
        ...

    def explain(self, sample: Any) -> bytes:
        """Show what the model looked at, as a PNG picture."""
        ...


def predict_items(predictor: Predictor, contents: Sequence[bytes]) -> list[dict[str, Any]]:
    """Run the whole chain on encoded items: the way that serving, replay and verification share."""
    import numpy as np

    batch = np.stack([predictor.transform(predictor.decode(content)) for content in contents])
    return [predictor.encode(output) for output in predictor.predict(batch)]
