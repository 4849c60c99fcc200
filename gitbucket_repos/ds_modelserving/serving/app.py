"""The HTTP surface: FastAPI for what people and the platform ask, bare ASGI for predictions."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException

from airloom.contract.errors import AirloomError, ConflictError
from serving.batcher import MicroBatcher
from serving.drain import Drainer
from serving.engine import Engine, Job
from serving.journal import JournalWriter, Signal
from serving.limits import Receive, Scope, Send
from serving.metrics import Metrics
from serving.openapi import describe
from serving.options import Options
from serving.predict import Predictions
from serving.problems import ProblemError, internal
from serving.served import Served, ServedHolder

log = logging.getLogger(__name__)

HOT_ROUTES = frozenset({"/predict", "/explain"})
PAGE = Path(__file__).parent / "page.html"
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
}

AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]


class Swap(BaseModel):
    """Body of `PUT /model`."""

    model_config = ConfigDict(extra="forbid")

    release_dir: Path


class ServingApp:
    """One release behind HTTP: an ASGI app that owns the model's thread, the journal and its drain."""

    def __init__(self, *, pipeline: str, model: Path, release_file: Path, options: Options) -> None:
        self._pipeline = pipeline
        self._options = options
        self.metrics = Metrics(pipeline)
        self.holder = ServedHolder(
            pipeline=pipeline,
            model=model,
            release_file=release_file,
            releases_root=options.releases_root,
            state_dir=options.journal_dir,
            threads=options.threads,
        )
        signal = Signal()
        self.journal = JournalWriter(options.journal_dir, max_bytes=options.max_journal_bytes, on_append=signal.set)
        self.drainer = Drainer(
            self.journal,
            journal_dir=options.journal_dir,
            url=options.database_url.get_secret_value() if options.database_url else None,
            signal=signal,
            metrics=self.metrics,
        )
        engine = Engine(self.holder, self.journal, self.metrics)
        self.batcher: MicroBatcher[Job, bytes] = MicroBatcher(
            engine.predict, max_batch=options.max_batch, max_queue=options.max_queue
        )
        self.predictions = Predictions(
            holder=self.holder, batcher=self.batcher, engine=engine, options=options, metrics=self.metrics
        )
        self.metrics.watch("airloom_serving_queue", "Requests that wait for the model", lambda: self.batcher.waiting)
        self.metrics.watch(
            "airloom_serving_in_flight", "Requests being read or answered", lambda: self.predictions.in_flight
        )
        self.metrics.watch(
            "airloom_serving_journal_backlog_bytes",
            "Answers that the prediction log does not have yet",
            self.drainer.backlog_bytes,
        )
        self._rest = self._fastapi()
        self._loading: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] in HOT_ROUTES:
            await self.predictions.respond(scope["path"], scope, receive, send)
        else:
            await self._rest(scope, receive, send)

    def _fastapi(self) -> FastAPI:
        app = FastAPI(
            title=f"{self._pipeline} (Airloom)",
            lifespan=self._lifespan,
            docs_url=None,  # their pages load scripts from elsewhere
            redoc_url=None,
            exception_handlers={
                ProblemError: _on_problem,
                RequestValidationError: _on_invalid,
                HTTPException: _on_http_error,
                Exception: _on_error,
            },
        )
        app.get("/", include_in_schema=False)(self.page)
        app.get("/health", summary="200 with a loaded model, else 503 and why")(self.health)
        app.get("/info", summary="What answers: release, model, data version, code")(self.info)
        app.get("/metrics", summary="Figures in Prometheus' format")(self.render_metrics)
        app.put("/model", summary="Swap the model without a pause; needs the admin token")(self.swap)
        describe(app)
        return app

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        self.batcher.start()
        self.drainer.start()
        self._loading = asyncio.create_task(self._load_first())
        try:
            yield
        finally:
            self._loading.cancel()
            # In this order: nothing is answered after the journal is closed.
            await asyncio.to_thread(self.batcher.stop)
            self.journal.close(drained=await asyncio.to_thread(self.drainer.stop))

    async def _load_first(self) -> None:
        """Load in the background: the port answers at once, and /health says how it stands."""
        started = time.monotonic()
        try:
            served = await asyncio.to_thread(self.holder.load_first)
        except AirloomError as error:
            log.error("nothing can be served: %s", error)
            return
        self._serves(served)
        log.info("release %s answers after %.1f s", served.release.version, time.monotonic() - started)

    def _serves(self, served: Served) -> None:
        self.metrics.serves(served.release.version, served.release.model_version, served.card.classes)

    async def page(self) -> HTMLResponse:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=PAGE_HEADERS)

    async def health(self) -> JSONResponse:
        served = self.holder.current
        if served is None:
            error = {
                "type": "not_ready",
                "message": self.holder.reason,
                "hint": "wait; if it stays so, see the service's log",
            }
            return JSONResponse({"status": "not_ready", "error": error}, status_code=503)
        return JSONResponse(
            {
                "status": "ok",
                "pipeline": served.release.pipeline,
                "release": served.release.version,
                "model_version": served.release.model_version,
                "loaded_at": served.loaded_at,
                "journal_backlog_bytes": self.drainer.backlog_bytes(),
                "prediction_log": "down" if self.drainer.failing else "ok",
            }
        )

    async def info(self) -> dict[str, Any]:
        served = self._required()
        release = served.release
        return {
            "pipeline": release.pipeline,
            "release": release.version,
            "model_name": release.model_name,
            "model_version": release.model_version,
            "model_digest": release.model_digest,
            "run_id": release.run_id,
            "data_tag": release.data_tag,
            "serving_commit": release.serving_commit,
            "environment": release.environment,
            "metrics": release.metrics,
            "task": served.card.task,
            "classes": served.card.classes,
            "media_types": served.card.media_types,
            "max_upload_bytes": self._options.max_upload_bytes,
        }

    async def render_metrics(self) -> Response:
        return Response(self.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    async def swap(self, request: Request, wanted: Swap) -> dict[str, Any]:
        """Load the release in `release_dir`, then let it answer. The old one answers until then, and if it fails."""
        self._authorise(request)
        previous = self.holder.current
        try:
            served = await asyncio.to_thread(self.holder.swap, wanted.release_dir)
        except AirloomError as error:
            self.metrics.swaps.labels("failed").inc()
            log.warning("the model was not swapped: %s", error)
            status = 409 if isinstance(error, ConflictError) else 422
            raise ProblemError(
                status, "not_swapped", error.message, error.hint or "the service's log says more"
            ) from error
        self._serves(served)
        self.metrics.swaps.labels("ok").inc()
        log.info("release %s answers after a swap", served.release.version)
        return {"release": served.release.version, "previous": previous.release.version if previous else None}

    def _authorise(self, request: Request) -> None:
        token = self._options.admin_token
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        expected = token.get_secret_value() if token else ""
        same = hmac.compare_digest(given.strip().encode(), expected.encode())
        if not expected or scheme.lower() != "bearer" or not same:
            raise ProblemError(
                401,
                "unauthorized",
                "the admin token is missing or wrong",
                "send Authorization: Bearer <serving_admin_token>",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _required(self) -> Served:
        if self.holder.current is None:
            raise ProblemError(503, "not_ready", self.holder.reason, "see /health", headers={"Retry-After": "2"})
        return self.holder.current


def _response(problem: ProblemError) -> Response:
    answer = problem.answer()
    return Response(answer.body, status_code=answer.status, media_type=answer.media_type, headers=dict(answer.headers))


async def _on_problem(_: Request, error: Exception) -> Response:
    assert isinstance(error, ProblemError)
    return _response(error)


async def _on_invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return _response(ProblemError(422, "invalid_request", f"{where}: {first['msg']}", "see /openapi.json"))


async def _on_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "refused")
    return _response(
        ProblemError(error.status_code, kind, str(error.detail), "see /openapi.json", headers=dict(error.headers or {}))
    )


async def _on_error(_: Request, error: Exception) -> Response:
    log.error("a request failed", exc_info=error)
    return _response(internal())
