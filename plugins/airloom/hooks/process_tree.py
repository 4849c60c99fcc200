"""Processes as /proc shows them: who lives, who descends from whom, how much memory they hold.

Imports nothing but the standard library: the stage shim needs it and has to start fast.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

_PROC = Path("/proc")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_ENDED = (b"Z", b"X")


def start_of(pid: int) -> str | None:
    """When a living process started, as text that no later process with the same id has; None if it has ended."""
    fields = _stat(pid)
    if fields is None or fields[0] in _ENDED:
        return None
    return f"{boot_id()}:{fields[19].decode()}"


def is_alive(pid: int, started: str) -> bool:
    """Whether the process that `start_of` told of still runs."""
    return pid > 0 and start_of(pid) == started


def descendants(pid: int) -> set[int]:
    """All living processes below one."""
    children: dict[int, list[int]] = {}
    for other, parent in _parents().items():
        children.setdefault(parent, []).append(other)
    found: set[int] = set()
    waiting = [pid]
    while waiting:
        below = [child for child in children.get(waiting.pop(), ()) if child not in found]
        found.update(below)
        waiting += below
    return found


def environments(prefix: str) -> dict[int, dict[str, str]]:
    """The variables that start with `prefix` of each living process of this user that has any."""
    start, found = prefix.encode(), {}
    for pid in _parents():
        try:
            content = (_PROC / str(pid) / "environ").read_bytes()
        except OSError:  # it has ended meanwhile, or belongs to another user
            continue
        pairs = [part.partition(b"=") for part in content.split(b"\0") if part.startswith(start)]
        if pairs:
            found[pid] = {os.fsdecode(name): os.fsdecode(value) for name, _, value in pairs}
    return found


def with_variable(name: str, value: str) -> set[int]:
    """All living processes of this user that were started with this variable."""
    return {pid for pid, variables in environments(name).items() if variables.get(name) == value}


def memory_bytes(pids: Iterable[int], *, enough: int) -> int:
    """Memory that processes hold together.

    Resident sizes count shared pages once for each process, but cost nothing to read. Only if they reach
    `enough` are the pages told apart (proportional set size), which takes milliseconds for each GiB.
    """
    known = list(pids)
    resident = sum(_resident(pid) for pid in known)
    if resident < enough or len(known) < 2:
        return resident
    return min(resident, sum(_proportional(pid) for pid in known))


def send(pids: Iterable[int], number: signal.Signals) -> None:
    """Signal each process that is still there."""
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def kill_marked(name: str, value: str, *, limit_seconds: float = 10.0) -> bool:
    """SIGKILL to all processes with a variable, and to all below them; whether none is left."""
    deadline = time.monotonic() + limit_seconds
    while True:
        found = with_variable(name, value)
        for pid in tuple(found):
            found |= descendants(pid)
        found -= {os.getpid()}
        if not found:
            return True
        if time.monotonic() > deadline:
            return False
        send(found, signal.SIGKILL)
        time.sleep(0.02)


def describe_signal(number: int) -> str:
    """`SIGKILL`, or `signal 77` for what has no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _stat(pid: int) -> list[bytes] | None:
    """The fields of /proc/<pid>/stat from the state on; the name before them may hold anything."""
    try:
        content = (_PROC / str(pid) / "stat").read_bytes()
    except OSError:
        return None
    return content[content.rindex(b")") + 2 :].split()


def _parents() -> Mapping[int, int]:
    found = {}
    with os.scandir(_PROC) as entries:
        pids = [int(entry.name) for entry in entries if entry.name.isdigit()]
    for pid in pids:
        fields = _stat(pid)
        if fields is not None and fields[0] not in _ENDED:
            found[pid] = int(fields[1])
    return found


def _resident(pid: int) -> int:
    try:
        return int((_PROC / str(pid) / "statm").read_bytes().split()[1]) * _PAGE_BYTES
    except (OSError, IndexError):
        return 0


def _proportional(pid: int) -> int:
    try:
        for line in (_PROC / str(pid) / "smaps_rollup").read_bytes().splitlines():
            if line.startswith(b"Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return _resident(pid)


def boot_id() -> str:
    """Which start of the machine this is; `-` where it does not tell."""
    try:
        return (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()[:8]
    except OSError:
        return "-"
