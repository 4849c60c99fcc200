"""Write rows as packed shards."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from airloom.contract.shards import write_shards
from preprocessing.decode import Row, image_digest

SCHEMA = pa.schema(
    [
        ("id", pa.string()),  # first 16 hex digits of the pixels' SHA-256
        ("image", pa.binary()),  # canonical PNG
        ("label", pa.string()),
        ("source", pa.string()),  # key of the raw file
        ("sha256", pa.string()),  # of the bytes in `image`
    ]
)


def pack(folder: Path, splits: Mapping[str, Sequence[Row]], *, rows_per_shard: int) -> list[Path]:
    """Write all splits into an emptied folder; return the files.

    Equal rows give equal bytes, whatever an earlier try left in the folder.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    paths: list[Path] = []
    for split, rows in splits.items():
        paths += write_shards(folder, split, _table(rows), rows_per_shard=rows_per_shard)
    return paths


def _table(rows: Sequence[Row]) -> pa.Table:
    columns = [
        [row.id for row in rows],
        [row.image for row in rows],
        [row.label for row in rows],
        [row.source for row in rows],
        [image_digest(row) for row in rows],
    ]
    return pa.table(columns, schema=SCHEMA)
