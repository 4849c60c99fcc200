"""The four components of Airflow with Airloom's plugin, for real."""

from __future__ import annotations

import sqlite3
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import requests

from airloom.contract.assets import stage_asset
from airloom.embedded.airflow_server import airflow_home
from airloom.errors import AuthError, ConfigError, NotFoundError, UnavailableError
from airloom.hooks.airflow_api import AirflowApi
from airloom.hooks.ledger import Ledger, TaskOutcome
from tests.fixtures.airflow import RunningAirflow, until

pytestmark = pytest.mark.timeout(1200)


def page(airflow: RunningAirflow, path: str, *, token: str | None = None, accept: str = "*/*") -> requests.Response:
    headers = {"Accept": accept, **({"Authorization": f"Bearer {token}"} if token else {})}
    url = f"{airflow.api.url}{path}"
    return requests.get(url, headers=headers, allow_redirects=False, timeout=60)


def token_of(airflow: RunningAirflow) -> str:
    body = {"username": "admin", "password": airflow.settings.secret("admin_password")}
    return str(requests.post(f"{airflow.api.url}/auth/token", json=body, timeout=60).json()["access_token"])


def run_trivial(airflow: RunningAirflow, conf: Mapping[str, Any] | None = None) -> tuple[str, str]:
    """Run the trivial DAG; return the run's id and state."""
    until(
        lambda: any(dag["dag_id"] == "trivial" for dag in airflow.api.dags()),
        seconds=240,
        what=lambda: ["trivial is not parsed", *airflow.api.import_errors()],
    )
    run_id = airflow.api.trigger("trivial", conf)
    return run_id, airflow.api.wait("trivial", run_id, timeout_seconds=400, poll_seconds=0.3)["state"]


def test_all_components_are_healthy(airflow: RunningAirflow) -> None:
    # A heartbeat may come late where others use the machine, and counts as none until the next one.
    until(airflow.api.healthy, seconds=120, what=airflow.api.health)
    wanted = dict.fromkeys(("metadatabase", "scheduler", "triggerer", "dag_processor"), "healthy")

    def states() -> dict[str, str]:
        return {name: part["status"] for name, part in airflow.api.health().items()}

    assert until(lambda: states() == wanted, seconds=120, what=states)


def test_secrets_are_private(airflow: RunningAirflow) -> None:
    home = airflow_home(airflow.settings)
    assert stat.S_IMODE((home / "passwords.json").stat().st_mode) == 0o600
    assert stat.S_IMODE(home.stat().st_mode) == 0o700


def tries_of(ledger: Ledger, run_id: str, tasks: int) -> list[TaskOutcome]:
    """All tries of so many tasks that have run: a listener is told of a try's end a moment after Airflow is."""

    def ended() -> list[TaskOutcome] | None:
        tries = ledger.tasks("trivial", run_id)
        over = len({found.task for found in tries}) == tasks and all(found.state != "running" for found in tries)
        return tries if over else None

    return until(ended, seconds=120, what=lambda: f"what the ledger has: {ledger.tasks('trivial', run_id)}")


def test_a_run_is_in_the_ledger_the_metrics_and_on_its_page(airflow: RunningAirflow) -> None:
    run_id, state = run_trivial(airflow)
    assert state == "success"
    ledger = Ledger.from_settings(airflow.settings)
    tries = {found.task: found for found in tries_of(ledger, run_id, 2)}  # the last one of each task
    assert list(tries) == ["train", "gate"]
    train, gate = tries.values()
    assert (train.state, train.cache, train.values["loss"]) == ("success", "miss", 0.25)
    assert gate.values["champion.accuracy"] == 0.95

    def ended() -> bool:
        run = ledger.run("trivial", run_id)
        return run is not None and (run.state, run.verdict) == ("success", "promoted") and run.finished_at is not None

    until(ended, seconds=120, what=lambda: f"what the ledger has of the run: {ledger.run('trivial', run_id)}")

    text = page(airflow, "/airloom/metrics").text
    assert 'airloom_gate_metric{metric="accuracy",model="candidate",pipeline="trivial"} 0.97' in text

    token = token_of(airflow)
    html = page(airflow, f"/airloom/runs/trivial/{requests.utils.quote(run_id, safe='')}", token=token)
    assert html.status_code == 200
    assert "accuracy 0.97 is at least 0.9" in html.text
    assert "nothing equal ran before" in html.text
    assert run_id in html.text
    assert "default-src 'none'" in html.headers["Content-Security-Policy"]
    start = page(airflow, "/airloom/", token=token).text
    assert run_id.split("+")[0] in start
    assert 'href="/airloom/receipts"' in start
    receipts = page(airflow, "/airloom/receipts", token=token)
    assert receipts.status_code == 200
    assert "Nothing has been asked yet." in receipts.text.partition("Latest of trivial")[2]
    found = page(airflow, "/airloom/receipts?id=%20some-id", token=token)
    assert (found.status_code, found.headers["location"]) == (302, "/airloom/receipts/some-id")


def test_a_failure_is_in_the_ledger_with_its_reason(airflow: RunningAirflow) -> None:
    run_id, state = run_trivial(airflow, {"fail": True})
    assert state == "failed"
    tries = tries_of(Ledger.from_settings(airflow.settings), run_id, 1)
    assert {(found.task, found.state) for found in tries} == {("train", "failed")}, tries
    # One of them may have failed for a reason of Airflow's own.
    asked = [found.attempt for found in tries if found.reason == "ValueError: asked to fail"]
    assert asked, tries
    assert any("asked to fail" in line for line in airflow.api.task_log("trivial", run_id, "train", asked[0]))


def test_pages_need_the_login_and_metrics_do_not(airflow: RunningAirflow) -> None:
    for path in ("/airloom/", "/airloom/runs/trivial/some-run", "/airloom/receipts/some-id"):
        assert page(airflow, path).status_code == 401, path
        sent_to = page(airflow, path, accept="text/html")
        assert sent_to.status_code == 302
        assert "/auth/login" in sent_to.headers["location"]
    assert page(airflow, "/airloom/metrics").status_code == 200


def test_pages_of_what_does_not_exist(airflow: RunningAirflow) -> None:
    token = token_of(airflow)
    missing = page(airflow, "/airloom/runs/trivial/%3Cscript%3Ealert(1)%3C%2Fscript%3E", token=token)
    assert missing.status_code == 404
    assert "<script>" not in missing.text
    assert "&lt;script&gt;" in missing.text


def test_a_push_starts_what_is_built_from_the_repo(airflow: RunningAirflow) -> None:
    name = stage_asset("some_repo")
    until(lambda: any(asset["name"] == name for asset in airflow.api.assets()), seconds=240, what="no asset")
    before = {run["dag_run_id"] for run in airflow.api.runs("trivial")}
    airflow.api.create_asset_event(name, {"repo": "some_repo", "commit": "0" * 40, "pusher": "ada"})
    run = until(
        lambda: next((r for r in airflow.api.runs("trivial") if r["dag_run_id"] not in before), None),
        seconds=120,
        what="the event started nothing",
    )
    assert run["run_type"] == "asset_triggered"
    assert airflow.api.wait("trivial", run["dag_run_id"], timeout_seconds=400)["state"] == "success"
    (event,) = airflow.api.asset_events(name, since=datetime.now(UTC) - timedelta(hours=1), limit=1)
    assert (event["extra"]["commit"], event["extra"]["pusher"]) == ("0" * 40, "ada")
    assert [(made["dag_id"], made["run_id"]) for made in event["created_dagruns"]] == [("trivial", run["dag_run_id"])]
    assert airflow.api.asset_events(name, since=datetime.now(UTC) + timedelta(hours=1)) == []
    with pytest.raises(NotFoundError, match="no asset"):
        airflow.api.create_asset_event(stage_asset("unheard_of"), {})
    with pytest.raises(NotFoundError, match="no asset"):
        airflow.api.asset_events(stage_asset("unheard_of"))


def test_of_quick_pushes_the_last_one_starts_a_run(airflow: RunningAirflow) -> None:
    """Airflow's note that a run is due keeps the first event's time, and its run takes no later one."""
    name = stage_asset("some_repo")
    until(lambda: any(asset["name"] == name for asset in airflow.api.assets()), seconds=240, what="no asset")
    for quick in range(3):
        pushes = [f"{quick}{number}" * 20 for number in range(4)]
        for commit in pushes:
            airflow.api.create_asset_event(name, {"repo": "some_repo", "commit": commit})

        def runs_of(commits: list[str] = pushes) -> dict[str, set[str]]:
            made: dict[str, set[str]] = {commit: set() for commit in commits}
            for event in airflow.api.asset_events(name, limit=8):
                made.get(event["extra"]["commit"], set()).update(run["run_id"] for run in event["created_dagruns"])
            return made

        runs = until(lambda: all(runs_of().values()) and runs_of(), seconds=120, what=runs_of)
        assert list(runs) == pushes
        for run_id in runs[pushes[-1]]:
            assert airflow.api.wait("trivial", run_id, timeout_seconds=400)["state"] == "success"


def test_many_changes_at_once_are_all_made(airflow: RunningAirflow) -> None:
    """None is refused because others hold the database, and nobody waits until it gives up."""
    run_id, _ = run_trivial(airflow)
    impatient = AirflowApi.from_settings(airflow.settings, patience_seconds=0)
    tasks = [task["task_id"] for task in impatient.task_instances("trivial", run_id)]

    def note(number: int) -> None:
        for again in range(10):
            impatient.set_task_note("trivial", run_id, tasks[number % len(tasks)], f"note {again}")

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(note, range(8)))
    assert {task["note"] for task in airflow.api.task_instances("trivial", run_id)} == {"note 9"}


def test_all_events_are_found_newest_first(airflow: RunningAirflow, monkeypatch: pytest.MonkeyPatch) -> None:
    name = stage_asset("ds_modelserving")  # of the pipeline digits, whose runs would fail here
    until(lambda: any(asset["name"] == name for asset in airflow.api.assets()), seconds=240, what="no asset")
    airflow.api.pause("digits")
    try:
        monkeypatch.setattr("airloom.hooks.airflow_api._PAGE", 2)
        for number in range(5):
            airflow.api.create_asset_event(name, {"commit": str(number)})
        found = [event["extra"]["commit"] for event in airflow.api.asset_events(name)]
        assert found == ["4", "3", "2", "1", "0"]
        assert [event["extra"]["commit"] for event in airflow.api.asset_events(name, limit=3)] == ["4", "3", "2"]
    finally:
        airflow.api.unpause("digits")


def test_the_reconciler_is_there_and_waits_for_its_time(airflow: RunningAirflow) -> None:
    found = until(
        lambda: next((dag for dag in airflow.api.dags() if dag["dag_id"] == "airloom__reconcile"), None),
        seconds=240,
        what="no reconciler",
    )
    assert not found["is_paused"]
    assert found["timetable_summary"] == "*/5 * * * *"
    first = datetime.fromisoformat(found["next_dagrun_run_after"])
    assert all(datetime.fromisoformat(run["run_after"]) <= first for run in airflow.api.runs("airloom__reconcile"))
    assert first.minute % 5 == 0


def test_notes_xcoms_and_marks(airflow: RunningAirflow) -> None:
    run_id, _ = run_trivial(airflow)
    airflow.api.set_run_note("trivial", run_id, "pushed by ada\n" + "x" * 2000)
    airflow.api.set_task_note("trivial", run_id, "gate", "promoted")
    assert airflow.api.run("trivial", run_id)["note"].startswith("pushed by ada")
    notes = {task["task_id"]: task["note"] for task in airflow.api.task_instances("trivial", run_id)}
    assert notes["gate"] == "promoted"
    gate = airflow.api.task_instance("trivial", run_id, "gate")
    assert (gate["task_id"], gate["state"], gate["note"]) == ("gate", "success", "promoted")
    for missing in (("no_such_task", -1), ("gate", 0)):
        with pytest.raises(NotFoundError):
            airflow.api.task_instance("trivial", run_id, *missing)
    assert airflow.api.xcom("trivial", run_id, "gate")["verdict"] == "promoted"
    with pytest.raises(NotFoundError):
        airflow.api.xcom("trivial", run_id, "no_such_task")
    airflow.api.mark("trivial", run_id, "failed")
    assert airflow.api.run("trivial", run_id)["state"] == "failed"


def test_invalid_yamls_are_import_errors_and_the_others_stay(airflow: RunningAirflow) -> None:
    """`trivial.yaml` of the fixture's project has a name that is not its file's."""

    def shown() -> dict[str, Any] | None:
        found = airflow.api.import_errors()
        return next((e for e in found if e["filename"] == "check_configs.py"), None)

    error = until(shown, seconds=240, what="the wrong YAML is not shown")
    assert "trivial.yaml:3: name: 'wrong_name' differs from the file's name" in error["stack_trace"]
    digits = until(
        lambda: next((dag for dag in airflow.api.dags() if dag["dag_id"] == "digits"), None),
        seconds=240,
        what="the valid pipeline is not there",
    )
    assert not digits["has_import_errors"]
    assert not digits["is_stale"]

    configs = airflow.settings.configs_dir
    second = configs / "second.yaml"
    second.write_text((configs / "digits.yaml").read_text().replace("name: digits", "name: second"))
    try:
        until(
            lambda: any(dag["dag_id"] == "second" for dag in airflow.api.dags()),
            seconds=240,
            what=lambda: ["a new YAML is not seen", *airflow.api.import_errors()],
        )
    finally:
        second.unlink()


def test_parameters_are_checked_before_the_run(airflow: RunningAirflow) -> None:
    until(lambda: any(dag["dag_id"] == "digits" for dag in airflow.api.dags()), seconds=240, what="no pipeline")
    with pytest.raises(ConfigError, match="force"):
        airflow.api.trigger("digits", {"force": "certainly"})
    with pytest.raises(NotFoundError):
        airflow.api.trigger("no_such_pipeline")


def test_a_busy_database_loses_no_run_and_doubles_none(airflow: RunningAirflow) -> None:
    """Whoever holds the database for longer than SQLite's own patience delays a run; that is all."""
    run_trivial(airflow)
    before = {run["dag_run_id"] for run in airflow.api.runs("trivial", limit=100)}
    path = airflow_home(airflow.settings) / "airflow.db"
    with closing(sqlite3.connect(path, timeout=60, isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(airflow.api.trigger, "trivial")
            with pytest.raises(TimeoutError):
                asked.result(7)
            database.execute("ROLLBACK")
            run_id = asked.result(120)
    assert {run["dag_run_id"] for run in airflow.api.runs("trivial", limit=100)} - before == {run_id}
    assert airflow.api.wait("trivial", run_id, timeout_seconds=400)["state"] == "success"


def test_a_run_that_was_made_is_not_made_again(airflow: RunningAirflow, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is lost, not the run."""
    run_trivial(airflow)
    before = {run["dag_run_id"] for run in airflow.api.runs("trivial", limit=100)}
    send, lost = requests.Session.request, []

    def losing(self: requests.Session, method: str, url: str, **kwargs: Any) -> requests.Response:
        answer = send(self, method, url, **kwargs)
        if method == "POST" and url.endswith("/dagRuns") and not lost:
            lost.append(answer)
            raise requests.ConnectionError("the answer is lost")
        return answer

    monkeypatch.setattr(requests.Session, "request", losing)
    run_id = airflow.api.trigger("trivial")
    assert len(lost) == 1
    assert {run["dag_run_id"] for run in airflow.api.runs("trivial", limit=100)} - before == {run_id}


def test_errors_name_the_cause(airflow: RunningAirflow) -> None:
    url = airflow.api.url
    wrong = AirflowApi(url=url, username="admin", password="wrong", patience_seconds=0)
    with pytest.raises(AuthError, match="401"):
        wrong.dags()
    nobody = AirflowApi(url="http://127.0.0.1:9", username="admin", password="x", patience_seconds=0)
    with pytest.raises(UnavailableError, match="does not answer"):
        nobody.dags()
    assert not nobody.healthy()


@pytest.mark.parametrize("broken", ["not.a.token", ""])
def test_a_token_that_is_refused_is_renewed(airflow: RunningAirflow, broken: str) -> None:
    api = AirflowApi.from_settings(airflow.settings)
    api.dags()
    api._token = broken
    assert api.dags()
    assert api._token != broken
