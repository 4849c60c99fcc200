"""What Airloom adds to Airflow itself. Every Airflow process imports this, so it imports little."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from airflow.configuration import conf
from airflow.plugins_manager import AirflowPlugin

from airloom import listener


class AirloomPlugin(AirflowPlugin):
    """The listener that keeps the ledger, the pages under `/airloom`, and order among changes on SQLite."""

    name = "airloom"
    listeners = [listener]  # noqa: RUF012 - Airflow's own shape
    external_views = [  # noqa: RUF012
        {"name": "Airloom", "href": "/airloom/", "url_route": "airloom", "destination": "nav", "nav_top_level": True},
        {
            "name": "Airloom run",
            "href": "/airloom/runs/{DAG_ID}/{RUN_ID}",
            "url_route": "airloom-run",
            "destination": "dag_run",
        },
    ]

    @cached_property
    def fastapi_apps(self) -> list[dict[str, Any]]:
        """Made when the API server asks: the others need no web framework for it."""
        from airloom.airflow_pages.app import create_app

        return [{"app": create_app(), "url_prefix": "/airloom", "name": "Airloom"}]

    @cached_property
    def fastapi_root_middlewares(self) -> list[dict[str, Any]]:
        """What the API server's requests go through, those of tasks among them."""
        if not conf.get_mandatory_value("database", "sql_alchemy_conn").startswith("sqlite"):
            return []
        from airloom.airflow_pages.changes import OneChangeAtATime

        return [{"middleware": OneChangeAtATime, "name": "Airloom: one change at a time"}]
