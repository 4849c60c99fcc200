"""The Docker engine that stages run on, and its errors in Airloom's words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from airloom.errors import AirloomError, ServiceError, UnavailableError
from airloom.settings import Settings


def connect(settings: Settings) -> Any:
    """A client of the engine's API; DOCKER_TLS_VERIFY and DOCKER_CERT_PATH count as for Docker's own programs."""
    import os

    import docker

    with engine_errors():
        variables = dict(os.environ)
        if settings.docker_host:
            variables["DOCKER_HOST"] = settings.docker_host
        return docker.from_env(environment=variables, timeout=60).api


@contextmanager
def engine_errors() -> Iterator[None]:
    """Raise the SDK's errors as Airloom's."""
    import requests
    from docker.errors import APIError, DockerException

    try:
        yield
    except APIError as error:
        kind: type[AirloomError] = UnavailableError if error.is_server_error() else ServiceError
        raise kind(f"the Docker engine refused: {error.explanation or error}") from error
    except (DockerException, requests.RequestException) as error:
        raise UnavailableError(
            f"the Docker engine does not answer: {error}", hint="does it run? see AIRLOOM_DOCKER_HOST"
        ) from error


def container_facts(api: Any, container: str) -> dict[str, Any] | None:
    """What the engine knows of a container, by id or name; None where there is none."""
    from docker.errors import NotFound

    with engine_errors():
        try:
            facts: dict[str, Any] = api.inspect_container(container)
        except NotFound:
            return None
    return facts


def ensure_image(api: Any, settings: Settings, reference: str) -> None:
    """Pull an image that the engine lacks.

    Raises:
        ServiceError: it is neither in the engine nor in the registry.
    """
    from docker.errors import ImageNotFound

    with engine_errors():
        try:
            api.inspect_image(reference)
        except ImageNotFound:
            if reference.startswith("sha256:"):
                raise ServiceError(
                    f"the image {reference} is not in this engine", hint="build the commit again: airloom build …"
                ) from None
            api.pull(reference, auth_config=login_of(settings))


def login_of(settings: Settings) -> dict[str, str] | None:
    """Whom the registry is to know; None: nobody."""
    if not settings.registry_user:
        return None
    return {"username": settings.registry_user, "password": settings.secret("registry_password")}
