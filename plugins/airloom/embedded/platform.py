"""Which services make the embedded platform."""

from __future__ import annotations

from airloom.embedded.service import Service
from airloom.settings import Settings


def services(settings: Settings) -> list[Service]:
    """All static services; the supervisor starts each as soon as what it depends on is ready.

    Raises:
        ConfigError: a secret is missing.
    """
    from airloom.embedded.airflow_server import services as airflow
    from airloom.embedded.gateway_server import service as gateway
    from airloom.embedded.git_server import service as git
    from airloom.embedded.mlflow_server import service as mlflow
    from airloom.embedded.s3_server import service as s3

    return [s3(settings), git(settings), *airflow(settings), mlflow(settings), gateway(settings)]
