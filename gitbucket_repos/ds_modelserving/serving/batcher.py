"""One thread that owns the model, and batches that never wait.

The thread takes whatever is queued when it becomes free: one request at once when there is one, more when they
came while it was busy. So batching adds no delay, and its size follows the load.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

log = logging.getLogger(__name__)

J = TypeVar("J")
R = TypeVar("R")

STOP_SECONDS = 30.0


class QueueFullError(Exception):
    """More requests wait than may."""


class StoppedError(Exception):
    """The batcher takes no more."""


class MicroBatcher(Generic[J, R]):
    """Hands jobs from the event loop to `work` on its own thread, and the results back.

    Args:
        work: called with one or more jobs; gives one result, or one exception, for each, in their order.
            What it raises itself becomes the outcome of every job of the batch.
        max_batch: jobs that `work` gets at once.
        max_queue: jobs that may wait, besides those in work.
    """

    def __init__(
        self, work: Callable[[Sequence[J]], Sequence[R | Exception]], *, max_batch: int, max_queue: int
    ) -> None:
        self._work = work
        self._max_batch = max_batch
        self._max_queue = max_queue
        self._jobs: deque[tuple[J, asyncio.Future[R]]] = deque()
        self._calls: deque[tuple[Callable[[], Any], asyncio.Future[Any]]] = deque()
        self._wake = threading.Semaphore(0)
        self._asleep = False
        self._stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        """Start the thread; call it in the event loop that submits."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        return len(self._jobs)

    def submit(self, job: J) -> asyncio.Future[R]:
        """Queue one job.

        Raises:
            QueueFullError: as many wait as may.
            StoppedError: after `stop`.
        """
        if self._stopping or self._loop is None:
            raise StoppedError
        if len(self._jobs) >= self._max_queue:
            raise QueueFullError
        future: asyncio.Future[R] = self._loop.create_future()
        self._jobs.append((job, future))
        self._wake.release()
        return future

    def call(self, function: Callable[[], Any]) -> asyncio.Future[Any]:
        """Run a function on the model's thread, before the next batch. Raises as `submit` does."""
        if self._stopping or self._loop is None:
            raise StoppedError
        if len(self._calls) >= self._max_queue:
            raise QueueFullError
        future: asyncio.Future[Any] = self._loop.create_future()
        self._calls.append((function, future))
        self._wake.release()
        return future

    def stop(self) -> None:
        """Finish what is queued and end the thread. Blocks."""
        self._stopping = True
        self._wake.release()
        if self._thread.ident is not None:
            self._thread.join(STOP_SECONDS)

    def _run(self) -> None:
        jobs, calls = self._jobs, self._calls
        while True:
            self._wake.acquire()
            while self._wake.acquire(blocking=False):  # one token for each job; the queue is what counts
                pass
            while calls or jobs:
                if calls:
                    self._call(*calls.popleft())
                if jobs:
                    self._batch([jobs.popleft() for _ in range(min(len(jobs), self._max_batch))])
            if self._stopping and not calls and not jobs:
                return

    def _batch(self, taken: list[tuple[J, asyncio.Future[R]]]) -> None:
        try:
            outcomes = self._work([job for job, _ in taken])
        except Exception as error:
            log.exception("a batch of %d failed", len(taken))
            outcomes = [error] * len(taken)
        self._deliver([(future, outcome) for (_, future), outcome in zip(taken, outcomes, strict=True)])

    def _call(self, function: Callable[[], Any], future: asyncio.Future[Any]) -> None:
        try:
            outcome = function()
        except Exception as error:
            outcome = error
        self._deliver([(future, outcome)])

    def _deliver(self, outcomes: list[tuple[asyncio.Future[Any], Any]]) -> None:
        """Wake everybody of a batch with one call into the loop."""
        if self._loop is None or self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(_settle, outcomes)


def _settle(outcomes: list[tuple[asyncio.Future[Any], Any]]) -> None:
    for future, outcome in outcomes:
        if future.done():  # its client went away
            continue
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
