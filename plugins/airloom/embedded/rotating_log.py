"""Keeps what a child writes, in files of bounded size."""

from __future__ import annotations

import os
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

MAX_BYTES = 10 * 2**20
KEPT = 3
_CHUNK_BYTES = 2**16


class RotatingLog:
    """`<name>.log`, and up to `kept` older ones as `<name>.log.1` (the newest of them) and so on.

    A disk without room loses lines and never blocks the child.
    """

    def __init__(self, path: Path, *, max_bytes: int = MAX_BYTES, kept: int = KEPT) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._kept = kept
        self._lock = threading.Lock()
        self._file: BinaryIO | None = None
        self._size = 0
        self._lost_bytes = 0

    def write(self, data: bytes) -> None:
        """Append; rotates first when the file would grow too large."""
        with self._lock:
            try:
                if self._file is None:
                    self._open()
                elif self._size and self._size + len(data) > self._max_bytes:
                    self._rotate()
                self._append(data)
            except OSError:
                self._lost_bytes += len(data)
                self._close()

    def note(self, text: str) -> None:
        """A line of the supervisor's own."""
        self.write(f"--- {datetime.now(UTC):%Y-%m-%d %H:%M:%S} airloom: {text}\n".encode())

    def pump(self, descriptor: int) -> threading.Thread:
        """Copy from a pipe in a thread, until its other ends are closed."""

        def copy() -> None:
            with os.fdopen(descriptor, "rb", buffering=0) as pipe:
                while chunk := pipe.read(_CHUNK_BYTES):
                    self.write(chunk)

        thread = threading.Thread(target=copy, name=f"log-{self.path.stem}", daemon=True)
        thread.start()
        return thread

    def close(self) -> None:
        with self._lock:
            self._close()

    def _append(self, data: bytes) -> None:
        assert self._file is not None  # noqa: S101 - for the type checker
        if self._lost_bytes:
            lost, self._lost_bytes = self._lost_bytes, 0
            data = f"--- airloom: {lost} bytes of this log were lost, the disk had no room\n".encode() + data
        self._file.write(data)
        self._size += len(data)

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._file = self.path.open("ab", buffering=0)
        self._size = self._file.tell()

    def _rotate(self) -> None:
        self._close()
        for number in range(self._kept, 0, -1):
            older = self.path if number == 1 else self.path.with_name(f"{self.path.name}.{number - 1}")
            if older.exists():
                older.replace(self.path.with_name(f"{self.path.name}.{number}"))
        self._open()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of a log; none when there is no such file."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 512 * lines - 4096))
            return file.read().decode(errors="replace").splitlines()[-lines:]
    except FileNotFoundError:
        return []
