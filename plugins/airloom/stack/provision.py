"""Provisions the stack from a container on its network: what the embedded platform gets, and the stack's own."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from airloom.hooks.connect import Hooks
from airloom.settings import Settings
from airloom.stack.container import DAGS_REPO

OnProgress = Callable[[str, str], None]


def provision_stack(settings: Settings, on_progress: OnProgress, *, before_airflow: bool = False) -> None:
    """Make what a fresh stack lacks; a second call changes nothing.

    Args:
        before_airflow: only what Airflow's containers need to start: GitBucket's users and the DAGs' repo.

    Raises:
        ServiceError: a service refused or did not answer. What was done stays; run it again.
    """
    from airloom.embedded.provision import provision
    from airloom.stack.git_users import ensure_git_users

    hooks = Hooks(settings)
    if before_airflow:
        on_progress("git users", f"done: {ensure_git_users(settings)}")
        on_progress("DAGs", f"done: {DAGS_REPO}" + (" pushed for the first time" if ensure_dags(hooks) else ""))
        return
    provision(hooks, on_progress)


def ensure_dags(hooks: Hooks) -> bool:
    """The repo that Airflow takes its DAGs from, with dags/ as its first commit; whether that was pushed now."""
    import shutil

    from airloom.embedded.provision import push_template

    hooks.gitbucket.ensure_repo(DAGS_REPO, "DAGs and their configurations")
    with tempfile.TemporaryDirectory(prefix="airloom-dags-") as temporary:
        folder = Path(temporary) / "dags"
        shutil.copytree(hooks.settings.project / "dags", folder, ignore=shutil.ignore_patterns("__pycache__"))
        return push_template(hooks, DAGS_REPO, Path(temporary))
