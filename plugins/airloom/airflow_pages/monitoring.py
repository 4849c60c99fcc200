"""What Prometheus and Grafana have to be told: where releases answer, and where people reach each service."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from airloom.hooks.gateway import Gateway
from airloom.settings import Settings


def serving_targets(gateway: Gateway) -> list[dict[str, Any]]:
    """Whatever the gateway sends traffic to, in the form of Prometheus' HTTP service discovery.

    Raises:
        UnavailableError: the gateway does not answer; Prometheus then keeps to what it was told before.
    """
    return [
        {"targets": [urlsplit(upstream.url).netloc for upstream in upstreams], "labels": {"pipeline": pipeline}}
        for pipeline, upstreams in sorted(gateway.routes().items())
    ]


def addresses(settings: Settings) -> dict[str, str]:
    """Service -> the address at which a browser finds it: the ports of `.env` on the address that all listen on.

    Not the settings' URLs: in the stack those are names that only its own network knows.
    """
    everywhere = settings.bind_host in {"0.0.0.0", "::"}  # noqa: S104 - compared, not bound
    host = "localhost" if everywhere else settings.bind_host
    ports = {"airflow": settings.airflow_port, "git": settings.git_port, "mlflow": settings.mlflow_port}
    return {name: f"http://{host}:{port}" for name, port in ports.items()}
