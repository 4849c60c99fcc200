"""Keep aside what was rejected: listed in the dataset, and the original bytes where there is room for them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from airloom.contract import RejectedRow, sha256_bytes
from preprocessing.source import Source


def write_list(path: Path, rejected: Sequence[RejectedRow]) -> None:
    """Write `rejected.jsonl`, sorted by name."""
    lines = [row.model_dump_json() + "\n" for row in sorted(rejected, key=lambda row: row.name)]
    path.write_text("".join(lines), encoding="utf-8")


def keep_originals(folder: Path, rejected: Sequence[RejectedRow], source: Source) -> None:
    """Copy the rejected files into `<reason>/<digest of the key>-<file name>` of an emptied folder.

    The digest keeps apart files of one name, and a key such as `../x` inside the folder.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    entries = {entry.key: entry for entry in source.entries}
    for row in rejected:
        target = folder / row.reason / f"{sha256_bytes(row.name.encode())[:8]}-{PurePosixPath(row.name).name}"
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(source.read(entries[row.name]))
