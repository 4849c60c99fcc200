"""The supervisor's HTTP API, on a Unix socket that only its user may open.

GET    /services[?memory=1]       every service
GET    /services/{name}           one
GET    /services/{name}/log       its last lines (?lines=50)
PUT    /services/{name}           start a dynamic service (body: ServiceDefinition)
DELETE /services/{name}           stop and forget a dynamic service; answers when it is gone
POST   /shutdown                  end the platform; answers at once
GET    /metrics                   Prometheus' text format
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from airloom.embedded.instance import memory_by_service
from airloom.embedded.rotating_log import tail
from airloom.errors import AirloomError, ConfigError, ConflictError, NotFoundError
from airloom.hooks.supervisor import ServiceDefinition

if TYPE_CHECKING:
    from airloom.embedded.keeper import Keeper
    from airloom.embedded.supervisor import Supervisor

_STATUS: tuple[tuple[type[AirloomError], int], ...] = ((ConfigError, 400), (NotFoundError, 404), (ConflictError, 409))
_MAX_LINES = 10_000


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to the supervisor."""
        yield


class ControlApi:
    """Serves the API in the supervisor's event loop."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._path = Path(supervisor.settings.supervisor.removeprefix("unix:"))
        config = uvicorn.Config(
            self._app(), log_config=None, access_log=False, lifespan="off", loop="none", timeout_graceful_shutdown=2
        )
        self._server = _Server(config)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen. A socket that an earlier supervisor left is replaced; the lock says that it is gone."""
        self._path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        old = os.umask(0o177)
        try:
            listener.bind(str(self._path))
        finally:
            os.umask(old)
        listener.listen(64)
        self._task = asyncio.create_task(self._server.serve(sockets=[listener]), name="control-api")
        while not self._server.started and not self._task.done():
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        self._server.should_exit = True
        if self._task is not None:
            await self._task
        self._path.unlink(missing_ok=True)

    def _app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/services", self._list, methods=["GET"]),
                Route("/services/{name}", self._show, methods=["GET"]),
                Route("/services/{name}", self._add, methods=["PUT"]),
                Route("/services/{name}", self._remove, methods=["DELETE"]),
                Route("/services/{name}/log", self._log, methods=["GET"]),
                Route("/shutdown", self._shutdown, methods=["POST"]),
                Route("/metrics", self._metrics, methods=["GET"]),
            ],
            exception_handlers={AirloomError: _refused},
        )

    async def _list(self, request: Request) -> Response:
        sizes: dict[str, int] = {}
        if request.query_params.get("memory"):
            sizes = await asyncio.to_thread(memory_by_service, self._supervisor.settings)
        states = [_dump(keeper, sizes.get(keeper.name, 0)) for keeper in self._supervisor.keepers]
        return JSONResponse({"services": states})

    async def _show(self, request: Request) -> Response:
        return JSONResponse(_dump(self._supervisor.keeper(request.path_params["name"])))

    async def _log(self, request: Request) -> Response:
        keeper = self._supervisor.keeper(request.path_params["name"])
        try:
            lines = min(int(request.query_params.get("lines", "50")), _MAX_LINES)
        except ValueError:
            raise ConfigError(f"lines: expected a number, found {request.query_params['lines']!r}") from None
        return JSONResponse({"lines": await asyncio.to_thread(tail, Path(keeper.log_path), lines)})

    async def _add(self, request: Request) -> Response:
        try:
            definition = ServiceDefinition.model_validate_json(await request.body())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the body"
            raise ConfigError(f"not a valid definition of a service: {where}: {first['msg']}") from error
        keeper = await self._supervisor.add(request.path_params["name"], definition)
        return JSONResponse(_dump(keeper), status_code=202)

    async def _remove(self, request: Request) -> Response:
        await self._supervisor.remove(request.path_params["name"])
        return JSONResponse({})

    async def _shutdown(self, _: Request) -> Response:
        self._supervisor.shutdown()
        return JSONResponse({}, status_code=202)

    async def _metrics(self, _: Request) -> Response:
        sizes = await asyncio.to_thread(memory_by_service, self._supervisor.settings)
        return PlainTextResponse(exposition(self._supervisor.keepers, sizes), media_type="text/plain; version=0.0.4")


def exposition(keepers: list[Keeper], memory_bytes: dict[str, int]) -> str:
    """The services in Prometheus' text format. Names of services need no escape: see `DynamicServices`."""
    states = [keeper.state(memory_bytes.get(keeper.name, 0)) for keeper in keepers]
    families = (
        ("airloom_service_up", "gauge", "Whether the service's probe passes.", lambda state: int(state.ready)),
        ("airloom_service_restarts_total", "counter", "Starts after the first.", lambda state: state.restarts),
        (
            "airloom_service_memory_bytes",
            "gauge",
            "Proportional set size of all the service's processes.",
            lambda state: state.memory_bytes,
        ),
    )
    lines: list[str] = []
    for name, kind, meaning, value in families:
        lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
        lines += [f'{name}{{service="{state.name}"}} {value(state)}' for state in states]
    return "\n".join(lines) + "\n"


def _dump(keeper: Keeper, memory_bytes: int = 0) -> dict[str, Any]:
    return keeper.state(memory_bytes).model_dump(mode="json")


async def _refused(_: Request, error: Exception) -> Response:
    if not isinstance(error, AirloomError):
        raise error
    status = next((status for kind, status in _STATUS if isinstance(error, kind)), 500)
    return JSONResponse({"error": error.message, "hint": error.hint}, status_code=status)
