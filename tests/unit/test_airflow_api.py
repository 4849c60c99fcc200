"""Waiting for a run while Airflow answers, is silent, or stays so; and events that follow each other quickly."""

from __future__ import annotations

from typing import Any

import pytest

from airloom.errors import NotFoundError, UnavailableError
from airloom.hooks import airflow_api
from airloom.hooks.airflow_api import AirflowApi

AWAY = UnavailableError("Airflow does not answer")


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What Airflow says of the run, one after the other; the last one from then on."""

    def say(*found: Any) -> AirflowApi:
        left = list(found)

        def run(self: AirflowApi, dag_id: str, run_id: str) -> dict[str, Any]:
            answer = left.pop(0) if len(left) > 1 else left[0]
            if isinstance(answer, Exception):
                raise answer
            return {"dag_run_id": run_id, "state": answer}

        monkeypatch.setattr(AirflowApi, "run", run)
        monkeypatch.setattr(AirflowApi, "task_instances", lambda self, dag_id, run_id: [])
        return AirflowApi(url="http://127.0.0.1:1", username="admin", password="p")

    return say


def test_a_run_goes_on_while_airflow_is_silent(answers: Any) -> None:
    api = answers("running", AWAY, AWAY, "running", AWAY, "success")
    seen: list[str] = []
    ended = api.wait("digits", "r1", lambda run, tasks: seen.append(run["state"]), poll_seconds=0)
    assert ended["state"] == "success"
    assert seen == ["running", "success"]


def test_who_waits_hears_that_airflow_stays_silent(answers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(airflow_api, "_SILENT_SECONDS", 0.05)
    with pytest.raises(UnavailableError, match="does not answer"):
        answers("running", AWAY).wait("digits", "r1", poll_seconds=0.01)


def test_a_time_limit_holds_while_airflow_is_silent(answers: Any) -> None:
    with pytest.raises(UnavailableError, match="does not answer"):
        answers(AWAY).wait("digits", "r1", timeout_seconds=0.05, poll_seconds=0.01)
    with pytest.raises(UnavailableError, match="still running after 0 s"):
        answers("running").wait("digits", "r1", timeout_seconds=0.05, poll_seconds=0.01)


@pytest.mark.parametrize(
    ("waits", "run", "due", "told"),
    [
        pytest.param(False, False, False, 1, id="no event waited"),
        pytest.param(True, True, False, 1, id="its run is there"),
        pytest.param(True, False, True, 1, id="its run is due"),
        pytest.param(True, False, False, 2, id="the scheduler removed its note with the earlier one's"),
    ],
)
def test_an_event_that_would_start_nothing_is_told_again(
    monkeypatch: pytest.MonkeyPatch, waits: bool, run: bool, due: bool, told: int
) -> None:
    calls: list[str] = []

    def call(self: AirflowApi, method: str, path: str, **given: Any) -> Any:
        calls.append(f"{method} {path}")
        if method == "DELETE" and not waits:
            raise NotFoundError("nothing is queued")
        if method == "POST":
            return {"id": 7}
        return {
            "assets": {"assets": [{"id": 3, "name": "a", "uri": "a"}], "total_entries": 1},
            "assets/events": {"asset_events": [{"id": 7, "created_dagruns": [{}] * run}], "total_entries": 1},
            "assets/3/queuedEvents": {"queued_events": [{}] * due, "total_entries": int(due)},
        }.get(path, {})

    monkeypatch.setattr(AirflowApi, "_call", call)
    monkeypatch.setattr(airflow_api, "_LOOK_SECONDS", 0)
    AirflowApi(url="http://127.0.0.1:1", username="admin", password="p").create_asset_event("a", {"commit": "c"})
    assert calls[:3] == ["GET assets", "DELETE assets/3/queuedEvents", "POST assets/events"]
    assert calls.count("POST assets/events") == told
