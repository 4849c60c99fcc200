"""A closed-loop load generator on bare sockets: each connection asks again as soon as it is answered."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import cast


@dataclass
class Load:
    """What came of one measurement. Latencies in seconds."""

    seconds: float
    latencies: list[float] = field(default_factory=list)
    failures: int = 0

    @property
    def rate(self) -> float:
        return len(self.latencies) / self.seconds

    def percentile(self, percent: float) -> float:
        if not self.latencies:
            return float("nan")
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


class _Client(asyncio.Protocol):
    def __init__(self, requests: list[bytes], first: int, load: Load, ends_at: float) -> None:
        self._requests = requests
        self._next = first
        self._load = load
        self._ends_at = ends_at
        self._buffer = b""
        self._asked = 0.0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._ask()

    def _ask(self) -> None:
        self._asked = time.perf_counter()
        self._transport.write(self._requests[self._next % len(self._requests)])
        self._next += 1

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, separator, rest = self._buffer.partition(b"\r\n\r\n")
        if not separator:
            return
        lower = head.lower()
        at = lower.find(b"content-length:")
        if at < 0:
            if not rest.endswith(b"0\r\n\r\n"):  # chunked
                return
        elif len(rest) < int(lower[at + 15 :].split(b"\r\n", 1)[0]):
            return
        now = time.perf_counter()
        if head[9:12] == b"200":
            self._load.latencies.append(now - self._asked)
        else:
            self._load.failures += 1
        self._buffer = b""
        if now < self._ends_at:
            self._ask()
        else:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if time.perf_counter() < self._ends_at:
            self._load.failures += 1
        if not self.done.done():
            self.done.set_result(None)


async def _run(port: int, requests: list[bytes], connections: int, seconds: float) -> Load:
    loop = asyncio.get_running_loop()
    load = Load(seconds=seconds)
    ends_at = time.perf_counter() + seconds
    clients = []
    for number in range(connections):
        _, client = await loop.create_connection(
            lambda number=number: _Client(requests, number, load, ends_at), "127.0.0.1", port
        )
        clients.append(client)
    await asyncio.wait([client.done for client in clients], timeout=seconds + 30)
    return load


def measure(port: int, requests: list[bytes], *, connections: int, seconds: float) -> Load:
    """Ask for some seconds over some connections; the requests are sent in turn."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_run(port, requests, connections, seconds))


def http_request(path: str, media_type: str, body: bytes) -> bytes:
    """A whole request as bytes."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {media_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
