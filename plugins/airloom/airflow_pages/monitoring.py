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
    """Service -> the address at which a browser finds it."""
    return {"airflow": settings.airflow_page_url, "git": settings.git_page_url, "mlflow": settings.mlflow_page_url}
