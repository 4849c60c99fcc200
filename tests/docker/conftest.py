"""A real Docker engine: required where AIRLOOM_REQUIRE_DOCKER=1, else its absence is a reason to skip."""

from __future__ import annotations

import os

import pytest


def _why_not() -> str | None:
    """Why no engine can be used, or None."""
    import docker
    from docker.errors import DockerException

    try:
        client = docker.from_env(timeout=120)
        client.ping()
    except DockerException as error:
        return f"no Docker engine answers: {error}"
    return None


@pytest.fixture(scope="session", autouse=True)
def docker_engine() -> None:
    """Every test of this folder needs the engine."""
    reason = _why_not()
    if reason is None:
        return
    if os.environ.get("AIRLOOM_REQUIRE_DOCKER") == "1":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)
