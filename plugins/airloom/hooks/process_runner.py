"""Runner `process`: a stage as a child of a small watching process (the shim) that outlives Airflow's worker.

Files of a workspace, beside the request and the result:

    spec.json        what the shim is to do; no secrets
    process.json     who the shim is; there is one whenever a stage was started here
    shim.lock        held by the shim for as long as it lives, and by whoever is just starting it
    log.txt          what the stage has written
    log.offset       up to where a waiter has handed it on
    stop             seconds of grace, from whoever asks for a stop
    exit.json        how it ended
    collected        the id of the job whose exit somebody has taken
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from airloom.errors import ConflictError, StorageFullError
from airloom.hooks import process_tree
from airloom.hooks.log_tail import LogTail, line_start_before
from airloom.hooks.process_environment import JOB_VARIABLE, WORKSPACE_VARIABLE, stage_environment
from airloom.hooks.runner import LOG_FILE, ExitReason, JobExit, JobHandle, OnLog, ShouldStop, StageJob

SPEC_FILE = "spec.json"
PROCESS_FILE = "process.json"
LOCK_FILE = "shim.lock"
OFFSET_FILE = "log.offset"
STOP_FILE = "stop"
EXIT_FILE = "exit.json"
COLLECTED_FILE = "collected"

POLL_SECONDS = 0.2
_START_SECONDS = 30.0
# What a killed waiter had handed on last may not have reached Airflow's log: it is handed on again.
_REPEATED_BYTES = 4096
_OF_EARLIER_JOB = (PROCESS_FILE, EXIT_FILE, STOP_FILE, OFFSET_FILE, COLLECTED_FILE, LOG_FILE)


class ProcessRunner:
    """Runs stages as processes of this machine. See `airloom.hooks.runner.Runner` for what its methods promise.

    Args:
        poll_seconds: how often a waiter looks at the log and asks whether to stop.
        python: the interpreter of shim and stage.
    """

    def __init__(self, *, poll_seconds: float = POLL_SECONDS, python: str = sys.executable) -> None:
        self._poll_seconds = poll_seconds
        self._python = python
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, job: StageJob) -> JobHandle:
        """See `Runner.start`.

        Raises:
            ConflictError: a job runs in this workspace.
            StorageFullError: the disk is full.
        """
        workspace = job.workspace
        try:
            workspace.mkdir(parents=True, exist_ok=True)
            lock = os.open(workspace / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _no_room(workspace, error) from error
        try:
            _lock(lock)
            return self._start_locked(job, lock)
        except BlockingIOError:
            raise ConflictError(
                f"a stage process runs in {workspace} already", hint="stop it, or wait until it has ended"
            ) from None
        except OSError as error:
            raise _no_room(workspace, error) from error
        finally:
            os.close(lock)  # the shim holds it on

    def find(self, workspace: Path) -> JobHandle | None:
        """See `Runner.find`. Waits for a job that another process is just starting."""
        deadline = time.monotonic() + _START_SECONDS
        while True:
            running = _is_locked(workspace)
            facts = _read_json(workspace / PROCESS_FILE)
            if facts is not None or not running or time.monotonic() > deadline:
                break
            time.sleep(0.02)
        if facts is None:
            return None
        handle = _handle(workspace, facts)
        ended = (workspace / EXIT_FILE).exists()
        if not running and not ended:
            # The shim was killed; nobody holds what it may have left to its limits.
            process_tree.kill_marked(JOB_VARIABLE, handle.id)
            return None
        collected = (workspace / COLLECTED_FILE).exists()
        return replace(handle, running=running and not ended, collected=collected)

    def wait(self, handle: JobHandle, on_log: OnLog, should_stop: ShouldStop) -> JobExit:
        """See `Runner.wait`."""
        workspace = handle.workspace
        log = workspace / LOG_FILE
        tail = LogTail(log, offset=_offset_to_start(workspace))
        asked = False
        with _pidfd(handle) as ended:
            while True:
                over = (workspace / EXIT_FILE).exists() or not process_tree.is_alive(handle.pid, handle.started)
                handed_on = 0
                for line in tail.rest() if over else tail.read():
                    on_log(line)
                    handed_on += 1
                    if handed_on % 1000 == 0 and not asked and should_stop():
                        asked = True
                        self.request_stop(handle)
                if handed_on:
                    _write_offset(workspace, tail.offset)
                if over:
                    return self._exit_of(handle)
                if not asked and should_stop():
                    asked = True
                    self.request_stop(handle)
                ended(self._poll_seconds)

    def stop(self, handle: JobHandle, grace_seconds: float) -> None:
        """See `Runner.stop`. The shim does the work; if it can't, this process does."""
        with suppress(OSError):
            (handle.workspace / STOP_FILE).write_text(str(grace_seconds), encoding="ascii")
        self.request_stop(handle)
        deadline = time.monotonic() + grace_seconds + 3.0
        with _pidfd(handle) as ended:
            while process_tree.is_alive(handle.pid, handle.started) and time.monotonic() < deadline:
                ended(0.05)
        process_tree.kill_marked(JOB_VARIABLE, handle.id)

    def request_stop(self, handle: JobHandle) -> None:
        """See `Runner.request_stop`. May be called from a signal handler."""
        if process_tree.is_alive(handle.pid, handle.started):
            process_tree.send([handle.pid], signal.SIGTERM)

    def mark_collected(self, handle: JobHandle) -> None:
        """See `Runner.mark_collected`."""
        with suppress(OSError):  # on a full disk the next try takes the same exit once more
            (handle.workspace / COLLECTED_FILE).write_text(handle.id, encoding="ascii")

    def _start_locked(self, job: StageJob, lock: int) -> JobHandle:
        workspace = job.workspace
        for name in _OF_EARLIER_JOB:
            (workspace / name).unlink(missing_ok=True)
        job.result_file.unlink(missing_ok=True)
        home = workspace / "home"
        home.mkdir(exist_ok=True)
        job_id = secrets.token_hex(8)
        spec = {
            "command": [
                self._python,
                "main.py",
                job.stage.value,
                "--request",
                str(job.request_file),
                "--result",
                str(job.result_file),
            ],
            "cwd": str(job.checkout),
            "log": str(workspace / LOG_FILE),
            "process_file": str(workspace / PROCESS_FILE),
            "exit_file": str(workspace / EXIT_FILE),
            "stop_file": str(workspace / STOP_FILE),
            "facts": {
                "id": job_id,
                "key": job.key,
                "pipeline": job.pipeline,
                "run_id": job.run_id,
                "stage": job.stage.value,
            },
            "memory_bytes": job.memory_bytes,
            "timeout_seconds": job.timeout_seconds,
            "grace_seconds": job.grace_seconds,
        }
        (workspace / SPEC_FILE).write_text(json.dumps(spec, indent=1), encoding="utf-8")
        log = workspace / LOG_FILE
        log.touch()
        environment = stage_environment(home=home, cpus=job.cpus, gpus=job.gpus, extra=job.environment)
        environment |= {JOB_VARIABLE: job_id, WORKSPACE_VARIABLE: str(workspace)}
        with log.open("ab") as output:
            process = subprocess.Popen(
                [self._python, "-m", "airloom.hooks.stage_shim", str(workspace / SPEC_FILE)],
                cwd=workspace,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                pass_fds=(lock,),
            )
        return self._started(job, process, job_id)

    def _started(self, job: StageJob, process: subprocess.Popen[bytes], job_id: str) -> JobHandle:
        """Wait until the shim has said who it is: from then on it can be found, stopped and adopted."""
        deadline = time.monotonic() + _START_SECONDS
        while True:
            facts = _read_json(job.workspace / PROCESS_FILE)
            if facts is not None and facts.get("id") == job_id:
                self._children[job_id] = process  # to be waited for when it has ended
                return _handle(job.workspace, facts)
            if process.poll() is not None or time.monotonic() > deadline:
                process_tree.kill_marked(JOB_VARIABLE, job_id)
                process.wait()
                return JobHandle(id=job_id, key=job.key, workspace=job.workspace, label="process", running=False)
            time.sleep(0.01)

    def _exit_of(self, handle: JobHandle) -> JobExit:
        child = self._children.get(handle.id)
        if child is not None and child.poll() is not None:
            del self._children[handle.id]
        value = _read_json(handle.workspace / EXIT_FILE)
        if value is None:
            # The shim is gone without a word: somebody killed it, or could not be stopped in any other way.
            process_tree.kill_marked(JOB_VARIABLE, handle.id)
            reason = ExitReason.STOPPED if (handle.workspace / STOP_FILE).exists() else ExitReason.LOST
            return JobExit(reason)
        return JobExit(**{**value, "reason": ExitReason(value["reason"])})


def find_jobs(workspaces: Path) -> Iterator[tuple[JobHandle, dict[str, Any]]]:
    """Every job below a folder that runs, with what its process file says: id, key, pipeline, run_id, stage."""
    runner = ProcessRunner()
    for path in sorted(workspaces.glob(f"*/*/*/{PROCESS_FILE}")):
        if not _is_locked(path.parent):
            continue
        facts = _read_json(path)
        handle = runner.find(path.parent)
        if facts and handle and handle.running:
            yield handle, facts


def _handle(workspace: Path, facts: dict[str, Any]) -> JobHandle:
    pid = int(facts["pid"])
    return JobHandle(
        id=str(facts["id"]),
        key=str(facts["key"]),
        workspace=workspace,
        label=f"process {facts.get('stage_pid') or pid}",
        pid=pid,
        started=str(facts["started"]),
    )


def _lock(descriptor: int) -> None:
    """Take the lock for good; whoever only looks whether it is taken holds it for a moment."""
    for _ in range(20):
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(0.02)
    raise BlockingIOError


def _is_locked(workspace: Path) -> bool:
    try:
        lock = os.open(workspace / LOCK_FILE, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def _offset_to_start(workspace: Path) -> int:
    try:
        offset = int((workspace / OFFSET_FILE).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0
    return line_start_before(workspace / LOG_FILE, max(0, offset - _REPEATED_BYTES))


def _write_offset(workspace: Path, offset: int) -> None:
    # Without it, on a full disk, an adopting waiter would hand on more than it must.
    with suppress(OSError):
        (workspace / OFFSET_FILE).write_text(str(offset), encoding="ascii")


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


class _pidfd:  # noqa: N801 - reads as a function
    """Waits for the end of a process that need not be a child of this one; gives a function of seconds."""

    def __init__(self, handle: JobHandle) -> None:
        self._handle = handle
        self._descriptor = -1

    def __enter__(self) -> Any:
        with suppress(OSError):
            if process_tree.is_alive(self._handle.pid, self._handle.started):
                self._descriptor = os.pidfd_open(self._handle.pid)
        return self._wait

    def __exit__(self, *_: object) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def _wait(self, seconds: float) -> None:
        if self._descriptor < 0:
            time.sleep(seconds)
            return
        import select

        select.select([self._descriptor], [], [], seconds)


def _no_room(workspace: Path, error: OSError) -> Exception:
    if error.errno in {28, 122}:  # ENOSPC, EDQUOT
        return StorageFullError(f"no room for a stage's files in {workspace}", hint="free disk space there")
    return error
