"""Ends every process of an installation: at once, or when the supervisor is gone.

Run as a program (`python -I -S guard.py FD INSTANCE`) it waits until the other end of a pipe is closed, which
the kernel does even when the supervisor is killed, and then leaves no process behind. It imports nothing of
the package, to be small and hard to break.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

_PROC = Path("/proc")
_GRACE_SECONDS = 3.0
_LIMIT_SECONDS = 30.0


def _parents() -> dict[int, int]:
    parents = {}
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_bytes()
            except OSError:  # it has ended meanwhile
                continue
            state, parent = stat[stat.rindex(b")") + 2 :].split()[:2]
            if state not in (b"Z", b"X"):
                parents[int(entry.name)] = int(parent)
    return parents


def members(instance: str) -> set[int]:
    """Every living process with the mark of this installation, and all their descendants; never the caller
    or one of its ancestors.
    """
    parents = _parents()
    spared = {os.getpid()}
    current = os.getpid()
    while current in parents:
        current = parents[current]
        spared.add(current)
    mark = f"AIRLOOM_INSTANCE={instance}".encode()
    found = set()
    for pid in parents:
        try:
            environment = (_PROC / str(pid) / "environ").read_bytes()
        except OSError:  # it has ended meanwhile, or belongs to another user
            continue
        if mark in environment.split(b"\0"):
            found.add(pid)
    found -= spared
    # A process may have dropped the mark; its ancestors tell on it.
    grown = True
    while grown:
        children = {pid for pid, parent in parents.items() if parent in found} - found
        grown = bool(children)
        found |= children
    return found - spared  # an ancestor of the caller may descend from a marked process


def end_members(instance: str, *, grace_seconds: float = _GRACE_SECONDS) -> int:
    """SIGTERM, and SIGKILL after the grace, until no process of the installation is left.

    Returns how many processes were found at first.
    """
    first = len(members(instance))
    started = time.monotonic()
    while pids := members(instance):
        waited = time.monotonic() - started
        if waited > _LIMIT_SECONDS:
            break
        number = signal.SIGTERM if waited < grace_seconds else signal.SIGKILL
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)
        time.sleep(0.5 if number == signal.SIGTERM else 0.05)
    return first


def main() -> None:
    """Wait for the end of the pipe, then sweep."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    descriptor, instance = int(sys.argv[1]), sys.argv[2]
    while os.read(descriptor, 64):
        pass
    end_members(instance)


if __name__ == "__main__":
    main()
