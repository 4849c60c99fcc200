"""Write every answer to a journal before it is sent: what a crash of this process or the database can't lose."""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from airloom.contract.journal import OWNER_LOCK, SEGMENT_SUFFIX

log = logging.getLogger(__name__)

SEGMENT_BYTES = 8 * 2**20
_MAX_PIECES = 900  # of one writev; the system takes 1024


def lock_owner(folder: Path) -> int | None:
    """Take a journal folder's lock: its descriptor, or `None` while its owner lives. Closing it lets go."""
    try:
        descriptor = os.open(folder / OWNER_LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


class JournalWriter:
    """The journal of this process: a folder of segments that it alone appends to.

    Args:
        journal_dir: shared with other processes of the pipeline; each has a folder of its own.
        max_bytes: of undrained segments; beyond it nothing more is kept.
        on_append: called after each append: there is something to drain.
    """

    def __init__(self, journal_dir: Path, *, max_bytes: int, on_append: Callable[[], None] = lambda: None) -> None:
        journal_dir.mkdir(parents=True, exist_ok=True)
        self._max_bytes = max_bytes
        self._on_append = on_append
        self._number = 0
        self._size = 0
        self._full = False
        # A folder gets its name only once it is locked, so that nobody takes it for a dead process's.
        unnamed = journal_dir / f".new-{secrets.token_hex(8)}"
        unnamed.mkdir(mode=0o700)
        (unnamed / OWNER_LOCK).touch(mode=0o600)
        lock = lock_owner(unnamed)
        if lock is None:
            raise RuntimeError(f"{unnamed} was locked by somebody else")
        self._lock = lock
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        self.folder = journal_dir / f"{stamp}-{os.getpid()}-{secrets.token_hex(4)}"
        unnamed.rename(self.folder)
        self._file = self._open()

    @property
    def current(self) -> Path:
        """The segment that is being appended to; those with a lower number are complete."""
        return self.folder / f"{self._number:08d}{SEGMENT_SUFFIX}"

    def append(self, pieces: Sequence[bytes]) -> bool:
        """Append whole entries with one write, unbuffered: once it returns, a SIGKILL cannot lose them.

        Returns:
            Whether they were kept. If not (the journal is full, or the disk), nothing of them was.
        """
        size = sum(map(len, pieces))
        try:
            if self._size + size > SEGMENT_BYTES and self._size:
                self._rotate()
            if self._is_full(size):
                return False
            written = sum(
                os.writev(self._file, pieces[i : i + _MAX_PIECES]) for i in range(0, len(pieces), _MAX_PIECES)
            )
            if written < size:
                os.ftruncate(self._file, self._size)
                raise OSError(f"only {written} of {size} bytes were written")
        except OSError as error:
            log.warning("the journal cannot be written, so answers are not kept: %s", error)
            return False
        self._size += size
        self._on_append()
        return True

    def close(self, *, drained: bool) -> None:
        """Let go of the journal; a drained one is removed."""
        os.close(self._file)
        if drained:
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)

    def size_bytes(self) -> int:
        """Of all segments that are still there."""
        return sum(size_of(path) for path in self.folder.glob(f"*{SEGMENT_SUFFIX}"))

    def _open(self) -> int:
        return os.open(self.current, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def _rotate(self) -> None:
        os.close(self._file)
        self._number += 1
        self._size = 0
        self._file = self._open()

    def _is_full(self, size: int) -> bool:
        """Asked for each append, but the segments are only counted when one of them is complete."""
        if self._number == 0:
            full = self._size + size > self._max_bytes
        elif self._full or self._size == 0 or self._max_bytes < 2 * SEGMENT_BYTES:
            full = self.size_bytes() + size > self._max_bytes
        else:
            full = False
        if full and not self._full:
            log.warning(
                "the journal holds %d bytes that the database has not taken: answers are not kept", self._max_bytes
            )
        self._full = full
        return full


def size_of(path: Path) -> int:
    """A file's size, 0 if it is gone."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


class Signal:
    """Wakes the drain thread; cheap to set again."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        if not self._event.is_set():
            self._event.set()

    def wait(self, seconds: float) -> None:
        self._event.wait(seconds)
        self._event.clear()
