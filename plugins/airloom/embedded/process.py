"""One child process: its start, its group, its end."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from airloom.embedded.rotating_log import RotatingLog


class Child:
    """A running process that leads a session of its own. Make one with `spawn`, inside the event loop."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        threading.Thread(target=self._reap, name=f"wait-{process.pid}", daemon=True).start()

    @classmethod
    def spawn(cls, command: Sequence[str], *, cwd: Path, env: Mapping[str, str], log: RotatingLog) -> Child:
        """Start a program; what it writes goes to the log.

        Raises:
            OSError: there is no such program, or it cannot be started.
        """
        read_end, write_end = os.pipe()
        try:
            process = subprocess.Popen(
                command,
                cwd=cwd,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=write_end,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except BaseException:
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
        log.note(f"started process {process.pid}: {command[0]}")
        log.pump(read_end)
        return cls(process)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return not self._ended.is_set()

    async def wait(self) -> int:
        """Until it ends; the exit code, negative for a signal."""
        await self._ended.wait()
        return int(self._process.returncode)

    async def stop(self, number: signal.Signals, grace_seconds: float) -> bool:
        """Signal the group, wait, then kill what is left of the group. Whether it went within the grace."""
        in_time = True
        self._signal(number)
        try:
            await asyncio.wait_for(self._ended.wait(), grace_seconds)
        except TimeoutError:
            in_time = False
        self.kill_group()
        await self._ended.wait()
        return in_time

    def kill_group(self) -> None:
        """SIGKILL to all of the group; also after the leader is gone."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        # No process gets this id while one of the group lives; when none does there is nobody to hit but a
        # process that was given the same id since, and ids are handed out in turn.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    def _reap(self) -> None:
        self._process.wait()
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._ended.set)


def describe_exit(code: int) -> str:
    """`ended with exit code 3`, `was killed by SIGKILL`."""
    if code >= 0:
        return f"ended with exit code {code}"
    with suppress(ValueError):
        return f"was killed by {signal.Signals(-code).name}"
    return f"was killed by signal {-code}"
