"""Provisions the stack from a container on its network: what the embedded platform gets, and the stack's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from airloom.hooks.connect import Hooks
from airloom.settings import Settings

SOURCE_CONNECTION = "airloom_source"

OnProgress = Callable[[str, str], None]


def provision_stack(
    settings: Settings, on_progress: OnProgress, *, before_airflow: bool = False, seed: bool = True
) -> None:
    """Make what a fresh stack lacks; a second call changes nothing.

    Args:
        before_airflow: only what is needed before Airflow's containers: GitBucket's users.
        seed: whether to write the demo's raw data.

    Raises:
        ServiceError: a service refused or did not answer. What was done stays; run it again.
    """
    from airloom.embedded.provision import provision
    from airloom.stack.git_users import ensure_git_users

    if before_airflow:
        on_progress("git users", f"done: {ensure_git_users(settings)}")
        return
    hooks = Hooks(settings)
    provision(hooks, on_progress, seed=seed)
    _source_tables(settings, on_progress)
    hooks.airflow.ensure_connection(SOURCE_CONNECTION, source_connection(settings))


def _source_tables(settings: Settings, on_progress: OnProgress) -> None:
    from airloom.stack.databases import source_owner
    from airloom.stack.source_tables import ensure_source_tables

    step = "source tables"
    if not settings.seed_source:
        on_progress(step, "done: none wanted")
        return
    on_progress(step, "working")
    with source_owner(settings) as connection:
        said = ensure_source_tables(connection, lambda table, rows: on_progress(step, f"{table}: {rows:,} rows"))
    on_progress(step, f"done: {said}")


def source_connection(settings: Settings) -> dict[str, Any]:
    """Airflow's connection to the source database, with the right to read alone."""
    from airloom.stack.databases import MYSQL, SOURCE_DATABASE, SOURCE_READER

    return {
        "conn_type": "mysql",
        "host": MYSQL[0],
        "port": MYSQL[1],
        "schema": SOURCE_DATABASE,
        "login": SOURCE_READER,
        "password": settings.secret("mysql_source_reader_password"),
        "description": "Source tables, to be read",
    }
