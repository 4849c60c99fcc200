"""Digests: one way to hash bytes, files, folders and JSON, used for keys and for proofs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def sha256_bytes(content: bytes) -> str:
    """Hex SHA-256 of bytes."""
    return hashlib.sha256(content).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's content, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_tree(folder: Path) -> str:
    """Hex SHA-256 of a folder: of the sorted lines `<file digest>  <relative path>`.

    Two folders have the same digest exactly when they hold the same files with the same bytes;
    times, owners and modes don't count.
    """
    files = sorted((path.relative_to(folder).as_posix(), path) for path in folder.rglob("*") if path.is_file())
    return sha256_bytes("".join(f"{sha256_file(path)}  {name}\n" for name, path in files).encode())


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of a JSON value's canonical text."""
    return sha256_bytes(canonical_json(value).encode())
