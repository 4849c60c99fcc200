"""A person is asked, on a real Airflow, with the task that pipelines have."""

from __future__ import annotations

from contextlib import suppress
from typing import Any
from urllib.parse import quote

import pytest

from airloom.errors import ConflictError, NotFoundError
from tests.fixtures.airflow import RunningAirflow, until

pytestmark = pytest.mark.timeout(1200)

DAG_FILE = """
from datetime import UTC, datetime
from airflow.sdk import DAG, BaseOperator
from airloom.dag_factory import FLOW_RETRIES, RETRY_DELAY, _approve
from airloom.spec.load import load_pipeline
from airloom.settings import get_settings


class Say(BaseOperator):
    def execute(self, context):
        return {"verdict": "promoted", "reasons": ["accuracy 0.97 is at least 0.9"]}


with DAG("asks", schedule=None, start_date=datetime(2024, 1, 1, tzinfo=UTC), catchup=False,
         params={"skip_approval": False}, default_args={"retries": FLOW_RETRIES, "retry_delay": RETRY_DELAY}):
    spec = load_pipeline(get_settings().configs_dir / "digits.yaml")
    Say(task_id="gate") >> _approve(spec) >> Say(task_id="release")
"""


@pytest.fixture(scope="module")
def asks(airflow: RunningAirflow) -> RunningAirflow:
    (airflow.settings.project / "dags" / "asks.py").write_text(DAG_FILE)
    until(
        lambda: any(dag["dag_id"] == "asks" for dag in airflow.api.dags()), seconds=240, what=airflow.api.import_errors
    )
    return airflow


def states(airflow: RunningAirflow, run_id: str) -> dict[str, str]:
    return {task["task_id"]: task["state"] for task in airflow.api.task_instances("asks", run_id)}


def details(airflow: RunningAirflow, run_id: str) -> dict[str, Any]:
    """What the person is asked."""
    return dict(airflow.api._call("GET", f"dags/asks/dagRuns/{quote(run_id)}/taskInstances/approve/-1/hitlDetails"))


def give(airflow: RunningAirflow, run_id: str, answer: str) -> None:
    # A server that is busy is told again, and may have taken the answer the first time. What it took, the run shows.
    with suppress(ConflictError):
        airflow.api.answer("asks", run_id, "approve", answer)


def logs(airflow: RunningAirflow, run_id: str) -> str:
    """What each try of the question wrote, as far as Airflow has it."""
    found = []
    for number in range(1, 5):
        with suppress(NotFoundError):
            found += [f"try {number}", *airflow.api.task_log("asks", run_id, "approve", number)]
    return "\n".join(found)


@pytest.mark.parametrize(("answer", "release"), [("Approve", "success"), ("Reject", "skipped")])
def test_the_run_waits_for_the_answer(asks: RunningAirflow, answer: str, release: str) -> None:
    run_id = asks.api.trigger("asks")
    until(
        lambda: states(asks, run_id).get("approve") in {"awaiting_input", "deferred"},
        seconds=240,
        what=lambda: f"nobody is asked: {states(asks, run_id)}\n{logs(asks, run_id)}",
    )
    asked = details(asks, run_id)
    assert asked["subject"] == "Release the new model of digits?"
    assert "accuracy 0.97 is at least 0.9" in asked["body"]
    assert states(asks, run_id)["release"] is None
    give(asks, run_id, answer)

    def ended_state() -> str | None:
        # A try that failed for a reason of its own, such as a busy database, asks once more.
        now = states(asks, run_id)
        if now["approve"] == "awaiting_input" and not details(asks, run_id)["response_received"]:
            give(asks, run_id, answer)
        state = asks.api.run("asks", run_id)["state"]
        return state if state in {"success", "failed"} else None

    ended = until(
        ended_state, seconds=400, what=lambda: f"the run goes on: {states(asks, run_id)}\n{logs(asks, run_id)}"
    )
    assert states(asks, run_id) == {"gate": "success", "approve": "success", "release": release}, logs(asks, run_id)
    assert ended == "success"


def test_nobody_is_asked_where_the_run_says_so(asks: RunningAirflow) -> None:
    run_id = asks.api.trigger("asks", {"skip_approval": True})
    state = asks.api.wait("asks", run_id, timeout_seconds=400)["state"]
    assert state == "success", logs(asks, run_id)
    assert states(asks, run_id) == {"gate": "success", "approve": "success", "release": "success"}
