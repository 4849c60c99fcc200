"""Real processes: how they end, what is left of them, and who takes them over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from airloom.errors import ConflictError
from airloom.hooks import process_tree
from airloom.hooks.process_runner import ProcessRunner
from airloom.hooks.runner import ExitReason
from tests.fixtures.stage_repo import (
    StageBench,
    kill,
    processes_of,
    wait_until,
)

# How a job ends


def test_success(stage_bench: StageBench) -> None:
    job_exit, lines = stage_bench.run("lines", params={"lines": 3})
    assert (job_exit.reason, job_exit.exit_code) == (ExitReason.EXITED, 0)
    assert lines == ["line 0", "line 1", "line 2"]
    assert job_exit.cpu_seconds > 0
    assert job_exit.peak_memory_bytes > 5 * 2**20
    assert json.loads((stage_bench.workspace / "result.json").read_text())["status"] == "ok"


@pytest.mark.parametrize(
    ("do", "code"),
    [("fault", 1), ("bad_data", 65), ("temporary", 75), ("unavailable", 75), ("exit_3", 3), ("no_result", 0)],
)
def test_exit_codes(stage_bench: StageBench, do: str, code: int) -> None:
    job_exit, _ = stage_bench.run(do)
    assert (job_exit.reason, job_exit.exit_code, job_exit.signal) == (ExitReason.EXITED, code, None), job_exit


@pytest.mark.parametrize(
    ("do", "number"), [("sigkill", signal.SIGKILL), ("sigsegv", signal.SIGSEGV), ("shared_memory_full", signal.SIGBUS)]
)
def test_signals(stage_bench: StageBench, do: str, number: int) -> None:
    job_exit, _ = stage_bench.run(do)
    assert (job_exit.reason, job_exit.signal, job_exit.exit_code) == (ExitReason.SIGNALLED, number, None), job_exit


def test_unusable_request(stage_bench: StageBench) -> None:
    job = stage_bench.job("success")
    job.request_file.write_text("{")
    job_exit = stage_bench.runner.wait(stage_bench.runner.start(job), lambda line: None, lambda: False)
    assert job_exit.exit_code == 64


def test_no_checkout(stage_bench: StageBench, tmp_path: Path) -> None:
    job_exit, _ = stage_bench.run("success", checkout=tmp_path / "nowhere")
    assert job_exit.reason is ExitReason.NOT_STARTED
    assert "nowhere" in job_exit.detail


@pytest.mark.parametrize("do", ["memory", "memory_of_child"])
def test_memory_limit(stage_bench: StageBench, do: str) -> None:
    handle = stage_bench.start(do, memory_bytes=150 * 2**20)
    job_exit = stage_bench.runner.wait(handle, lambda line: None, lambda: False)
    assert job_exit.reason is ExitReason.MEMORY_LIMIT, job_exit
    assert job_exit.peak_memory_bytes > 150 * 2**20
    assert processes_of(handle.id) <= {handle.pid}  # who watched it ends a moment after it has said so


def test_timeout(stage_bench: StageBench) -> None:
    handle = stage_bench.start("family", timeout_seconds=1.0, grace_seconds=0.2, params={"ignore": True})
    job_exit = stage_bench.runner.wait(handle, lambda line: None, lambda: False)
    assert job_exit.reason is ExitReason.TIMEOUT, job_exit
    assert job_exit.seconds >= 1.0
    assert processes_of(handle.id) <= {handle.pid}  # who watched it ends a moment after it has said so


# Stopping


def test_stop_asks_first(stage_bench: StageBench) -> None:
    handle = stage_bench.start("politely")
    stage_bench.wait_for_log("ready")
    stage_bench.runner.stop(handle, 20.0)
    assert "cleaning up" in stage_bench.log()
    job_exit = stage_bench.runner.wait(handle, lambda line: None, lambda: False)
    assert job_exit.reason is ExitReason.STOPPED


@pytest.mark.parametrize("ignore", [False, True])
def test_stop_ends_the_whole_tree(stage_bench: StageBench, ignore: bool) -> None:
    handle = stage_bench.start("family", params={"ignore": ignore})
    stage_bench.wait_for_log("ready")
    assert len(processes_of(handle.id)) == 4  # shim, stage, its child, and a grandchild with a session of its own
    stage_bench.runner.stop(handle, 0.5)
    assert not processes_of(handle.id)
    assert stage_bench.runner.wait(handle, lambda line: None, lambda: False).reason is ExitReason.STOPPED


def test_what_a_stage_leaves_behind_is_ended(stage_bench: StageBench) -> None:
    handle = stage_bench.start("family", params={"leave": True})
    job_exit = stage_bench.runner.wait(handle, lambda line: None, lambda: False)
    assert (job_exit.reason, job_exit.exit_code) == (ExitReason.EXITED, 0)
    assert processes_of(handle.id) <= {handle.pid}  # who watched it ends a moment after it has said so


def test_waiter_is_asked_whether_to_stop(stage_bench: StageBench) -> None:
    handle = stage_bench.start("sleep")
    asked = threading.Event()

    def should_stop() -> bool:
        return asked.is_set()

    def on_log(line: str) -> None:
        if line == "ready":
            asked.set()

    assert stage_bench.runner.wait(handle, on_log, should_stop).reason is ExitReason.STOPPED


def test_stop_twice_and_after_the_end(stage_bench: StageBench) -> None:
    handle = stage_bench.start("success")
    stage_bench.runner.wait(handle, lambda line: None, lambda: False)
    stage_bench.runner.stop(handle, 1.0)
    stage_bench.runner.stop(handle, 1.0)
    found = stage_bench.runner.find(stage_bench.workspace)
    assert found is not None
    assert not found.running


# The log


def test_progress_bar(stage_bench: StageBench) -> None:
    _, lines = stage_bench.run("progress")
    assert lines[-2:] == ["100% of it", "after the bar"]
    assert len(lines) < 10
    assert stage_bench.log().count("% of it") == 21


def test_fifty_megabytes(stage_bench: StageBench) -> None:
    count = size = 0
    last = ""

    def on_log(line: str) -> None:
        nonlocal count, size, last
        count, size, last = count + 1, size + len(line) + 1, line

    handle = stage_bench.start("megabytes", params={"megabytes": 50})
    job_exit = stage_bench.runner.wait(handle, on_log, lambda: False)
    assert job_exit.exit_code == 0
    assert (count, size, last) == (500_001, 50_000_000 + 8, "the end")


def test_lines_come_while_the_stage_runs(stage_bench: StageBench, tmp_path: Path) -> None:
    go = tmp_path / "go"
    handle = stage_bench.start("wait_for_file", params={"file": str(go)})
    lines: list[str] = []

    def on_log(line: str) -> None:
        lines.append(line)
        go.touch()  # the stage ends only because its first line has come

    stage_bench.runner.wait(handle, on_log, lambda: False)
    assert lines == ["waiting", "found"]


# The environment


def test_environment_is_private(stage_bench: StageBench, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {
        "AIRFLOW__CORE__FERNET_KEY": "do-not-tell-1",
        "AWS_SECRET_ACCESS_KEY": "do-not-tell-2",
        "AIRLOOM_HOME": "do-not-tell-3",
        "DATABASE_PASSWORD": "do-not-tell-4",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AIRLOOM_INSTANCE", "this-one")
    monkeypatch.setenv("SSL_CERT_FILE", "/etc/ssl/company.pem")
    _, lines = stage_bench.run("environment", cpus=2.5, environment={"MLFLOW_TRACKING_URI": "http://mlflow"})
    found = json.loads(lines[0])
    assert not [name for name, value in found.items() if "do-not-tell" in value]
    assert found["AIRLOOM_INSTANCE"] == "this-one"
    assert found["SSL_CERT_FILE"] == "/etc/ssl/company.pem"
    assert found["MLFLOW_TRACKING_URI"] == "http://mlflow"
    assert found["OMP_NUM_THREADS"] == "2"
    assert found["HOME"].startswith(str(stage_bench.workspace))
    assert found["CUDA_VISIBLE_DEVICES"] == ""


def test_secrets_are_in_no_file_and_no_argument(stage_bench: StageBench) -> None:
    handle = stage_bench.start("sleep", environment={"AWS_SECRET_ACCESS_KEY": "do-not-tell"})
    stage_bench.wait_for_log("ready")
    for path in stage_bench.folder.rglob("*"):
        if path.is_file():
            assert b"do-not-tell" not in path.read_bytes(), path
    for pid in processes_of(handle.id):
        assert b"do-not-tell" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    assert "do-not-tell" not in repr(stage_bench.job("sleep", environment={"X": "do-not-tell"}))


# Taking over

WORKER = """
import sys
from pathlib import Path
from airloom.hooks.process_runner import ProcessRunner
from airloom.hooks.runner import StageJob
from airloom.contract import Stage

workspace, checkout = Path(sys.argv[1]), Path(sys.argv[2])
runner = ProcessRunner(poll_seconds=0.05)
handle = runner.start(StageJob(pipeline="digits", run_id="run-1", stage=Stage.PREPROCESS, key="key",
                               workspace=workspace, checkout=checkout, memory_bytes=2**30, timeout_seconds=600))
print(handle.id, flush=True)
runner.wait(handle, lambda line: print(line, flush=True), lambda: False)
"""


def start_worker(bench: StageBench, do: str, **params: object) -> subprocess.Popen[str]:
    """A worker of its own that starts a job and hands on its log."""
    job = bench.job(do, params=params)
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(job.workspace), str(job.checkout)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert worker.stdout is not None
    bench.jobs.append(worker.stdout.readline().strip())
    return worker


def test_killed_worker_leaves_a_job_that_another_adopts(stage_bench: StageBench, tmp_path: Path) -> None:
    go, count = tmp_path / "go", tmp_path / "count"
    worker = start_worker(stage_bench, "lines", lines=100, pause=0.03, hold=50, file=str(go), count=str(count))
    assert worker.stdout is not None
    seen = [worker.stdout.readline().strip() for _ in range(5)]
    os.killpg(worker.pid, signal.SIGKILL)  # as Airflow does it: the whole group
    seen += [line.strip() for line in worker.stdout]
    worker.wait()

    runner = ProcessRunner(poll_seconds=0.05)
    found = runner.find(stage_bench.workspace)
    assert found is not None
    assert (found.running, found.key) == (True, "key")
    go.touch()
    adopted: list[str] = []
    job_exit = runner.wait(found, adopted.append, lambda: False)
    assert job_exit.exit_code == 0
    assert count.read_text() == "ran\n"
    numbers = {int(line.split()[1]) for line in [*seen, *adopted]}
    assert numbers == set(range(100))


def test_a_job_that_ended_meanwhile_is_found_with_its_exit(stage_bench: StageBench, tmp_path: Path) -> None:
    go = tmp_path / "go"
    worker = start_worker(stage_bench, "wait_for_file", file=str(go))
    os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
    go.touch()
    wait_until((stage_bench.workspace / "exit.json").exists, "end of the stage")
    runner = ProcessRunner()
    found = runner.find(stage_bench.workspace)
    assert found is not None
    assert (found.running, found.collected) == (False, False)
    lines: list[str] = []
    assert runner.wait(found, lines.append, lambda: False).exit_code == 0
    assert lines[-1] == "found"
    runner.mark_collected(found)
    again = runner.find(stage_bench.workspace)
    assert again is not None
    assert again.collected


def test_adopted_job_can_be_stopped(stage_bench: StageBench) -> None:
    worker = start_worker(stage_bench, "family")
    stage_bench.wait_for_log("ready")
    os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
    found = ProcessRunner().find(stage_bench.workspace)
    assert found is not None
    ProcessRunner().stop(found, 1.0)
    assert not processes_of(found.id)


def test_killed_shim_takes_the_stage_with_it(stage_bench: StageBench) -> None:
    handle = stage_bench.start("family")
    stage_bench.wait_for_log("ready")
    kill(handle.pid)
    job_exit = stage_bench.runner.wait(handle, lambda line: None, lambda: False)
    assert job_exit.reason is ExitReason.LOST
    assert not processes_of(handle.id)
    assert stage_bench.runner.find(stage_bench.workspace) is None


def test_find_after_the_shim_was_killed_ends_what_it_left(stage_bench: StageBench) -> None:
    handle = stage_bench.start("family")
    stage_bench.wait_for_log("ready")
    kill(handle.pid)
    assert ProcessRunner().find(stage_bench.workspace) is None
    wait_until(lambda: not processes_of(handle.id), "end of the strays")


def test_a_workspace_holds_one_job(stage_bench: StageBench) -> None:
    handle = stage_bench.start("sleep")
    stage_bench.wait_for_log("ready")
    with pytest.raises(ConflictError, match="runs in"):
        stage_bench.runner.start(stage_bench.job("success"))
    stage_bench.runner.stop(handle, 1.0)
    job_exit, _ = stage_bench.run("success")
    assert job_exit.exit_code == 0


def test_nothing_to_find(stage_bench: StageBench) -> None:
    assert stage_bench.runner.find(stage_bench.workspace) is None


def test_another_process_with_the_same_id_is_not_the_job(stage_bench: StageBench) -> None:
    """A process id is given again: what tells is when the process started."""
    handle = stage_bench.start("success")
    stage_bench.runner.wait(handle, lambda line: None, lambda: False)
    wait_until(lambda: not process_tree.is_alive(handle.pid, handle.started), "the end of its watcher")
    path = stage_bench.workspace / "process.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pid": os.getpid()}))
    (stage_bench.workspace / "exit.json").unlink()
    found = stage_bench.runner.find(stage_bench.workspace)
    assert found is None
    assert process_tree.start_of(os.getpid()) is not None
