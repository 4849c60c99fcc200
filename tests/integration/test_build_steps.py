"""A build in steps, each a command of its own as a stage of Jenkins runs it: real git, real store, real kills."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from airloom.embedded import git_server
from airloom.flows.build import build, build_until, find_build, find_failure
from airloom.flows.build_steps import Step
from airloom.flows.pushes import Push, list_pushes
from airloom.hooks.connect import Hooks
from airloom.hooks.object_store import ObjectStore
from airloom.settings import Settings
from tests.conftest import make_settings
from tests.fixtures.git import StageRepoFixture
from tests.fixtures.pushes import GOOD, MAIN, STAGES, AirflowDouble, status, wait_for

STEPS: tuple[Step, ...] = get_args(Step)
AIRLOOM = (sys.executable, "-c", "import sys; from airloom.cli.main import main; sys.argv[0] = 'airloom'; main()")
TESTS = "tests: [tests]\n"


class Job:
    """A job of Jenkins for one commit, on a machine with a home of its own."""

    def __init__(self, repo: StageRepoFixture, sha: str, home: Path) -> None:
        ports = {name: getattr(repo.settings, name) for name in ("s3_port", "git_port", "airflow_port")}
        self.settings = make_settings(home, **ports)
        self.hooks = Hooks(self.settings)
        self.repo, self.sha = repo, sha

    def start(self, step: Step) -> subprocess.Popen[str]:
        target = f"{self.repo.name}@{self.sha}"
        push = ("--once", "--pusher", "ada", "--delivery", f"delivery-{self.sha[:8]}")
        # As the git server that comes along hands its settings on.
        environment = {**os.environ, **git_server.service(self.settings).env}
        return subprocess.Popen(
            [*AIRLOOM, "build", target, "--until", step, *push],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, step: Step) -> tuple[int, str]:
        process = self.start(step)
        said, _ = process.communicate(timeout=120)
        return process.returncode, said

    @property
    def push(self) -> Push:
        (found,) = list_pushes(self.hooks, repo=self.repo.name).pushes
        return found


@pytest.fixture
def commit(stage_repo: StageRepoFixture, s3_store: ObjectStore, airflow_double: AirflowDouble, tmp_path: Path) -> Any:
    """Push files, and have a job for them."""

    def push(files: dict[str, str | bytes], home: str = "home") -> Job:
        sha = stage_repo.commit_files("One", files)
        stage_repo.push()
        return Job(stage_repo, sha, tmp_path / home)

    return push


def counting(runs: Path) -> dict[str, str | bytes]:
    """Files of a commit that note each time they are tested."""
    test = f"def test_it():\n    open({str(runs)!r}, 'a').write('x')\n"
    return {**GOOD, "stages.yaml": TESTS + STAGES, "tests/test_it.py": test}


def test_five_commands_are_one_build(commit: Any, airflow_double: AirflowDouble, tmp_path: Path) -> None:
    job = commit(counting(tmp_path / "runs"))
    said = {}
    for step in STEPS[:-1]:
        code, said[step] = job.run(step)
        assert code == 0, said[step]
        assert status(job.repo, job.sha) == ("pending", "inspect" if step in {"inspect", "build"} else "test")
        assert job.push.build == "running or killed"
        assert find_build(job.hooks, job.repo.name, job.sha) is None
    assert "linting" in said["inspect"]
    assert "no image is built" in said["build"]
    assert "testing" in said["test"]
    assert "tested already" in said["push"]
    assert "no image is pushed" in said["push"]
    assert airflow_double.of(job.repo.name) == []

    code, last = job.run("report")
    assert (code, "built in" in last) == (0, True)
    assert status(job.repo, job.sha)[0] == "success"
    assert [extra["pusher"] for extra in airflow_double.of(job.repo.name)] == ["ada"]
    push = job.push
    assert (push.build, push.builds, push.asked_by) == ("built", 1, "push")
    assert push.deliveries == [f"delivery-{job.sha[:8]}"]
    record = find_build(job.hooks, job.repo.name, job.sha)
    assert record is not None
    assert push.build_seconds >= record.seconds  # type: ignore[operator]
    assert (tmp_path / "runs").read_text() == "x"
    assert list(job.hooks.store.list("airloom", f"building/{job.repo.name}/")) == []

    # The job is run again: nothing is left to do.
    for step in STEPS:
        assert "was built already" in job.run(step)[1]
    assert (tmp_path / "runs").read_text() == "x"
    assert len(airflow_double.of(job.repo.name)) == 1
    assert (job.push.build, job.push.deliveries) == ("built", push.deliveries)


@pytest.mark.parametrize(
    ("files", "fails", "said"),
    [
        ({"main.py": "x ="}, "inspect", "main.py:1: invalid syntax"),
        ({"main.py": f"{MAIN}nowhere\n"}, "inspect", "F821"),
        ({"main.py": "import no_such_package\n"}, "test", "no_such_package"),
        ({"stages.yaml": TESTS + STAGES, "tests/test_it.py": "def test_it():\n    assert 1 == 2\n"}, "test", "failed"),
    ],
)
def test_the_stage_that_fails_is_the_one_at_fault(
    commit: Any, airflow_double: AirflowDouble, files: dict[str, str | bytes], fails: Step, said: str
) -> None:
    job = commit({**GOOD, **files})
    codes = [job.run(step)[0] for step in STEPS[: STEPS.index(fails) + 1]]
    assert codes[-1] != 0
    assert set(codes[:-1]) <= {0}
    state, description = status(job.repo, job.sha)
    assert state == "failure"
    assert said in description
    assert find_failure(job.hooks, job.repo.name, job.sha) is not None
    push = job.push
    assert (push.build, push.builds, said in push.reason) == ("failed", 1, True)
    assert airflow_double.of(job.repo.name) == []
    assert list(job.hooks.store.list("airloom", f"building/{job.repo.name}/")) == []


def test_killed_in_a_step_the_next_command_goes_on(commit: Any, airflow_double: AirflowDouble, tmp_path: Path) -> None:
    met, opened = tmp_path / "met", tmp_path / "opened"
    gate = (
        "import pathlib, time\n"
        f"met, opened = pathlib.Path({str(met)!r}), pathlib.Path({str(opened)!r})\n"
        "met.touch()\nwhile not opened.exists():\n    time.sleep(0.02)\n"
    )
    job = commit({**counting(tmp_path / "runs"), "main.py": gate + MAIN})
    assert job.run("build")[0] == 0
    process = job.start("test")
    wait_for(lambda: met.exists() or process.poll() is not None, "the check")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    assert job.push.build == "running or killed"
    opened.touch()
    code, said = job.run("report")
    assert (code, "inspected already" in said) == (0, True)
    assert "linting" not in said
    push = job.push
    assert (push.build, push.builds) == ("built", 1)
    assert (tmp_path / "runs").read_text() == "x"
    assert len(airflow_double.of(job.repo.name)) == 1


def test_another_machine_goes_on(commit: Any, tmp_path: Path) -> None:
    job = commit(counting(tmp_path / "runs"))
    assert build_until(job.hooks, job.repo.name, job.sha, "test", asked_by="push") is None
    other = Job(job.repo, job.sha, tmp_path / "other")
    lines: list[str] = []
    record = build(other.hooks, job.repo.name, job.sha, lines.append, asked_by="reconciler")
    assert record.created
    assert (other.settings.checkouts_dir / job.repo.name / job.sha).is_dir()
    assert [line for line in lines if "tested already" in line]
    assert (tmp_path / "runs").read_text() == "x"
    assert (job.push.build, job.push.builds, job.push.asked_by) == ("built", 1, "push")


def test_a_step_is_left_to_whoever_takes_it(commit: Any, tmp_path: Path, session_settings: Settings) -> None:
    """Two jobs at once, as of two deliveries of one push: each step is done once."""
    job = commit(counting(tmp_path / "runs"))
    other = Job(job.repo, job.sha, tmp_path / "other")
    for step in STEPS:
        processes = [job.start(step), other.start(step)]
        outputs = [process.communicate(timeout=120)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], outputs
    assert (tmp_path / "runs").read_text() == "x"
    assert (job.push.build, len(job.push.deliveries)) == ("built", 1)
