"""All parts of the git server, put together."""

from __future__ import annotations

import asyncio
import functools
import hmac
import logging
import secrets
import sys
from pathlib import Path

import anyio.to_thread
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from airloom.embedded import builder
from airloom.embedded.forge import notify
from airloom.embedded.forge.api import Api
from airloom.embedded.forge.auth import BasicAuth
from airloom.embedded.forge.events import Events, Push, read_push
from airloom.embedded.forge.metrics import Metrics, Timed
from airloom.embedded.forge.pages import Pages
from airloom.embedded.forge.repositories import ZERO, Repositories, Repository
from airloom.embedded.forge.shapes import Shapes
from airloom.embedded.forge.smart_http import SmartHttp
from airloom.embedded.forge.state import State
from airloom.embedded.git_server import git_data_dir
from airloom.settings import Settings

log = logging.getLogger(__name__)

NOTIFY_PATH = "/-/received"
OPEN_PATHS = frozenset({"/health", "/metrics", builder.HOOK_PATH, NOTIFY_PATH})


class Forge:
    """The git server: `app` answers requests, `start` and `stop` frame the threads beside it."""

    def __init__(self, settings: Settings) -> None:
        root = git_data_dir(settings)
        own = root / ".forge"
        bodies = own / "bodies"
        bodies.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._settings = settings
        self.metrics = Metrics()
        self.state = State(own / "forge.db")
        self.repositories = Repositories(root, own / "hooks")
        self._shapes = Shapes(settings.git_base_url)
        self._token = secrets.token_urlsafe(32)
        self._events = Events(
            folder=own,
            repositories=self.repositories,
            state=self.state,
            shapes=self._shapes,
            on_push=self._count_push,
            on_delivery=lambda outcome: self.metrics.deliveries.labels(outcome).inc(),
        )
        self._builder = builder.Builder(
            settings,
            self.repositories,
            self.state,
            on_event=lambda outcome: self.metrics.events.labels(outcome).inc(),
            on_build=lambda outcome: self.metrics.builds.labels(outcome).inc(),
        )
        self._git = SmartHttp(
            self.repositories,
            bodies=bodies,
            hook_environment={
                "AIRLOOM_PYTHON": sys.executable,
                "AIRLOOM_NOTIFY": str(Path(notify.__file__)),
                "AIRLOOM_NOTIFY_URL": f"{settings.bind_host}:{settings.git_port}{NOTIFY_PATH}",
                "AIRLOOM_NOTIFY_TOKEN": self._token,
            },
            after_push=self._pushed,
        )
        self.app = self._build_app(settings)

    def start(self) -> None:
        """Make what is on disk ready, and start the threads."""
        self._events.install()
        for repository in self.repositories.all():
            repository.remove_stale_locks()
            self.repositories.configure(repository)
        self._events.start()
        self._builder.start()

    def stop(self) -> None:
        """End builds and deliveries; both go on after the next start."""
        self._events.stop()
        self._builder.stop()

    def _build_app(self, settings: Settings) -> ASGIApp:
        api = Api(self.repositories, self.state, self._shapes)
        pages = Pages(self.repositories, self.state, functools.partial(builder.build_log, settings))
        git_path = "/{owner}/{repo}.git/{rest:path}"
        routes = [
            Route("/health", lambda request: PlainTextResponse("ok\n")),
            Route("/metrics", self._metrics),
            Route(builder.HOOK_PATH, self._builder.endpoint, methods=["POST"]),
            Route(NOTIFY_PATH, self._received, methods=["POST"]),
            *api.routes(),
            Route(f"/git{git_path}", self._git.endpoint, methods=["GET", "POST"]),
            Route(git_path, self._git.endpoint, methods=["GET", "POST"]),
            *pages.routes(),
        ]
        passwords = {
            settings.git_user: settings.secret("git_password"),
            "admin": settings.secret("admin_password"),
        }
        return Starlette(
            routes=routes,
            middleware=[
                Middleware(Timed, metrics=self.metrics),
                Middleware(BasicAuth, passwords=passwords, open_paths=OPEN_PATHS),
            ],
        )

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type=Metrics.content_type)

    async def _pushed(self, repository: Repository) -> None:
        self._events.wake()
        await asyncio.sleep(0)

    async def _received(self, request: Request) -> Response:
        """What the hook script tells, while the person who pushed still waits: the answer is shown to them."""
        if not hmac.compare_digest(request.headers.get("authorization", ""), f"Bearer {self._token}"):
            return PlainTextResponse("only for hook scripts\n", status_code=401)
        push = read_push((await request.body()).decode(errors="replace"), "", self.repositories)
        if push is None:
            return PlainTextResponse("")
        return PlainTextResponse(await anyio.to_thread.run_sync(self._reply, push))

    def _reply(self, push: Push) -> str:
        urls = {row["url"] for row in self.state.hooks(push.repository.full_name)}
        lines = []
        if builder.hook_url(self._settings) in urls:
            for change in push.changes:
                if change.branch is None:
                    continue
                decision = self._builder.decide(push.repository, ref=change.ref, after=change.after)
                if decision.commit is None:
                    lines.append(f"Airloom: no build of {push.repository.name}: {decision.reason}")
                else:
                    page = self._shapes.url(push.repository.full_name, "commit", decision.commit)
                    lines.append(f"Airloom: build of {push.repository.name}@{decision.commit[:8]} started")
                    lines.append(f"Airloom: its status: {page}")
        others = len(urls - {builder.hook_url(self._settings)})
        if others:
            lines.append(f"Airloom: {others} webhook{'s' if others > 1 else ''} will be told")
        return "".join(f"{line}\n" for line in lines)

    def _count_push(self, push: Push) -> None:
        for change in push.changes:
            kind = "tag" if change.ref.startswith("refs/tags/") else "branch" if change.branch else "other"
            action = "deleted" if change.deletes else "created" if change.before == ZERO else "updated"
            self.metrics.pushes.labels(push.repository.full_name, kind, action).inc()
