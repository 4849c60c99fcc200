"""What is killed comes back: every part of the platform, in the middle of a run."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from airloom.contract.plan import safe_run_id
from airloom.embedded import guard
from airloom.embedded.instance import read_record
from airloom.errors import AirloomError, AuthError
from airloom.hooks.mlflow_records import RUN_TAG
from airloom.hooks.supervisor import ServiceState
from tests.e2e.conftest import AIRLOOM, Platform
from tests.fixtures.mlflow import runs_with
from tests.fixtures.services import free_port, free_range

DATA_REPO = "de_datapreprocessing"
ENDED = {"success", "failed"}
STAGES = ("preprocess", "train", "evaluate")
RUN_TIMEOUT = 240.0


class Run:
    """A run that is under way, and what it must leave behind."""

    def __init__(self, platform: Platform) -> None:
        self.platform = platform
        started = platform.airloom("run", "digits", "--force", "--no-wait", "--json")
        self.id = str(json.loads(started.stdout)["run_id"])

    def state(self) -> str:
        return str(self._ask(lambda: self.platform.hooks.airflow.run("digits", self.id)["state"]))

    def tasks(self) -> dict[str, dict[str, Any]]:
        found = self._ask(lambda: self.platform.hooks.airflow.task_instances("digits", self.id))
        return {task["task_id"]: dict(task) for task in found or []}

    def stage_process(self, stage: str) -> dict[str, Any] | None:
        """The stage's process file while the stage's own process lives."""
        folder = self.platform.settings.workspaces_dir / "digits" / safe_run_id(self.id) / stage
        try:
            facts: dict[str, Any] = json.loads((folder / "process.json").read_bytes())
        except (OSError, ValueError):
            return None
        pid = facts.get("stage_pid") or 0
        return facts if pid and f"main.py {stage}" in command_of(pid) else None

    def wait_for_stage(self, stage: str) -> dict[str, Any]:
        found: dict[str, Any] = self.platform.wait_for(
            f"stage {stage} of {self.id}", lambda: self._unless_ended(lambda: self.stage_process(stage))
        )
        return found

    def wait_for_task(self, task: str) -> None:
        def runs() -> bool:
            return self.tasks().get(task, {}).get("state") == "running"

        self.platform.wait_for(f"task {task} of {self.id}", lambda: self._unless_ended(runs))

    def end(self) -> dict[str, dict[str, Any]]:
        """Wait for the end, which must be success, and look for what was done twice or left over; the tasks."""
        self.platform.wait_for(f"the end of {self.id}", lambda: self.state() in ENDED, RUN_TIMEOUT)
        tasks = self.tasks()
        states = {name: (task["state"], task["try_number"]) for name, task in tasks.items()}
        assert self.state() == "success", f"{states}\n{reasons_of(self.platform, self.id)}"
        assert {state for state, _ in states.values()} == {"success"}, states
        assert len(tags_of(self.platform, self.id)) == 1
        (run,) = runs_with(self.platform.hooks.mlflow, RUN_TAG, self.id)
        assert run.status == "FINISHED"
        assert len(self.platform.hooks.mlflow.versions("digits", run_id=run.run_id)) == 1
        self.platform.wait_for("the end of all stages", lambda: not stage_processes(self.platform), 15)
        return tasks

    def _unless_ended(self, condition: Callable[[], Any]) -> Any:
        found = condition()
        if not found and self.state() in ENDED:
            raise AssertionError(f"{self.id} is over: {reasons_of(self.platform, self.id)}")
        return found

    @staticmethod
    def _ask(question: Callable[[], Any]) -> Any:
        """An answer, or None while the one who is asked is down."""
        try:
            return question()
        except AirloomError:
            return None


def command_of(pid: int) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return ""


def members(platform: Platform) -> set[int]:
    return guard.members(platform.settings.instance_id)


def stage_processes(platform: Platform) -> list[str]:
    wanted = tuple(f"main.py {stage}" for stage in STAGES)
    return [command for pid in members(platform) if any(name in (command := command_of(pid)) for name in wanted)]


def tags_of(platform: Platform, run_id: str) -> list[str]:
    tags = platform.hooks.git.list_tags(DATA_REPO)
    return [tag.name for tag in tags if tag.message and json.loads(tag.message).get("run_id") == run_id]


def reasons_of(platform: Platform, run_id: str) -> str:
    tries = platform.hooks.ledger.tasks("digits", run_id)
    return "\n".join(f"{found.task}: {found.reason}" for found in tries if found.state == "failed")


def is_worker(command: str, task: str) -> bool:
    return command.startswith("airflow worker -- ") and task in command


def service(platform: Platform, name: str) -> ServiceState:
    return platform.hooks.supervisor.service(name)


def serving(platform: Platform) -> ServiceState:
    """The process of the release that answers; two live for as long as the other is drained."""
    name = f"serving-digits-{platform.deployed()}"
    return service(platform, name)


def kill(platform: Platform, name: str, *, wait: bool = True) -> ServiceState:
    """SIGKILL a service and see that the supervisor has it back on the same port."""
    before = service(platform, name)
    assert before.pid is not None
    os.kill(before.pid, signal.SIGKILL)

    def back() -> bool:
        now = service(platform, name)
        return now.ready and now.pid not in (None, before.pid) and now.restarts > before.restarts

    if wait:
        platform.wait_for(f"{name} after its kill", back, 90)
        assert service(platform, name).port == before.port
    return before


class Client:
    """Asks for predictions through the gateway, one after the other."""

    def __init__(self, platform: Platform) -> None:
        self.url = platform.hooks.gateway.model_url("digits") + "/predict"
        self.image = next((platform.settings.home_dir / "releases").rglob("reference.json"))
        self.answers: list[tuple[float, str]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)

    def __enter__(self) -> Client:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(120)

    @property
    def counts(self) -> Counter[str]:
        return Counter(answer for _, answer in list(self.answers))

    def wait_for_answers(self, platform: Platform, number: int) -> None:
        """Until so many more have been answered well."""
        wanted = self.counts["200"] + number
        platform.wait_for("answers through the gateway", lambda: self.counts["200"] >= wanted, 120)

    def _ask(self) -> None:
        row = json.loads(self.image.read_bytes())["rows"][0]
        body, headers = base64.b64decode(row["image_base64"]), {"Content-Type": row["media_type"]}
        with httpx.Client(timeout=90, trust_env=False) as client:  # longer than the gateway holds a request
            while not self._over.is_set():
                try:
                    response = client.post(self.url, content=body, headers=headers)
                    answer = str(response.status_code)
                    if response.is_error:
                        answer += f" {response.json()['error']['type']}" if response.content else " without a body"
                    elif response.json()["label"] != row["output"]["label"]:
                        answer = f"wrong: {response.text[:100]}"
                except httpx.TransportError as error:
                    answer = type(error).__name__
                self.answers.append((time.monotonic(), answer))
                time.sleep(0.02)


@contextmanager
def client_of(platform: Platform) -> Iterator[Client]:
    with Client(platform) as client:
        client.wait_for_answers(platform, 10)
        yield client


def test_training_and_serving_processes_are_killed(platform: Platform) -> None:
    run = Run(platform)
    killed = run.wait_for_stage("train")
    with client_of(platform) as client:
        os.kill(killed["stage_pid"], signal.SIGKILL)
        kill(platform, serving(platform).name)
        client.wait_for_answers(platform, 20)
        # The gateway sends again what the dying process left, until the next one has loaded its model.
        assert set(client.counts) == {"200"}, client.counts
    assert run.wait_for_stage("train")["id"] != killed["id"]
    tasks = run.end()
    assert tasks["train"]["try_number"] == 2
    assert "killed by SIGKILL" in reasons_of(platform, run.id)


def test_killed_worker_leaves_training_to_the_next_try_and_killed_gateway_keeps_its_routes(platform: Platform) -> None:
    run = Run(platform)
    stage = run.wait_for_stage("train")
    # The executor's process that watches the task, and the task's own: both bear its id, cut to fit their titles.
    task = str(run.tasks()["train"]["id"])[:23]
    doomed = [process.pid for process in psutil.process_iter() if is_worker(command_of(process.pid), task)]
    assert len(doomed) == 2, [command_of(pid) for pid in doomed]
    for pid in doomed:
        os.kill(pid, signal.SIGKILL)
    release = platform.deployed()
    kill(platform, "gateway")
    assert platform.deployed() == release
    tasks = run.end()
    assert tasks["train"]["try_number"] == 2
    workspace = platform.settings.workspaces_dir / "digits" / safe_run_id(run.id) / "train"
    ran = json.loads((workspace / "process.json").read_bytes())
    assert ran["id"] == stage["id"], "training ran twice"


def test_store_mlflow_and_scheduler_are_killed(platform: Platform) -> None:
    run = Run(platform)
    run.wait_for_stage("preprocess")
    kill(platform, "s3", wait=False)
    run.wait_for_stage("train")
    assert service(platform, "s3").ready
    kill(platform, "mlflow", wait=False)
    kill(platform, "airflow-scheduler")
    run.end()


def test_marked_as_failed_ends_the_training(platform: Platform) -> None:
    run = Run(platform)
    stage = run.wait_for_stage("train")
    platform.hooks.airflow.mark("digits", run.id, "failed")
    platform.wait_for("the end of the training", lambda: not stage_processes(platform), 30)
    platform.wait_for("the end of its watcher", lambda: not psutil.pid_exists(stage["pid"]), 15)
    # What Airflow says of the run is left out: its scheduler may just be looking at the run, and on SQLite it then
    # writes over the mark what it makes of a run whose last tasks are skipped.
    states = {name: task["state"] for name, task in run.tasks().items()}
    assert states["train"] == "failed", states
    assert {states[task] for task in ("evaluate", "gate", "release", "deploy", "verify")} == {"skipped"}, states


def test_second_start_is_refused(platform: Platform) -> None:
    record = read_record(platform.settings)
    assert record is not None
    refused = platform.airloom("up", "--embedded", check=False)
    assert refused.returncode != 0
    assert f"is running already (process {record.pid}" in refused.stderr
    assert "airloom down" in refused.stderr
    assert platform.deployed() is not None


def test_taken_port_is_named(platform: Platform, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(platform.project / "dags", other / "dags")
    taken = platform.settings.mlflow_port
    env = {**platform.env, "AIRLOOM_PROJECT": str(other), "AIRLOOM_HOME": str(other / ".airloom")}
    # Its own ports but for one; nothing of it starts.
    for name in ("AIRFLOW", "GIT", "S3", "GATEWAY"):
        env[f"AIRLOOM_{name}_PORT"] = str(free_port())
    for name in ("SERVING", "INTERNAL"):
        first = free_range(20)
        env[f"AIRLOOM_{name}_PORTS"] = f"{first}-{first + 19}"
    done = subprocess.run(
        [AIRLOOM, "up", "--embedded"], cwd=other, env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0
    assert f"port {taken} (AIRLOOM_MLFLOW_PORT) for mlflow is taken by process" in " ".join(done.stderr.split())
    assert "gateway" not in done.stderr


def test_wrong_git_password_is_said(platform: Platform, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(platform.settings.secrets_dir, home / "secrets")
    (home / "secrets" / "git_password").write_text("wrong")
    done = subprocess.run(
        [AIRLOOM, "build", f"{DATA_REPO}@main", "--no-event"],
        cwd=platform.project,
        env={**platform.env, "AIRLOOM_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == AuthError.exit_code
    said = " ".join(done.stderr.split())
    assert f"the git server refused '{platform.settings.git_user}' for repo {DATA_REPO}" in said
    assert "the secret git_password is not what the git server expects" in said


def test_killed_supervisor_leaves_nothing_and_the_next_start_brings_all_back(platform: Platform) -> None:
    release = platform.deployed()
    assert release is not None
    run = Run(platform)
    run.wait_for_stage("train")
    record = read_record(platform.settings)
    assert record is not None
    os.kill(record.pid, signal.SIGKILL)
    platform.wait_for("the end of every process", lambda: not members(platform), 15)
    platform.airloom("up", "--embedded")
    assert all(state.ready for state in platform.hooks.supervisor.services())
    assert platform.deployed() == release
    with client_of(platform) as client:
        assert set(client.counts) == {"200"}
    # Its training was lost with the platform; a later try makes it again.
    run.end()
    assert platform.run()["state"] == "success"
