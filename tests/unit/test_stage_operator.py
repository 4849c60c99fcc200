"""Stage tasks: what they hand to the flow, what becomes of errors, and when a stage is stopped."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import pytest
from airflow.sdk import BaseHook
from airflow.sdk.exceptions import AirflowException, AirflowFailException

from airloom.contract import DataVersion, RunPlan, Stage, StageOutcome
from airloom.errors import AuthError, NotFoundError, StageFailedError, UnavailableError
from airloom.flows import stages
from airloom.hooks import airflow_api
from airloom.hooks.airflow_api import AirflowApi
from airloom.hooks.docker_engine import RegistryLogin
from airloom.hooks.process_runner import ProcessRunner
from airloom.hooks.runner import JobHandle
from airloom.operators import stage as module
from airloom.operators.stage import ARGUMENTS, StageOperator
from airloom.operators.wanted import is_wanted
from tests.fixtures.plans import make_data_version, make_outcome, make_plan


class Ti:
    """As much of a task instance as the operator asks for."""

    dag_id, run_id, task_id = "digits", "run-1", "train"
    map_index: int | None = -1
    try_number = 2

    def __init__(self, **results: Any) -> None:
        self.results = results
        self.pushed: dict[str, Any] = {}

    def xcom_pull(self, task_ids: str) -> Any:
        return self.results.get(task_ids)

    def xcom_push(self, key: str, value: Any) -> None:
        self.pushed[key] = value


class Bench:
    """The operator with the flow, Airflow's API and notes replaced."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.result: StageOutcome | Exception = make_outcome(Stage.TRAIN)
        self.api = create_autospec(AirflowApi, instance=True)
        self.runner = create_autospec(ProcessRunner, instance=True)
        self.ti = Ti(
            resolve=make_plan().model_dump(mode="json"),
            version=make_data_version().model_dump(mode="json"),
            train=make_outcome(Stage.TRAIN).model_dump(mode="json"),
        )
        monkeypatch.setattr(stages, "run_stage", self._run)
        monkeypatch.setattr(module, "note_task", lambda hooks, context, text: self.notes.append(text))
        monkeypatch.setattr(airflow_api.AirflowApi, "from_settings", lambda settings, **options: self.api)

    def _run(self, hooks: Any, **arguments: Any) -> StageOutcome:
        self.calls.append(arguments)
        if isinstance(self.result, Exception):
            raise self.result
        return self.result

    def execute(self, stage: Stage = Stage.TRAIN) -> Any:
        operator = StageOperator(task_id=stage.value, stage=stage)
        return operator.execute.__wrapped__(operator, self.context())

    def context(self) -> Any:
        return {"ti": self.ti}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch)


@pytest.mark.parametrize("stage", list(ARGUMENTS))
def test_what_each_stage_is_given(bench: Bench, stage: Stage) -> None:
    returned = bench.execute(stage)
    (call,) = bench.calls
    assert call["stage"] is stage
    kinds = {"plan": RunPlan, "data_version": DataVersion, "train": StageOutcome}
    for name in ARGUMENTS[stage]:
        assert isinstance(call[name], kinds[name])
    assert set(call) & set(kinds) == set(ARGUMENTS[stage])
    assert StageOutcome.model_validate(returned) == make_outcome(Stage.TRAIN)


def test_a_stage_that_no_task_runs() -> None:
    with pytest.raises(ValueError, match="preprocess, train, evaluate"):
        StageOperator(task_id="serve", stage=Stage.SERVE)


def test_a_hit_is_seen(bench: Bench) -> None:
    bench.result = make_outcome(Stage.TRAIN, cache="hit", reason="equal to run run-0")
    bench.execute()
    assert bench.ti.pushed["cache"]["cache"] == "hit"
    assert bench.ti.pushed["cache"]["reason"] == "equal to run run-0"
    assert bench.notes == ["cache hit, not run: equal to run run-0"]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (StageFailedError("bad", retryable=False), AirflowFailException),
        (StageFailedError("killed", retryable=True), AirflowException),
        (UnavailableError("away"), AirflowException),
        (AuthError("refused"), AirflowFailException),
    ],
)
def test_errors(bench: Bench, error: Exception, kind: type[Exception]) -> None:
    bench.result = error
    with pytest.raises(kind) as caught:
        bench.execute()
    assert type(caught.value) is kind
    assert bench.notes == [str(error)]


def test_nothing_was_handed_on(bench: Bench) -> None:
    bench.ti.results["version"] = None
    with pytest.raises(AirflowFailException, match="'version' has handed nothing on"):
        bench.execute()


@pytest.mark.parametrize(
    ("answer", "stopped"),
    [
        ("running", False),
        ("up_for_retry", False),
        ("failed", True),
        ("success", True),
        ("removed", True),
        (None, True),
        (NotFoundError("no such run"), True),
        (UnavailableError("away"), False),
        (AuthError("refused"), False),
    ],
)
def test_when_told_to_end(bench: Bench, monkeypatch: pytest.MonkeyPatch, answer: Any, stopped: bool) -> None:
    """The stage is stopped only if Airflow says that nobody wants it any more."""
    operator = StageOperator(task_id="train", stage=Stage.TRAIN)
    if isinstance(answer, Exception):
        bench.api.task_instance.side_effect = answer
    else:
        bench.api.task_instance.return_value = {"task_id": "train", "state": answer}

    def run(hooks: Any, *, should_stop: Any, **arguments: Any) -> StageOutcome:
        assert should_stop() is False
        operator.on_kill()
        assert should_stop() is True
        raise StageFailedError("it was stopped", retryable=True)

    monkeypatch.setattr(stages, "run_stage", run)
    with pytest.raises(AirflowException, match="it was stopped" if stopped else "the next try adopts it"):
        operator.execute.__wrapped__(operator, bench.context())


def test_a_mapped_task_is_asked_for_by_its_index(bench: Bench) -> None:
    states = {0: "running", 1: "failed"}

    def answer(dag_id: str, run_id: str, task_id: str, map_index: int) -> dict[str, Any]:
        if map_index not in states:
            raise NotFoundError(f"no {task_id} {map_index}")
        return {"task_id": task_id, "map_index": map_index, "state": states[map_index]}

    bench.api.task_instance.side_effect = answer
    for index, wanted in ((0, True), (1, False), (2, False), (None, False)):
        bench.ti.map_index = index
        assert is_wanted(bench.ti) is wanted


def test_the_runner_is_given_a_login_that_asks_airflow_when_it_is_called(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    found = SimpleNamespace(host="registry", port=None, login="me", password="p")
    monkeypatch.setattr(BaseHook, "get_connection", lambda name: asked.append(name) or found)
    bench.execute()
    (call,) = bench.calls
    assert asked == []
    assert call["registry_login"]() == RegistryLogin("registry", "me", "p")
    assert call["try_number"] == 2
    assert asked == ["airloom_registry"]


def test_a_timeout_of_the_task_stops_the_stage(bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Airflow raises inside `execute`, and calls `on_kill` afterwards."""
    operator = StageOperator(task_id="train", stage=Stage.TRAIN)
    handle = JobHandle(id="i", key="k", workspace=tmp_path, label="process 1")

    def run(hooks: Any, *, on_start: Any, **arguments: Any) -> StageOutcome:
        on_start(bench.runner, handle)
        raise TimeoutError

    monkeypatch.setattr(stages, "run_stage", run)
    with pytest.raises(TimeoutError):
        operator.execute.__wrapped__(operator, bench.context())
    operator.on_kill()
    bench.runner.stop.assert_called_once_with(handle, module.STOP_SECONDS)


def test_on_kill_before_anything_has_started() -> None:
    operator = StageOperator(task_id="train", stage=Stage.TRAIN)
    operator.on_kill()
    assert operator._told_to_end
