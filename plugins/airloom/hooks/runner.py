"""How a stage is run, whatever runs it: a job goes in, lines of its log and its exit come out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from airloom.contract.enums import Stage

REQUEST_FILE = "request.json"
RESULT_FILE = "result.json"
LOG_FILE = "log.txt"
OUTPUTS_FOLDER = "outputs"

DEFAULT_GRACE_SECONDS = 10.0


class ExitReason(StrEnum):
    """Why a job is no longer running."""

    EXITED = "exited"  # by itself, with an exit code
    SIGNALLED = "signalled"  # by a signal that the runner did not send
    MEMORY_LIMIT = "memory_limit"
    TIMEOUT = "timeout"
    STOPPED = "stopped"  # somebody asked the runner to
    NOT_STARTED = "not_started"
    LOST = "lost"  # it is gone, and nobody knows why


@dataclass(frozen=True, kw_only=True)
class StageJob:
    """One try of a stage.

    Attributes:
        key: digest of everything that the result depends on: a running job with the same key is the same work.
        workspace: folder with the request; the runner keeps its own files and the log there too.
        checkout: read-only folder with the stage's code.
        environment: what the stage needs beside the usual, secrets among it: never written to a file.
        cpus: threads that numeric libraries may use; for containers, processors.
        memory_bytes, timeout_seconds: limits of all processes of the stage together, and of this try.
        shm_bytes, tmp_bytes: of a container's /dev/shm and /tmp, which count as its memory; runner `process` ignores
            them.
        image: of containers; runner `process` has none.
        objects: of inputs that are data versions, the MD5 of each file by its name, so that containers share them.
        try_number: of the task that starts it, from 1.
    """

    pipeline: str
    run_id: str
    stage: Stage
    key: str
    workspace: Path
    checkout: Path
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    cpus: float = 1.0
    memory_bytes: int
    timeout_seconds: float
    gpus: int = 0
    shm_bytes: int = 256 * 2**20
    tmp_bytes: int = 512 * 2**20
    grace_seconds: float = DEFAULT_GRACE_SECONDS
    image: str | None = None
    objects: Mapping[str, Mapping[str, str]] = field(default_factory=dict, repr=False)
    try_number: int = 1

    @property
    def request_file(self) -> Path:
        return self.workspace / REQUEST_FILE

    @property
    def result_file(self) -> Path:
        return self.workspace / RESULT_FILE


@dataclass(frozen=True)
class JobHandle:
    """A job that was started, running or ended.

    Attributes:
        id: names this start of it and no other.
        key: the job's key.
        label: for people, such as `process 4711`.
        running: whether it ran when the handle was made.
        collected: whether somebody has taken its exit before.
        pid, started: of the watching process, for runner `process`.
    """

    id: str
    key: str
    workspace: Path
    label: str
    running: bool = True
    collected: bool = False
    pid: int = 0
    started: str = ""


@dataclass(frozen=True)
class JobExit:
    """How a job ended. `exit_code` is set for EXITED, `signal` for SIGNALLED."""

    reason: ExitReason
    exit_code: int | None = None
    signal: int | None = None
    detail: str = ""
    peak_memory_bytes: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0


OnLog = Callable[[str], None]
ShouldStop = Callable[[], bool]


class Runner(Protocol):
    """Runs jobs that outlive the process that started them."""

    def start(self, job: StageJob) -> JobHandle:
        """Start a job. What an earlier one left in the workspace's log and result is removed.

        Raises:
            ConflictError: one runs in this workspace already.
        """
        ...

    def find(self, workspace: Path) -> JobHandle | None:
        """The job of a workspace: running, or ended and accounted for; None where there is none."""
        ...

    def wait(self, handle: JobHandle, on_log: OnLog, should_stop: ShouldStop) -> JobExit:
        """Hand on the log line by line until the job has ended.

        A line that an earlier waiter has handed on comes again only where it may have been lost with that waiter.
        `should_stop` is asked several times a second, and stops the job.
        """
        ...

    def stop(self, handle: JobHandle, grace_seconds: float) -> None:
        """Ask a job to end, kill what is left of it after the grace, and return when nothing is left."""
        ...

    def request_stop(self, handle: JobHandle) -> None:
        """Begin to stop it and return at once."""
        ...

    def mark_collected(self, handle: JobHandle) -> None:
        """Note that the exit has been taken, so that a later try does not take a failure for its own."""
        ...
