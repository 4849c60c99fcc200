"""The process that watches one stage: `python -m airloom.hooks.stage_shim spec.json`.

It leads a session of its own, so that nothing that happens to Airflow's worker reaches it. It starts the
stage, holds it to its limits, ends everything that the stage has started, and writes down how it ended.
Its environment is the stage's: secrets come to it that way and are never written to a file.

Imports nothing but the standard library and one small module, to start fast.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from airloom.hooks import process_tree

POLL_SECONDS = 0.25
LEFTOVER_GRACE_SECONDS = 0.5
RESERVE_BYTES = 4096
OOM_SCORE = b"500"

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_WAITED_FOR = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD}
_libc = ctypes.CDLL(None, use_errno=True)


class Shim:
    """One stage from start to end.

    Args:
        spec: `command`, `cwd`, `log`, `process_file`, `exit_file`, `stop_file`, `facts` (kept in the process file),
            `memory_bytes`, `timeout_seconds`, `grace_seconds`.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        self._spec = spec
        self._exit_file = Path(spec["exit_file"])
        self._reserve = self._exit_file.with_name(f".{self._exit_file.name}.tmp")
        self._process: subprocess.Popen[bytes] | None = None
        self._status: int | None = None
        self._peak_bytes = 0
        self._reason = ""
        self._kill_at = 0.0
        self._started_at = time.time()
        self._started = time.monotonic()

    def run(self) -> None:
        """Start the stage, watch it, end what is left of it, and write the exit file."""
        # Orphans of the stage become children of this process: nothing can slip away by a double fork.
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        signal.pthread_sigmask(signal.SIG_BLOCK, _WAITED_FOR)
        # Room for the exit file is taken now: the stage may fill the disk.
        self._reserve.write_bytes(b" " * RESERVE_BYTES)
        self._write_process_file()
        try:
            self._process = self._start()
        except OSError as error:
            self._finish("not_started", detail=str(error))
            return
        self._write_process_file()
        while self._status is None:
            self._wait(POLL_SECONDS)
            if self._status is None:
                self._check()
        self._end_leftovers()
        code = os.waitstatus_to_exitcode(self._status)
        if self._reason:
            self._finish(self._reason)
        elif code < 0:
            self._finish("signalled", number=-code)
        else:
            self._finish("exited", code=code)

    def _start(self) -> subprocess.Popen[bytes]:
        with Path(self._spec["log"]).open("ab") as log:
            return subprocess.Popen(
                self._spec["command"],
                cwd=self._spec["cwd"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # A group of its own: what the stage sends to its group must not reach this process.
                process_group=0,
                preexec_fn=_in_child,  # noqa: PLW1509 - this process has one thread
            )

    def _wait(self, seconds: float) -> None:
        """Until a signal comes or the time is over; then collect ended children."""
        found = signal.sigtimedwait(_WAITED_FOR, seconds)
        if found is not None and found.si_signo in (signal.SIGTERM, signal.SIGINT):
            self._end("stopped")
        assert self._process is not None  # noqa: S101
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._process.pid:
                self._status = status

    def _check(self) -> None:
        """Hold the stage to its limits, and kill what did not end when asked."""
        living = process_tree.descendants(os.getpid())
        if self._kill_at:
            if time.monotonic() >= self._kill_at:
                process_tree.send(living, signal.SIGKILL)
            return
        limit = self._spec["memory_bytes"]
        used = process_tree.memory_bytes(living, enough=limit)
        self._peak_bytes = max(self._peak_bytes, used)
        if used > limit:
            self._end("memory_limit", at_once=True)  # being asked, it would take more
        elif time.monotonic() - self._started > self._spec["timeout_seconds"]:
            self._end("timeout")

    def _end(self, reason: str, *, at_once: bool = False) -> None:
        if self._reason:
            return
        self._reason = reason
        grace = 0.0 if at_once else self._grace_seconds()
        self._kill_at = time.monotonic() + grace
        number = signal.SIGTERM if grace else signal.SIGKILL
        process_tree.send(process_tree.descendants(os.getpid()), number)

    def _grace_seconds(self) -> float:
        """Whoever asks for the stop may say how long to wait."""
        try:
            return float(Path(self._spec["stop_file"]).read_text(encoding="ascii"))
        except (OSError, ValueError):
            return float(self._spec["grace_seconds"])

    def _end_leftovers(self) -> None:
        """What the stage started and left behind gets a moment to end by itself."""
        kill_at = self._kill_at or time.monotonic() + LEFTOVER_GRACE_SECONDS
        while living := process_tree.descendants(os.getpid()):
            if time.monotonic() >= kill_at:
                process_tree.send(living, signal.SIGKILL)
            self._wait(0.02)
        self._wait(0)

    def _write_process_file(self) -> None:
        path = Path(self._spec["process_file"])
        value = {
            **self._spec["facts"],
            "pid": os.getpid(),
            "started": process_tree.start_of(os.getpid()),
            "stage_pid": self._process.pid if self._process else 0,
            "started_at": self._started_at,
        }
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps(value), encoding="utf-8")
        temporary.replace(path)

    def _finish(self, reason: str, *, code: int | None = None, number: int | None = None, detail: str = "") -> None:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        value = {
            "reason": reason,
            "exit_code": code,
            "signal": number,
            "detail": detail[:1000],
            "peak_memory_bytes": self._peak_bytes or used.ru_maxrss * 1024,
            "seconds": round(time.monotonic() - self._started, 3),
            "cpu_seconds": round(used.ru_utime + used.ru_stime, 3),
        }
        # Written over the reserve, in place: this needs no more room.
        with self._reserve.open("r+b") as file:
            content = json.dumps(value).encode()
            file.write(content + b"\n" * max(0, RESERVE_BYTES - len(content)))
            file.flush()
            os.fsync(file.fileno())
        self._reserve.replace(self._exit_file)


def _in_child() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    # When the watcher is killed, nobody would hold the stage to its limits.
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # If the machine runs out of memory, the kernel should take the stage and not the platform.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_bytes(OOM_SCORE)


if __name__ == "__main__":
    Shim(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))).run()
