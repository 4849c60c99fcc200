"""A stage task under the real scheduler: what people see, and what kills do."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from airloom.contract import Runner, RunPlan, SourcePin, Stage
from airloom.embedded.airflow_server import services
from airloom.flows.reap import reap
from airloom.flows.stages import workspace_of
from airloom.hooks.airflow_api import AirflowApi
from airloom.hooks.object_store import ObjectStore
from airloom.hooks.process_runner import ProcessRunner
from airloom.hooks.runner import JobHandle
from tests.conftest import make_settings
from tests.fixtures.airflow import RunningAirflow, logs_of_tries, make_project, until
from tests.fixtures.plans import make_plan, make_spec
from tests.fixtures.services import running
from tests.fixtures.stage_repo import processes_of, write_stage_repo

pytestmark = pytest.mark.timeout(1200)

PIPELINE = "staged"
BRIEF = "staged_briefly"  # the same, but that its stage may last 20 s only
DAG = """
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from airflow.sdk import DAG, BaseOperator
from airloom.contract.enums import Stage
from airloom.operators.stage import StageOperator


class Resolve(BaseOperator):
    def execute(self, context):
        plan = json.loads(Path(__file__).with_name("plan.json").read_text())
        plan["pipeline"], plan["run_id"] = context["dag"].dag_id, context["run_id"]
        plan["stages"]["preprocess"]["params"] = context["params"]["stage"]
        return plan


for dag_id, seconds in (("staged", 120), ("staged_briefly", 20)):
    with DAG(dag_id, schedule=None, start_date=datetime(2024, 1, 1, tzinfo=UTC), catchup=False, tags={"airloom"},
             params={"stage": {}}):
        stage = StageOperator(task_id="preprocess", stage=Stage.PREPROCESS, retries=2,
                              retry_delay=timedelta(seconds=1), execution_timeout=timedelta(seconds=seconds))
        Resolve(task_id="resolve") >> stage
"""


class Staged:
    """A DAG, and the processes of its stage."""

    def __init__(self, airflow: RunningAirflow, pipeline: str) -> None:
        self.api = airflow.api
        self.settings = airflow.settings
        self.pipeline = pipeline

    def start(self, do: str, **params: Any) -> str:
        until(
            lambda: any(dag["dag_id"] == self.pipeline for dag in self.api.dags()),
            seconds=240,
            what=self.api.import_errors,
        )
        return self.api.trigger(self.pipeline, {"stage": {"do": do, **params}})

    def wait(self, run_id: str, seconds: float = 400) -> str:
        return str(self.api.wait(self.pipeline, run_id, timeout_seconds=seconds, poll_seconds=0.3)["state"])

    def task(self, run_id: str) -> dict[str, Any]:
        return self.api.task_instance(self.pipeline, run_id, "preprocess")

    def running(self, run_id: str) -> JobHandle:
        """The job, once the stage has written something."""
        workspace = workspace_of(self.settings, self.pipeline, run_id, Stage.PREPROCESS)
        log = workspace / "log.txt"
        until(lambda: log.exists() and log.stat().st_size > 0, seconds=240, what="the stage does not run")
        handle = ProcessRunner().find(workspace)
        assert handle is not None
        return handle

    def logs(self, run_id: str, after: int = 0) -> list[str]:
        return logs_of_tries(self.api, self.pipeline, run_id, "preprocess", after)

    def wait_for_try(self, run_id: str, after: int) -> None:
        """A try later than that one."""
        until(
            lambda: self.task(run_id)["try_number"] > after,
            seconds=300,
            what=lambda: ["no later try", self.task(run_id), *self.logs(run_id)],
        )


@pytest.fixture(scope="module")
def airflow(tmp_path_factory: pytest.TempPathFactory, s3_store: ObjectStore) -> Iterator[RunningAirflow]:
    root = tmp_path_factory.mktemp("staged")
    project = make_project(root / "project")
    settings = make_settings(root / "home", project=project, s3_url=s3_store.endpoint_url)
    digits = (project / "dags" / "configs" / "digits.yaml").read_text()
    for name in ("digits", "trivial"):
        (project / "dags" / "configs" / f"{name}.yaml").unlink()
    (project / "dags" / "configs" / f"{PIPELINE}.yaml").write_text(digits)  # of another name: it gives no DAG
    (project / "dags" / "staged.py").write_text(DAG)
    (project / "dags" / "plan.json").write_text(_plan(s3_store).model_dump_json())
    checkout = write_stage_repo(settings.checkouts_dir / "de_data" / ("a" * 40))
    checkout.with_name(f".{checkout.name}.checked").touch()
    with ExitStack() as stack:
        for service in services(settings):
            stack.enter_context(running(service, root / "logs"))
        yield RunningAirflow(settings, AirflowApi.from_settings(settings))
    reap(settings, is_live=lambda pipeline, run_id: False)


@pytest.fixture
def staged(airflow: RunningAirflow) -> Staged:
    return Staged(airflow, PIPELINE)


def _plan(store: ObjectStore) -> RunPlan:
    store.put_bytes("airloom", f"runs/{PIPELINE}/manifest.jsonl", b"{}\n")
    source = SourcePin(
        uri="s3://raw/staged/",
        manifest=f"s3://airloom/runs/{PIPELINE}/manifest.jsonl",
        digest="f" * 64,
        objects=1,
        size_bytes=1,
    )
    return make_plan("replaced", make_spec(name=PIPELINE), source=source, runner=Runner.PROCESS)


def test_success_is_seen_everywhere(staged: Staged) -> None:
    run_id = staged.start("lines", lines=3)
    assert staged.wait(run_id) == "success"
    outcome = staged.api.xcom(PIPELINE, run_id, "preprocess")
    assert (outcome["stage"], outcome["cache"], outcome["result"]["status"]) == ("preprocess", "miss", "ok")
    assert staged.api.xcom(PIPELINE, run_id, "preprocess", "cache")["reason"] == "first run of this stage"
    assert staged.task(run_id)["note"].startswith("cache miss: first run of this stage; ran ")
    log = staged.logs(run_id)[-1]
    assert "line 0" in log
    assert "line 2" in log


def test_what_cannot_be_helped_is_not_tried_again(staged: Staged) -> None:
    run_id = staged.start("bad_data")
    assert staged.wait(run_id) == "failed"
    said = "stage preprocess failed: no pictures; put some into raw/"
    assert said in staged.task(run_id)["note"]
    for_good = f"AirflowFailException: {said}"
    *earlier, last = staged.logs(run_id)
    assert for_good in last
    # Airflow tries again where it could not be told of such an end. No other kind of end may have asked for that.
    assert not [log for log in earlier if said in log and for_good not in log], earlier


def test_killed_worker_then_adoption(staged: Staged, tmp_path: Path) -> None:
    """SIGKILL to the task's process and to the one that watches it; Airflow finds out by the lost heartbeat."""
    go, count = tmp_path / "go", tmp_path / "count"
    run_id = staged.start("wait_for_file", file=str(go), count=str(count))
    handle = staged.running(run_id)
    killed = staged.task(run_id)["try_number"]
    task = psutil.Process(handle.pid).parent()
    assert task is not None
    worker = task.parent()
    assert worker is not None
    for process in (worker, task):
        process.send_signal(signal.SIGKILL)
    staged.wait_for_try(run_id, killed)
    until(
        lambda: any("adopting process" in log for log in staged.logs(run_id, killed)),
        seconds=300,
        what=lambda: ["not adopted", *staged.logs(run_id)],
    )
    assert psutil.pid_exists(handle.pid)
    go.touch()
    assert staged.wait(run_id) == "success"
    assert count.read_text() == "ran\n"
    assert any("found" in log for log in staged.logs(run_id, killed))


def test_a_task_whose_worker_has_to_go_leaves_its_stage(staged: Staged, tmp_path: Path) -> None:
    """SIGTERM while Airflow still wants the task, as after lost heartbeats."""
    go, count = tmp_path / "go", tmp_path / "count"
    run_id = staged.start("wait_for_file", file=str(go), count=str(count))
    handle = staged.running(run_id)
    killed = staged.task(run_id)["try_number"]
    task = psutil.Process(handle.pid).parent()
    assert task is not None
    os.kill(task.pid, signal.SIGTERM)
    staged.wait_for_try(run_id, killed)
    go.touch()
    assert staged.wait(run_id) == "success"
    assert count.read_text() == "ran\n"


def test_a_run_that_is_marked_as_failed_stops_its_stage(staged: Staged) -> None:
    run_id = staged.start("family")
    handle = staged.running(run_id)
    staged.api.mark(PIPELINE, run_id, "failed")
    until(lambda: not processes_of(handle.id), seconds=180, what="the stage still runs")
    assert staged.wait(run_id) == "failed"


def test_a_timeout_of_the_task_stops_the_stage(airflow: RunningAirflow) -> None:
    staged = Staged(airflow, BRIEF)
    run_id = staged.start("family")
    handle = staged.running(run_id)
    staged.wait_for_try(run_id, staged.task(run_id)["try_number"])
    until(lambda: not processes_of(handle.id), seconds=180, what="the stage still runs")
    staged.api.mark(BRIEF, run_id, "failed")
    assert staged.wait(run_id) == "failed"
