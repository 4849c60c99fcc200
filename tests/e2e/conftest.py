"""The whole platform, started as a person starts it, in a project folder and on ports of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from airloom.cli.runs import summarize
from airloom.errors import AirloomError, UnavailableError
from airloom.flows.gate import split_metrics
from airloom.hooks.airflow_api import FINISHED
from airloom.hooks.connect import Hooks
from airloom.settings import Settings
from tests.fixtures.services import free_port, free_range

ROOT = Path(__file__).parents[2]
AIRLOOM = str(Path(sys.executable).with_name("airloom"))
# Far more than a run needs alone on a machine: what is waited for here comes later where others use it.
RUN_SECONDS = 900.0


class Platform:
    """A platform and the command line that a person would use. `more`: settings beside its folder and ports."""

    def __init__(self, folder: Path, **more: str) -> None:
        self.project = folder / "project with spaces"
        shutil.copytree(ROOT / "dags", self.project / "dags", ignore=shutil.ignore_patterns("__pycache__"))
        ignored = shutil.ignore_patterns("__pycache__", ".*_cache")
        shutil.copytree(ROOT / "gitbucket_repos", self.project / "gitbucket_repos", ignore=ignored)
        self.config = self.project / "dags" / "configs" / "digits.yaml"
        config = yaml.safe_load(self.config.read_text())
        config["stages"]["train"]["params"]["epochs"] = 4  # less accurate than the demo's, and quicker
        config["gate"]["thresholds"]["accuracy"]["min"] = 0.9
        config["deploy"]["canary"]["step_time"] = "2s"
        self.config.write_text(yaml.safe_dump(config, sort_keys=False))
        serving, internal = free_range(20), free_range(20)
        ports = {name: free_port() for name in ("airflow_port", "git_port", "mlflow_port", "s3_port", "gateway_port")}
        values = {
            "project": self.project,
            "home": self.project / ".airloom",
            **ports,
            "serving_ports": f"{serving}-{serving + 19}",
            "internal_ports": f"{internal}-{internal + 19}",
            **more,
        }
        self.settings = Settings(_env_file=None, **values)
        self.env = {key: value for key, value in os.environ.items() if not key.startswith(("AIRLOOM_", "AIRFLOW_"))}
        self.env |= {f"AIRLOOM_{name.upper()}": str(value) for name, value in values.items()}
        self.hooks = Hooks(self.settings)
        self.first: dict[str, Any] = {}
        self.demo_said = ""

    def airloom(
        self, *arguments: str, check: bool = True, timeout: float = RUN_SECONDS
    ) -> subprocess.CompletedProcess[str]:
        """Run the command line in the project's folder."""
        done = subprocess.run(
            [AIRLOOM, *arguments],
            cwd=self.project,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and done.returncode != 0:
            said = f"{done.stdout}\n{done.stderr}"
            raise AssertionError(f"airloom {' '.join(arguments)} ended with {done.returncode}\n{said}")
        return done

    def run(self, *arguments: str) -> dict[str, Any]:
        """Run the pipeline to its end; the summary that `airloom run --json` prints."""
        result: dict[str, Any] = json.loads(self.airloom("run", "digits", "--json", *arguments).stdout)
        return result

    def evaluated(self, run_id: str) -> tuple[dict[str, float], str]:
        """A run's own metrics, without those of the champion beside it, and the digest of its predictions."""
        result = self.returned(run_id, "evaluate")["result"]
        return split_metrics(result["metrics"])[0], result["facts"]["predictions_digest"]

    def latest(self) -> dict[str, Any]:
        """The summary of the newest run, which has ended."""
        return summarize(self.hooks, "digits", self.hooks.airflow.runs("digits", limit=1)[0])

    def wait_for(
        self,
        what: str,
        condition: Callable[[], Any],
        timeout: float = 300,
        *,
        evidence: Callable[[], object] = lambda: "",
    ) -> Any:
        """Poll until the condition gives something true. `evidence`: asked when it does not, for the error.

        Who does not answer for a while, such as a database that is busy, gives nothing yet.
        """
        deadline = time.monotonic() + timeout
        silent: UnavailableError | None = None
        while True:
            try:
                found, silent = condition(), None
            except UnavailableError as error:
                found, silent = None, error
            if found:
                return found
            if time.monotonic() > deadline:
                break
            time.sleep(0.2)
        try:
            said = evidence()
        except Exception as error:  # what is waited for is the news, and not this
            said = f"why is not known: {error}"
        said = f"{said}\n{silent}" if silent else said
        raise AssertionError(f"{what} has not come within {timeout:g} s\n{said}".rstrip())

    def ended(self, run_id: str, pipeline: str = "digits") -> dict[str, Any]:
        """Wait for a run's end; the run."""

        def over() -> dict[str, Any] | None:
            run = self.hooks.airflow.run(pipeline, run_id)
            return run if run["state"] in FINISHED else None

        found: dict[str, Any] = self.wait_for(
            f"the end of {run_id}", over, RUN_SECONDS, evidence=lambda: self.reasons(run_id, pipeline)
        )
        return found

    def reasons(self, run_id: str, pipeline: str = "digits") -> str:
        """How far each task of a run is, and why tries of it have failed: what a failing test has to show."""
        try:
            tasks = self.hooks.airflow.task_instances(pipeline, run_id)
            tries = self.hooks.ledger.tasks(pipeline, run_id)
        except AirloomError as error:
            return f"nothing is known of {run_id}: {error}"
        lines = [f"{task['task_id']}: {task['state']}, try {task['try_number']}" for task in tasks]
        said = [f"{found.task}, try {found.attempt}, {found.state}: {found.reason}" for found in tries if found.reason]
        return "\n".join([*lines, *said])

    def returned(self, run_id: str, task: str) -> dict[str, Any]:
        """What a task of a run handed on."""
        value: dict[str, Any] = self.hooks.airflow.xcom("digits", run_id, task)
        return value

    def clone(self, repo: str, folder: Path) -> Path:
        """Clone a stage repo as a person would."""
        url = self.hooks.git.clone_url(repo).replace(
            "://", f"://{self.settings.git_user}:{self.settings.secret('git_password')}@"
        )
        self._git("clone", "-q", url, str(folder))
        return folder

    def push(self, folder: Path, message: str) -> str:
        """Commit everything and push; the commit."""
        here = ("-C", str(folder), "-c", "user.name=Ada", "-c", "user.email=ada@example.org")
        self._git(*here, "commit", "-q", "-a", "-m", message)
        self._git(*here, "push", "-q", "origin", "main")
        return self._git(*here, "rev-parse", "HEAD").strip()

    def _git(self, *arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, env=self.env, check=False)
        assert done.returncode == 0, f"git ended with {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout

    def deployed(self) -> str | None:
        """The release that answers now, from the gateway itself."""
        import httpx

        try:
            answer = httpx.get(self.hooks.gateway.model_url("digits") + "/info", timeout=90, trust_env=False)
        except httpx.TransportError:
            return None
        return str(answer.json().get("release")) if answer.status_code == 200 else None


@pytest.fixture(scope="session")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """As `make demo` leaves it: started, provisioned, one run of `digits` has ended, release 1.0.0 answers."""
    found = Platform(tmp_path_factory.mktemp("e2e"))
    try:  # a start that fails half way has services running too
        found.demo_said = found.airloom("demo").stdout
        found.first = found.latest()
        assert found.first["state"] == "success", found.first
        yield found
    finally:
        found.airloom("down", check=False)
