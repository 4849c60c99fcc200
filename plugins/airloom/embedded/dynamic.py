"""Services that are started and stopped while the platform runs: serving processes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from pydantic import Field

from airloom.contract.base import Frozen
from airloom.embedded.ports import bind_error, port_range
from airloom.embedded.service import Service
from airloom.errors import ConfigError, ContractError, PlatformError
from airloom.hooks.supervisor import SECRET_PREFIX, ServiceDefinition
from airloom.settings import SECRET_NAMES, Settings

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


class Kept(Frozen):
    """A definition and the port it was given, which it keeps for its life."""

    port: int
    definition: ServiceDefinition


class _File(Frozen):
    services: dict[str, Kept] = Field(default_factory=dict)


class DynamicServices:
    """The definitions, kept in `data/supervisor/services.json`: written whole or not at all, before they hold."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._path = settings.data_dir / "supervisor" / "services.json"
        # Whose folder is gone, as after a move of the project, is not started: provisioning starts what is deployed.
        self._kept = {name: kept for name, kept in self._read().services.items() if Path(kept.definition.cwd).is_dir()}

    def items(self) -> list[tuple[str, Kept]]:
        return sorted(self._kept.items())

    def get(self, name: str) -> Kept | None:
        return self._kept.get(name)

    def add(self, name: str, definition: ServiceDefinition) -> Kept:
        """Check a definition, give it a port, and keep both.

        Raises:
            ConfigError: the name, the folder or a secret's name is wrong.
            PlatformError: no serving port is free.
        """
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"{name!r} is no name for a service", hint="lower-case letters, digits, '.', '_' and '-'; 63 at most"
            )
        if not Path(definition.cwd).is_dir():
            raise ConfigError(f"{name}: there is no folder {definition.cwd}")
        for variable, value in definition.env.items():
            if value.startswith(SECRET_PREFIX) and value.removeprefix(SECRET_PREFIX) not in SECRET_NAMES:
                raise ConfigError(
                    f"{name}: {variable}={value}: no such secret", hint=f"known: {', '.join(SECRET_NAMES)}"
                )
        kept = Kept(port=self._free_port(), definition=definition)
        self._write({**self._kept, name: kept})
        return kept

    def remove(self, name: str) -> None:
        """Forget one; it is not started again."""
        self._write({key: kept for key, kept in self._kept.items() if key != name})

    def service(self, name: str, kept: Kept) -> Service:
        """What the supervisor runs for a definition.

        Raises:
            ConfigError: a secret cannot be read.
        """
        port, definition = kept.port, kept.definition
        host = self._settings.bind_host
        env = {"AIRLOOM_PORT": str(port)}
        for variable, value in definition.env.items():
            if value.startswith(SECRET_PREFIX):
                env[variable] = self._settings.secret(value.removeprefix(SECRET_PREFIX))
            else:
                env[variable] = value.replace("{port}", str(port))
        return Service(
            name=name,
            command=tuple(part.replace("{port}", str(port)) for part in definition.command),
            cwd=Path(definition.cwd),
            env=env,
            ports=(port,),
            prepare=lambda: _ensure_free(host, port),
            probe=_http_probe(f"http://{host}:{port}{definition.ready_path}"),
            grace_seconds=definition.grace_seconds,
            urls={"API": f"http://{host}:{port}"},
            metrics_url=f"http://{host}:{port}/metrics",
        )

    def _free_port(self) -> int:
        used = {kept.port for kept in self._kept.values()}
        ports = port_range(self._settings.serving_ports)
        for port in ports:
            if port not in used and bind_error(self._settings.bind_host, port) is None:
                return port
        raise PlatformError(
            f"no port of AIRLOOM_SERVING_PORTS={self._settings.serving_ports} is free "
            f"({len(used)} serving processes run)",
            hint="stop a serving process, or widen the range in .env.local",
        )

    def _read(self) -> _File:
        if not self._path.exists():
            return _File()
        try:
            return _File.read(self._path)
        except ContractError as error:
            raise PlatformError(error.message, hint=f"repair or remove {self._path}; deploys make it anew") from error

    def _write(self, kept: dict[str, Kept]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _File(services=kept).write(self._path)
        self._kept = kept


def _ensure_free(host: str, port: int) -> None:
    error = bind_error(host, port)
    if error is not None:
        from airloom.embedded.ports import holder_of

        raise PlatformError(f"port {port} (AIRLOOM_SERVING_PORTS) is taken by {holder_of(port)}")


def _http_probe(url: str) -> Callable[[], None]:
    def probe() -> None:
        import httpx

        httpx.get(url, timeout=5, trust_env=False).raise_for_status()

    return probe
