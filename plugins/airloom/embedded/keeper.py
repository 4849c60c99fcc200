"""Keeps one service running: waits, starts, probes, watches, starts again, stops."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from airloom.embedded.environment import child_environment
from airloom.embedded.process import Child, describe_exit
from airloom.embedded.rotating_log import KEPT, MAX_BYTES, RotatingLog
from airloom.embedded.service import Service
from airloom.errors import AirloomError
from airloom.hooks.supervisor import Phase, ServiceState
from airloom.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How patient the supervisor is.

    Attributes:
        first_backoff_seconds: before the first new start; doubled for each that follows, up to the last.
        stable_seconds: ready for so long, and the back-off begins anew.
        liveness_seconds: between two probes of a service that is ready.
        recheck_seconds: the same while its probe fails.
        patience_seconds: probes failing for so long make it start again.
        probe_timeout_seconds: a probe that takes longer has failed.
        log_bytes: size of a log file before it is rotated.
    """

    first_backoff_seconds: float = 0.5
    last_backoff_seconds: float = 30.0
    stable_seconds: float = 60.0
    liveness_seconds: float = 15.0
    recheck_seconds: float = 2.0
    patience_seconds: float = 120.0
    probe_timeout_seconds: float = 20.0
    log_bytes: int = MAX_BYTES

    def backoff_seconds(self, failures: int) -> float:
        """How long to wait after that many failures in a row, counted from 1."""
        return float(min(self.first_backoff_seconds * 2 ** min(failures - 1, 30), self.last_backoff_seconds))


class _FailedError(Exception):
    """The service has to be started again, for the reason given."""


class Keeper:
    """One service and its task in the event loop."""

    def __init__(
        self,
        service: Service,
        settings: Settings,
        needed: Sequence[Keeper],
        threads: Executor,
        *,
        timing: Timing,
        dynamic: bool = False,
    ) -> None:
        self.service = service
        self.dynamic = dynamic
        self.ready = asyncio.Event()
        self.phase = Phase.WAITING
        self.restarts = 0
        self._settings = settings
        self._needed = needed
        self._threads = threads
        self._timing = timing
        self._log = RotatingLog(settings.log_dir / f"{service.name}.log", max_bytes=timing.log_bytes, kept=KEPT)
        self._child: Child | None = None
        self._probing: asyncio.Future[None] | None = None
        self._since = time.time()
        self._failures = 0  # in a row, for the back-off
        self._failed_starts = 0  # in a row, never ready
        self._error: str | None = None
        self._task: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        return self.service.name

    @property
    def log_path(self) -> str:
        return str(self._log.path)

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name=f"keep-{self.name}")

    def hold(self) -> None:
        """No new start from now on; a process that runs goes on running."""
        if self._task is not None:
            self._task.cancel()
        if self._child is None or not self._child.alive:
            self._set(Phase.STOPPED)

    async def stop(self) -> None:
        """End it: stop signal, grace, SIGKILL. Whoever calls, it goes on when the caller is gone."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop(), name=f"stop-{self.name}")
        await asyncio.shield(self._stopping)

    def state(self, memory_bytes: int = 0) -> ServiceState:
        """What there is to know now."""
        service = self.service
        running = self._child is not None and self._child.alive
        return ServiceState(
            name=service.name,
            state=self.phase,
            pid=self._child.pid if self._child is not None and running else None,
            port=service.ports[0] if service.ports else None,
            restarts=self.restarts,
            ready=self.ready.is_set(),
            url=next(iter(service.urls.values()), None),
            urls=dict(service.urls),
            log=self.log_path,
            failed_starts=self._failed_starts,
            since=self._since,
            seconds=time.time() - self._since,
            memory_bytes=memory_bytes,
            dynamic=self.dynamic,
            error=self._error,
        )

    async def _run(self) -> None:
        while True:
            self._set(Phase.WAITING)
            await asyncio.gather(*(other.ready.wait() for other in self._needed))
            ready_at: float | None = None
            try:
                await self._begin()
                ready_at = time.monotonic()
                await self._watch()
            except _FailedError as error:
                reason = str(error)
            await self._end_child()
            if ready_at is None:
                self._failed_starts += 1
            elif time.monotonic() - ready_at >= self._timing.stable_seconds:
                self._failures = 0
            self._failures += 1
            pause = self._timing.backoff_seconds(self._failures)
            self._error = reason.splitlines()[0]
            self._set(Phase.BACKOFF)
            self._log.note(f"{reason}; starting again in {pause:g} s")
            await asyncio.sleep(pause)
            self.restarts += 1

    async def _begin(self) -> None:
        """Start the process and wait until its probe passes.

        Raises:
            _FailedError: it did not come to that.
        """
        service = self.service
        self._set(Phase.STARTING)
        try:
            await asyncio.get_running_loop().run_in_executor(self._threads, service.prepare)
            service.cwd.mkdir(parents=True, exist_ok=True)
            env = child_environment(self._settings, service.name, service.env)
            # Without an await between, so that a stop can't miss the process.
            self._child = Child.spawn(service.command, cwd=service.cwd, env=env, log=self._log)
        except FileNotFoundError as error:
            raise _FailedError(f"cannot be started: there is no {error.filename}") from error
        except Exception as error:  # what prepare() raises is for the person, not for the supervisor
            raise _FailedError(f"cannot be started: {_words(error)}") from error
        deadline = time.monotonic() + service.start_timeout_seconds
        pause = 0.1
        while (problem := await self._probe()) is not None:
            self._error = f"not ready yet: {problem}"
            if time.monotonic() > deadline:
                raise _FailedError(f"not ready after {service.start_timeout_seconds:g} s: {problem}")
            await self._pause(pause)
            pause = min(pause * 1.3, 1.0)
        await self._pause(0)
        self._failed_starts = 0
        self._error = None
        self._set(Phase.READY)
        self._log.note("ready")

    async def _watch(self) -> None:
        """Until it has to be started again.

        Raises:
            _FailedError: always; says why.
        """
        answered = time.monotonic()
        while True:
            ready = self.phase is Phase.READY
            await self._pause(self._timing.liveness_seconds if ready else self._timing.recheck_seconds)
            problem = await self._probe()
            if not all(other.ready.is_set() for other in self._needed):
                # No fault of its own: a probe may go through what it depends on.
                answered = time.monotonic()
            if problem is None:
                answered = time.monotonic()
                if self.phase is not Phase.READY:
                    self._error = None
                    self._set(Phase.READY)
                continue
            self._error = problem
            if self.phase is Phase.READY:
                self._set(Phase.UNREADY)
                self._log.note(f"does not answer: {problem}")
            if time.monotonic() - answered > self._timing.patience_seconds:
                raise _FailedError(f"did not answer for {self._timing.patience_seconds:g} s: {problem}")

    async def _pause(self, seconds: float) -> None:
        """Wait; the end of the process ends it.

        Raises:
            _FailedError: the process has ended.
        """
        child = self._child
        if child is None:
            raise _FailedError("has no process")
        if seconds or not child.alive:
            try:
                code = await asyncio.wait_for(child.wait(), seconds)
            except TimeoutError:
                return
            raise _FailedError(describe_exit(code))

    async def _probe(self) -> str | None:
        """Why the service is not ready, or None. A probe that hangs is left alone and counts as failed."""
        if self._probing is not None and not self._probing.done():
            return "an earlier probe still waits for an answer"
        loop = asyncio.get_running_loop()
        self._probing = loop.run_in_executor(self._threads, self.service.probe)
        self._probing.add_done_callback(_forget)
        done, _ = await asyncio.wait({self._probing}, timeout=self._timing.probe_timeout_seconds)
        if not done:
            return f"no answer in {self._timing.probe_timeout_seconds:g} s"
        error = self._probing.exception()
        return None if error is None else _words(error)

    async def _end_child(self) -> None:
        if self._child is None:
            return
        if self._child.alive:
            await self._child.stop(self.service.stop_signal, self.service.grace_seconds)
        # Workers of a leader that was killed hold its port.
        self._child.kill_group()

    async def _stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        if self._child is not None and self._child.alive:
            self._set(Phase.STOPPING)
            if not await self._child.stop(self.service.stop_signal, self.service.grace_seconds):
                self._log.note(f"did not stop within {self.service.grace_seconds:g} s and was killed")
        await self._end_child()
        self._set(Phase.STOPPED)
        self._log.note("stopped")
        self._log.close()

    def _set(self, phase: Phase) -> None:
        if phase is not self.phase:
            self._since = time.time()
        self.phase = phase
        if phase is Phase.READY:
            self.ready.set()
        else:
            self.ready.clear()


def _words(error: BaseException) -> str:
    if isinstance(error, AirloomError):
        return error.message
    text = str(error).strip().splitlines()
    return text[0][:300] if text else type(error).__name__


def _forget(future: asyncio.Future[None]) -> None:
    if not future.cancelled():
        future.exception()
