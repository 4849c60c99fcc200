"""What the engine that builds is told: names, logins, and where it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from airloom.errors import AuthError, UnavailableError
from airloom.hooks.docker_engine import builder_variables, connect_builder
from airloom.hooks.engine_images import EngineImages
from airloom.settings import Settings
from tests.conftest import make_settings

OWN = "127.0.0.1:5050/airloom/ds_mlmodeling"
LOGIN = {"username": "airloom", "password": "right-one"}


class Api:
    """An engine's client that notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []

    def pull(self, reference: str, *, auth_config: Any, **_: Any) -> Iterator[dict[str, Any]]:
        self.asked.append((reference, auth_config))
        return iter([{"status": "done"}])

    def push(self, name: str, *, auth_config: Any, **_: Any) -> Iterator[dict[str, Any]]:
        self.asked.append((name, auth_config))
        return iter([{"aux": {"Digest": "sha256:1"}}])


@pytest.fixture
def known(tmp_path: Path) -> Settings:
    settings = make_settings(
        tmp_path / "home",
        registry="127.0.0.1:5050",
        registry_user="airloom",
        build_host="tcp://127.0.0.1:1",
        build_registry="registry:5000",
    )
    (settings.secrets_dir / "registry_password").write_text("right-one")
    return settings


def test_a_login_goes_to_the_registry_by_either_name_and_to_no_other(known: Settings) -> None:
    api = Api()
    engine = EngineImages(known, api, builds=True)
    engine.pull(f"{OWN}:one")
    engine.push(OWN, "one")
    engine.pull("python:3.11.15-slim-bookworm")
    engine.pull("127.0.0.1:50505/airloom/ds_mlmodeling:one")
    assert api.asked == [
        ("registry:5000/airloom/ds_mlmodeling:one", LOGIN),
        ("registry:5000/airloom/ds_mlmodeling", LOGIN),
        ("python:3.11.15-slim-bookworm", None),
        ("127.0.0.1:50505/airloom/ds_mlmodeling:one", None),
    ]


def test_the_engine_that_runs_has_its_own_name_for_the_registry(known: Settings) -> None:
    api = Api()
    EngineImages(known, api).pull(f"{OWN}:one")
    assert api.asked == [(f"{OWN}:one", LOGIN)]
    same = known.model_copy(update={"build_registry": ""})
    EngineImages(same, api, builds=True).pull(f"{OWN}:two")
    assert api.asked[-1] == (f"{OWN}:two", LOGIN)


def test_each_engine_has_certificates_of_its_own(known: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    secured = known.model_copy(update={"build_certs": "/certs/client", "docker_host": "tcp://127.0.0.1:2"})
    assert builder_variables(secured) == {
        "DOCKER_HOST": "tcp://127.0.0.1:1",
        "DOCKER_TLS_VERIFY": "1",
        "DOCKER_CERT_PATH": "/certs/client",
    }
    # Without an engine that builds, there is nothing that they could be of.
    assert builder_variables(secured.model_copy(update={"build_host": ""})) == {"DOCKER_HOST": "tcp://127.0.0.1:2"}


def test_an_engine_that_builds_and_cannot_be_reached_is_named(known: Settings, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="the Docker engine that builds does not answer") as caught:
        connect_builder(known)
    assert caught.value.hint == "does it run? see AIRLOOM_BUILD_HOST"
    with pytest.raises(AuthError, match="the Docker engine that builds and this client don't trust") as refused:
        connect_builder(known.model_copy(update={"build_certs": str(tmp_path)}))
    assert "AIRLOOM_BUILD_CERTS" in (refused.value.hint or "")
