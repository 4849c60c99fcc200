"""`POST /predict` and `POST /explain` as bare ASGI: the path that every request takes, with nothing on it to spare."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from serving.batcher import MicroBatcher, QueueFullError, StoppedError
from serving.engine import Engine, Job
from serving.limits import ClientGoneError, Receive, Scope, Send, check_media_type, headers_of, read_body
from serving.media import media_type_of, plain
from serving.metrics import Metrics
from serving.multipart import file_of
from serving.options import Options
from serving.problems import Answer, ProblemError, busy, internal, not_ready, stopping
from serving.served import ServedHolder

log = logging.getLogger(__name__)

MULTIPART = "multipart/form-data"
# What a multipart body needs besides its file: boundaries and part headers.
MULTIPART_ALLOWANCE_BYTES = 16 * 1024

Endpoint = Callable[[Scope, Receive], Awaitable[Answer]]


class Predictions:
    """Reads a body, has the model answer it, and turns whatever goes wrong into a typed error."""

    def __init__(
        self,
        *,
        holder: ServedHolder,
        batcher: MicroBatcher[Job, bytes],
        engine: Engine,
        options: Options,
        metrics: Metrics,
    ) -> None:
        self._holder = holder
        self._batcher = batcher
        self._engine = engine
        self._options = options
        self._metrics = metrics
        self._in_flight = 0

    @property
    def in_flight(self) -> int:
        """Requests that are being read or answered."""
        return self._in_flight

    async def respond(self, route: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request of `route`, `/predict` or `/explain`."""
        arrived = time.perf_counter()
        self._in_flight += 1
        try:
            if scope["method"] != "POST":
                raise _wrong_method(route)
            answer = await (self._predict if route == "/predict" else self._explain)(scope, receive, arrived)
        except ProblemError as problem:
            answer = problem.answer()
        except ClientGoneError:
            return
        except asyncio.CancelledError:
            raise
        except Exception:
            log.exception("%s failed", route)
            answer = internal().answer()
        finally:
            self._in_flight -= 1
        await send_answer(send, answer)
        self._metrics.answered(route, answer.status, time.perf_counter() - arrived)

    async def _predict(self, scope: Scope, receive: Receive, arrived: float) -> Answer:
        content, media_type = await self._input(scope, receive)
        try:
            return Answer(200, await self._batcher.submit(Job(content, media_type, arrived)))
        except QueueFullError:
            raise busy() from None
        except StoppedError:
            raise stopping() from None

    async def _explain(self, scope: Scope, receive: Receive, _: float) -> Answer:
        content, _media_type = await self._input(scope, receive)
        try:
            picture = await self._batcher.call(lambda: self._engine.explain(content))
        except QueueFullError:
            raise busy() from None
        except StoppedError:
            raise stopping() from None
        return Answer(200, picture, media_type="image/png", headers={"Cache-Control": "no-store"})

    async def _input(self, scope: Scope, receive: Receive) -> tuple[bytes, str]:
        """The bytes to decode and their media type, within the limits."""
        served = self._holder.current
        if served is None:
            raise not_ready(self._holder.reason)
        if self._in_flight > 2 * self._options.max_queue:  # bodies that are being read count too: they take memory
            raise busy()
        content_type, length, expects = headers_of(scope)
        declared = check_media_type(plain(content_type))
        multipart = declared == MULTIPART
        limit = self._options.max_upload_bytes
        content = await read_body(
            receive,
            length=length,
            expects=expects,
            limit_bytes=limit + MULTIPART_ALLOWANCE_BYTES if multipart else limit,
            timeout_seconds=self._options.read_timeout_seconds,
        )
        if multipart:
            content, declared = await file_of(content, content_type, limit)
            declared = check_media_type(plain(declared))
        return content, media_type_of(content, declared, served.card.media_types)


async def send_answer(send: Send, answer: Answer) -> None:
    """Send a whole answer."""
    headers = [
        (b"content-type", answer.media_type.encode()),
        (b"content-length", str(len(answer.body)).encode()),
        *((name.lower().encode(), value.encode()) for name, value in answer.headers.items()),
    ]
    if answer.closes:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})


def _wrong_method(route: str) -> ProblemError:
    return ProblemError(
        405, "method_not_allowed", f"{route} takes POST alone", "send the file with POST", headers={"Allow": "POST"}
    )
