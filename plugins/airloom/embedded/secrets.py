"""Makes the secrets of an installation."""

from __future__ import annotations

import base64
import os
import secrets
from pathlib import Path

from airloom.errors import ConfigError
from airloom.settings import SECRET_NAMES, Settings

# Airflow refuses keys for its tokens that are shorter than 64 bytes.
_BYTES = {"airflow_api_secret": 64, "airflow_jwt_secret": 64, "s3_jwt_secret": 48}
_PASSWORD_BYTES = 24


def init_secrets(settings: Settings) -> list[str]:
    """Make each secret that is not there yet; the names of those made. One that exists is never changed.

    Each is a file of mode 0600 in a folder of mode 0700, and holds only characters that are safe in URLs.

    Raises:
        ConfigError: the folder or a file can't be made, or is open to others and can't be closed.
    """
    folder = settings.secrets_dir
    try:
        # The home as well: it also holds data and logs.
        settings.home_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
        return [name for name in SECRET_NAMES if _make(folder / name)]
    except OSError as error:
        raise ConfigError(
            f"secrets cannot be kept in {folder}: {error.strerror}",
            hint="that folder must belong to the user who runs the platform; or set another AIRLOOM_HOME",
        ) from error


def _make(path: Path) -> bool:
    """Write a new secret whole or not at all, and never over another. Whether it was made."""
    if path.exists() and path.stat().st_size:
        path.chmod(0o600)
        return False
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(_value(path.name))
        file.flush()
        os.fsync(file.fileno())
    try:
        if path.exists():  # empty: left by a full disk
            temporary.replace(path)
        else:
            os.link(temporary, path)
    except FileExistsError:  # somebody else was faster, and theirs holds
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _value(name: str) -> str:
    if name == "airflow_fernet_key":
        return base64.urlsafe_b64encode(secrets.token_bytes(32)).decode("ascii")
    return secrets.token_urlsafe(_BYTES.get(name, _PASSWORD_BYTES))
