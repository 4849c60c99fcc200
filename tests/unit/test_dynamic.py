"""Definitions of services that come and go."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from pydantic import ValidationError

from airloom.embedded.dynamic import DynamicServices
from airloom.errors import ConfigError, PlatformError
from airloom.hooks.supervisor import ServiceDefinition
from airloom.settings import Settings
from tests.conftest import make_settings


def definition(tmp_path: Path, **more: object) -> ServiceDefinition:
    return ServiceDefinition.model_validate({"command": ["serve", "--port={port}"], "cwd": str(tmp_path), **more})


def test_port_and_secrets_are_filled_in_at_start_only(settings: Settings, tmp_path: Path) -> None:
    services = DynamicServices(settings)
    kept = services.add("a", definition(tmp_path, env={"T": "secret:git_password", "U": "http://h:{port}/"}))
    service = services.service("a", kept)
    assert service.command == ("serve", f"--port={kept.port}")
    assert service.env["U"] == f"http://h:{kept.port}/"
    assert service.env["T"] == settings.secret("git_password")
    assert service.env["AIRLOOM_PORT"] == str(kept.port)
    file = settings.data_dir / "supervisor" / "services.json"
    assert settings.secret("git_password") not in file.read_text()
    assert DynamicServices(settings).items() == [("a", kept)]
    services.remove("a")
    assert DynamicServices(settings).items() == []


def test_one_whose_folder_is_gone_is_not_started_with_the_platform(settings: Settings, tmp_path: Path) -> None:
    """The project was moved; what is deployed is started from the new folder."""
    (tmp_path / "gone").mkdir()
    services = DynamicServices(settings)
    here = services.add("here", definition(tmp_path))
    services.add("moved", definition(tmp_path / "gone"))
    (tmp_path / "gone").rmdir()
    assert DynamicServices(settings).items() == [("here", here)]


def test_ports_that_others_use_are_left_out(settings: Settings, tmp_path: Path) -> None:
    first = int(settings.serving_ports.split("-")[0])
    with socket.socket() as other:
        other.bind(("127.0.0.1", first))
        other.listen()
        services = DynamicServices(settings)
        ports = [services.add(name, definition(tmp_path)).port for name in ("a", "b")]
    assert first not in ports
    assert len(set(ports)) == 2


def test_no_port_left_is_a_clear_error(tmp_path: Path) -> None:
    settings = make_settings(tmp_path / "home")
    first = int(settings.serving_ports.split("-")[0])
    settings = make_settings(tmp_path / "home", serving_ports=f"{first}-{first}")
    services = DynamicServices(settings)
    services.add("a", definition(tmp_path))
    with pytest.raises(PlatformError, match=f"no port of AIRLOOM_SERVING_PORTS={first}-{first} is free"):
        services.add("b", definition(tmp_path))
    assert services.get("b") is None


@pytest.mark.parametrize("name", ["", "UPPER", "a/b", "../a", "a b", "-a", "x" * 64])
def test_wrong_name_is_refused(settings: Settings, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="no name for a service"):
        DynamicServices(settings).add(name, definition(tmp_path))


def test_unknown_secret_and_missing_folder_are_refused(settings: Settings, tmp_path: Path) -> None:
    services = DynamicServices(settings)
    with pytest.raises(ConfigError, match=r"T=secret:\.\./x: no such secret"):
        services.add("a", definition(tmp_path, env={"T": "secret:../x"}))
    with pytest.raises(ConfigError, match="there is no folder"):
        services.add("a", definition(tmp_path / "missing"))


@pytest.mark.parametrize(
    "wrong",
    [{"command": []}, {"ready_path": "health"}, {"grace_seconds": 0}, {"env": {"AIRLOOM_INSTANCE": "x"}}, {"more": 1}],
)
def test_wrong_definition_is_refused(tmp_path: Path, wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        definition(tmp_path, **wrong)


def test_broken_file_names_itself(settings: Settings) -> None:
    file = settings.data_dir / "supervisor" / "services.json"
    file.parent.mkdir(parents=True)
    file.write_text("{")
    with pytest.raises(PlatformError, match=r"services\.json"):
        DynamicServices(settings)
