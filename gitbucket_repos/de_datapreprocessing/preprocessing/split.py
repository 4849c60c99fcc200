"""Assign each row to a split by what it shows.

A row's place is a number in [0, 1) drawn from the seed and the row's pixels, held against the splits'
fractions. Hence:

- equal pictures can never stand in two splits;
- rows that are added or removed move no other row, so that a champion trained on an earlier data version
  has not seen today's test rows;
- every class is divided by the same rule, and so in the same proportions up to chance: a share p of n rows
  has a standard deviation of sqrt(n p (1 - p)), about 8 of 75 for a class of 500 at p = 0.15. Exact
  quotas would need ranks within a class, and one added row would then move others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from preprocessing.decode import Row
from preprocessing.params import Fractions

SPLITS = ("train", "validation", "test")


def split_of(content_digest: str, *, fractions: Fractions, seed: int) -> str:
    """The split of the content with this digest."""
    drawn = hashlib.sha256(f"{seed}:{content_digest}".encode()).digest()
    place = int.from_bytes(drawn[:8], "big") / 2**64
    if place < fractions.train:
        return "train"
    return "validation" if place < fractions.train + fractions.validation else "test"


def divide(rows: Iterable[Row], *, fractions: Fractions, seed: int) -> dict[str, list[Row]]:
    """Divide rows into splits; each keeps the order that it finds."""
    splits: dict[str, list[Row]] = {name: [] for name in SPLITS}
    for row in rows:
        splits[split_of(row.content_digest, fractions=fractions, seed=seed)].append(row)
    return splits
