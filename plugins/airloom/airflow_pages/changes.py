"""Changes that Airflow's API server makes one after the other, where its database is SQLite."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_CHANGES_NOTHING = frozenset({"GET", "HEAD", "OPTIONS"})


class OneChangeAtATime:
    """Lets each request that may change something wait for the one before it.

    SQLite has one writer at a time. Airflow's server commits the audit log on its event loop: there it would wait, with
    everybody else, for a request whose own commit needs that loop, until SQLite gives up and the request has failed.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._change = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["method"] in _CHANGES_NOTHING:
            await self._app(scope, receive, send)
            return
        whole = await _read(receive)
        async with self._change:
            await self._app(scope, whole, send)


async def _read(receive: Receive) -> Receive:
    """A request that has arrived as a whole: who sends slowly keeps nobody else waiting."""
    arrived: list[Message] = []
    while not arrived or arrived[-1].get("more_body"):
        arrived.append(await receive())

    async def again() -> Message:
        return arrived.pop(0) if arrived else await receive()

    return again
