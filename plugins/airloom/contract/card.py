"""The data card: what is in a dataset, in numbers that later tasks decide on."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from airloom.contract.base import Frozen

CARD_FILE = "card.json"
REJECTED_FILE = "rejected.jsonl"


class RejectedRow(Frozen):
    """One row or file that was kept aside: one line of `rejected.jsonl`."""

    name: str
    reason: str
    detail: str = ""
    size_bytes: int = 0


class DataCard(Frozen):
    """`card.json` in a dataset's folder.

    Attributes:
        rows: split -> rows.
        classes: the labels in the order that models number them.
        rows_by_class: split -> label -> rows.
        rejected: reason -> files or rows kept aside and listed in `rejected.jsonl`.
        leaks: rows whose content stands in more than one split.
        duplicates: rows dropped to `rejected.jsonl` because an equal one was kept.
        size_bytes: size of all shards.
        fields: name -> type of a shard's columns.
        statistics: further numbers, such as mean and standard deviation of pixels.
    """

    schema_version: Literal[1] = 1
    rows: dict[str, int]
    classes: list[str] = Field(default_factory=list)
    rows_by_class: dict[str, dict[str, int]] = Field(default_factory=dict)
    rejected: dict[str, int] = Field(default_factory=dict)
    leaks: int = 0
    duplicates: int = 0
    size_bytes: int = 0
    fields: dict[str, str] = Field(default_factory=dict)
    statistics: dict[str, float] = Field(default_factory=dict)

    @property
    def total_rows(self) -> int:
        return sum(self.rows.values())

    @property
    def total_rejected(self) -> int:
        return sum(self.rejected.values())
