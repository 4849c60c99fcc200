"""Stages as containers of a real engine."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from airloom.contract import Stage, StageRequest
from airloom.errors import ConflictError
from airloom.hooks.docker_runner import DockerRunner
from airloom.hooks.runner import ExitReason, StageJob
from airloom.settings import Settings
from tests.fixtures.stage_repo import wait_until

pytest_plugins = ["tests.fixtures.stage_image"]


class Bench:
    def __init__(self, settings: Settings, folder: Path, image: str) -> None:
        self.settings, self.workspace, self.image = settings, folder / "workspace", image
        self.runner = DockerRunner(settings, poll_seconds=0.05)

    def job(self, do: str, **changes: object) -> StageJob:
        outputs = {"dataset": self.workspace / "outputs" / "dataset"}
        values: dict[str, object] = {"memory_bytes": 2**28, "timeout_seconds": 60.0, **changes}
        job = StageJob(
            pipeline="digits", run_id="run-1", stage=Stage.PREPROCESS, key="key", workspace=self.workspace,
            checkout=self.workspace, image=self.image, environment={"SECRET": "do-not-tell"}, **values,  # type: ignore[arg-type]
        )  # fmt: skip
        StageRequest(
            pipeline="digits", run_id="run-1", stage=Stage.PREPROCESS, commit="c" * 40,
            params={"do": do, "lines": 3}, outputs=outputs,
        ).write(job.request_file)  # fmt: skip
        return job


@pytest.fixture
def bench(settings: Settings, tmp_path: Path, stage_image: str) -> Iterator[Bench]:
    found = Bench(settings, tmp_path, stage_image)
    yield found
    found.runner._remove(found.runner._name(found.workspace))


def test_success_brings_outputs_log_and_result(bench: Bench) -> None:
    handle, lines = bench.runner.start(bench.job("lines")), []
    job_exit = bench.runner.wait(handle, lines.append, lambda: False)
    assert (job_exit.reason, job_exit.exit_code) == (ExitReason.EXITED, 0), (job_exit, lines)
    assert lines == ["line 0", "line 1", "line 2"]
    result = json.loads((bench.workspace / "result.json").read_text())
    assert Path(result["outputs"]["dataset"]["path"]) == bench.workspace / "outputs" / "dataset"
    assert (bench.workspace / "outputs" / "dataset" / "data.txt").read_text() == "1"
    bench.runner.mark_collected(handle)
    name = bench.runner._name(bench.workspace)
    assert not bench.runner._api.containers(all=True, filters={"name": name})
    assert not bench.runner._api.volumes(filters={"name": name})["Volumes"]
    again = bench.runner.find(bench.workspace)
    assert again is not None
    assert again.collected
    assert not again.running


@pytest.mark.parametrize(("do", "code"), [("bad_data", 65), ("fault", 1)])
def test_exit_codes(bench: Bench, do: str, code: int) -> None:
    job_exit = bench.runner.wait(bench.runner.start(bench.job(do)), lambda line: None, lambda: False)
    assert (job_exit.reason, job_exit.exit_code) == (ExitReason.EXITED, code)
    assert json.loads((bench.workspace / "result.json").read_text())["status"] == "failed"


def test_memory_limit(bench: Bench) -> None:
    handle = bench.runner.start(bench.job("memory", memory_bytes=100 * 2**20))
    assert bench.runner.wait(handle, lambda line: None, lambda: False).reason is ExitReason.MEMORY_LIMIT


def test_timeout(bench: Bench) -> None:
    handle = bench.runner.start(bench.job("sleep", timeout_seconds=1.0, grace_seconds=1.0))
    assert bench.runner.wait(handle, lambda line: None, lambda: False).reason is ExitReason.TIMEOUT


def test_adopted_stopped_and_without_secrets(bench: Bench) -> None:
    handle = bench.runner.start(bench.job("sleep"))
    assert "do-not-tell" not in json.dumps(bench.runner._api.inspect_container(handle.id))
    with pytest.raises(ConflictError):
        bench.runner.start(bench.job("sleep"))
    other = DockerRunner(bench.settings, poll_seconds=0.05)
    found = other.find(bench.workspace)
    assert found == handle
    stop = threading.Event()
    job_exit = other.wait(found, lambda line: stop.set(), stop.is_set)
    assert job_exit.reason is ExitReason.STOPPED


def test_removed_by_hand_is_lost(bench: Bench) -> None:
    handle = bench.runner.start(bench.job("sleep"))
    bench.runner._api.remove_container(handle.id, force=True)
    wait_until(lambda: bench.runner.find(bench.workspace) is None, "the container is gone")
    assert bench.runner.wait(handle, lambda line: None, lambda: False).reason is ExitReason.LOST
