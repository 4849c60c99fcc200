"""Short texts on runs and tasks in Airflow's UI. A note that cannot be written is no reason to fail."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from airloom.contract import GateDecision, RunPlan
from airloom.errors import AirloomError
from airloom.operators.trigger import first_line

if TYPE_CHECKING:
    from collections.abc import Mapping

    from airloom.contract.build import BuildRecord
    from airloom.hooks.connect import Hooks

log = logging.getLogger(__name__)


def plan_note(plan: RunPlan, builds: Mapping[str, BuildRecord]) -> str:
    """Who started the run, and each stage repo's commit with its build: seconds, image, log."""
    trigger = plan.trigger
    started = f"{trigger.kind} by {trigger.by}" if trigger.by else trigger.kind
    lines = [f"{started}: {trigger.detail}" if trigger.detail else started]
    for pin in plan.code.values():
        lines.append(f"{pin.repo}@{pin.commit[:8]} {first_line(pin.message)}")
        record = builds.get(pin.repo)
        if record is not None:
            lines.append(f"    built in {record.seconds:.1f} s{f': {record.image.digest}' if record.image else ''}")
            lines += [f"    {record.url}"] if record.url else []
    if plan.reproduces:
        lines.append(f"reproduces {plan.reproduces}")
    return "\n".join(lines)


def decision_note(decision: GateDecision) -> str:
    """The verdict and its reasons, those that reject the candidate first."""
    passed = [reason for reason in decision.reasons if reason not in decision.failed]
    return "\n".join([f"{decision.verdict.value.upper()}", *decision.failed, *passed])


def note_run(hooks: Hooks, context: Mapping[str, Any] | Any, text: str) -> None:
    """Put a note on the run."""
    _write(lambda: hooks.airflow.set_run_note(context["dag"].dag_id, context["run_id"], text))


def note_task(hooks: Hooks, context: Mapping[str, Any] | Any, text: str) -> None:
    """Put a note on the task."""
    ti = context["ti"]
    _write(lambda: hooks.airflow.set_task_note(ti.dag_id, ti.run_id, ti.task_id, text))


def _write(call: Any) -> None:
    try:
        call()
    except AirloomError as error:
        log.warning("the note could not be written: %s", error)
