"""Find pictures that stand more than once, and those whose copies disagree on the label."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from airloom.contract import RejectedRow
from preprocessing.decode import Row

DUPLICATE = "duplicate"
CONFLICTING_LABEL = "conflicting_label"


def keep_unique(rows: Iterable[Row]) -> tuple[list[Row], list[RejectedRow]]:
    """Keep one row for each content, in the order of ids, and give a reason for each of the others.

    Of copies with one label the first by name stays. Copies under several labels all go: at least one of
    them is mislabelled, and nothing here can tell which.
    """
    by_content: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_content[row.content_digest].append(row)
    kept: list[Row] = []
    rejected: list[RejectedRow] = []
    for _, found in sorted(by_content.items()):
        copies = sorted(found, key=lambda row: row.source)
        labels = sorted({row.label for row in copies})
        if len(labels) > 1:
            detail = f"the same picture stands under the labels {', '.join(labels)}"
            rejected += [_rejected(row, CONFLICTING_LABEL, detail) for row in copies]
            continue
        first, *others = copies
        kept.append(first)
        rejected += [_rejected(row, DUPLICATE, f"the same picture as {first.source}") for row in others]
    return kept, rejected


def _rejected(row: Row, reason: str, detail: str) -> RejectedRow:
    return RejectedRow(name=row.source, reason=reason, detail=detail, size_bytes=row.size_bytes)
