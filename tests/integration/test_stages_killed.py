"""Stages whose worker or shim is killed, and the reaper of what nobody wants any more."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from unittest.mock import create_autospec

import pytest

from airloom.contract import RunPlan
from airloom.errors import NotFoundError
from airloom.flows.reap import live_in_airflow, reap, reap_run
from airloom.hooks.airflow_api import AirflowApi
from airloom.hooks.process_runner import ProcessRunner
from tests.fixtures.stage_flow import StageFlow
from tests.fixtures.stage_repo import kill, processes_of, wait_until


@pytest.fixture
def bench(stage_flow: StageFlow) -> StageFlow:
    return stage_flow


WORKER = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
from airloom.contract import RunPlan, Stage
from airloom.flows.stages import run_stage
from airloom.hooks.object_store import ObjectStore
from airloom.settings import Settings
from tests.conftest import make_settings

settings = Settings(_env_file=None, **json.loads(sys.argv[1]))
hooks = SimpleNamespace(settings=settings, store=ObjectStore.from_settings(settings))
run_stage(hooks, plan=RunPlan.model_validate_json(sys.argv[2]), stage=Stage.PREPROCESS,
          on_log=lambda line: print(line, flush=True))
"""


def killed_worker(bench: StageFlow, plan: RunPlan, until: str) -> list[str]:
    """Run a stage in a worker of its own and kill the worker when a line has come: what it had logged."""
    values = json.dumps({name: str(value) for name, value in bench.settings.model_dump().items()})
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, values, plan.model_dump_json()],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert worker.stdout is not None
    lines = []
    for line in worker.stdout:
        lines.append(line.rstrip("\n"))
        if line.strip() == until:
            break
    os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
    return lines


def touch_after(bench: StageFlow, text: str, file: Path) -> None:
    """Let the stage go on when a line with this text has come."""

    def watch() -> None:
        wait_until(lambda: any(text in line for line in list(bench.log)), text)
        file.touch()

    threading.Thread(target=watch, daemon=True).start()


def test_killed_worker(bench: StageFlow, tmp_path: Path) -> None:
    """Kill the worker while its stage runs: the next try adopts it, and the stage has run once."""
    count = tmp_path / "count"
    go = tmp_path / "go"
    plan = bench.plan("lines", lines=60, pause=0.05, hold=30, file=str(go), count=str(count))
    seen = killed_worker(bench, plan, "line 3")
    touch_after(bench, "adopting process", go)
    outcome = bench.run(plan)
    assert (outcome.cache, outcome.reason) == ("miss", "first run of this stage")
    assert any("adopting process" in line for line in bench.log)
    numbers = {int(line.split()[1]) for line in [*seen, *bench.log] if line.startswith("line ")}
    assert numbers == set(range(60))
    assert count.read_text() == "ran\n"


def test_stage_that_ended_after_its_worker_was_killed(bench: StageFlow, tmp_path: Path) -> None:
    go, count = tmp_path / "go", tmp_path / "count"
    plan = bench.plan("wait_for_file", file=str(go), count=str(count))
    killed_worker(bench, plan, "waiting")
    go.touch()
    wait_until((bench.workspace(plan) / "exit.json").exists, "end of the stage")
    assert bench.run(plan).result.status == "ok"
    assert count.read_text() == "ran\n"


def test_worker_and_shim_killed(bench: StageFlow, tmp_path: Path) -> None:
    """Nobody is left: the next try starts afresh, with empty outputs, and no process of the first remains."""
    go, count = tmp_path / "go", tmp_path / "count"
    plan = bench.plan("wait_for_file", file=str(go), count=str(count))
    killed_worker(bench, plan, "waiting")
    (bench.workspace(plan) / "outputs" / "dataset" / "half").write_text("half")
    handle = ProcessRunner().find(bench.workspace(plan))
    assert handle is not None
    kill(handle.pid)
    touch_after(bench, "waiting", go)
    outcome = bench.run(plan)
    assert outcome.result.outputs["dataset"].files == 1
    assert not processes_of(handle.id)
    assert count.read_text() == "ran\n"


def test_running_stage_with_other_inputs_is_stopped(bench: StageFlow) -> None:
    killed_worker(bench, bench.plan("sleep"), "ready")
    plan = bench.plan("success")
    handle = ProcessRunner().find(bench.workspace(plan))
    assert handle is not None
    assert bench.run(plan).result.status == "ok"
    assert not processes_of(handle.id)


# The reaper


def test_reaper_ends_stages_of_dead_runs_only(bench: StageFlow) -> None:
    dead, live = bench.plan("family", run_id="dead:1"), bench.plan("family", run_id="live:1")
    killed_worker(bench, dead, "ready")
    killed_worker(bench, live, "ready")
    handles = {run: ProcessRunner().find(bench.workspace(plan)) for run, plan in (("dead", dead), ("live", live))}
    ended = reap(bench.settings, is_live=lambda pipeline, run_id: run_id == "live:1")
    assert [(item.pipeline, item.run_id, item.stage) for item in ended] == [(bench.pipeline, "dead:1", "preprocess")]
    assert handles["dead"]
    assert handles["live"]
    assert not processes_of(handles["dead"].id)
    assert len(processes_of(handles["live"].id)) == 4
    assert reap_run(bench.settings, bench.pipeline, "other") == []
    assert len(reap_run(bench.settings, bench.pipeline, "live:1")) == 1
    assert not processes_of(handles["live"].id)


def test_reaper_ends_what_a_killed_shim_has_left(bench: StageFlow) -> None:
    plan = bench.plan("family")
    killed_worker(bench, plan, "ready")
    handle = ProcessRunner().find(bench.workspace(plan))
    assert handle is not None
    kill(handle.pid)
    assert len(reap(bench.settings, is_live=lambda pipeline, run_id: True)) == 1
    assert not processes_of(handle.id)


def test_whether_a_run_is_live(bench: StageFlow) -> None:
    bench.hooks.airflow = create_autospec(AirflowApi, instance=True)
    is_live = live_in_airflow(bench.hooks)
    for state, live in (("running", True), ("queued", True), ("failed", False), ("success", False)):
        bench.hooks.airflow.run.return_value = {"state": state}
        assert is_live("digits", "run-1") is live
    bench.hooks.airflow.run.side_effect = NotFoundError("no such run")
    assert not is_live("digits", "run-1")
