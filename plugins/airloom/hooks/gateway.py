"""The gateway's admin API (Caddy): which serving processes answer for a pipeline, and in what proportion."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from pydantic import Field

from airloom.contract.base import Frozen
from airloom.errors import ServiceError, UnavailableError
from airloom.settings import Settings

_ROUTES = "/config/apps/http/servers/gateway/routes"
_ROUTE_PREFIX = "pipeline-"
_FIRST_OWN_ROUTE = 2  # after the gateway's health and metrics
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
    """

    def __init__(self, admin_url: str, base_url: str) -> None:
        self._admin_url = admin_url
        self.base_url = base_url

    @classmethod
    def from_settings(cls, settings: Settings) -> Gateway:
        return cls(settings.gateway_admin, settings.gateway_base_url)

    def model_url(self, pipeline: str) -> str:
        """Where clients reach a pipeline's model."""
        return f"{self.base_url}/{pipeline}"

    def set_upstreams(self, pipeline: str, upstreams: list[Upstream], *, max_body_bytes: int) -> None:
        """Send a pipeline's traffic to these, at once and without dropping a request.

        Raises:
            UnavailableError: the gateway does not answer.
            ServiceError: it refused the route.
        """
        route = pipeline_route(pipeline, upstreams, max_body_bytes=max_body_bytes)
        answer = self._request("PATCH", f"/id/{route['@id']}", route)
        if answer.status_code == 404:
            answer = self._request("PUT", f"{_ROUTES}/{_FIRST_OWN_ROUTE}", route)
        if answer.is_error:
            raise ServiceError(f"the gateway refused the route of {pipeline}: {answer.text[:500]}")

    def upstreams(self, pipeline: str) -> list[Upstream]:
        """Who answers for a pipeline now; empty when nobody does."""
        answer = self._request("GET", f"/id/{_route_id(pipeline)}")
        return [] if answer.is_error else _upstreams_of(answer.json())

    def routes(self) -> dict[str, list[Upstream]]:
        """pipeline -> who answers for it now.

        Raises:
            UnavailableError: the gateway does not answer.
            ServiceError: it does not tell.
        """
        answer = self._request("GET", _ROUTES)
        if answer.is_error:
            raise ServiceError(f"the gateway did not tell its routes: {answer.text[:500]}")
        return {
            route["@id"].removeprefix(_ROUTE_PREFIX): _upstreams_of(route)
            for route in answer.json()
            if route.get("@id", "").startswith(_ROUTE_PREFIX)
        }

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


def pipeline_route(pipeline: str, upstreams: list[Upstream], *, max_body_bytes: int) -> dict[str, Any]:
    """The route of a pipeline: strip its prefix, choose by weight, repeat elsewhere what a dying process left."""
    return {
        "@id": _route_id(pipeline),
        "match": [{"path": [f"/{pipeline}", f"/{pipeline}/*"]}],
        "handle": [
            {"handler": "rewrite", "strip_path_prefix": f"/{pipeline}"},
            {
                "handler": "reverse_proxy",
                "upstreams": [{"dial": urlsplit(upstream.url).netloc} for upstream in upstreams],
                "load_balancing": {
                    "selection_policy": {
                        "policy": "weighted_round_robin",
                        "weights": [upstream.weight for upstream in upstreams],
                    },
                    "try_duration": "15s",
                    "try_interval": "100ms",
                    # A prediction changes nothing, so it may be sent again when the process it was sent to dies.
                    "retry_match": [{"method": ["GET", "HEAD", "POST"]}, {"expression": _NO_MODEL_YET}],
                },
                "health_checks": {"passive": {"fail_duration": "1s", "max_fails": 1}},
                # Larger bodies are passed on as they come: the serving process refuses them, with its reason.
                "request_buffers": max_body_bytes,
            },
        ],
        "terminal": True,
    }


def _upstreams_of(route: dict[str, Any]) -> list[Upstream]:
    proxy = route["handle"][-1]
    weights = proxy["load_balancing"]["selection_policy"]["weights"]
    return [
        Upstream(url=f"http://{upstream['dial']}", weight=weight)
        for upstream, weight in zip(proxy["upstreams"], weights, strict=True)
    ]


def _route_id(pipeline: str) -> str:
    return f"{_ROUTE_PREFIX}{pipeline}"
