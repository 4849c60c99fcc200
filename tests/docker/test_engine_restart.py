"""An engine of its own that is restarted under a running stage, with and without its containers."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from airloom.contract import Stage, StageRequest
from airloom.errors import UnavailableError
from airloom.hooks.docker_runner import DockerRunner
from airloom.hooks.runner import ExitReason, StageJob
from airloom.settings import Settings
from tests.conftest import make_settings

pytest_plugins = ["tests.fixtures.stage_image"]


class Engine:
    """A dockerd with folders, socket and images of its own, without networks."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.host = f"unix://{folder}/docker.sock"
        self._log = folder / "dockerd.log"
        self._command = [
            # In a network of its own: an engine without a bridge removes the one that it finds, which is another's.
            *("unshare", "--net", "dockerd", "--data-root", str(folder / "data"), "--exec-root", str(folder / "exec")),
            *("--pidfile", str(folder / "pid"), "--host", self.host, "--bridge", "none", "--iptables=false", *options),
        ]

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while self.run("info").returncode:
            assert self._process.poll() is None, self._log.read_text()[-2000:]
            assert time.monotonic() < deadline, self._log.read_text()[-2000:]
            time.sleep(0.2)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(60)

    def run(self, *arguments: str, **options: object) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(["docker", "--host", self.host, *arguments], capture_output=True, check=False, **options)  # type: ignore[call-overload,no-any-return]


@pytest.fixture(params=["stops its containers", "keeps them running"])
def engine(request: pytest.FixtureRequest, tmp_path: Path, stage_image: str) -> Iterator[Engine]:
    if shutil.which("dockerd") is None or os.getuid():
        if os.environ.get("AIRLOOM_REQUIRE_DOCKER") == "1":
            pytest.fail("dockerd and root are needed to start an engine", pytrace=False)
        pytest.skip("dockerd and root are needed to start an engine")
    found = Engine(tmp_path, *(["--live-restore"] if request.param == "keeps them running" else []))
    found.start()
    try:
        saved = subprocess.run(["docker", "save", stage_image], capture_output=True, check=True)
        assert found.run("load", input=saved.stdout).returncode == 0
        yield found
    finally:
        found.run("rm", "-f", *found.run("ps", "-aq").stdout.decode().split())
        found.stop()
        for line in Path("/proc/mounts").read_text().splitlines()[::-1]:
            if line.split()[1].startswith(f"{tmp_path}/"):
                subprocess.run(["umount", "--lazy", line.split()[1]], check=False)


def job_of(settings: Settings, image: str) -> StageJob:
    workspace = settings.workspaces_dir / "digits" / "run-1" / "preprocess"
    job = StageJob(
        pipeline="digits", run_id="run-1", stage=Stage.PREPROCESS, key="key", workspace=workspace, checkout=workspace,
        image=image, memory_bytes=2**28, timeout_seconds=120.0,
    )  # fmt: skip
    StageRequest(
        pipeline="digits", run_id="run-1", stage=Stage.PREPROCESS, commit="c" * 40,
        params={"do": "lines", "lines": 50, "pause": 0.2}, outputs={"dataset": workspace / "outputs" / "dataset"},
    ).write(job.request_file)  # fmt: skip
    return job


def test_stage_outlives_its_engine_or_is_run_again(engine: Engine, tmp_path: Path, stage_image: str) -> None:
    settings = make_settings(tmp_path / "home", docker_host=engine.host)
    runner, job = DockerRunner(settings, poll_seconds=0.05), job_of(settings, stage_image)
    first, lines = runner.start(job), []

    def on_log(line: str) -> None:
        lines.append(line)
        if line == "line 3":
            engine.stop()

    with pytest.raises(UnavailableError):  # which the task's next try takes up
        runner.wait(first, on_log, lambda: False)
    engine.start()

    later = DockerRunner(settings, poll_seconds=0.05)
    found = later.find(job.workspace)
    assert found is not None
    assert found.id == first.id
    ended = later.wait(found, lines.append, lambda: False)
    if ended.reason is not ExitReason.EXITED:
        assert ended.reason in {ExitReason.SIGNALLED, ExitReason.LOST}, ended
        again = later.start(job)
        lines.clear()
        ended = later.wait(again, lines.append, lambda: False)
        found = again
    assert (ended.reason, ended.exit_code) == (ExitReason.EXITED, 0), (ended, lines[-5:])
    assert (job.workspace / "result.json").exists()
    assert lines[-1] == "line 49"
    later.mark_collected(found)
    assert engine.run("ps", "-aq").stdout == b""
    assert engine.run("volume", "ls", "-q").stdout == b""
