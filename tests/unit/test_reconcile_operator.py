"""The reconciler's task: what it returns, notes and fails on."""

from __future__ import annotations

from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowException

from airloom.flows.reap import Reaped
from airloom.flows.reconcile import Action
from airloom.operators import reconcile as module
from airloom.operators.reconcile import ReconcileOperator

BUILT = Action(repo="x", commit="a" * 40, did="built", why="nothing before it has been built; Airflow: told")
AWAY = Action(repo="y", commit="", did="error", why="the git server did not answer")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    notes: list[str] = []
    monkeypatch.setattr(module, "note_task", lambda hooks, context, text: notes.append(text))

    def execute(*actions: Action, ended: tuple[Reaped, ...] = ()) -> tuple[Any, list[str]]:
        monkeypatch.setattr("airloom.flows.reap.reap", lambda settings, **options: list(ended))
        monkeypatch.setattr("airloom.flows.reconcile.reconcile", lambda hooks, **options: list(actions))
        return ReconcileOperator(task_id="reconcile").execute({}), notes

    execute.notes = notes  # type: ignore[attr-defined]
    return execute


def test_nothing_to_do_is_no_news(run: Any) -> None:
    assert run() == ([], [])


def test_what_was_done_is_noted(run: Any) -> None:
    result, notes = run(BUILT)
    assert result == [BUILT.model_dump(mode="json")]
    assert notes == ["x@aaaaaaaa built: nothing before it has been built; Airflow: told"]


def test_stage_without_a_run_is_ended_and_named(run: Any) -> None:
    stray = Reaped(pipeline="digits", run_id="gone", stage="train", label="container 0123456789ab")
    result, notes = run(ended=(stray,))
    assert result == []
    assert notes == ["ended container 0123456789ab: stage train of digits gone, which no live run owns"]


def test_what_stood_in_the_way_fails_the_task_after_all_was_tried(run: Any) -> None:
    with pytest.raises(AirflowException, match="y: the git server did not answer"):
        run(BUILT, AWAY)
    assert run.notes == [f"{BUILT}\n{AWAY}"]
