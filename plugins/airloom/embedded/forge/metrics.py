"""What the git server counts, in Prometheus format."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.types import ASGIApp, Message, Receive, Scope, Send

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter that nobody asks for

_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """The counters of one server."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.pushes = Counter(
            "airloom_git_pushes",
            "Refs that pushes changed.",
            ("repo", "kind", "change"),
            registry=self.registry,
        )
        self.deliveries = Counter(
            "airloom_git_webhook_deliveries",
            "Attempts to deliver a push event: delivered, retried or failed.",
            ("outcome",),
            registry=self.registry,
        )
        self.events = Counter(
            "airloom_git_push_events",
            "Push events that the builder received: accepted, ignored, unsigned, forged or malformed.",
            ("outcome",),
            registry=self.registry,
        )
        self.builds = Counter(
            "airloom_git_builds", "Builds that ended: success or failure.", ("outcome",), registry=self.registry
        )
        self.seconds = Histogram(
            "airloom_git_request_seconds",
            "Duration of requests until the last byte of the answer.",
            ("kind", "status"),
            buckets=_BUCKETS,
            registry=self.registry,
        )

        # Counters begin with 0: one that first appears as 1 has not increased in Prometheus' eyes.
        for counter, outcomes in (
            (self.deliveries, ("delivered", "retried", "failed")),
            (self.events, ("accepted", "ignored", "unsigned", "forged", "malformed")),
            (self.builds, ("success", "failure")),
        ):
            for outcome in outcomes:
                counter.labels(outcome)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Timed:
    """Measures each request by what it asked for: api, fetch, push, page or other."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        status = "500"

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, watch)
        finally:
            self._metrics.seconds.labels(_kind(scope["path"]), status).observe(time.perf_counter() - started)


def _kind(path: str) -> str:
    if path.startswith("/api/"):
        return "api"
    if path.endswith("/git-receive-pack"):
        return "push"
    if path.endswith(("/git-upload-pack", "/info/refs")):
        return "fetch"
    return "other" if path.startswith("/-/") or path in {"/metrics", "/health"} else "page"
