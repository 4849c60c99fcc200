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

from airloom.contract.plan import safe_run_id
from airloom.embedded import guard
from airloom.embedded.instance import read_record
from airloom.errors import AirloomError, AuthError
from airloom.flows.release import REFERENCE_FILE, bundle_path, release_of
from airloom.hooks import process_tree
from airloom.hooks.airflow_api import AirflowApi
from airloom.hooks.mlflow_records import RUN_TAG
from airloom.hooks.supervisor import ServiceState
from tests.e2e.actions import STAGES, held, process_of
from tests.e2e.conftest import AIRLOOM, RUN_SECONDS, Platform
from tests.fixtures.airflow import command_of, kill_worker
from tests.fixtures.mlflow import runs_with
from tests.fixtures.services import free_port, free_range

DATA_REPO = "de_datapreprocessing"
ENDED = {"success", "failed"}
ASK_SECONDS = 10.0


class Run:
    """A run that is under way, and what it must leave behind."""

    def __init__(self, platform: Platform) -> None:
        self.platform = platform
        started = platform.airloom("run", "digits", "--force", "--no-wait", "--json")
        self.id = str(json.loads(started.stdout)["run_id"])
        # While it answers late, if at all, a stage may begin and end.
        self._impatient = AirflowApi.from_settings(platform.settings, patience_seconds=0)
        self._asked_at = time.monotonic()

    def state(self) -> str:
        return str(self._ask(lambda: self.platform.hooks.airflow.run("digits", self.id)["state"]))

    def tasks(self) -> dict[str, dict[str, Any]]:
        found = self._ask(lambda: self.platform.hooks.airflow.task_instances("digits", self.id))
        return {task["task_id"]: dict(task) for task in found or []}

    def process_file(self, stage: str) -> dict[str, Any] | None:
        """What is known of the process that the stage was started as last, which may have ended."""
        return process_of(self.platform, self.id, stage)

    def stage_process(self, stage: str) -> dict[str, Any] | None:
        """The stage's process file while the stage's own process lives."""
        facts = self.process_file(stage)
        return facts if facts and f"main.py {stage}" in command_of(facts["stage_pid"]) else None

    def processes(self) -> list[str]:
        """Those of its stages."""
        commands = [command_of(pid) for pid in members(self.platform)]
        wanted = tuple(f"main.py {stage}" for stage in STAGES)
        return [found for found in commands if safe_run_id(self.id) in found and any(name in found for name in wanted)]

    def wait_for_start(self, stage: str) -> None:
        """Until the stage was started, however short its life is."""
        self._wait_for(f"the start of stage {stage}", lambda: self.process_file(stage))

    def wait_for_stage(self, stage: str) -> dict[str, Any]:
        """Until the stage's own process runs."""
        return self._wait_for(f"stage {stage}", lambda: self.stage_process(stage))

    def end(self) -> dict[str, dict[str, Any]]:
        """Wait for the end, which must be success, and look for what was done twice or left over; the tasks."""
        ended, platform = set[str](), self.platform

        def over() -> bool:
            ended.update({self.state()} & ENDED)
            return bool(ended)

        platform.wait_for(f"the end of {self.id}", over, RUN_SECONDS, evidence=self.reasons)
        tasks: dict[str, dict[str, Any]] = platform.wait_for(f"the tasks of {self.id}", self.tasks)
        states = {name: (task["state"], task["try_number"]) for name, task in tasks.items()}
        assert ended == {"success"}, self.reasons()
        assert {state for state, _ in states.values()} == {"success"}, self.reasons()
        assert len(tags_of(self.platform, self.id)) == 1
        (run,) = runs_with(self.platform.hooks.mlflow, RUN_TAG, self.id)
        assert run.status == "FINISHED"
        assert len(self.platform.hooks.mlflow.versions("digits", run_id=run.run_id)) == 1
        platform.wait_for("the end of all stages", lambda: not self.processes(), 120, evidence=self.processes)
        return tasks

    def reasons(self) -> str:
        return self.platform.reasons(self.id)

    def _wait_for(self, what: str, condition: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
        def unless_ended() -> dict[str, Any] | None:
            found = condition()
            if found is None and time.monotonic() - self._asked_at > ASK_SECONDS:
                state = self._ask(lambda: self._impatient.run("digits", self.id)["state"])
                self._asked_at = time.monotonic()
                assert state not in ENDED, f"{self.id} has ended without {what}\n{self.reasons()}"
            return found

        found: dict[str, Any] = self.platform.wait_for(
            f"{what} of {self.id}", unless_ended, RUN_SECONDS, evidence=self.reasons
        )
        return found

    @staticmethod
    def _ask(question: Callable[[], Any]) -> Any:
        """An answer, or None while the one who is asked is down."""
        try:
            return question()
        except AirloomError:
            return None


def members(platform: Platform) -> set[int]:
    return guard.members(platform.settings.instance_id)


def tags_of(platform: Platform, run_id: str) -> list[str]:
    tags = platform.hooks.git.list_tags(DATA_REPO)
    return [tag.name for tag in tags if tag.message and json.loads(tag.message).get("run_id") == run_id]


def service(platform: Platform, name: str) -> ServiceState:
    return platform.hooks.supervisor.service(name)


def serving(platform: Platform) -> ServiceState:
    """The process of the release that answers; two live for as long as the other is drained."""
    release = platform.wait_for("an answer of the release", platform.deployed)
    return service(platform, f"serving-digits-{release}")


def kill(platform: Platform, name: str, *, wait: bool = True) -> ServiceState:
    """SIGKILL a service and see that the supervisor has it back on the same port."""
    before = service(platform, name)
    assert before.pid is not None, before
    os.kill(before.pid, signal.SIGKILL)
    if wait:
        wait_for_return(platform, before)
    return before


def wait_for_return(platform: Platform, before: ServiceState) -> None:
    """Until the supervisor has a killed service back."""

    def back() -> bool:
        now = service(platform, before.name)
        return now.ready and now.pid not in (None, before.pid) and now.restarts > before.restarts

    platform.wait_for(f"{before.name} after its kill", back, evidence=lambda: service(platform, before.name))
    assert service(platform, before.name).port == before.port


class Client:
    """Asks for predictions through the gateway, one after the other."""

    def __init__(self, platform: Platform) -> None:
        self.url = platform.hooks.gateway.model_url("digits") + "/predict"
        release = platform.wait_for("an answer of the release", platform.deployed)
        self.image = bundle_path(platform.hooks, release_of(platform.hooks, "digits", release)) / REFERENCE_FILE
        self.answers: list[str] = []
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
        return Counter(list(self.answers))

    def wait_for_answers(self, platform: Platform, number: int) -> None:
        """Until so many more have been answered well."""
        wanted = self.counts["200"] + number
        platform.wait_for(
            "answers through the gateway", lambda: self.counts["200"] >= wanted, evidence=lambda: self.counts
        )

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
                self.answers.append(answer)
                time.sleep(0.02)


@contextmanager
def client_of(platform: Platform) -> Iterator[Client]:
    with Client(platform) as client:
        client.wait_for_answers(platform, 10)
        yield client


def test_training_and_serving_processes_are_killed(platform: Platform) -> None:
    run = Run(platform)
    with client_of(platform) as client:
        killed = run.wait_for_stage("train")
        with held(killed["stage_pid"]):  # else the run may end what is killed here before it is back
            kill(platform, serving(platform).name)
            client.wait_for_answers(platform, 20)
            os.kill(killed["stage_pid"], signal.SIGKILL)
        # The gateway sends again what the dying process left, until the next one has loaded its model.
        assert set(client.counts) == {"200"}, client.counts
    tasks = run.end()
    again = run.process_file("train")
    assert again is not None
    assert again["id"] != killed["id"]
    assert tasks["train"]["try_number"] >= 2, run.reasons()
    assert "killed by SIGKILL" in run.reasons()


def test_killed_worker_leaves_training_to_the_next_try_and_killed_gateway_keeps_its_routes(platform: Platform) -> None:
    run = Run(platform)
    stage = run.wait_for_stage("train")
    release = platform.wait_for("an answer of the release", platform.deployed)
    with held(stage["stage_pid"]):  # else it may be done before its worker is found
        kill_worker(platform.wait_for("its tasks", run.tasks)["train"])
    kill(platform, "gateway")
    platform.wait_for("the gateway's routes", lambda: platform.deployed() == release, 60, evidence=platform.deployed)
    tasks = run.end()
    assert tasks["train"]["try_number"] >= 2, run.reasons()
    ran = run.process_file("train")
    assert ran is not None
    assert ran["id"] == stage["id"], "training ran twice"


def test_store_mlflow_and_scheduler_are_killed(platform: Platform) -> None:
    run = Run(platform)
    run.wait_for_start("preprocess")
    killed = kill(platform, "s3", wait=False)
    run.wait_for_start("train")
    wait_for_return(platform, killed)
    stopped = kill(platform, "mlflow", wait=False)
    kill(platform, "airflow-scheduler")
    tasks = run.end()
    wait_for_return(platform, stopped)
    assert {tasks[stage]["state"] for stage in STAGES} == {"success"}, run.reasons()


def test_marked_as_failed_ends_the_training(platform: Platform) -> None:
    run = Run(platform)
    stage = run.wait_for_stage("train")
    with held(stage["stage_pid"]):
        platform.hooks.airflow.mark("digits", run.id, "failed")
    platform.wait_for("the end of the training", lambda: not run.processes(), 120, evidence=run.processes)
    watches = (int(stage["pid"]), str(stage["started"]))
    platform.wait_for("the end of its watcher", lambda: not process_tree.is_alive(*watches), 60)
    # What Airflow says of the run is left out: its scheduler may just be looking at the run, and on SQLite it then
    # writes over the mark what it makes of a run whose last tasks are skipped.
    states = {name: task["state"] for name, task in platform.wait_for("its tasks", run.tasks).items()}
    assert states["train"] == "failed", run.reasons()
    assert {states[task] for task in ("evaluate", "gate", "release", "deploy", "verify")} == {"skipped"}, states


def test_second_start_is_refused(platform: Platform) -> None:
    record = read_record(platform.settings)
    assert record is not None
    refused = platform.airloom("up", "--embedded", check=False)
    assert refused.returncode != 0
    assert f"is running already (process {record.pid}" in refused.stderr
    assert "airloom down" in refused.stderr
    platform.wait_for("an answer of the release", platform.deployed)


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
        [AIRLOOM, "up", "--embedded"], cwd=other, env=env, capture_output=True, text=True, timeout=180, check=False
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
        timeout=180,
        check=False,
    )
    assert done.returncode == AuthError.exit_code
    said = " ".join(done.stderr.split())
    assert f"the git server refused '{platform.settings.git_user}' for repo {DATA_REPO}" in said
    assert "the secret git_password is not what the git server expects" in said


def test_killed_supervisor_leaves_nothing_and_the_next_start_brings_all_back(platform: Platform) -> None:
    release = platform.wait_for("an answer of the release", platform.deployed)
    run = Run(platform)
    run.wait_for_stage("train")
    record = read_record(platform.settings)
    assert record is not None
    os.kill(record.pid, signal.SIGKILL)
    platform.wait_for(
        "the end of every process",
        lambda: not members(platform),
        120,
        evidence=lambda: [command_of(pid) for pid in members(platform)],
    )
    platform.airloom("up", "--embedded")
    services = platform.hooks.supervisor.services
    platform.wait_for("all services", lambda: all(state.ready for state in services()), evidence=services)
    now = platform.wait_for("an answer of the release", platform.deployed)
    if now != release:  # the run, which goes on, was quick
        assert now == platform.returned(run.id, "release")["version"]
    with client_of(platform) as client:
        assert set(client.counts) == {"200"}, client.counts
    # Its training was lost with the platform; a later try makes it again.
    run.end()
    assert platform.run()["state"] == "success"
