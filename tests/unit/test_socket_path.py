"""Where Unix sockets stand."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from airloom.errors import ConfigError
from airloom.settings import Settings


def of(home: Path) -> Settings:
    return Settings(_env_file=None, project=Path("/"), home=home)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Settings]:
    """Settings whose sockets can't stand in their home."""
    settings = of(tmp_path / "Übung mit Leerzeichen")
    yield settings
    shutil.rmtree(f"/tmp/airloom-{os.getuid()}-{settings.instance_id}", ignore_errors=True)


def test_short_plain_home_holds_its_sockets() -> None:
    assert of(Path("/srv/a")).supervisor == "unix:/srv/a/run/supervisor.sock"


def test_odd_name_leads_to_a_private_folder(elsewhere: Settings) -> None:
    path = elsewhere.socket_path("supervisor.sock")
    assert path.parent == Path(f"/tmp/airloom-{os.getuid()}-{elsewhere.instance_id}")
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert elsewhere.socket_path("supervisor.sock") == path
    assert elsewhere.gateway_admin == f"unix:{path.parent / 'gateway.sock'}"


def test_long_name_leads_to_a_short_one(tmp_path: Path) -> None:
    settings = of(tmp_path / ("long" * 30))
    path = settings.socket_path("s.sock")
    path.parent.rmdir()
    assert len(os.fsencode(path)) < 100


def test_folder_that_others_may_enter_is_refused(elsewhere: Settings) -> None:
    elsewhere.socket_path("a").parent.chmod(0o755)
    with pytest.raises(ConfigError, match="not a private folder"):
        elsewhere.socket_path("a")


def test_link_in_its_place_is_refused(elsewhere: Settings, tmp_path: Path) -> None:
    folder = elsewhere.socket_path("a").parent
    folder.rmdir()
    (tmp_path / "trap").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "trap")
    try:
        with pytest.raises(ConfigError, match="not a private folder"):
            elsewhere.socket_path("a")
    finally:
        folder.unlink()


def test_installations_differ_and_links_to_one_do_not(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert of(tmp_path / "real").instance_id == of(tmp_path / "link").instance_id
    assert of(tmp_path / "real").instance_id != of(tmp_path / "other").instance_id
