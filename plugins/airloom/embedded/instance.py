"""One running platform for each home folder: its lock, its record, its guard."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from airloom.embedded import guard
from airloom.embedded.environment import INSTANCE_VARIABLE, SERVICE_VARIABLE
from airloom.errors import PlatformError
from airloom.settings import Settings


@dataclass(frozen=True)
class Running:
    """Who holds the lock of an installation."""

    pid: int
    started: datetime

    @property
    def alive(self) -> bool:
        try:
            return psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def record_path(settings: Settings) -> Path:
    return settings.run_dir / "supervisor.json"


def read_record(settings: Settings) -> Running | None:
    """The supervisor that last started here, running or not."""
    try:
        value = json.loads(record_path(settings).read_text(encoding="utf-8"))
        return Running(pid=int(value["pid"]), started=datetime.fromisoformat(value["started"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_record(settings: Settings) -> None:
    path = record_path(settings)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(
        json.dumps({"pid": os.getpid(), "started": datetime.now(UTC).isoformat(), "home": str(settings.home_dir)}),
        encoding="utf-8",
    )
    temporary.replace(path)


def code_changed(settings: Settings) -> bool:
    """Whether Airloom's code is newer than the platform that runs: its services hold the old in memory."""
    record = read_record(settings)
    newest = max(path.stat().st_mtime for path in Path(__file__).parents[1].rglob("*.py"))
    return record is not None and newest > record.started.timestamp()


def is_locked(settings: Settings) -> bool:
    """Whether a supervisor, or the guard that cleans up after one, is alive."""
    path = settings.run_dir / "supervisor.lock"
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(descriptor)


class InstanceLock:
    """Held by the supervisor and by its guard: it is free only when both are gone, so a new start can't race
    with the cleaning up after the last one.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.descriptor = -1

    def acquire(self, *, wait_seconds: float = 40.0) -> None:
        """Take the lock.

        A holder that is alive refuses at once; one that has died is waited for, while its guard cleans up.

        Raises:
            PlatformError: the platform runs already; says its process, since when, and the folder.
        """
        self._settings.run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._settings.run_dir / "supervisor.lock"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + wait_seconds
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                holder = read_record(self._settings)
                if (holder and holder.alive) or time.monotonic() > deadline:
                    os.close(descriptor)
                    raise already_running(self._settings, holder) from None
                time.sleep(0.1)
        self.descriptor = descriptor

    def release(self) -> None:
        """Give it back, as the end of the process does."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def already_running(settings: Settings, holder: Running | None) -> PlatformError:
    who = f"process {holder.pid}, since {holder.started:%Y-%m-%d %H:%M:%S} UTC" if holder else "another process"
    return PlatformError(
        f"the platform in {settings.home_dir} is running already ({who})",
        hint="see it with `airloom status`, stop it with `airloom down`; "
        "a second platform needs its own AIRLOOM_HOME and ports",
    )


class Guard:
    """The small process that outlives the supervisor by the time it takes to leave nothing behind."""

    def __init__(self, settings: Settings, lock: InstanceLock) -> None:
        self._settings = settings
        self._lock = lock
        self._write_end = -1
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        read_end, write_end = os.pipe()
        command = [sys.executable, "-I", "-S", guard.__file__, str(read_end), self._settings.instance_id]
        environment = {k: v for k, v in os.environ.items() if k not in (INSTANCE_VARIABLE, SERVICE_VARIABLE)}
        self._process = subprocess.Popen(
            command,
            pass_fds=(read_end, self._lock.descriptor),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
            env=environment,
        )
        os.close(read_end)
        self._write_end = write_end

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def ensure(self) -> None:
        """Start another one when it has been killed."""
        if self._process is not None and self._process.poll() is not None:
            os.close(self._write_end)
            self.start()

    def release(self) -> None:
        """Let it make its sweep and go."""
        if self._process is not None:
            os.close(self._write_end)
            self._process.wait()
            self._process = None


def memory_by_service(settings: Settings) -> dict[str, int]:
    """Proportional set size in bytes of all processes of each service, grandchildren included."""
    mark = f"{INSTANCE_VARIABLE}={settings.instance_id}".encode()
    prefix = f"{SERVICE_VARIABLE}=".encode()
    total: dict[str, int] = {}
    for pid in psutil.pids():
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if mark not in environment:
                continue
            name = next((part[len(prefix) :].decode() for part in environment if part.startswith(prefix)), "other")
            total[name] = total.get(name, 0) + pss_bytes(pid)
        except OSError:  # it has ended meanwhile, or belongs to another user
            continue
    return total


def supervisor_memory_bytes(pid: int) -> int:
    """Proportional set size of the supervisor and its guard."""
    total = 0
    try:
        total += pss_bytes(pid)
        for child in psutil.Process(pid).children():
            if any(part.endswith("guard.py") for part in child.cmdline()):
                total += pss_bytes(child.pid)
    except (OSError, psutil.Error):  # ended meanwhile
        pass
    return total


def pss_bytes(pid: int) -> int:
    """Memory of one process, with pages that it shares counted in proportion.

    Raises:
        OSError: the process is gone or belongs to another user.
    """
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0
