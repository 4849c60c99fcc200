"""The durable DockerOperator and registries: logins by connection, images without a shell."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk import BaseHook
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowNotFoundException

from airloom.settings import Settings
from tests.docker.task_bench import Bench, Ti, make_bench
from tests.fixtures.image_registry import USER, ImageRegistry
from tests.fixtures.tiny_image import COMMAND, SAYS, pushed_image

bench = pytest.fixture(make_bench)


@pytest.fixture
def pushed(bench: Bench, login_registry: ImageRegistry, login_settings: Settings) -> Iterator[str]:
    with pushed_image(bench.api, login_registry, login_settings, "test-operator") as image:
        yield image


def test_a_connection_is_asked_for_only_to_pull(
    bench: Bench,
    pushed: str,
    login_registry: ImageRegistry,
    login_settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    password = login_settings.secret("registry_password")
    connections: dict[str, Any] = {}
    asked: list[str] = []

    def get(connection_id: str) -> Any:
        asked.append(connection_id)
        if connection_id not in connections:
            raise AirflowNotFoundException(connection_id)
        return connections[connection_id]

    monkeypatch.setattr(BaseHook, "get_connection", get)
    host, port = login_registry.host.split(":")
    options = {"image": pushed, "command": COMMAND, "init": False}
    with pytest.raises(AirflowException, match="refuses the pull"):  # nobody
        bench.run(**options)
    with pytest.raises(AirflowFailException, match="'team' is not in Airflow"):
        bench.run(**options, docker_conn_id="team")
    connections["team"] = SimpleNamespace(host=host, port=int(port), login=USER, password="wrong-one")
    with pytest.raises(AirflowException, match="refuses the pull") as caught:
        bench.run(**options, docker_conn_id="team")
    assert "wrong-one" not in str(caught.value)
    connections["team"] = SimpleNamespace(host=host, port=int(port), login=USER, password=password)
    ti = Ti()
    value, lines = bench.run(**options, docker_conn_id="team", ti=ti)
    assert value.startswith(SAYS)
    assert ti.pushed["image_digest"] == pushed
    assert any(pushed in line for line in lines)
    # The image is here: neither registry nor connection is needed any more.
    login_registry.kill()
    connections.clear()
    asked.clear()
    assert bench.run(**options, docker_conn_id="team")[0].startswith(SAYS)
    assert asked == []


def test_an_image_without_a_shell_and_with_secrets(
    bench: Bench, pushed: str, login_settings: Settings, login_registry: ImageRegistry
) -> None:
    auth = {"username": USER, "password": login_settings.secret("registry_password")}
    list(bench.api.pull(pushed, auth_config=auth, stream=True))
    options = {"image": pushed, "command": COMMAND, "init": False, "private_environment": {"A": "b"}}
    with pytest.raises(AirflowException, match=r"(?s)could not be started.*private_environment_in='config'"):
        bench.run(**options)
    with pytest.raises(AirflowException, match=r"(?s)cannot be started.*private_environment_in='config'"):
        bench.run(**{**options, "init": True})
    assert bench.run(**options, private_environment_in="config")[0].startswith(SAYS)
    assert bench.containers() == []
