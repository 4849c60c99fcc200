"""Clients of a served model that ask steadily and count what they get."""

from __future__ import annotations

import threading
import time
from collections import Counter
from types import TracebackType

import httpx

PER_SECOND = 75.0
_CLIENTS = 8


class Traffic:
    """Asks for predictions through the gateway, from `__enter__` to `__exit__`, on kept connections; never twice.

    Attributes:
        releases: release -> answers that it gave.
        failures: what each request got that was not answered by 200; at most as many as were sent.
        per_second: answers of 200, over the whole time.
    """

    def __init__(self, url: str, content: bytes) -> None:
        self._url = f"{url}/predict"
        self._content = content
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(_CLIENTS)]
        self.releases: Counter[str] = Counter()
        self.failures: list[str] = []
        self._seconds = 0.0

    @property
    def per_second(self) -> float:
        return sum(self.releases.values()) / self._seconds

    def __enter__(self) -> Traffic:
        self._started = time.monotonic()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(120)
        self._seconds = time.monotonic() - self._started

    def _ask(self) -> None:
        due = time.monotonic()
        with httpx.Client(timeout=90, trust_env=False, headers={"Content-Type": "image/png"}) as client:
            while not self._stop.is_set():
                try:
                    answer = client.post(self._url, content=self._content)
                    failure = "" if answer.status_code == 200 else f"{answer.status_code}: {answer.text[:200]}"
                    release = "" if failure else str(answer.json()["release"])
                except (httpx.HTTPError, ValueError, KeyError) as error:
                    failure, release = repr(error), ""
                with self._lock:
                    if failure:
                        self.failures.append(failure)
                    else:
                        self.releases[release] += 1
                # By the clock: what a pause made late is caught up.
                due += _CLIENTS / PER_SECOND
                self._stop.wait(max(0.0, due - time.monotonic()))
