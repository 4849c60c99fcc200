"""The task that makes up for what pushes should have led to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperator
from airflow.sdk.exceptions import AirflowException

from airloom.operators.notes import note_task
from airloom.settings import get_settings

if TYPE_CHECKING:
    from airflow.sdk.definitions.context import Context


class ReconcileOperator(BaseOperator):
    """Call `airloom.flows.reconcile`, end stages that no live run owns, and say what was done in log, note and result.

    Raises:
        AirflowException: something stood in the way; what could be done was done.
    """

    ui_color = "#e6eefc"

    def execute(self, context: Context) -> list[dict[str, Any]]:
        from airloom.flows.reap import live_in_airflow, reap
        from airloom.flows.reconcile import reconcile
        from airloom.hooks.connect import Hooks

        hooks = Hooks(get_settings())
        actions = reconcile(hooks, on_progress=lambda line: self.log.info("%s", line))
        ended = [
            f"ended {stage.label}: stage {stage.stage} of {stage.pipeline} {stage.run_id}, which no live run owns"
            for stage in reap(hooks.settings, is_live=live_in_airflow(hooks))
        ]
        for line in ended:
            self.log.warning("%s", line)
        if not actions and not ended:
            self.log.info("everything that was pushed is built, and Airflow knows of it")
            return []
        note_task(hooks, context, "\n".join([*map(str, actions), *ended]))
        errors = [str(action) for action in actions if action.did == "error"]
        if errors:
            raise AirflowException("\n".join(errors))
        return [action.model_dump(mode="json") for action in actions]
