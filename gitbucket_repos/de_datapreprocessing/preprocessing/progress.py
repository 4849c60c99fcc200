"""Say on stdout how far a long step is, every second, whatever the step is waiting for."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Counter:
    """How many items are done; read by the thread that reports."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0


@contextmanager
def counting(what: str, total: int, *, interval_seconds: float = 1.0) -> Iterator[Counter]:
    """Print `what: done of total` at each interval, and once more with the time taken at the end."""
    counter, ended, started = Counter(total), threading.Event(), time.monotonic()

    def report() -> None:
        while not ended.wait(interval_seconds):
            print(f"{what}: {counter.done:,} of {counter.total:,}", flush=True)

    reporter = threading.Thread(target=report, name="progress", daemon=True)
    reporter.start()
    try:
        yield counter
    finally:
        ended.set()
        reporter.join()
        print(f"{what}: {counter.done:,} of {counter.total:,} in {time.monotonic() - started:.1f} s", flush=True)
