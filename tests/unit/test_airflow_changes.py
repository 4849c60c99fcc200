"""Requests to Airflow's API server on SQLite: changes one after the other, everything else as it comes."""

from __future__ import annotations

import asyncio
from typing import Any

from airloom.airflow_pages.changes import OneChangeAtATime


class Server:
    """An app that notes what it is asked and answers when it is let; `most`: how many it has served at once."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.bodies: list[bytes] = []
        self.now = self.most = 0
        self.app = OneChangeAtATime(self._serve)

    async def _serve(self, scope: Any, receive: Any, send: Any) -> None:
        self.now += 1
        self.most = max(self.most, self.now)
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.bodies.append(body)
        await self.go.wait()
        self.now -= 1

    def ask(self, method: str, *parts: bytes, kind: str = "http", ends: bool = True) -> asyncio.Task[None]:
        messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
        if ends:
            messages.append({"type": "http.request", "body": b""})

        async def receive() -> Any:
            if not messages:
                await asyncio.Event().wait()  # a client that sends no more
            return messages.pop(0)

        async def send(message: Any) -> None:
            raise AssertionError("nothing is sent here")

        async def asked() -> None:
            await self.app({"type": kind, "method": method}, receive, send)

        return asyncio.create_task(asked())


async def until(condition: Any) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0)


def test_changes_come_one_after_the_other_and_whole() -> None:
    async def scenario() -> None:
        server = Server()
        asked = [server.ask(method, b"a", b"b") for method in ("POST", "PATCH", "PUT", "DELETE")]
        await until(lambda: server.bodies)
        for _ in range(50):
            await asyncio.sleep(0)
        assert (server.bodies, server.now) == ([b"ab"], 1)
        server.go.set()
        await asyncio.gather(*asked)
        assert (server.bodies, server.most) == ([b"ab"] * 4, 1)

    asyncio.run(scenario())


def test_who_only_reads_waits_for_nobody() -> None:
    async def scenario() -> None:
        server = Server()
        asked = [server.ask(method) for method in ("POST", "GET", "HEAD", "OPTIONS")]
        asked.append(server.ask("", kind="lifespan"))
        await until(lambda: server.now == 5)
        assert server.most == 5
        server.go.set()
        await asyncio.gather(*asked)

    asyncio.run(scenario())


def test_who_sends_slowly_or_goes_away_keeps_nobody_waiting() -> None:
    async def scenario() -> None:
        server = Server()
        slow = server.ask("POST", b"never", ends=False)
        waits = server.ask("POST", b"one")
        await until(lambda: server.bodies == [b"one"])
        gone, after = server.ask("POST", b"two"), server.ask("POST", b"three")
        await asyncio.sleep(0)
        gone.cancel()
        server.go.set()
        await asyncio.gather(waits, after)
        assert server.bodies == [b"one", b"three"]
        slow.cancel()

    asyncio.run(scenario())
