"""Starts the supervisor in the background, watches it come up, and brings it down."""

from __future__ import annotations

import asyncio
import json
import logging
import logging.handlers
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from airloom.embedded.environment import base_environment
from airloom.embedded.instance import already_running, is_locked, read_record
from airloom.embedded.keeper import Timing
from airloom.embedded.rotating_log import tail
from airloom.embedded.service import Service
from airloom.errors import AirloomError, PlatformError, UnavailableError
from airloom.hooks.supervisor import FAILED_STARTS, ServiceState, Supervisor
from airloom.settings import Settings

_POLL_SECONDS = 0.25
_LOG_LINES = 25

OnChange = Callable[[list[ServiceState]], None]


def is_running(settings: Settings) -> bool:
    """Whether a supervisor of this installation is alive."""
    holder = read_record(settings)
    return is_locked(settings) and holder is not None and holder.alive


def launch(settings: Settings, *, program: Sequence[str] = ("-m", "airloom.embedded")) -> int:
    """Start the supervisor detached from this process and its terminal; its process id.

    Returns when the control API answers; the services are then starting.

    Raises:
        PlatformError: it runs already, a port is taken, there is no room …; nothing was started.
    """
    for folder in (settings.home_dir, settings.log_dir, settings.run_dir, settings.data_dir):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if is_running(settings):
        raise already_running(settings, read_record(settings))
    output = settings.log_dir / "supervisor.out"
    read_end, write_end = os.pipe()
    try:
        with output.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, *program, "--report", str(write_end)],
                cwd=settings.project,
                env=base_environment(settings),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                pass_fds=(write_end,),
                start_new_session=True,
            )
    finally:
        os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        report = pipe.read()  # until the supervisor closes its end, or ends
    try:
        answer = json.loads(report)
    except ValueError:
        process.wait()
        lines = "\n".join(tail(output, _LOG_LINES))
        raise PlatformError(
            f"the supervisor ended with {process.returncode} before it was ready:\n{lines}", hint=f"see {output}"
        ) from None
    if "error" in answer:
        process.wait()
        raise PlatformError(str(answer["error"]), hint=answer["hint"])
    return process.pid


def serve(
    settings: Settings,
    services: Callable[[Settings], Sequence[Service]],
    report: int | None,
    *,
    timing: Timing | None = None,
) -> int:
    """The supervisor's process: runs until somebody asks for the end; the exit code.

    Args:
        report: descriptor of a pipe that hears once how the start went, as JSON.
    """
    from airloom.embedded.supervisor import supervise

    os.umask(0o077)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    _log_to(settings.log_dir / "supervisor.log")

    def tell(value: dict[str, str | None]) -> None:
        nonlocal report
        if report is not None:
            with suppress(OSError):
                os.write(report, json.dumps(value).encode())
            os.close(report)
            report = None

    if report is not None:
        os.set_inheritable(report, False)
    try:
        asyncio.run(supervise(settings, services(settings), on_started=lambda: tell({}), timing=timing))
    except AirloomError as error:
        logging.getLogger(__name__).error("%s", error)
        tell({"error": error.message, "hint": error.hint})
        return error.exit_code
    return 0


def wait_ready(settings: Settings, on_change: OnChange, *, timeout_seconds: float = 300.0) -> list[ServiceState]:
    """Until every service is ready. `on_change` is called with all states, several times a second.

    Raises:
        PlatformError: one fails to start again and again, or it takes too long; holds its last log lines.
    """
    supervisor = Supervisor.from_settings(settings)
    deadline = time.monotonic() + timeout_seconds
    while True:
        states = supervisor.services()
        on_change(states)
        static = [state for state in states if not state.dynamic]
        if all(state.ready for state in static):
            return states
        late = time.monotonic() > deadline
        for state in static:
            # What a late service waits for is late, and the one to speak of.
            if state.failed_starts >= FAILED_STARTS or (late and not state.ready and state.state != "waiting"):
                lines = "\n".join(f"    {line}" for line in tail(Path(state.log), _LOG_LINES))
                raise PlatformError(
                    f"{state.name} does not start: {state.error or 'no answer'}\n{lines}", hint=f"its log: {state.log}"
                )
        time.sleep(_POLL_SECONDS)


def bring_down(settings: Settings, on_change: OnChange, *, timeout_seconds: float = 180.0) -> bool:
    """Stop everything and wait until no process is left. False when nothing ran.

    Raises:
        PlatformError: it is still not down after the time given.
    """
    if not is_locked(settings):
        return False
    holder = read_record(settings)
    supervisor = Supervisor.from_settings(settings)
    deadline = time.monotonic() + timeout_seconds
    asked = False
    while is_locked(settings):
        if time.monotonic() > deadline:
            raise PlatformError(
                f"the platform is not down after {timeout_seconds:g} s",
                hint=f"kill its supervisor: kill -9 {holder.pid if holder else ''} (all of its processes end with it)",
            )
        try:
            if not asked:
                supervisor.shutdown()
                asked = True
            on_change(supervisor.services())
        except (PlatformError, UnavailableError):
            # The API is gone already, or not there yet.
            if not asked and holder is not None and holder.alive:
                with suppress(ProcessLookupError):
                    os.kill(holder.pid, signal.SIGTERM)
        time.sleep(_POLL_SECONDS)
    return True


def _log_to(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handler = logging.handlers.RotatingFileHandler(path, maxBytes=2 * 2**20, backupCount=2, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    # Probes make requests all the time.
    for name in ("httpx", "httpcore", "urllib3", "asyncio"):
        logging.getLogger(name).setLevel(logging.WARNING)
