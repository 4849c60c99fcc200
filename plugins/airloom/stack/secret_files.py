"""Secrets in the form that a service reads them in, made anew from the plain ones at each `airloom up`."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

from airloom.settings import Settings

NAMES = ("s3_identities", "registry_htpasswd", "mysql_exporter_cnf")


def write_secret_files(settings: Settings) -> None:
    """Write each file whole, mode 0600, and only when it says something new.

    Raises:
        ConfigError: a plain secret is missing.
    """
    from airloom.embedded.s3_server import s3_identities

    folder = settings.secrets_dir
    _write(folder / "s3_identities", json.dumps(s3_identities(settings), indent=1))
    password = settings.secret("mysql_exporter_password")
    _write(folder / "mysql_exporter_cnf", f"[client]\nuser=exporter\npassword={password}\nhost=mysql\nport=3306\n")
    user, path = settings.registry_user or "airloom", folder / "registry_htpasswd"
    wanted = settings.secret("registry_password")
    # Its hash is another one each time: kept while it fits.
    name, _, hashed = path.read_text().strip().partition(":") if path.exists() else ("", "", "")
    if name != user or _bcrypt(wanted, hashed) != hashed:
        _write(path, f"{user}:{_bcrypt(wanted)}\n")


def _bcrypt(password: str, salt: str = "") -> str:
    """The C library's: registries take bcrypt alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # gone in Python 3.13, which Airloom does not take
        import crypt

        return crypt.crypt(password, salt or crypt.mksalt(crypt.METHOD_BLOWFISH, rounds=2**10))  # noqa: S324 - bcrypt


def _write(path: Path, text: str) -> None:
    if path.exists() and path.read_text() == text:
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    if os.getuid() == 0:  # whoever the secrets belong to, services run as that user
        os.chown(temporary, path.parent.stat().st_uid, path.parent.stat().st_gid)
    # Into the same file where there is one: a container that runs has it mounted.
    if path.exists():
        path.write_text(text)
        temporary.unlink()
    else:
        temporary.replace(path)
