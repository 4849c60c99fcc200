"""When the stack's services are told of its own engine that builds."""

from __future__ import annotations

from pathlib import Path

import pytest

from airloom.stack import compose as module
from airloom.stack.compose import Compose
from tests.conftest import make_settings

OWN = {
    "AIRLOOM_BUILD_HOST": "tcp://builder:2376",
    "AIRLOOM_BUILD_CERTS": "builder-client",
    "AIRLOOM_BUILD_REGISTRY": "registry:5000",
}


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COMPOSE_PROFILES", *OWN):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "compose_command", lambda: ["compose"])


def told(folder: Path, **settings: object) -> dict[str, str]:
    """What Compose fills in for the settings of builds, beside `.env`."""
    environment = Compose(make_settings(folder / "home", project=folder, **settings)).environment
    return {name: environment[name] for name in OWN if name in environment}


@pytest.mark.parametrize(
    ("local", "profiles", "builds"),
    [
        (None, "minio,jenkins", False),
        (None, "minio,builder,jenkins", True),
        ("minio,builder", "minio", True),
        ("minio", "builder", False),
        ("", "builder", False),
        (None, "builders,nobuilder", False),
    ],
)
def test_chosen_by_the_profile(tmp_path: Path, local: str | None, profiles: str, builds: bool) -> None:
    (tmp_path / ".env").write_text(f"COMPOSE_PROFILES={profiles}\n")
    if local is not None:
        (tmp_path / ".env.local").write_text(f"COMPOSE_PROFILES={local}\n")
    assert told(tmp_path, registry="127.0.0.1:5050") == (OWN if builds else {})


def test_the_environment_goes_before_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text("COMPOSE_PROFILES=minio\n")
    monkeypatch.setenv("COMPOSE_PROFILES", "minio,builder")
    assert told(tmp_path, registry="127.0.0.1:5050") == OWN


def test_another_registry_has_one_name(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("COMPOSE_PROFILES=builder\n")
    assert "AIRLOOM_BUILD_REGISTRY" not in told(tmp_path, registry="registry.example.org")


def test_an_engine_that_is_named_goes_before_the_profile(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("COMPOSE_PROFILES=builder\n")
    (tmp_path / "certificates").mkdir()
    found = told(
        tmp_path,
        registry="registry.example.org",
        build_host="tcp://build.example:2376",
        build_certs=str(tmp_path / "certificates"),
    )
    # A path, which Compose mounts: a bare name would be a volume.
    assert found == {"AIRLOOM_BUILD_CERTS": str(tmp_path / "certificates")}
