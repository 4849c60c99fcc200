"""Pictures of a training and of an evaluation, as PNG files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

mpl.use("Agg")

BLUE, ORANGE, GRAY = "#3366aa", "#dd6622", "#888888"


@dataclass(frozen=True)
class Mistake:
    """One wrongly predicted row: pixels (H, W), and the probability of what was predicted."""

    pixels: NDArray[np.uint8]
    label: str
    predicted: str
    probability: float


def learning_curve(path: Path, history: Sequence[dict[str, float]], best_epoch: int) -> None:
    """Loss and accuracy of both splits by epoch; the chosen epoch is marked."""
    epochs = [row["epoch"] for row in history]
    with _figure(path, width=10, height=4) as figure:
        for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
            for split, colour in (("train", ORANGE), ("validation", BLUE)):
                axes.plot(epochs, [row[f"{split}_{name}"] for row in history], marker="o", color=colour, label=split)
            axes.axvline(best_epoch, color=GRAY, linestyle=":", label=f"kept: epoch {best_epoch}")
            axes.set(xlabel="epoch", title=name.capitalize())
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.3)
            axes.legend(frameon=False)
        figure.suptitle("Training loss is on augmented pictures, validation loss on plain ones", fontsize=9, color=GRAY)


def confusion(path: Path, matrix: NDArray[np.int64], classes: Sequence[str]) -> None:
    """Rows by true and predicted class; colour is the part of the true class."""
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = max(5.0, 0.55 * len(classes) + 1.5)
    with _figure(path, width=side + 0.8, height=side) as figure:
        axes = figure.subplots()
        image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for i, j in np.argwhere(matrix > 0):
            axes.text(
                j, i, str(matrix[i, j]), ha="center", va="center", color="white" if share[i, j] > 0.5 else "black"
            )
        ticks = range(len(classes))
        rotation = 45 if max(map(len, classes)) > 3 else 0
        axes.set_xticks(ticks, classes, rotation=rotation)
        axes.set_yticks(ticks, classes)
        axes.set(xlabel="predicted", ylabel="true", title=f"Confusion on {matrix.sum():,} test rows")
        figure.colorbar(image, ax=axes, label="part of the true class", shrink=0.8)


def calibration(path: Path, curve: Sequence[tuple[float, float, int]], error: float) -> None:
    """Accuracy against the predicted class's probability, and how many rows lie where."""
    with _figure(path, width=5.5, height=6) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        upper.plot([0, 1], [0, 1], color=GRAY, linestyle=":", label="perfect")
        upper.plot([c for c, _, _ in curve], [a for _, a, _ in curve], marker="o", color=BLUE, label="model")
        upper.set(ylabel="accuracy", ylim=(0, 1.03), title=f"Calibration: expected error {error:.3f}")
        upper.grid(alpha=0.3)
        upper.legend(frameon=False, loc="upper left")
        lower.bar([c for c, _, _ in curve], [n for _, _, n in curve], width=0.05, color=BLUE)
        lower.set(xlabel="probability of the predicted class", ylabel="rows", yscale="log", xlim=(0, 1.03))
        lower.grid(alpha=0.3, axis="y")


def mistakes(path: Path, found: Sequence[Mistake], total: int, rows: int) -> None:
    """The wrongly predicted rows that the model was surest of."""
    columns = 8
    lines = max(1, -(-len(found) // columns))
    with _figure(path, width=10, height=1.5 * lines + 0.5) as figure:
        figure.suptitle(f"{total} of {rows:,} test rows are wrong; the surest {len(found)}: true → predicted")
        grid: NDArray[np.object_] = np.atleast_1d(figure.subplots(lines, columns)).reshape(-1)
        for place, axes in enumerate(grid):
            axes.axis("off")
            if place < len(found):
                _draw_mistake(axes, found[place])


def _draw_mistake(axes: Axes, mistake: Mistake) -> None:
    axes.imshow(mistake.pixels, cmap="gray", vmin=0, vmax=255)
    axes.set_title(f"{mistake.label} → {mistake.predicted}  ({mistake.probability:.0%})", fontsize=9)


@contextmanager
def _figure(path: Path, *, width: float, height: float) -> Iterator[Figure]:
    """A figure that is written to `path` when the block ends. Sizes in inches, at 110 pixels each."""
    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
