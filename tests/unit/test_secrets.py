"""Secrets of an installation."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import pytest

from airloom.embedded.secrets import init_secrets
from airloom.errors import ConfigError
from airloom.settings import SECRET_NAMES, Settings


@pytest.fixture
def fresh(tmp_path: Path) -> Settings:
    return Settings(_env_file=None, project=tmp_path, home=tmp_path / "home")


def test_makes_each_secret_private_and_only_once(fresh: Settings) -> None:
    assert init_secrets(fresh) == list(SECRET_NAMES)
    values = {name: fresh.secret(name) for name in SECRET_NAMES}
    assert len(set(values.values())) == len(SECRET_NAMES)
    for name, value in values.items():
        assert re.fullmatch(r"[A-Za-z0-9_=-]{24,}", value), name
        assert (fresh.secrets_dir / name).stat().st_mode & 0o777 == 0o600
    assert fresh.secrets_dir.stat().st_mode & 0o777 == 0o700
    assert fresh.home_dir.stat().st_mode & 0o777 == 0o700
    assert init_secrets(fresh) == []
    assert {name: fresh.secret(name) for name in SECRET_NAMES} == values
    assert sorted(path.name for path in fresh.secrets_dir.iterdir()) == sorted(SECRET_NAMES)


def test_only_what_is_missing_or_empty_is_made(fresh: Settings) -> None:
    init_secrets(fresh)
    kept = fresh.secret("git_password")
    (fresh.secrets_dir / "webhook_secret").unlink()
    (fresh.secrets_dir / "admin_password").write_text("")
    assert init_secrets(fresh) == ["admin_password", "webhook_secret"]
    assert fresh.secret("git_password") == kept
    assert len(fresh.secret("admin_password")) >= 24


def test_open_file_is_closed_to_others(fresh: Settings) -> None:
    init_secrets(fresh)
    (fresh.secrets_dir / "git_password").chmod(0o644)
    init_secrets(fresh)
    assert (fresh.secrets_dir / "git_password").stat().st_mode & 0o777 == 0o600


def test_keys_have_the_form_that_airflow_wants(fresh: Settings) -> None:
    init_secrets(fresh)
    assert len(base64.urlsafe_b64decode(fresh.secret("airflow_fernet_key"))) == 32
    assert len(fresh.secret("airflow_api_secret")) >= 64
    assert len(fresh.secret("airflow_jwt_secret")) >= 64


def test_home_that_is_a_file_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("not a folder")
    settings = Settings(_env_file=None, project=tmp_path, home=tmp_path / "home")
    with pytest.raises(ConfigError, match="secrets cannot be kept in"):
        init_secrets(settings)
