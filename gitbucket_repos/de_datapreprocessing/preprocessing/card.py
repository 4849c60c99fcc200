"""Describe a dataset in numbers that later tasks decide on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from airloom.contract import DataCard, RejectedRow
from preprocessing.decode import Row
from preprocessing.duplicates import DUPLICATE
from preprocessing.pack import SCHEMA


def describe(
    splits: Mapping[str, Sequence[Row]], rejected: Sequence[RejectedRow], *, image_size: int, size_bytes: int
) -> DataCard:
    """Count rows by split and class, what was kept aside, and contents that stand in more than one split."""
    classes = sorted({row.label for rows in splits.values() for row in rows})
    counted = {name: Counter(row.label for row in rows) for name, rows in splits.items()}
    reasons = Counter(row.reason for row in rejected)
    return DataCard(
        rows={name: len(rows) for name, rows in splits.items()},
        classes=classes,
        rows_by_class={name: {label: counted[name][label] for label in classes} for name in splits},
        rejected=dict(sorted(reasons.items())),
        leaks=_leaks(splits),
        duplicates=reasons[DUPLICATE],
        size_bytes=size_bytes,
        fields={field.name: str(field.type) for field in SCHEMA},
        statistics=_pixel_statistics(splits["train"], image_size),
    )


def _leaks(splits: Mapping[str, Sequence[Row]]) -> int:
    """Rows whose content stands in another split as well."""
    contents = {name: {row.content_digest for row in rows} for name, rows in splits.items()}
    return sum(
        any(row.content_digest in contents[other] for other in splits if other != name)
        for name, rows in splits.items()
        for row in rows
    )


def _pixel_statistics(rows: Sequence[Row], image_size: int) -> dict[str, float]:
    """Mean and standard deviation of the training pixels as 0…1, from exact sums."""
    pixels = len(rows) * image_size * image_size
    if not pixels:
        return {}
    mean = sum(row.pixel_sum for row in rows) / pixels
    variance = sum(row.pixel_square_sum for row in rows) / pixels - mean * mean
    return {"image_size": float(image_size), "pixel_mean": mean / 255, "pixel_std": math.sqrt(max(variance, 0)) / 255}
