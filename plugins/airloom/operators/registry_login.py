"""Logins of image registries from Airflow's connections of the type `docker`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from airloom.hooks.docker_engine import FindLogin, RegistryLogin

REGISTRY_CONNECTION = "airloom_registry"


def login_from(connection_id: str, *, required: bool = False) -> FindLogin:
    """Asks Airflow for the connection when it is called, and not before.

    Args:
        required: whether a connection that is not there is an error; else there is no login.

    Raises (when called):
        ConfigError: the connection is missing, or lacks host or login.
    """

    def find() -> RegistryLogin | None:
        from airflow.sdk import BaseHook
        from airflow.sdk.exceptions import AirflowNotFoundException

        from airloom.errors import ConfigError
        from airloom.hooks.docker_engine import RegistryLogin

        try:
            found = BaseHook.get_connection(connection_id)
        except AirflowNotFoundException as error:
            if not required:
                return None
            raise ConfigError(
                f"the connection {connection_id!r} is not in Airflow",
                hint="add it: type docker, the registry's host, login and password",
            ) from error
        if not found.host or not found.login:
            raise ConfigError(
                f"the connection {connection_id!r} has no {'login' if found.host else 'host'}",
                hint="it needs the registry's host (docker.io for Docker Hub), login and password",
            )
        registry = f"{found.host}:{found.port}" if found.port else found.host
        return RegistryLogin(registry, found.login, found.password or "")

    return find
