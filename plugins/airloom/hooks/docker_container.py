"""The life of any container that does Airloom's work: its limits, its log, and how it ended by what the engine says."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from airloom.hooks.docker_engine import container_facts
from airloom.hooks.docker_gpu import gpu_requests
from airloom.hooks.log_tail import LogTail
from airloom.hooks.runner import ExitReason, JobExit, OnLog, ShouldStop

INSTANCE_LABEL, TRY_LABEL, KEY_LABEL = "airloom.instance", "airloom.try", "airloom.key"
POLL_SECONDS = 0.2
_RECONNECT_SECONDS = 1.0
_LAST_LINES_SECONDS = 30.0


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
    """
    log.touch()
    tail, asked, ended = LogTail(log, offset=log.stat().st_size), False, threading.Event()
    follower = threading.Thread(target=_follow, args=(client, container, log, ended), daemon=True)
    follower.start()
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
    finally:
        ended.set()
    follower.join(_LAST_LINES_SECONDS)
    for line in tail.rest():
        on_log(line)
    return facts


def _follow(client: Callable[[], Any], container: str, log: Path, ended: threading.Event) -> None:
    """Append to the file what it lacks: an adopted log has no holes and no line twice.

    A proxy may cut a stream that is silent for long. Nothing that goes wrong here is of any consequence to how
    the container's end is taken.
    """
    while True:
        with suppress(Exception):
            api = client()
            try:
                with log.open("ab", buffering=0) as file:
                    known_bytes = file.tell()
                    for piece in api.logs(container, stream=True, follow=True):
                        skipped = min(known_bytes, len(piece))
                        known_bytes -= skipped
                        file.write(piece[skipped:])
                facts = container_facts(api, container)
                if facts is None or not facts["State"]["Running"]:
                    return
            finally:
                api.close()
        if ended.wait(_RECONNECT_SECONDS):
            return


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
