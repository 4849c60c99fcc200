"""Which services make the embedded platform."""

from __future__ import annotations

from airloom.embedded.service import Service
from airloom.settings import Settings


def services(settings: Settings) -> list[Service]:
    """All static services; the supervisor starts each as soon as what it depends on is ready.

    Raises:
        ConfigError: a secret is missing.
    """
    from airloom.embedded import airflow_server, gateway_server, git_server, mlflow_server, s3_server

    return [
        s3_server.service(settings),
        mlflow_server.service(settings),
        git_server.service(settings),
        *airflow_server.services(settings),
        gateway_server.service(settings),
    ]
