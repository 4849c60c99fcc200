"""The life of any container that does Airloom's work: its limits, its log, and how it ended by what the engine says."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from airloom.hooks.docker_engine import container_facts
from airloom.hooks.docker_gpu import gpu_requests
from airloom.hooks.log_tail import LogTail, line_start_before
from airloom.hooks.runner import ExitReason, JobExit, OnLog, ShouldStop

INSTANCE_LABEL, TRY_LABEL, KEY_LABEL = "airloom.instance", "airloom.try", "airloom.key"
POLL_SECONDS = 0.2
_RECONNECT_SECONDS = 1.0
_LAST_LINES_SECONDS = 30.0
# Together with the question whether Airflow still wants the task, well below the 5 seconds that it gives a task.
_LEAVE_SECONDS, _HAND_ON_SECONDS = 0.5, 1.0


# Processes and threads of a container together. No stage or release needs as many, and a fault that makes ever more is
# stopped before the machine runs out of them.
_PIDS_LIMIT = 1024


def closed(tmp_bytes: int) -> dict[str, Any]:
    """What `create_host_config` takes for a container that writes to its volumes and to a `/tmp` in memory alone."""
    return {
        "read_only": True,
        "tmpfs": {"/tmp": f"size={tmp_bytes},mode=1777"},  # noqa: S108 - the container's own
        "init": True,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
        "pids_limit": _PIDS_LIMIT,
    }


def limits(
    api: Any, *, memory_bytes: int | None, cpus: float | None, shm_bytes: int | None, gpus: int = 0, gpu_key: str
) -> dict[str, Any]:
    """What `create_host_config` takes. Memory is no more with swap, and processors are no more than there are.

    Args:
        gpu_key: what people set the number of GPUs by, for the error.

    Raises:
        ConfigError: the engine is sure to have fewer GPUs.
    """
    info = api.info() if gpus or cpus is not None else {}
    found: dict[str, Any] = {"device_requests": gpu_requests(info, gpus, gpu_key)}
    if memory_bytes is not None:
        found |= {"mem_limit": memory_bytes, "memswap_limit": memory_bytes}
    if cpus is not None:
        found["nano_cpus"] = int(min(cpus, info["NCPU"]) * 1e9)
    if shm_bytes is not None:
        found["shm_size"] = shm_bytes
    return found


def watch(
    api: Any,
    client: Callable[[], Any],
    container: str,
    log: Path,
    *,
    on_log: OnLog,
    should_stop: ShouldStop,
    stop: Callable[[], None],
    poll_seconds: float = POLL_SECONDS,
) -> dict[str, Any] | None:
    """Hand on a container's log until it has ended; what the engine knows of it then, None if it is gone.

    Args:
        client: makes another client, for the thread that reads the log.
        log: gets what the engine has of the log and the file has not; only what is new is handed on.
        stop: begins to stop it and returns at once; called when `should_stop` first says so. What `should_stop`
            raises leaves the container running.

    Raises:
        UnavailableError: the engine does not answer. With this as with any other error, what the file has by then is
            handed on before: the next one begins at its end.
    """
    log.touch()
    # Half a line was not handed on by whoever was here before.
    tail, asked = LogTail(log, offset=line_start_before(log, log.stat().st_size)), False
    follower = _Follower(client, container, log)
    try:
        while True:
            facts = container_facts(api, container)
            for line in tail.read():
                on_log(line)
            if facts is None or not facts["State"]["Running"]:
                break
            if not asked and should_stop():
                asked = True
                stop()
            time.sleep(poll_seconds)
        follower.finish()
        for line in tail.rest():
            on_log(line)
    except BaseException:
        follower.leave()
        _hand_on_more(LogTail(log, offset=tail.offset), on_log)
        raise
    return facts


def _hand_on_more(tail: LogTail, on_log: OnLog) -> None:
    """What the file still has. Why this one leaves is of more consequence than what may go wrong here."""
    until = time.monotonic() + _HAND_ON_SECONDS
    with suppress(Exception):
        for line in tail.read():
            on_log(line)
            if time.monotonic() > until:
                return


class _Follower:
    """Appends to the file what it lacks, in a thread of its own: an adopted log has no holes and no line twice.

    A proxy may cut a stream that is silent for long. Nothing that goes wrong here is of any consequence to how
    the container's end is taken.
    """

    def __init__(self, client: Callable[[], Any], container: str, log: Path) -> None:
        self._client, self._container, self._log = client, container, log
        self._ended, self._left, self._writing = threading.Event(), False, threading.Lock()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """The container has ended: wait for its last lines."""
        self._ended.set()
        self._thread.join(_LAST_LINES_SECONDS)

    def leave(self) -> None:
        """Wait a moment for what is on its way. From then on this one writes no more, if the thread lives on."""
        self._ended.set()
        self._thread.join(_LEAVE_SECONDS)
        with self._writing:
            self._left = True

    def _follow(self) -> None:
        while True:
            with suppress(Exception):
                api = self._client()
                try:
                    self._append(api.logs(self._container, stream=True, follow=True))
                    facts = container_facts(api, self._container)
                    if facts is None or not facts["State"]["Running"]:
                        return
                finally:
                    api.close()
            if self._ended.wait(_RECONNECT_SECONDS):
                return

    def _append(self, stream: Iterable[bytes]) -> None:
        with self._log.open("ab", buffering=0) as file:
            known_bytes = file.tell()
            for piece in stream:
                skipped = min(known_bytes, len(piece))
                known_bytes -= skipped
                with self._writing:
                    if self._left:
                        return
                    file.write(piece[skipped:])


def is_gone(facts: dict[str, Any] | None) -> bool:
    """Whether somebody has removed a container, or is about to."""
    return facts is None or facts["State"]["Status"] in {"removing", "dead"}


def engine_exit(facts: dict[str, Any], *, stopped: bool) -> JobExit | None:
    """How a container ended, as far as the engine alone can say; None where its exit code has to tell.

    The engine says of a container that it was out of memory although its main program may have ended with 0:
    one of its processes is missing then.
    """
    state, seconds = facts["State"], seconds_of(facts)
    if stopped:
        return JobExit(ExitReason.STOPPED, seconds=seconds)
    if state["OOMKilled"]:
        return JobExit(ExitReason.MEMORY_LIMIT, seconds=seconds, peak_memory_bytes=int(facts["HostConfig"]["Memory"]))
    if state["Error"]:
        return JobExit(ExitReason.NOT_STARTED, detail=state["Error"])
    return None


def seconds_of(facts: dict[str, Any]) -> float:
    """How long it ran, by the engine's clock; 0 if it could not start."""
    state = facts["State"]
    return 0.0 if state["Error"] else _seconds(state["FinishedAt"]) - _seconds(state["StartedAt"])


def _seconds(stamp: str) -> float:
    return datetime.fromisoformat(stamp.split(".", maxsplit=1)[0].rstrip("Z") + "+00:00").timestamp()
