"""The durable DockerOperator under the real scheduler."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest
from docker.errors import APIError

from airloom.embedded.airflow_server import services
from airloom.embedded.provision import connections
from airloom.hooks.airflow_api import AirflowApi
from airloom.hooks.connect import Hooks
from airloom.hooks.docker_engine import connect
from airloom.settings import Settings
from tests.conftest import make_settings
from tests.fixtures.airflow import kill_worker, logs_of_tries, make_project, until
from tests.fixtures.image_registry import ImageRegistry
from tests.fixtures.services import running
from tests.fixtures.stage_image import BASE
from tests.fixtures.tiny_image import COMMAND, SAYS, pushed_image

pytestmark = pytest.mark.timeout(1500)

DAG_ID, PULLED_ID = "own_dag", "own_pulled_dag"
DAG = f"""
from datetime import UTC, datetime, timedelta
from airflow.sdk import DAG
from airloom.operators.stage_docker import StageDockerOperator

with DAG("{DAG_ID}", schedule=None, start_date=datetime(2024, 1, 1, tzinfo=UTC), catchup=False,
         params={{"program": "pass"}}):
    StageDockerOperator(
        task_id="work", image="{BASE}", command=["python3", "-u", "-c", "{{{{ params.program }}}}"],
        network_mode="none", private_environment={{"TOKEN": "do-not-tell"}}, mem_limit="128MiB",
        result_path="/airloom/result.json", retries=3, retry_delay=timedelta(seconds=1),
    )

with DAG("{PULLED_ID}", schedule=None, start_date=datetime(2024, 1, 1, tzinfo=UTC), catchup=False,
         params={{"image": "none"}}):
    StageDockerOperator(
        task_id="work", image="{{{{ params.image }}}}", command={COMMAND}, init=False, network_mode="none",
        docker_conn_id="airloom_registry", retries=3, retry_delay=timedelta(seconds=1),
    )
"""
RESULT = "import json; json.dump({'lines': 3}, open('/airloom/result.json', 'w'))"


class Own:
    """The DAG, and its containers."""

    def __init__(self, settings: Settings) -> None:
        self.api = AirflowApi.from_settings(settings)
        self.engine = connect(settings)
        self.label = f"airloom.instance={settings.instance_id}"

    def start(self, *program: str) -> str:
        return self.trigger(DAG_ID, program="\n".join(program))

    def trigger(self, dag_id: str, **params: str) -> str:
        until(lambda: any(dag["dag_id"] == dag_id for dag in self.api.dags()), seconds=240, what=self.api.import_errors)
        return self.api.trigger(dag_id, params)

    def wait(self, run_id: str, dag_id: str = DAG_ID) -> str:
        return str(self.api.wait(dag_id, run_id, timeout_seconds=600, poll_seconds=0.3)["state"])

    def task(self, run_id: str) -> dict[str, Any]:
        (found,) = self.api.task_instances(DAG_ID, run_id)
        return found

    def logs(self, run_id: str, dag_id: str = DAG_ID) -> list[str]:
        return logs_of_tries(self.api, dag_id, run_id, "work")

    def containers(self, run_id: str, *, ended: bool = True) -> list[str]:
        """Those that run, and those that have ended too unless told otherwise."""
        wanted = [self.label, f"airloom.run={run_id}"]
        return [str(found["Id"]) for found in self.engine.containers(all=ended, filters={"label": wanted})]

    def running(self, run_id: str) -> str:
        """The container, once its program has written something."""

        def found() -> str | None:
            with suppress(APIError):
                for container in self.containers(run_id):
                    if b"ready" in self.engine.logs(container):
                        return container
            return None

        return until(found, seconds=300, what=lambda: ["no container", *self.logs(run_id)])


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Own]:
    root = tmp_path_factory.mktemp("own")
    project = make_project(root / "project")
    for file in (project / "dags" / "configs").glob("*.yaml"):
        file.unlink()
    (project / "dags" / "trivial.py").unlink()
    (project / "dags" / "own_dag.py").write_text(DAG)
    settings = make_settings(root / "home", project=project)
    with ExitStack() as stack:
        for service in services(settings):
            stack.enter_context(running(service, root / "logs"))
        found = Own(settings)
        yield found
        for container in found.engine.containers(all=True, filters={"label": found.label}):
            found.engine.remove_container(container["Id"], force=True)


def test_result_log_and_image_are_seen(own: Own) -> None:
    run_id = own.start("import os; print('the token is', os.environ['TOKEN'])", RESULT)
    assert own.wait(run_id) == "success", own.logs(run_id)
    assert own.api.xcom(DAG_ID, run_id, "work") == {"lines": 3}
    assert own.api.xcom(DAG_ID, run_id, "work", "image_digest") == own.engine.inspect_image(BASE)["Id"]
    logs = own.logs(run_id)
    assert "the token is ***" in logs[-1]
    assert not [log for log in logs if "do-not-tell" in log]
    assert own.containers(run_id) == []


def test_killed_worker_then_adoption(own: Own) -> None:
    """SIGKILL to the task's process and to the one that watches it; Airflow finds out by the lost heartbeat."""
    run_id = own.start(
        "import os, time", "print('ready')", "while not os.path.exists('/tmp/go'): time.sleep(0.1)", RESULT
    )
    container = own.running(run_id)
    killed = own.task(run_id)
    kill_worker(killed)
    until(lambda: own.task(run_id)["try_number"] > killed["try_number"], seconds=300, what=lambda: own.task(run_id))
    until(
        lambda: any(f"adopting container {container[:12]}" in log for log in own.logs(run_id)),
        seconds=300,
        what=lambda: own.logs(run_id),
    )
    own.engine.exec_start(own.engine.exec_create(container, ["touch", "/tmp/go"])["Id"])
    assert own.wait(run_id) == "success", own.logs(run_id)
    assert own.api.xcom(DAG_ID, run_id, "work") == {"lines": 3}
    assert own.containers(run_id) == []


def test_a_run_that_is_marked_as_failed_stops_its_container(own: Own) -> None:
    """Even a program that does not mind SIGTERM."""
    run_id = own.start(
        "import signal, time", "signal.signal(signal.SIGTERM, signal.SIG_IGN)", "print('ready')", "time.sleep(600)"
    )
    own.running(run_id)
    own.api.mark(DAG_ID, run_id, "failed")
    until(lambda: own.containers(run_id, ended=False) == [], seconds=180, what=lambda: own.logs(run_id))
    # A task that Airflow kills before it has removed its container leaves that to the reconciler's DAG, which runs
    # every 5 minutes.
    until(lambda: own.containers(run_id) == [], seconds=420, what=lambda: own.logs(run_id))
    assert own.wait(run_id) == "failed"


def test_an_image_is_pulled_with_the_login_of_a_connection(
    own: Own, login_registry: ImageRegistry, login_settings: Settings
) -> None:
    """The one that the platform makes."""
    registry = login_settings.model_copy(update={"registry": login_registry.host})
    name = "airloom_registry"
    with pushed_image(own.engine, login_registry, login_settings, "test-connection") as image:
        refused = own.trigger(PULLED_ID, image=image)
        assert own.wait(refused, PULLED_ID) == "failed"
        assert "the connection 'airloom_registry' is not in Airflow" in own.logs(refused, PULLED_ID)[-1]
        own.api.ensure_connection(name, connections(Hooks(registry))[name])
        run_id = own.trigger(PULLED_ID, image=image)
        assert own.wait(run_id, PULLED_ID) == "success", own.logs(run_id, PULLED_ID)
        assert own.api.xcom(PULLED_ID, run_id, "work").startswith(SAYS)
        assert own.api.xcom(PULLED_ID, run_id, "work", "image_digest") == image


def test_what_cannot_be_helped_is_not_tried_again(own: Own) -> None:
    # The engine hears of the kill and of the container's end apart; of the kill only where that comes well before.
    run_id = own.start(
        "import subprocess, sys, time",
        "subprocess.run([sys.executable, '-c', 'held = bytearray(b\"x\") * (300 * 2**20)'])",
        "time.sleep(15)",
    )
    assert own.wait(run_id) == "failed"
    said = "more memory than its limit of 128 MiB"
    for_good = f"AirflowFailException: the container needed {said}"
    *earlier, last = own.logs(run_id)
    assert for_good in last
    # Airflow tries again where it could not be told of such an end. No other kind of end may have asked for that.
    assert not [log for log in earlier if said in log and for_good not in log], earlier
    assert own.containers(run_id) == []
