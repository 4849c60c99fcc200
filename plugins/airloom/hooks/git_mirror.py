"""Bare mirrors of repos, shared by all processes of a machine."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from airloom.hooks.git_command import run_git

_LEFTOVER_SECONDS = 3600


def ensure_mirror(folder: Path, repo: str) -> Path:
    """The mirror of a repo below `folder`, empty when it is new."""
    mirror = folder / f"{repo}.git"
    if not mirror.exists():
        folder.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{repo}.", dir=folder))
        run_git(("init", "--quiet", "--bare", "-b", "main", str(made)))
        run_git(("config", "gc.autoDetach", "false"), git_dir=made)
        try:
            made.rename(mirror)
        except OSError:  # another process was faster
            shutil.rmtree(made, ignore_errors=True)
    return mirror


@contextmanager
def locked(mirror: Path) -> Iterator[int]:
    """Be the only one who changes the mirror's refs; gives the lock's file descriptor."""
    descriptor = os.open(mirror.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Only a holder of this lock changes refs, so that git's own locks found now are a dead one's.
        for pattern in ("*.lock", "refs/**/*.lock"):
            for stale in mirror.glob(pattern):
                stale.unlink(missing_ok=True)
        yield descriptor
    finally:
        os.close(descriptor)


def last_fetch(lock: int) -> float:
    """When the last fetch that ended well began, on the clock that all processes share."""
    try:
        return float(os.pread(lock, 64, 0) or b"0")
    except ValueError:
        return 0.0


def note_fetch(lock: int, started: float) -> None:
    """Keep when a fetch that has ended well began."""
    os.pwrite(lock, f"{started:020.6f}".encode(), 0)


@contextmanager
def scratch(mirror: Path) -> Iterator[Path]:
    """A folder of one's own in the mirror; those of writers that were killed are removed in time."""
    parent = mirror / "airloom"
    parent.mkdir(exist_ok=True)
    for leftover in parent.iterdir():
        if time.time() - _modified(leftover) > _LEFTOVER_SECONDS:
            shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        yield Path(folder)


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return time.time()
