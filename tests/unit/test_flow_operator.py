"""Flow tasks: what they hand to flows, what becomes of errors and verdicts, and why a run was started."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk import DAG
from airflow.sdk.exceptions import AirflowException, AirflowFailException, DownstreamTasksSkipped
from jinja2 import Environment, PackageLoader

from airloom.airflow_pages.run_page import RunPage
from airloom.contract import DataVersion, GateDecision, ImageRef, RunPlan, StageResult, ValidationReport, Verdict
from airloom.contract.assets import stage_asset
from airloom.contract.build import BuildRecord
from airloom.contract.outcome import StageOutcome
from airloom.errors import AuthError, DataRejectedError, RolledBackError, StageFailedError, UnavailableError
from airloom.flows import commit_report
from airloom.operators import flow, notes
from airloom.operators.flow import RETURNS, STEPS, FlowOperator, Step, returned
from airloom.operators.notes import decision_note, plan_note
from airloom.operators.trigger import pinned_at, pushed_commits, trigger_of

SHA = "3f2a91c0" + "0" * 32


def make_plan(**changes: Any) -> RunPlan:
    values: dict[str, Any] = {
        "pipeline": "digits",
        "run_id": "r1",
        "created_at": datetime(2026, 11, 21, tzinfo=UTC),
        "runner": "process",
        "spec": {},
        "spec_digest": "d",
        "code": {"repo": {"repo": "repo", "commit": SHA, "message": "first line\nsecond", "author": "ada"}},
        "stages": {},
        "source": {"uri": "s3://raw/d/", "manifest": "s3://a/m", "digest": "d", "objects": 1, "size_bytes": 1},
        "trigger": {"kind": "push", "by": "ada", "detail": "repo@3f2a91c0 first line"},
    }
    return RunPlan.model_validate({**values, **changes})


def make_outcome(stage: str) -> StageOutcome:
    result = StageResult.model_validate({"stage": stage, "status": "ok", "started_at": 0, "finished_at": 1})
    return StageOutcome.model_validate(
        {"stage": stage, "cache": "miss", "reason": "new", "key": "k", "seconds": 1, "result": result}
    )


def make_decision(verdict: Verdict) -> GateDecision:
    rejected = verdict is Verdict.REJECTED
    return GateDecision(
        verdict=verdict,
        reasons=["accuracy 0.97 is at least 0.9", "accuracy is 0.02 worse than the champion's"],
        failed=["accuracy is 0.02 worse than the champion's"] if rejected else [],
        metrics={"accuracy": 0.97},
        model_name="digits",
        model_version="2",
        mlflow_run_id="m",
        data_tag="t",
    )


DATA = DataVersion(
    tag="t", repo="r", commit=SHA, code_commit=SHA, path="data", md5="x.dir", files=1, size_bytes=1, digest="d"
)


@dataclass
class Ti:
    """As much of a task instance as the operator asks for."""

    results: dict[str, Any]
    dag_id: str = "digits"
    run_id: str = "r1"
    task_id: str = "gate"
    map_index: int = -1
    pushed: dict[str, Any] = field(default_factory=dict)

    def xcom_pull(self, task_ids: str) -> Any:
        return self.results.get(task_ids)

    def xcom_push(self, key: str, value: Any) -> None:
        self.pushed[key] = value


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Execute a flow task with a function in the place of its flow; gives result, notes and skipped tasks."""
    written: list[tuple[str, str]] = []
    skipped: list[str] = []
    said: list[tuple[str, Any]] = []
    monkeypatch.setattr(flow, "note_run", lambda hooks, context, text: written.append(("run", text)))
    monkeypatch.setattr("airloom.flows.build.find_build", lambda *_: None)
    monkeypatch.setattr(flow, "note_task", lambda hooks, context, text: written.append(("task", text)))
    for name in ("report_result", "report_verified", "report_failed_release"):
        monkeypatch.setattr(commit_report, name, lambda *given, name=name, **named: said.append((name, given[-1])))

    def skip(self: FlowOperator, ti: Ti, tasks: Any) -> None:
        """As Airflow's: it never comes back."""
        skipped.extend(task.task_id for task in tasks)
        raise DownstreamTasksSkipped(tasks=skipped)

    monkeypatch.setattr(FlowOperator, "skip", skip)

    def execute(task_id: str, function: Any, **results: Any) -> Any:
        monkeypatch.setattr(Step, "load", lambda self: function)
        with DAG("digits", schedule=None, start_date=datetime(2024, 1, 1, tzinfo=UTC)) as dag:
            task = FlowOperator(task_id=task_id, pipeline="digits")
            if task_id == "gate":
                (
                    task
                    >> FlowOperator(task_id="release", pipeline="digits")
                    >> FlowOperator(task_id="deploy", pipeline="digits")
                )
        handed = {name: value.model_dump(mode="json") for name, value in results.items()}
        ti = Ti(handed, task_id=task_id)
        try:
            value = task.execute({"ti": ti, "dag": dag, "run_id": "r1", "params": {}})
        except DownstreamTasksSkipped:
            value = ti.pushed["return_value"]
        return SimpleNamespace(value=value, notes=written, skipped=sorted(skipped), said=said)

    return execute


def test_upstream_results_arrive_as_models(ran: Any) -> None:
    got: dict[str, Any] = {}

    def version_dataset(hooks: Any, *, plan: RunPlan, outcome: StageOutcome) -> DataVersion:
        got.update(plan=plan, outcome=outcome)
        return DATA

    plan, outcome = make_plan(), make_outcome("preprocess")
    done = ran("version", version_dataset, resolve=plan, preprocess=outcome)
    assert got == {"plan": plan, "outcome": outcome}
    assert DataVersion.model_validate(done.value) == DATA
    assert done.notes[0][1].startswith("t (made)")
    assert done.said == [("report_result", DATA)]


@pytest.mark.parametrize("verdict", list(Verdict))
def test_a_rejection_skips_the_rest_and_is_no_failure(ran: Any, verdict: Verdict) -> None:
    done = ran(
        "gate",
        lambda hooks, **inputs: make_decision(verdict),
        resolve=make_plan(),
        version=DATA,
        train=make_outcome("train"),
        evaluate=make_outcome("evaluate"),
    )
    assert done.value["verdict"] == verdict.value
    assert done.skipped == (["deploy", "release"] if verdict is Verdict.REJECTED else [])
    assert done.said == [("report_result", make_decision(verdict))]
    where = dict(done.notes)
    assert where["task"].startswith(verdict.value.upper())
    assert "push by ada: repo@3f2a91c0" in where["run"]
    assert verdict.value.upper() in where["run"]


@pytest.mark.parametrize(
    ("error", "final"),
    [
        (DataRejectedError("too few rows: 3"), True),
        (RolledBackError("the old release answers"), True),
        (AuthError("wrong password"), True),
        (StageFailedError("bad request"), True),
        (StageFailedError("killed", retryable=True), False),
        (UnavailableError("MLflow does not answer"), False),
    ],
)
def test_errors_say_whether_to_try_again(ran: Any, error: Exception, final: bool) -> None:
    def fail(hooks: Any, **inputs: Any) -> Any:
        raise error

    with pytest.raises(AirflowException, match=str(error)) as caught:
        ran("validate", fail, resolve=make_plan(), preprocess=make_outcome("preprocess"))
    assert isinstance(caught.value, AirflowFailException) is final


def test_an_unforeseen_error_is_tried_again(ran: Any) -> None:
    def fail(hooks: Any, **inputs: Any) -> Any:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ran("validate", fail, resolve=make_plan(), preprocess=make_outcome("preprocess"))


def test_a_missing_result_is_named(ran: Any) -> None:
    with pytest.raises(AirflowFailException, match="'preprocess' has handed nothing on"):
        ran("validate", lambda hooks, **inputs: ValidationReport(checks=[]), resolve=make_plan())
    with pytest.raises(StageFailedError):
        returned(Ti({}), "resolve")


def test_deploy_logs_its_steps(ran: Any) -> None:
    steps: list[Any] = []

    def deploy(hooks: Any, *, plan: Any, release: Any, on_step: Any) -> ValidationReport:
        on_step("10 % of the traffic")
        steps.append(release)
        return ValidationReport(checks=[])

    release = {
        "pipeline": "digits", "version": "1.0.1", "created_at": datetime(2026, 11, 21, tzinfo=UTC), "run_id": "r1",
        "model_name": "digits", "model_version": "2", "model_uri": "u", "model_digest": "d", "mlflow_run_id": "m",
        "data_tag": "t", "data_md5": "x", "serving_repo": "s", "serving_commit": SHA, "environment": "e",
        "plan": "p", "lineage": {},
    }  # fmt: skip
    ran("deploy", deploy, resolve=make_plan(), release=RETURNS["release"].model_validate(release))
    assert steps[0].version == "1.0.1"


def test_every_argument_of_a_step_is_some_tasks_result() -> None:
    for name, step in STEPS.items():
        assert set(step.arguments.values()) <= set(RETURNS), name
    with pytest.raises(ValueError, match="no flow is called 'dance'"):
        FlowOperator(task_id="dance", pipeline="digits")


@dataclass(frozen=True)
class Asset:
    uri: str


def event(commit: str, minute: int, pusher: str = "ada") -> Any:
    return SimpleNamespace(
        timestamp=datetime(2026, 11, 21, 4, minute, tzinfo=UTC),
        extra={"commit": commit, "pusher": pusher, "message": "improve\n\nmore"},
    )


def test_the_latest_push_of_each_repo_counts() -> None:
    events = {
        Asset(stage_asset("b")): [event("b" * 40, 1, "bob")],
        Asset(stage_asset("a")): [event("1" * 40, 5), event("2" * 40, 9), event("3" * 40, 7)],
        Asset("s3://other/asset"): [event("f" * 40, 3)],
    }
    assert pushed_commits(events) == {"a": "2" * 40, "b": "b" * 40}
    trigger = trigger_of(SimpleNamespace(run_type="asset_triggered"), events)
    assert (trigger.kind, trigger.by) == ("push", "ada, bob")
    assert trigger.detail == "a@22222222 improve; b@bbbbbbbb improve"


@pytest.mark.parametrize(
    ("run_type", "kind"),
    [("manual", "manual"), ("scheduled", "schedule"), ("asset_triggered", "asset"), ("backfill", "schedule")],
)
def test_other_triggers(run_type: str, kind: str) -> None:
    trigger = trigger_of(SimpleNamespace(run_type=run_type, triggering_user_name="admin"), None)
    assert (trigger.kind, trigger.by) == (kind, "admin")


def test_what_a_push_pins_is_as_old_as_its_event() -> None:
    """Runs of two pushes keep their order, whichever comes to pin its commits first."""
    due = datetime.now(UTC) - timedelta(minutes=5)
    assert pinned_at(SimpleNamespace(run_type="asset_triggered", run_after=due)) == due
    before = datetime.now(UTC)
    for run_type in ("manual", "scheduled", "backfill"):
        assert before <= pinned_at(SimpleNamespace(run_type=run_type, run_after=due)) <= datetime.now(UTC)


def test_a_runs_note_has_the_build_of_each_commit() -> None:
    plan = make_plan(code={"r": {"repo": "r", "commit": SHA, "message": "improve", "author": "a"}})
    image = ImageRef(name="h:1/airloom/r", tag=SHA, digest=f"sha256:{'d' * 64}", pushed=True, runtime="e" * 64)
    record = BuildRecord(
        repo="r",
        commit=SHA,
        message="improve",
        author="a",
        environment="e" * 64,
        stages={},
        image=image,
        built_at=datetime(2026, 11, 21, tzinfo=UTC),
        seconds=4.56,
        url="http://jenkins/job/r/7/console",
    )
    lines = plan_note(plan, {"r": record}).splitlines()
    at = lines.index(f"r@{SHA[:8]} improve")
    assert lines[at + 1 : at + 3] == [
        f"    built in 4.6 s: {image.digest}",
        "    http://jenkins/job/r/7/console",
    ]
    page = RunPage("digits", "one", "success", {"resolve": plan.model_dump(mode="json")}, (), builds={"r": record})
    html = _run_page(page)
    assert '<a href="http://jenkins/job/r/7/console">built</a> in 4.6 s' in html
    assert f"<code>{image.pull_ref}</code>" in html
    without = record.model_copy(update={"image": None, "url": ""})
    assert plan_note(plan, {"r": without}).splitlines()[at + 1 :] == ["    built in 4.6 s"]


def test_the_page_of_a_run_that_a_later_one_has_overtaken() -> None:
    results = {
        "release": {"version": "1.0.5", "model_name": "digits", "model_version": "7"},
        "deploy": {"state": "superseded", "detail": "release 1.0.6 answers, whose run was pinned later"},
        "verify": {"equal": 0, "checked": 0, "superseded_by": "1.0.6", "sample_prediction_ids": []},
    }
    html = _run_page(RunPage("digits", "one", "success", results, ()))
    assert '<span class="badge superseded">superseded</span> release 1.0.6 answers' in html
    assert "no: release 1.0.6 of a later run answers" in html
    results["verify"] = {"equal": 5, "checked": 5, "superseded_by": None, "sample_prediction_ids": []}
    assert "5 of 5 answers equal the evaluation" in _run_page(RunPage("digits", "one", "success", results, ()))


def _run_page(page: RunPage) -> str:
    templates = Environment(loader=PackageLoader("airloom.airflow_pages"), autoescape=True)
    templates.filters |= {"short": str, "figure": str}
    return templates.get_template("run.html").render(airflow_url="", run=page, run_part="one")


def test_notes_are_short_and_never_fail() -> None:
    plan = make_plan(code={"r": {"repo": "r", "commit": SHA, "message": "x" * 500, "author": "a"}})
    assert max(len(line) for line in plan_note(plan, {}).splitlines()) < 120
    assert decision_note(make_decision(Verdict.REJECTED)).splitlines()[1].startswith("accuracy is 0.02 worse")

    class Broken:
        @property
        def airflow(self) -> Any:
            raise UnavailableError("Airflow does not answer")

    notes.note_run(Broken(), {"dag": SimpleNamespace(dag_id="d"), "run_id": "r"}, "text")  # type: ignore[arg-type]
