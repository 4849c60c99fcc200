"""The gateway (Caddy): which serving processes answer for a pipeline, and in what proportion.

A pipeline's route is part of the gateway's configuration, and says in which files the addresses and the share are.
Caddy reads these for each request, so that traffic moves by writing them. To move it by new configuration would lose
requests: with each one Caddy opens its port anew and closes the connections that clients keep, written to or not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field

from airloom.contract.base import Frozen
from airloom.errors import ServiceError, UnavailableError
from airloom.settings import Settings

_ROUTES = "/config/apps/http/servers/gateway/routes"
_ROUTE_PREFIX = "pipeline-"
_FIRST_OWN_ROUTE = 2  # after the gateway's health and metrics
# In the gateway's working folder. The path stays relative, since a placeholder's name can't hold every folder's.
ROUTES_FOLDER = "routes"
_LIVE, _CANDIDATE, _SHARE = "live", "candidate", "share"
# For as long as a killed process takes on a busy machine to start again and load its model.
_HELD_FOR = "45s"
_ALL = "g"  # greater than every hexadecimal digit
# How a serving process that has just started again answers; one with too much to do asks for another time.
_NO_MODEL_YET = "{http.reverse_proxy.status_code} == 503 && {http.reverse_proxy.header.Retry-After} == '2'"


class Upstream(Frozen):
    """A serving process and its share of the traffic, in percent."""

    url: str
    weight: int = Field(gt=0, le=100)


class Gateway:
    """Sets routes `/<pipeline>/…`.

    Args:
        admin_url: `unix:<path>` or `http://…` of the admin API.
        base_url: of the gateway itself, as clients see it.
        folder: the gateway's working folder.
    """

    def __init__(self, admin_url: str, base_url: str, folder: Path) -> None:
        self._admin_url = admin_url
        self.base_url = base_url
        self._routes = folder / ROUTES_FOLDER

    @classmethod
    def from_settings(cls, settings: Settings) -> Gateway:
        return cls(settings.gateway_admin, settings.gateway_base_url, settings.gateway_dir)

    def model_url(self, pipeline: str) -> str:
        """Where clients reach a pipeline's model."""
        return f"{self.base_url}/{pipeline}"

    def set_upstreams(self, pipeline: str, upstreams: list[Upstream], *, max_body_bytes: int) -> None:
        """Send a pipeline's traffic to these one or two processes, at once and without losing a request.

        Raises:
            UnavailableError: the gateway does not answer.
            ServiceError: it refused the route.
        """
        live, *candidates = upstreams
        if len(candidates) > 1:
            raise ValueError(f"a pipeline's traffic goes to one process or two, not to {len(upstreams)}")
        candidate = candidates[0] if candidates else None
        self._share_out(
            pipeline,
            live=_address(live.url),
            candidate=_address((candidate or live).url),
            share=_share(candidate.weight / (candidate.weight + live.weight) if candidate else 0.0),
        )
        self._ensure_route(pipeline_route(pipeline, max_body_bytes=max_body_bytes))

    def _share_out(self, pipeline: str, *, live: str, candidate: str, share: str) -> None:
        """Write what differs, in an order in which every request meets a process that is meant to answer."""
        folder = self._routes / pipeline
        folder.mkdir(parents=True, exist_ok=True)
        found = {name: _read(folder / name) for name in (_LIVE, _CANDIDATE, _SHARE)}
        if live not in (found[_LIVE], None) and live == found[_CANDIDATE]:
            _write(folder / _SHARE, _ALL)
        if live != found[_LIVE]:
            _write(folder / _LIVE, live)
        if candidate != found[_CANDIDATE]:
            _write(folder / _SHARE, _share(0.0))
            _write(folder / _CANDIDATE, candidate)
        _write(folder / _SHARE, share)

    def _ensure_route(self, route: dict[str, Any]) -> None:
        place = f"/id/{route['@id']}"
        answer = self._request("GET", place)
        if answer.status_code == 404:
            answer = self._request("PUT", f"{_ROUTES}/{_FIRST_OWN_ROUTE}", route)
        elif answer.is_success and answer.json() != route:
            answer = self._request("PATCH", place, route)
        if answer.is_error:
            raise ServiceError(f"the gateway refused the route {route['@id']}: {answer.text[:500]}")

    def upstreams(self, pipeline: str) -> list[Upstream]:
        """Who answers for a pipeline now; empty when nobody does."""
        return self.routes().get(pipeline, [])

    def routes(self) -> dict[str, list[Upstream]]:
        """pipeline -> who answers for it now.

        Raises:
            UnavailableError: the gateway does not answer.
            ServiceError: it does not tell.
        """
        answer = self._request("GET", _ROUTES)
        if answer.is_error:
            raise ServiceError(f"the gateway did not tell its routes: {answer.text[:500]}")
        pipelines = [
            route["@id"].removeprefix(_ROUTE_PREFIX)
            for route in answer.json()
            if route.get("@id", "").startswith(_ROUTE_PREFIX)
        ]
        return {pipeline: self._upstreams(pipeline) for pipeline in pipelines}

    def _upstreams(self, pipeline: str) -> list[Upstream]:
        live, candidate, share = (_read(self._routes / pipeline / name) for name in (_LIVE, _CANDIDATE, _SHARE))
        percent = _percent(share or "")
        shares = [(live, 100 - percent), (candidate, percent)]
        return [Upstream(url=f"http://{address}", weight=weight) for address, weight in shares if address and weight]

    def remove(self, pipeline: str) -> None:
        """Answer 404 for a pipeline from now on. No such route: no change."""
        answer = self._request("DELETE", f"/id/{_route_id(pipeline)}")
        if answer.is_error and answer.status_code != 404:
            raise ServiceError(f"the gateway kept the route of {pipeline}: {answer.text[:500]}")

    def _request(self, method: str, path: str, body: Any = None) -> Any:
        import httpx
        import tenacity

        unix = self._admin_url.removeprefix("unix:") if self._admin_url.startswith("unix:") else None
        base = "http://gateway" if unix else self._admin_url

        def send() -> httpx.Response:
            transport = httpx.HTTPTransport(uds=unix)
            with httpx.Client(transport=transport, base_url=base, timeout=15, trust_env=False) as client:
                return client.request(method, path, json=body)

        try:
            # Every change states the whole route, so sending it twice is the same as once.
            return tenacity.Retrying(
                retry=tenacity.retry_if_exception_type(httpx.TransportError),
                stop=tenacity.stop_after_delay(10),
                wait=tenacity.wait_fixed(0.25),
                reraise=True,
            )(send)
        except httpx.TransportError as error:
            raise UnavailableError(
                f"the gateway's admin API at {self._admin_url} does not answer: {error}", hint="see: airloom status"
            ) from error


def pipeline_route(pipeline: str, *, max_body_bytes: int) -> dict[str, Any]:
    """The route of a pipeline: strip its prefix, choose by share, repeat elsewhere what a dying process left."""
    to_candidate = {
        # The first digits of a random number: a share of the requests, whoever sends them.
        "match": [{"expression": f"{{http.request.uuid}}.substring(0, 4) < {{http.vars.{_SHARE}}}"}],
        "handle": [_proxy(pipeline, _CANDIDATE, _LIVE, max_body_bytes=max_body_bytes)],
        "terminal": True,
    }
    to_live = {"handle": [_proxy(pipeline, _LIVE, _CANDIDATE, max_body_bytes=max_body_bytes)]}
    return {
        "@id": _route_id(pipeline),
        "match": [{"path": [f"/{pipeline}", f"/{pipeline}/*"]}],
        "handle": [
            {"handler": "rewrite", "strip_path_prefix": f"/{pipeline}"},
            {"handler": "vars", _SHARE: _content(pipeline, _SHARE)},
            {"handler": "subroute", "routes": [to_candidate, to_live]},
        ],
        "terminal": True,
    }


def _proxy(pipeline: str, *names: str, max_body_bytes: int) -> dict[str, Any]:
    """Hand on to the first of these that can be reached."""
    return {
        "handler": "reverse_proxy",
        "upstreams": [{"dial": _content(pipeline, name)} for name in names],
        "load_balancing": {
            "selection_policy": {"policy": "first"},
            "try_duration": _HELD_FOR,
            "try_interval": "100ms",
            # A prediction changes nothing, so it may be sent again when the process it was sent to dies.
            "retry_match": [{"method": ["GET", "HEAD", "POST"]}, {"expression": _NO_MODEL_YET}],
        },
        "health_checks": {"passive": {"fail_duration": "1s", "max_fails": 1}},
        # Larger bodies are passed on as they come: the serving process refuses them, with its reason.
        "request_buffers": max_body_bytes,
    }


def _content(pipeline: str, name: str) -> str:
    """Caddy's placeholder for what is in the file."""
    return f"{{file.{ROUTES_FOLDER}/{pipeline}/{name}}}"


def _address(url: str) -> str:
    return urlsplit(url).netloc


def _share(part: float) -> str:
    """What the first four hexadecimal digits of a request's random number must stay below."""
    return f"{round(0x10000 * part):04x}" if part < 1 else _ALL


def _percent(share: str) -> int:
    return 100 if share == _ALL else round(int(share or "0", 16) * 100 / 0x10000)


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:
        return None


def _write(path: Path, content: str) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(content)
    temporary.replace(path)


def _route_id(pipeline: str) -> str:
    return f"{_ROUTE_PREFIX}{pipeline}"
