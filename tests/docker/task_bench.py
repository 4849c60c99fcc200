"""Tasks of the durable DockerOperator, run without Airflow's scheduler."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from docker.errors import APIError, NotFound

from airloom.hooks.docker_engine import connect
from airloom.hooks.docker_task import TaskId
from airloom.operators import stage_docker, wanted
from airloom.operators.stage_docker import StageDockerOperator
from airloom.settings import Settings
from tests.fixtures.stage_image import BASE

DAG, RUN, TASK = "own_dag", "manual__2026-11-21T10:00:00+00:00", "work"


class Ti:
    """As much of a task instance as the operator asks for."""

    dag_id, run_id, task_id = DAG, RUN, TASK

    def __init__(self, try_number: int = 1, map_index: int = -1) -> None:
        self.try_number, self.map_index = try_number, map_index
        self.pushed: dict[str, Any] = {}

    def xcom_push(self, key: str, value: Any) -> None:
        self.pushed[key] = value


class Lines(list[str]):
    """A logger that keeps what it is told."""

    def info(self, text: str, *values: object) -> None:
        self.append(text % values if values else text)

    debug = warning = error = info


class Watched(StageDockerOperator):
    """The operator, with a log that a test can read."""

    lines: Lines

    @property
    def log(self) -> Any:
        return self.lines


class Bench:
    """Tasks of one run of one DAG, and an engine that keeps nothing of them."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.api = connect(settings)
        self.name = TaskId(dag=DAG, run=RUN, task=TASK).container_name(settings.instance_id)
        self.label = f"airloom.instance={settings.instance_id}"

    def task(self, *program: str, **changes: Any) -> tuple[StageDockerOperator, Lines]:
        command = ["python3", "-u", "-c", "\n".join(program)] if program else None
        values = {"task_id": TASK, "image": BASE, "command": command, "network_mode": "none", **changes}
        operator = Watched(**values)
        operator.lines = Lines()
        return operator, operator.lines

    def run(self, *program: str, ti: Ti | None = None, **changes: Any) -> tuple[Any, Lines]:
        operator, lines = self.task(*program, **changes)
        return execute(operator, ti), lines

    def containers(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.api.containers(all=True, filters={"label": self.label})
        return found

    def facts(self) -> dict[str, Any] | None:
        with suppress(NotFound):
            found: dict[str, Any] = self.api.inspect_container(self.name)
            return found
        return None

    def runs(self) -> bool:
        found = self.facts()
        return found is not None and bool(found["State"]["Running"])


def execute(operator: StageDockerOperator, ti: Ti | None = None) -> Any:
    return operator.execute.__wrapped__(operator, {"ti": ti or Ti()})


def make_bench(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """For each file a fixture of its own: importing Airflow's provider is not every test's business."""
    monkeypatch.setattr(stage_docker, "get_settings", lambda: settings)
    monkeypatch.setattr(wanted, "get_settings", lambda: settings)
    found = Bench(settings)
    yield found
    for container in found.containers():
        with suppress(APIError):
            found.api.remove_container(container["Id"], force=True, v=True)
    found.api.close()
