"""The gateway, Caddy: the one address that clients of served models talk to."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from airloom.embedded.service import Service
from airloom.settings import Settings

SERVER = "gateway"


def service(settings: Settings) -> Service:
    """Caddy with its admin API on a private Unix socket; routes survive a restart."""
    folder = settings.gateway_dir
    config = folder / "config.json"

    def probe() -> None:
        import httpx

        httpx.get(f"{settings.gateway_base_url}/-/health", timeout=5, trust_env=False).raise_for_status()

    return Service(
        name="gateway",
        command=(str(Path(sys.executable).with_name("caddyserver")), "run", "--config", str(config)),
        cwd=folder,
        # Caddy writes every accepted configuration below XDG_CONFIG_HOME at once.
        env={
            "XDG_CONFIG_HOME": str(folder / "config"),
            "XDG_DATA_HOME": str(folder / "data"),
            "HOME": str(folder),
            "GOMEMLIMIT": "150MiB",
        },
        ports=(settings.gateway_port,),
        prepare=lambda: _write_config(settings, config, folder / "config" / "caddy" / "autosave.json"),
        probe=probe,
        start_timeout_seconds=30,
        urls={"gateway": settings.gateway_base_url},
        metrics_url=f"{settings.gateway_base_url}/-/metrics",
    )


def base_config(settings: Settings, routes: list[dict[str, Any]]) -> dict[str, Any]:
    """The whole configuration: these routes between the gateway's own and the answer for all others."""
    # Metrics name every model's traffic, so they are for this machine and the networks named for it, even where the
    # gateway is for all.
    readers = ["127.0.0.0/8", "::1/128", *settings.metrics_networks.split()]
    own = [
        {
            "match": [{"path": ["/-/metrics"], "remote_ip": {"ranges": readers}}],
            "handle": [{"handler": "metrics"}],
            "terminal": True,
        },
        {
            "match": [{"path": ["/-/health"]}],
            "handle": [{"handler": "static_response", "status_code": 200, "body": "ok"}],
            "terminal": True,
        },
    ]
    nothing = _error("404", "no_such_model", "nothing is served at this path")
    # What a serving process says of its own errors is handed on as it is; this is said where none is ready.
    failed = _error(
        "{http.error.status_code}",
        "no_answer",
        "no process of this model is ready to answer",
        hint="try again in a while; where the platform runs, airloom status tells more",
        headers={"Retry-After": ["2"]},
    )
    return {
        "admin": {"listen": _admin_address(settings.gateway_admin)},
        "apps": {
            "http": {
                "grace_period": "10s",
                "metrics": {},
                "servers": {
                    SERVER: {
                        "listen": [f"{settings.bind_host}:{settings.gateway_port}"],
                        "automatic_https": {"disable": True},
                        "protocols": ["h1"],
                        "routes": [*own, *routes, nothing],
                        "errors": {"routes": [failed]},
                    }
                },
            }
        },
    }


def _error(
    status: str, kind: str, message: str, *, hint: str | None = None, headers: dict[str, list[str]] | None = None
) -> dict[str, Any]:
    """The route that answers so, in the form in which a serving process tells its errors."""
    return {
        "handle": [
            {
                "handler": "static_response",
                "status_code": status,
                "headers": {"Content-Type": ["application/json"], **(headers or {})},
                "body": json.dumps({"error": {"type": kind, "message": message, "hint": hint}}),
            }
        ]
    }


def _admin_address(url: str) -> str:
    if url.startswith("unix:"):
        return f"unix/{url.removeprefix('unix:')}|0600"
    return url.removeprefix("http://")


def _write_config(settings: Settings, path: Path, autosaved: Path) -> None:
    """The base configuration with the routes of the last accepted one, so that changed ports hold at once."""
    routes = []
    if autosaved.exists():
        try:
            saved = json.loads(autosaved.read_text())
            routes = [r for r in saved["apps"]["http"]["servers"][SERVER]["routes"] if "@id" in r]
        except (ValueError, KeyError, TypeError):
            routes = []  # the platform puts every route back from the deployments when it starts
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(base_config(settings, routes), indent=1))
    temporary.replace(path)
