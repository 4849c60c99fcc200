"""Buttons on tasks in Airflow's UI. Each address is worked out when the task ends, from what it returned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import attrs
from airflow.sdk import BaseOperatorLink

from airloom.settings import get_settings

if TYPE_CHECKING:
    from airflow.sdk import BaseOperator
    from airflow.sdk.types import TaskInstanceKey


def run_page_path(pipeline: str, run_id: str) -> str:
    """The plugin's page of a run, relative to Airflow's address."""
    return f"/airloom/runs/{quote(pipeline, safe='')}/{quote(run_id, safe='')}"


@attrs.define()
class RunPageLink(BaseOperatorLink):
    """The plan, cache use, data version, verdict and release of the run on one page."""

    name = "Run page"

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:
        return get_settings().airflow_page_url + run_page_path(ti_key.dag_id, ti_key.run_id)


@attrs.define()
class MlflowRunLink(BaseOperatorLink):
    """The candidate's run in MLflow."""

    name = "MLflow run"

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:
        own = _returned(ti_key)
        train = own if ti_key.task_id == "train" else _returned(ti_key, "train")
        run_id = own.get("mlflow_run_id") or train.get("result", {}).get("facts", {}).get("mlflow_run_id")
        if not run_id:
            return ""
        from airloom.hooks.connect import Hooks

        return str(Hooks(get_settings()).mlflow.run_url(run_id))


@attrs.define()
class VersionTagLink(BaseOperatorLink):
    """The version tag on the git server."""

    name = "Version tag"

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:
        version = _returned(ti_key, "version")
        if not version:
            return ""
        from airloom.hooks.connect import Hooks

        return str(Hooks(get_settings()).gitbucket.tag_url(version["repo"], version["tag"]))


@attrs.define()
class ReceiptLink(BaseOperatorLink):
    """The receipt of an answer that the release gave when it was verified; the latest ones where it gave none."""

    name = "Receipt"

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:
        asked = _returned(ti_key).get("sample_prediction_ids") or []
        return f"{get_settings().airflow_page_url}/airloom/receipts{f'/{quote(asked[0])}' if asked else ''}"


def _returned(ti_key: Any, task_id: str | None = None) -> dict[str, Any]:
    """What the task, or another one of its run, returned; empty if nothing."""
    from airflow.sdk.execution_time.xcom import XCom

    value = XCom.get_one(
        key="return_value", dag_id=ti_key.dag_id, task_id=task_id or ti_key.task_id, run_id=ti_key.run_id
    )
    return value if isinstance(value, dict) else {}
