"""The environment of child processes: little is inherited, and all of it is named here."""

from __future__ import annotations

import os
import pwd
import sys
from collections.abc import Mapping
from pathlib import Path

from airloom.settings import Settings

INSTANCE_VARIABLE = "AIRLOOM_INSTANCE"
SERVICE_VARIABLE = "AIRLOOM_SERVICE"

# Where programs look for the authorities that sign outside servers' certificates.
CA_VARIABLES = (
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "AWS_CA_BUNDLE",
    "GIT_SSL_CAINFO",
    "NIX_SSL_CERT_FILE",
)
# How Docker's own programs find an engine.
DOCKER_VARIABLES = ("DOCKER_HOST", "DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH", "DOCKER_CONFIG")
INHERITED = ("TMPDIR", "TZ", *DOCKER_VARIABLES, *CA_VARIABLES)


def base_environment(settings: Settings, source: Mapping[str, str] | None = None) -> dict[str, str]:
    """What every child gets: PATH, HOME, USER, LANG, certificates and this installation's settings.

    The settings are passed on as they are in force, so that a value from the command line that started the
    platform also holds in every child.
    """
    source = os.environ if source is None else source
    own_programs = str(Path(sys.executable).parent)
    path = [part for part in source.get("PATH", os.defpath).split(os.pathsep) if part and part != own_programs]
    user_name, user_home = _user()
    environment = {
        "PATH": os.pathsep.join([own_programs, *path]),
        # A user id that has no name (a container may be given any) still needs these two.
        "HOME": source.get("HOME") or user_home,
        "USER": user_name,
        "LANG": source.get("LANG") or "C.UTF-8",
    }
    environment.update({name: source[name] for name in INHERITED if source.get(name)})
    for field in type(settings).model_fields:
        environment[f"AIRLOOM_{field.upper()}"] = str(getattr(settings, field))
    return environment


def _user() -> tuple[str, str]:
    """Name and home of the user."""
    try:
        entry = pwd.getpwuid(os.getuid())
    except KeyError:
        return f"user{os.getuid()}", "/"
    return entry.pw_name, entry.pw_dir


def child_environment(settings: Settings, service: str, env: Mapping[str, str]) -> dict[str, str]:
    """The environment of one service: the base, its own part, and the marks by which it is found again."""
    return {
        **base_environment(settings),
        **env,
        INSTANCE_VARIABLE: settings.instance_id,
        SERVICE_VARIABLE: service,
        # setproctitle (Airflow uses it) would write over /proc/<pid>/environ, and with it over the mark.
        "SPT_NOENV": "1",
        "PYTHONUNBUFFERED": "1",
    }
