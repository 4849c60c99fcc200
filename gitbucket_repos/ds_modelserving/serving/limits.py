"""Read a request's body within limits that hold while it is read, whatever its headers say."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from serving.problems import ProblemError, too_large

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# Of a body that is too large, this much more is read and forgotten: a client that has not finished sending
# would otherwise see its connection reset instead of the answer.
DISCARD_BYTES = 64 * 2**20
DISCARD_SECONDS = 10.0
_MEDIA_TYPE = re.compile(r"[a-z0-9][a-z0-9!#$&^_.+-]{0,63}/[a-z0-9][a-z0-9!#$&^_.+-]{0,63}")


class ClientGoneError(Exception):
    """The client closed the connection before its request was complete: there is nobody to answer."""


def headers_of(scope: Scope) -> tuple[str, int | None, bool]:
    """Content-Type as sent, Content-Length if sent, and whether the client waits for `100 Continue`."""
    content_type, length, expects = "", None, False
    for name, value in scope["headers"]:
        if name == b"content-type":
            content_type = value.decode("latin-1")
        elif name == b"content-length" and value.isdigit():
            length = int(value)
        elif name == b"expect":
            expects = True
    return content_type, length, expects


def check_media_type(media_type: str) -> str:
    """A media type without parameters, or "" where there is none.

    Raises:
        ProblemError: it is none.
    """
    if media_type and not _MEDIA_TYPE.fullmatch(media_type):
        raise ProblemError(
            415,
            "unsupported_media_type",
            f"the Content-Type {media_type[:60]!r} is no media type",
            "send one such as image/png",
        )
    return media_type


async def read_body(
    receive: Receive, *, length: int | None, expects: bool, limit_bytes: int, timeout_seconds: float
) -> bytes:
    """The whole body.

    Raises:
        ProblemError: it is larger than the limit (found before or while it is read), or does not arrive in time.
        ClientGoneError: the client went away.
    """
    if length is not None and length > limit_bytes:
        if not expects:
            await _discard(receive)
        raise too_large(limit_bytes)
    chunks: list[bytes] = []
    size_bytes = 0
    try:
        async with asyncio.timeout(timeout_seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                chunk: bytes = message.get("body", b"")
                size_bytes += len(chunk)
                if size_bytes > limit_bytes:
                    break
                more = message.get("more_body", False)
                if not more and not chunks:  # nearly every body: it came whole
                    return chunk
                chunks.append(chunk)
                if not more:
                    return b"".join(chunks)
    except TimeoutError:
        raise ProblemError(
            408,
            "too_slow",
            f"the body did not arrive within {timeout_seconds:g} seconds",
            "check Content-Length against what is sent, or the connection",
            closes=True,
        ) from None
    chunks.clear()
    await _discard(receive)
    raise too_large(limit_bytes)


async def _discard(receive: Receive) -> None:
    left = DISCARD_BYTES
    try:
        async with asyncio.timeout(DISCARD_SECONDS):
            while left > 0:
                message = await receive()
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
                left -= len(message.get("body", b""))
    except TimeoutError:
        return
