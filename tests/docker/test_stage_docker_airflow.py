"""The durable DockerOperator under the real scheduler."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import psutil
import pytest
from docker.errors import APIError

from airloom.embedded.airflow_server import services
from airloom.embedded.provision import connections
from airloom.hooks.airflow_api import AirflowApi
from airloom.hooks.connect import Hooks
from airloom.hooks.docker_engine import connect
from airloom.settings import Settings
from tests.conftest import make_settings
from tests.e2e.test_kills import command_of, is_worker
from tests.fixtures.airflow import make_project, until
from tests.fixtures.image_registry import ImageRegistry
from tests.fixtures.services import running
from tests.fixtures.stage_image import BASE
from tests.fixtures.tiny_image import COMMAND, SAYS, pushed_image

pytestmark = pytest.mark.timeout(400)

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
        result_path="/airloom/result.json", retries=1, retry_delay=timedelta(seconds=1),
    )

with DAG("{PULLED_ID}", schedule=None, start_date=datetime(2024, 1, 1, tzinfo=UTC), catchup=False,
         params={{"image": "none"}}):
    StageDockerOperator(
        task_id="work", image="{{{{ params.image }}}}", command={COMMAND}, init=False, network_mode="none",
        docker_conn_id="airloom_registry",
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
        until(lambda: any(dag["dag_id"] == dag_id for dag in self.api.dags()), seconds=60, what="not parsed")
        return self.api.trigger(dag_id, params)

    def wait(self, run_id: str, dag_id: str = DAG_ID) -> str:
        return str(self.api.wait(dag_id, run_id, timeout_seconds=150, poll_seconds=0.3)["state"])

    def task(self, run_id: str) -> dict[str, Any]:
        (found,) = self.api.task_instances(DAG_ID, run_id)
        return found

    def log(self, run_id: str, try_number: int) -> str:
        return "\n".join(self.api.task_log(DAG_ID, run_id, "work", try_number))

    def containers(self, run_id: str) -> list[str]:
        wanted = [self.label, f"airloom.run={run_id}"]
        return [str(found["Id"]) for found in self.engine.containers(all=True, filters={"label": wanted})]

    def running(self, run_id: str) -> str:
        """The container, once its program has written something."""

        def found() -> str | None:
            with suppress(APIError):
                for container in self.containers(run_id):
                    if b"ready" in self.engine.logs(container):
                        return container
            return None

        return until(found, seconds=60, what="no container")


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
    assert own.wait(run_id) == "success"
    assert own.api.xcom(DAG_ID, run_id, "work") == {"lines": 3}
    assert own.api.xcom(DAG_ID, run_id, "work", "image_digest") == own.engine.inspect_image(BASE)["Id"]
    log = own.log(run_id, 1)
    assert "the token is ***" in log
    assert "do-not-tell" not in log
    assert own.containers(run_id) == []


def test_killed_worker_then_adoption(own: Own) -> None:
    """SIGKILL to the task's process and to the one that watches it; Airflow finds out by the lost heartbeat."""
    run_id = own.start(
        "import os, time", "print('ready')", "while not os.path.exists('/tmp/go'): time.sleep(0.1)", RESULT
    )
    container = own.running(run_id)
    task = str(own.task(run_id)["id"])[:23]
    doomed = [process for process in psutil.process_iter() if is_worker(command_of(process.pid), task)]
    assert len(doomed) == 2
    for process in doomed:
        process.kill()
    until(lambda: own.task(run_id)["try_number"] == 2, seconds=90, what="no second try")
    until(lambda: f"adopting container {container[:12]}" in own.log(run_id, 2), seconds=60, what="not adopted")
    own.engine.exec_start(own.engine.exec_create(container, ["touch", "/tmp/go"])["Id"])
    assert own.wait(run_id) == "success"
    assert own.api.xcom(DAG_ID, run_id, "work") == {"lines": 3}
    assert own.containers(run_id) == []


def test_a_run_that_is_marked_as_failed_stops_its_container(own: Own) -> None:
    """Even a program that does not mind SIGTERM."""
    run_id = own.start(
        "import signal, time", "signal.signal(signal.SIGTERM, signal.SIG_IGN)", "print('ready')", "time.sleep(600)"
    )
    own.running(run_id)
    own.api.mark(DAG_ID, run_id, "failed")
    until(lambda: own.containers(run_id) == [], seconds=30, what="the container is still there")
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
        said = "\n".join(own.api.task_log(PULLED_ID, refused, "work", 1))
        assert "the connection 'airloom_registry' is not in Airflow" in said
        own.api.ensure_connection(name, connections(Hooks(registry))[name])
        run_id = own.trigger(PULLED_ID, image=image)
        assert own.wait(run_id, PULLED_ID) == "success"
        assert own.api.xcom(PULLED_ID, run_id, "work").startswith(SAYS)
        assert own.api.xcom(PULLED_ID, run_id, "work", "image_digest") == image


def test_what_cannot_be_helped_is_not_tried_again(own: Own) -> None:
    run_id = own.start("held = bytearray(b'x') * (300 * 2**20)")
    assert own.wait(run_id) == "failed"
    assert own.task(run_id)["try_number"] == 1
    assert "more memory than its limit of 128 MiB" in own.log(run_id, 1)
    assert own.containers(run_id) == []
