"""The embedded git server: what GitBucket is in the stack, as one small child process."""

from __future__ import annotations

import sys
from pathlib import Path

from airloom.embedded.service import Service
from airloom.settings import Settings


def git_data_dir(settings: Settings) -> Path:
    """Bare repos as `<owner>/<repo>.git`, and the server's own state in `.forge`."""
    return settings.data_dir / "git"


def service(settings: Settings) -> Service:
    """The child process that serves git over HTTP, GitBucket's API, pages, push events and builds."""
    return Service(
        name="git",
        command=(sys.executable, "-m", "airloom.embedded.forge"),
        cwd=git_data_dir(settings),
        env={f"AIRLOOM_{name.upper()}": str(getattr(settings, name)) for name in type(settings).model_fields},
        ports=(settings.git_port,),
        prepare=lambda: git_data_dir(settings).mkdir(parents=True, exist_ok=True, mode=0o700),
        probe=lambda: _probe(settings),
        start_timeout_seconds=60.0,
        grace_seconds=15.0,
        urls={"Git": settings.git_base_url},
        metrics_url=f"{settings.git_base_url}/metrics",
    )


def _probe(settings: Settings) -> None:
    """List the repos as a client would; anything but an answer raises."""
    import requests

    with requests.Session() as session:
        session.trust_env = False
        answer = session.get(
            f"{settings.git_base_url}/api/v3/user/repos",
            auth=(settings.git_user, settings.secret("git_password")),
            timeout=5,
        )
    answer.raise_for_status()
