"""Run a model on the test split. Labels and predictions come from one row each, so they cannot be misaligned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from airloom.contract import StageInputError
from airloom.contract.model import ModelCard
from airloom.contract.predictor import Predictor
from airloom.contract.shards import iterate_split
from modeling import metrics

BATCH_ROWS = 256


@dataclass(frozen=True)
class Scored:
    """What a model says of the rows of a split.

    Attributes:
        classes: L labels; `labels` and `predicted` are indices into them.
        images: encoded pictures, as a client would send them.
        probabilities: (N, L).
    """

    classes: list[str]
    ids: list[str]
    images: list[bytes]
    labels: NDArray[np.int64]
    predicted: NDArray[np.int64]
    probabilities: NDArray[np.float64]

    def metrics(self) -> dict[str, float]:
        """The figures that the gate decides on."""
        confusion = metrics.confusion_matrix(self.labels, self.predicted, len(self.classes))
        return {
            "accuracy": float((self.labels == self.predicted).mean()),
            "macro_f1": float(metrics.per_class(confusion)["f1"].mean()),
            "log_loss": metrics.log_loss(self.labels, self.probabilities),
            "auc_ovr": metrics.auc_one_vs_rest(self.labels, self.probabilities),
        }


def score(dataset: Path, split: str, classes: Sequence[str], card: ModelCard, predictor: Predictor) -> Scored:
    """Run the model's own decode → transform → predict over a split, in its stored order, nothing augmented.

    `classes` are the dataset's. A model that was trained on others, as an older champion may be, gives
    a class that it doesn't know the probability 0.

    Raises:
        StageInputError: the split has no rows, or the model knows none of the dataset's classes.
    """
    if not set(classes) & set(card.classes):
        raise StageInputError(f"the model knows the classes {card.classes}, the dataset has {list(classes)}")
    order = [card.classes.index(name) if name in card.classes else -1 for name in classes]
    numbers = {name: index for index, name in enumerate(classes)}
    ids: list[str] = []
    images: list[bytes] = []
    labels: list[int] = []
    outputs: list[NDArray[np.float64]] = []
    for table in iterate_split(dataset, split, ["id", "image", "label"]):
        for start in range(0, table.num_rows, BATCH_ROWS):
            rows = table.slice(start, BATCH_ROWS)
            contents: list[bytes] = rows["image"].to_pylist()
            batch = np.stack([predictor.transform(predictor.decode(content)) for content in contents])
            # One more column, of zeros, stands for every class that the model doesn't know.
            known = np.pad(predictor.predict(batch).astype(np.float64), ((0, 0), (0, 1)))
            outputs.append(known[:, order])
            ids += rows["id"].to_pylist()
            images += contents
            labels += [numbers[label] for label in rows["label"].to_pylist()]
    if not ids:
        raise StageInputError(f"the split {split!r} of {dataset} has no rows to evaluate on")
    probabilities = np.concatenate(outputs)
    return Scored(
        classes=list(classes),
        ids=ids,
        images=images,
        labels=np.array(labels),
        predicted=probabilities.argmax(axis=1),
        probabilities=probabilities,
    )
