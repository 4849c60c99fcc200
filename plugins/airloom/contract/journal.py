"""The journal of predictions: what serving writes before it answers, until the prediction log has it.

    <journal_dir>/<owner>/owner.lock        held (flock) by the process that writes
    <journal_dir>/<owner>/<number>.journal  entries, appended

An entry is one line of JSON, then the input's bytes (`size` of them), then a newline. It is appended by one
write, so a reader meets whole entries and at most one torn one, at the end.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

OWNER_LOCK = "owner.lock"
SEGMENT_SUFFIX = ".journal"


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """One answered prediction.

    Attributes:
        answered_at: seconds since 1970, UTC.
        batch_size / batch_index: of the batch that the model saw, and this one's place in it.
        content: the bytes that `decode` got.
    """

    id: str
    pipeline: str
    release: str
    answered_at: float
    latency_ms: float
    input_sha256: str
    output: dict[str, Any]
    media_type: str
    batch_size: int
    batch_index: int
    content: bytes


def encode_entry(
    *,
    prediction_id: str,
    pipeline: str,
    release: str,
    answered_at: float,
    latency_ms: float,
    input_sha256: str,
    output_json: str,
    media_type: str,
    batch_size: int,
    batch_index: int,
    content: bytes,
) -> tuple[bytes, bytes, bytes]:
    """The pieces of one entry, to be written one after the other by one `os.writev`.

    `output_json` is the output as JSON text, so that it is encoded once for the journal and the answer.
    The texts must need no escaping in JSON, as ids, releases, digests and media types do.
    """
    head = (
        f'{{"id":"{prediction_id}","pipeline":"{pipeline}","release":"{release}","answered_at":{answered_at!r},'
        f'"latency_ms":{latency_ms!r},"input_sha256":"{input_sha256}","media_type":"{media_type}",'
        f'"batch_size":{batch_size},"batch_index":{batch_index},"size":{len(content)},"output":{output_json}}}\n'
    )
    return head.encode(), content, b"\n"


def read_entries(file: BinaryIO) -> Iterator[tuple[JournalEntry, int]]:
    """Read entries from a segment's current position, each with the position after it.

    Stops without an error at the end and at a torn entry: what is behind it was never answered, or is
    being written.
    """
    while True:
        head = file.readline()
        if not head.endswith(b"\n"):
            return
        try:
            values = json.loads(head)
            size = values.pop("size")
            content = file.read(size)
            if len(content) < size or file.read(1) != b"\n":
                return
            entry = JournalEntry(content=content, **values)
        except (ValueError, KeyError, TypeError, AttributeError):
            return
        yield entry, file.tell()


def segments(journal_dir: Path) -> list[Path]:
    """The segments below a folder, whoever wrote them, oldest first."""
    found = []
    for path in journal_dir.rglob(f"*{SEGMENT_SUFFIX}"):
        try:
            found.append((path.stat().st_mtime, path))
        except FileNotFoundError:  # drained just now
            continue
    return [path for _, path in sorted(found)]


def find_entry(journal_dir: Path, prediction_id: str) -> JournalEntry | None:
    """Look for a prediction in the segments below a folder, newest first.

    Only segments that hold the id's bytes are taken apart.
    """
    wanted = prediction_id.encode()
    for path in reversed(segments(journal_dir)):
        try:
            if wanted not in path.read_bytes():
                continue
            with path.open("rb") as file:
                for entry, _ in read_entries(file):
                    if entry.id == prediction_id:
                        return entry
        except FileNotFoundError:  # drained just now: the log has it
            continue
    return None
