"""Client of the embedded platform's supervisor."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import Field, field_validator

from airloom.contract.base import Frozen
from airloom.errors import AirloomError, ConfigError, ConflictError, NotFoundError, PlatformError, UnavailableError
from airloom.settings import Settings

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")

SECRET_PREFIX = "secret:"  # noqa: S105 - marks a reference, is none
FAILED_STARTS = 2  # that many in a row, and whoever waits for readiness gives up
_STOP_TIMEOUT_SECONDS = 180.0


class Phase(StrEnum):
    """Where a service is in its life."""

    WAITING = "waiting"  # for what it depends on
    STARTING = "starting"
    READY = "ready"
    UNREADY = "unready"  # runs, but its probe fails
    BACKOFF = "backoff"  # failed; starts again soon
    STOPPING = "stopping"
    STOPPED = "stopped"


class ServiceState(Frozen):
    """What the supervisor knows of a service now.

    Attributes:
        port: the first that it listens on.
        restarts: times it was started again since the supervisor started.
        failed_starts: starts in a row that did not become ready.
        since: seconds since 1970 when it entered this state.
        seconds: for how long it has been in this state.
        memory_bytes: proportional set size of all its processes; 0 when not asked for.
        error: why it is not ready, as far as known.
        log: its log file.
    """

    name: str
    state: Phase
    pid: int | None
    port: int | None
    restarts: int
    ready: bool
    url: str | None
    log: str
    urls: dict[str, str] = Field(default_factory=dict)
    failed_starts: int = 0
    since: float = 0.0
    seconds: float = 0.0
    memory_bytes: int = 0
    dynamic: bool = False
    error: str | None = None


class ServiceDefinition(Frozen):
    """A dynamic service, as it is kept and started again with the platform.

    `{port}` in the command and in values of `env` becomes a port of `AIRLOOM_SERVING_PORTS`;
    a value `secret:<name>` in `env` becomes that secret when the process starts.
    """

    command: tuple[str, ...] = Field(min_length=1)
    cwd: str
    env: dict[str, str] = Field(default_factory=dict)
    ready_path: str = Field(default="/health", pattern=r"^/")
    grace_seconds: float = Field(default=30.0, gt=0)

    @field_validator("env")
    @classmethod
    def _own_marks(cls, env: dict[str, str]) -> dict[str, str]:
        for name in ("AIRLOOM_INSTANCE", "AIRLOOM_SERVICE"):
            if name in env:
                raise ValueError(f"{name} is set by the supervisor")
        return env


class Supervisor:
    """Speaks to the supervisor's control API.

    Args:
        url: `unix:<path of its socket>` or `http://…`.
    """

    def __init__(self, url: str) -> None:
        self._url = url

    @classmethod
    def from_settings(cls, settings: Settings) -> Supervisor:
        return cls(settings.supervisor)

    def services(self, *, memory: bool = False) -> list[ServiceState]:
        """Every service, in the order of their start; `memory` also measures them, which takes longer."""
        answer = self._request("GET", "/services", params={"memory": "1"} if memory else None)
        return [ServiceState.model_validate(item) for item in answer["services"]]

    def service(self, name: str) -> ServiceState:
        """One service.

        Raises:
            NotFoundError: there is none of that name.
        """
        return ServiceState.model_validate(self._request("GET", f"/services/{name}"))

    def start(
        self,
        name: str,
        *,
        command: Sequence[str],
        cwd: str,
        env: Mapping[str, str] | None = None,
        ready_path: str = "/health",
        grace_seconds: float = 30.0,
    ) -> ServiceState:
        """Have a dynamic service run, now and after every start of the platform. Returns once accepted.

        Asking again for the same is no change.

        Raises:
            ConflictError: another definition has that name; stop it first.
            PlatformError: the platform is not running, or no serving port is free.
        """
        definition = ServiceDefinition(
            command=tuple(command),
            cwd=str(cwd),
            env=dict(env or {}),
            ready_path=ready_path,
            grace_seconds=grace_seconds,
        )
        body = definition.model_dump(mode="json")
        return ServiceState.model_validate(self._request("PUT", f"/services/{name}", json=body))

    def wait_ready(self, name: str, timeout_seconds: float) -> ServiceState:
        """Until the service answers.

        Raises:
            PlatformError: it failed to start, or needs longer than that; the message holds its last log lines.
            NotFoundError: there is none of that name.
        """
        deadline = time.monotonic() + timeout_seconds
        while True:
            state = self.service(name)
            if state.ready:
                return state
            if state.failed_starts >= FAILED_STARTS or time.monotonic() > deadline:
                lines = "\n".join(f"    {line}" for line in self.log_tail(name, 15))
                raise PlatformError(
                    f"{name} is not ready but {state.state}: {state.error or 'no answer yet'}\n{lines}",
                    hint=f"see its log: {state.log}",
                )
            time.sleep(0.1)

    def log_tail(self, name: str, lines: int = 50) -> list[str]:
        """The last lines of a service's log."""
        return list(self._request("GET", f"/services/{name}/log", params={"lines": str(lines)})["lines"])

    def stop(self, name: str) -> None:
        """End a dynamic service and forget it: stop signal, its grace to drain, SIGKILL. No such service: no change."""
        self._request("DELETE", f"/services/{name}", timeout_seconds=_STOP_TIMEOUT_SECONDS)

    def shutdown(self) -> None:
        """Ask for the end of the platform; returns once accepted."""
        self._request("POST", "/shutdown")

    def metrics(self) -> str:
        """Its metrics in Prometheus' text format."""
        return self._send("GET", "/metrics").text

    def _request(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self._send(method, path, **options).json()
        return answer

    def _send(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        params: dict[str, str] | None = None,
        timeout_seconds: float = 30.0,
    ) -> httpx.Response:
        import httpx

        unix = self._url.removeprefix("unix:") if self._url.startswith("unix:") else None
        base = "http://supervisor" if unix else self._url
        not_running = PlatformError(f"the platform is not running (nothing answers at {self._url})", hint=_START)

        def send() -> httpx.Response:
            # trust_env is off: a proxy in the environment must not be asked for a local socket.
            transport = httpx.HTTPTransport(uds=unix)
            with httpx.Client(transport=transport, base_url=base, timeout=timeout_seconds, trust_env=False) as client:
                return client.request(method, path, json=json, params=params)

        try:
            response = _retried(send)
        except httpx.ConnectError as error:
            raise not_running from error
        except httpx.TransportError as error:
            raise UnavailableError(
                f"the supervisor did not answer {method} {path}: {error or type(error).__name__}", hint=_START
            ) from error
        if response.is_error:
            raise _error(response)
        return response


_START = "run: airloom up --embedded"
_ERRORS: dict[int, type[AirloomError]] = {400: ConfigError, 404: NotFoundError, 409: ConflictError}


def _error(response: httpx.Response) -> AirloomError:
    try:
        body = response.json()
        message, hint = str(body["error"]), body.get("hint")
    except (ValueError, KeyError, TypeError):
        message, hint = f"the supervisor answered {response.status_code}: {response.text[:200]}", None
    return _ERRORS.get(response.status_code, PlatformError)(message, hint=hint)


def _retried(send: Callable[[], T]) -> T:
    """Every request is idempotent, so one that broke off may be sent again."""
    import httpx
    import tenacity

    return tenacity.Retrying(
        retry=tenacity.retry_if_exception_type((httpx.ReadError, httpx.RemoteProtocolError, httpx.WriteError)),
        stop=tenacity.stop_after_attempt(3),
        wait=tenacity.wait_fixed(0.2),
        reraise=True,
    )(send)
