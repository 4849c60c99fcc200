"""Packed shards: a dataset's rows in a few Parquet files instead of thousands of small ones.

A dataset's folder holds `<split>-<number>.parquet`, `card.json` and `rejected.jsonl`. The same rows in
the same order give the same bytes with the same pyarrow.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from airloom.errors import ContractError

DEFAULT_ROWS_PER_SHARD = 1000


def write_shards(
    folder: Path, split: str, table: pa.Table, *, rows_per_shard: int = DEFAULT_ROWS_PER_SHARD
) -> list[Path]:
    """Write one split's rows as shards of at most `rows_per_shard` rows; return the files in order."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, start in enumerate(range(0, max(table.num_rows, 1), rows_per_shard)):
        path = folder / f"{split}-{number:05d}.parquet"
        # Images are compressed already, and an uncompressed file is the same for every codec version.
        pq.write_table(table.slice(start, rows_per_shard), path, compression="none", write_statistics=False)
        paths.append(path)
    return paths


def read_split(folder: Path, split: str, columns: list[str] | None = None) -> pa.Table:
    """Read all rows of a split, in the order they were written.

    Raises:
        ContractError: the folder has no shard of that split.
    """
    paths = shard_paths(folder, split)
    return pa.concat_tables([pq.read_table(path, columns=columns) for path in paths])


def iterate_split(folder: Path, split: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """Read a split shard by shard, for what does not fit into memory."""
    for path in shard_paths(folder, split):
        yield pq.read_table(path, columns=columns)


def shard_paths(folder: Path, split: str) -> list[Path]:
    """The files of a split, in order."""
    paths = sorted(folder.glob(f"{split}-?????.parquet"))
    if not paths:
        raise ContractError(f"no shard of split {split!r} in {folder}", hint="expected <split>-00000.parquet and so on")
    return paths
