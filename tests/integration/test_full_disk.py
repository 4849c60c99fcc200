"""A disk and a shared memory that are full, for real: small ones, mounted where nobody else sees them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.stage_repo import write_stage_repo

ALONE = ("unshare", "--user", "--map-root-user", "--mount")
WORKER = """
import dataclasses, json, subprocess, sys
from pathlib import Path
from airloom.contract import Stage, StageRequest
from airloom.errors import AirloomError
from airloom.flows.stage_failure import failure_of, read_result
from airloom.hooks.log_tail import last_lines
from airloom.hooks.process_runner import ProcessRunner
from airloom.hooks.runner import StageJob
from airloom.spec.pipeline import Resources

do, small, workspace, checkout = sys.argv[1], *map(Path, sys.argv[2:])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", small], check=True)
dataset = workspace / "outputs" / "dataset"
dataset.mkdir(parents=True)
job = StageJob(pipeline="digits", run_id="run-1", stage=Stage.PREPROCESS, key="key", workspace=workspace,
               checkout=checkout, memory_bytes=2**30, timeout_seconds=60)
StageRequest(pipeline="digits", run_id="run-1", stage=Stage.PREPROCESS, commit="c", params={"do": do},
             outputs={"dataset": dataset}).write(job.request_file)
if do == "start":
    with open(workspace / "large", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
runner = ProcessRunner(poll_seconds=0.05)
try:
    handle = runner.start(job)
except AirloomError as error:
    print(json.dumps({"kind": type(error).__name__, "message": error.message, "hint": error.hint}))
    sys.exit()
job_exit = runner.wait(handle, lambda line: None, lambda: False)
result, why = read_result(job.result_file, job.stage)
error = failure_of(pipeline="digits", stage=job.stage, job_exit=job_exit, result=result, why_no_result=why,
                   log=last_lines(workspace / "log.txt", 15), log_file=workspace / "log.txt", resources=Resources())
print(json.dumps({"exit": dataclasses.asdict(job_exit), "message": error.message, "hint": error.hint,
                  "retryable": error.retryable}))
"""


def run(do: str, small: Path, workspace: Path, checkout: Path) -> dict[str, Any]:
    """Run a stage in a mount namespace of its own in which `small` holds 512 KiB."""
    command = [*ALONE, sys.executable, "-c", WORKER, do, str(small), str(workspace), str(checkout)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module", autouse=True)
def _may_mount() -> None:
    command = [*ALONE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        why = f"no file system can be mounted here: {done.stderr.strip()}"
        if os.environ.get("AIRLOOM_REQUIRE_MOUNTS") == "1":
            pytest.fail(why)
        pytest.skip(why)


def test_disk_that_the_stage_fills(tmp_path: Path) -> None:
    """Nothing can be written any more, and yet the exit is known, with the reason and what to do."""
    workspace = tmp_path / "small" / "workspace"
    workspace.parent.mkdir()
    found = run("fill_disk", workspace.parent, workspace, write_stage_repo(tmp_path / "checkout"))
    assert (found["exit"]["reason"], found["exit"]["exit_code"]) == ("exited", 1)
    assert "there is no room left: 0 KiB of 512 KiB free in" in found["hint"]
    assert str(workspace) in found["hint"]
    assert found["retryable"] is False


def test_disk_that_is_full_before(tmp_path: Path) -> None:
    workspace = tmp_path / "small" / "workspace"
    workspace.parent.mkdir()
    found = run("start", workspace.parent, workspace, write_stage_repo(tmp_path / "checkout"))
    assert found["kind"] == "StorageFullError"
    assert "no room for a stage's files" in found["message"]


def test_shared_memory_that_the_stage_fills(tmp_path: Path) -> None:
    found = run("fill_shared_memory", Path("/dev/shm"), tmp_path / "w", write_stage_repo(tmp_path / "checkout"))
    assert found["exit"]["reason"] == "signalled"
    assert "SIGBUS" in found["message"]
    assert "shared memory is full: 0 KiB of 512 KiB free in /dev/shm" in found["hint"]
    assert found["retryable"] is False
