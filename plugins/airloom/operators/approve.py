"""Ask a person before a release."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.providers.standard.operators.hitl import ApprovalOperator

if TYPE_CHECKING:
    from airflow.sdk.definitions.context import Context


class ApproveOperator(ApprovalOperator):
    """Airflow's approval, unless the run's parameter `skip_approval` says that nobody is to be asked.

    Rejecting is a decision: what comes after is skipped and the run succeeds.
    """

    ui_color = "#fff4d6"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(ignore_downstream_trigger_rules=True, **kwargs)

    def execute(self, context: Context) -> Any:
        if context["params"].get("skip_approval"):
            self.log.info("nobody is asked: the run's parameter skip_approval is set")
            return {"chosen_options": [self.APPROVE], "skipped": True}
        return super().execute(context)
