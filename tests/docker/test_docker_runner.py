"""Stages as containers of a real engine."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from airloom.contract import Stage, StageRequest
from airloom.errors import ConfigError, ConflictError, UnavailableError
from airloom.flows.reap import reap
from airloom.hooks.docker_engine import container_facts
from airloom.hooks.docker_gpu import probe_gpus
from airloom.hooks.docker_runner import DockerRunner
from airloom.hooks.runner import ExitReason, StageJob
from airloom.settings import Settings
from tests.conftest import ROOT
from tests.fixtures.stage_repo import wait_until


class Bench:
    def __init__(self, settings: Settings, image: str) -> None:
        self.settings, self.image = settings, image
        self.workspace = settings.workspaces_dir / "digits" / "run-1" / "preprocess"
        self.runner = DockerRunner(settings, poll_seconds=0.05)

    def job(self, do: str, *, params: dict[str, object] | None = None, **changes: object) -> StageJob:
        outputs = {"dataset": self.workspace / "outputs" / "dataset"}
        values: dict[str, object] = {"memory_bytes": 2**28, "timeout_seconds": 600.0, **changes}
        job = StageJob(
            pipeline="digits", run_id="run-1", stage=Stage.PREPROCESS, key="key", workspace=self.workspace,
            checkout=self.workspace, image=self.image, environment={"SECRET": "do-not-tell"}, **values,  # type: ignore[arg-type]
        )  # fmt: skip
        StageRequest(
            pipeline="digits", run_id="run-1", stage=Stage.PREPROCESS, commit="c" * 40,
            params={"do": do, "lines": 3, **(params or {})}, outputs=outputs,
        ).write(job.request_file)  # fmt: skip
        return job


@pytest.fixture
def bench(settings: Settings, stage_image: str) -> Iterator[Bench]:
    found = Bench(settings, stage_image)
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


def test_gpus_that_the_engine_cannot_give(bench: Bench) -> None:
    """It is the engine that refuses, and nothing is left of the attempt."""
    if probe_gpus(bench.runner._api) is None:
        pytest.skip("this engine has GPUs")
    with pytest.raises(ConfigError, match=r"2 GPUs are needed, but the engine .* said: could not select") as caught:
        bench.runner.start(bench.job("lines", gpus=2))
    assert "set resources.gpus: 0" in str(caught.value)
    name = bench.runner._name(bench.workspace)
    assert not bench.runner._api.containers(all=True, filters={"name": name})
    assert not bench.runner._api.volumes(filters={"name": name})["Volumes"]


@pytest.mark.parametrize(("do", "code"), [("bad_data", 65), ("fault", 1)])
def test_exit_codes(bench: Bench, do: str, code: int) -> None:
    job_exit = bench.runner.wait(bench.runner.start(bench.job(do)), lambda line: None, lambda: False)
    assert (job_exit.reason, job_exit.exit_code) == (ExitReason.EXITED, code), job_exit
    assert json.loads((bench.workspace / "result.json").read_text())["status"] == "failed"


def test_memory_limit(bench: Bench) -> None:
    handle = bench.runner.start(bench.job("memory", memory_bytes=100 * 2**20))
    job_exit = bench.runner.wait(handle, lambda line: None, lambda: False)
    assert job_exit.reason is ExitReason.MEMORY_LIMIT, job_exit
    # The limit itself where the engine has heard of the kill in time, else what the container has noted.
    assert 90 * 2**20 <= job_exit.peak_memory_bytes <= 100 * 2**20


def test_memory_limit_of_which_the_engine_has_not_heard(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Word of the kill and of the container's end reach it apart, the kill's sometimes too late."""

    def deaf(api: Any, container: str) -> dict[str, Any] | None:
        facts = container_facts(api, container)
        if facts is not None:
            facts["State"]["OOMKilled"] = False
        return facts

    monkeypatch.setattr("airloom.hooks.docker_container.container_facts", deaf)
    handle = bench.runner.start(bench.job("memory", memory_bytes=100 * 2**20))
    job_exit = bench.runner.wait(handle, lambda line: None, lambda: False)
    assert job_exit.reason is ExitReason.MEMORY_LIMIT, job_exit
    assert 90 * 2**20 <= job_exit.peak_memory_bytes <= 100 * 2**20


def test_shared_memory_and_tmp_are_as_large_as_the_job_says(bench: Bench) -> None:
    handle = bench.runner.start(bench.job("sleep", shm_bytes=8 * 2**20, tmp_bytes=16 * 2**20))
    facts = bench.runner._api.inspect_container(handle.id)
    host = facts["HostConfig"]
    # Threads that spin beside other work take many times as long.
    assert {"OMP_NUM_THREADS=1", "OMP_WAIT_POLICY=PASSIVE"} <= set(facts["Config"]["Env"])
    assert (host["ShmSize"], host["Tmpfs"]["/tmp"]) == (8 * 2**20, f"size={16 * 2**20},mode=1777")
    made = bench.runner._api.exec_create(handle.id, ["df", "--block-size=1", "--output=size", "/dev/shm", "/tmp"])
    said = bench.runner._api.exec_start(made["Id"]).decode().split()
    assert said[-2:] == [str(8 * 2**20), str(16 * 2**20)]


def test_timeout(bench: Bench) -> None:
    handle = bench.runner.start(bench.job("sleep", timeout_seconds=1.0, grace_seconds=1.0))
    job_exit = bench.runner.wait(handle, lambda line: None, lambda: False)
    assert job_exit.reason is ExitReason.TIMEOUT, job_exit


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


def test_removed_by_hand_is_lost_but_for_its_outputs(bench: Bench) -> None:
    """The next try goes on with the checkpoints among them."""
    handle = bench.runner.start(bench.job("write_and_sleep", try_number=3))
    assert bench.runner._api.inspect_container(handle.id)["Config"]["Labels"]["airloom.try"] == "3"
    wait_until(lambda: b"ready" in bench.runner._api.logs(handle.id), "the stage has written")
    bench.runner._api.remove_container(handle.id, force=True)
    wait_until(lambda: bench.runner.find(bench.workspace) is None, "the container is gone")
    assert bench.runner.wait(handle, lambda line: None, lambda: False).reason is ExitReason.LOST
    assert (bench.workspace / "outputs" / "dataset" / "half.txt").read_text() == "half"
    assert not (bench.workspace / "result.json").exists()
    name = bench.runner._name(bench.workspace)
    assert not bench.runner._api.containers(all=True, filters={"name": name})
    assert not bench.runner._api.volumes(filters={"name": name})["Volumes"]


def test_killed_from_outside_is_told_from_an_exit(bench: Bench) -> None:
    handle = bench.runner.start(bench.job("sleep"))
    bench.runner._api.kill(handle.id)
    job_exit = bench.runner.wait(handle, lambda line: None, lambda: False)
    assert (job_exit.reason, job_exit.signal) == (ExitReason.SIGNALLED, 9), job_exit


WAITER = """
import sys
from pathlib import Path
from airloom.hooks.docker_runner import DockerRunner
from tests.conftest import make_settings
from airloom.settings import Settings
settings = Settings.model_validate_json(sys.stdin.readline())
runner = DockerRunner(settings, poll_seconds=0.05)
runner.wait(runner.find(Path(sys.argv[1])), lambda line: print(line, flush=True), lambda: False)
"""


def test_killed_worker_leaves_a_container_that_the_next_one_adopts(bench: Bench) -> None:
    """No line is lost, and none comes twice."""
    # It stops half-way, until somebody else holds it.
    params: dict[str, object] = {"lines": 30, "pause": 0.1, "hold": 20, "file": "/tmp/go"}
    bench.runner.start(bench.job("lines", params=params))
    worker = subprocess.Popen(
        [sys.executable, "-c", WAITER, str(bench.workspace)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(bench.settings.model_dump_json() + "\n")
    worker.stdin.flush()
    seen = [worker.stdout.readline().strip() for _ in range(3)]
    worker.kill()
    worker.wait()
    rest: list[str] = []
    handle = bench.runner.find(bench.workspace)
    assert handle is not None
    assert handle.running
    go = bench.runner._api.exec_create(handle.id, ["touch", "/tmp/go"])
    bench.runner._api.exec_start(go["Id"])
    job_exit = bench.runner.wait(handle, rest.append, lambda: False)
    assert (job_exit.reason, job_exit.exit_code) == (ExitReason.EXITED, 0), job_exit
    lines = (bench.workspace / "log.txt").read_text().splitlines()
    assert lines == [f"line {number}" for number in range(30)]
    assert seen == lines[:3]
    assert rest == lines[30 - len(rest) :]
    assert job_exit.cpu_seconds > 0
    assert job_exit.peak_memory_bytes > 0


def test_who_loses_the_engine_leaves_no_hole_in_the_log(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What came between its last look and the engine's end is shown all the same, for the next one does not."""
    params: dict[str, object] = {"lines": 20, "hold": 10, "file": "/tmp/go"}
    handle, lines = bench.runner.start(bench.job("lines", params=params)), []
    log = bench.workspace / "log.txt"

    def away(api: Any, container: str) -> dict[str, Any] | None:
        wait_until(lambda: b"line 10\n" in log.read_bytes(), "the log has come")
        raise UnavailableError("the Docker engine does not answer")

    with monkeypatch.context() as patch:
        patch.setattr("airloom.hooks.docker_container.container_facts", away)
        with pytest.raises(UnavailableError):
            bench.runner.wait(handle, lines.append, lambda: False)
    assert lines == [f"line {number}" for number in range(11)]
    go = bench.runner._api.exec_create(handle.id, ["touch", "/tmp/go"])
    bench.runner._api.exec_start(go["Id"])
    job_exit = bench.runner.wait(handle, lines.append, lambda: False)
    assert (job_exit.reason, job_exit.exit_code) == (ExitReason.EXITED, 0), job_exit
    assert lines == [f"line {number}" for number in range(20)]


def test_of_two_starts_at_once_one_wins(bench: Bench) -> None:
    job = bench.job("sleep")

    def start() -> object:
        try:
            return DockerRunner(bench.settings).start(job)
        except ConflictError as error:
            return error

    with ThreadPoolExecutor(2) as threads:
        results = [future.result() for future in [threads.submit(start), threads.submit(start)]]
    assert sorted(type(result).__name__ for result in results) == ["ConflictError", "JobHandle"]


def test_reaper_ends_what_no_live_run_owns(bench: Bench) -> None:
    bench.runner.start(bench.job("sleep"))
    assert reap(bench.settings, is_live=lambda pipeline, run: True) == []
    (ended,) = reap(bench.settings, is_live=lambda pipeline, run: False)
    assert (ended.pipeline, ended.run_id, ended.stage) == ("digits", "run-1", "preprocess")
    name = bench.runner._name(bench.workspace)
    assert not bench.runner._api.containers(all=True, filters={"name": name})
    assert not bench.runner._api.volumes(filters={"name": name})["Volumes"]
