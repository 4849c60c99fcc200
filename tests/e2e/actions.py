"""What more than one file of these tests does with the platform."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from airloom.cli.runs import summarize
from airloom.contract import RunPlan
from airloom.contract.build import BuildRecord
from airloom.contract.plan import safe_run_id
from airloom.errors import NotFoundError
from airloom.flows.build import find_build
from airloom.hooks.serving import ServingClient
from tests.e2e.conftest import RUN_SECONDS, Platform

RAW = "raw"
STAGES = ("preprocess", "train", "evaluate")
PARAMS = "params = TrainParams.of(request.params)"


def edit(path: Path, old: str, new: str) -> None:
    """Replace one piece of a file, which must stand there once."""
    text = path.read_text()
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {path}"
    path.write_text(text.replace(old, new))


def caches(summary: dict[str, Any]) -> dict[str, str]:
    """Stage -> how its result came about.

    A task that is tried again after its result was noted takes that one: it is the run's own.
    """
    own = f"equal to run {summary['run_id']}"
    return {
        task["task"]: "miss" if (task["cache"], task["reason"]) == ("hit", own) else task["cache"]
        for task in summary["tasks"]
        if task["task"] in STAGES
    }


def code_of(platform: Platform, run_id: str) -> dict[str, str]:
    """repo -> commit that a run is pinned to; empty before it is."""
    try:
        plan = RunPlan.model_validate(platform.returned(run_id, "resolve"))
    except NotFoundError:
        return {}
    return {repo: pin.commit for repo, pin in plan.code.items()}


def started_by_push(platform: Platform, repo: str, commit: str, *, timeout: float = 600) -> str:
    """Wait for the run that a push starts, until it is pinned to its commits; its id."""

    def found() -> str | None:
        recent = platform.hooks.airflow.runs("digits", limit=10)
        started = [run["dag_run_id"] for run in recent if run["run_type"] == "asset_triggered"]
        return next((run_id for run_id in started if code_of(platform, run_id).get(repo) == commit), None)

    def known() -> object:
        pushes = platform.airloom("pushes", "--repo", repo, "-n", "3", "--json").stdout
        return f"{pushes}\n{platform.hooks.gitbucket.statuses(repo, commit)}"

    run_id: str = platform.wait_for(f"a run of {repo}@{commit[:8]}", found, timeout, evidence=known)
    return run_id


def run_of_push(platform: Platform, repo: str, commit: str, *, timeout: float = 600) -> dict[str, Any]:
    """Wait for the run that a push has started, to its end; its summary."""
    run_id = started_by_push(platform, repo, commit, timeout=timeout)
    summary = summarize(platform.hooks, "digits", platform.ended(run_id))
    plan = RunPlan.model_validate(platform.returned(run_id, "resolve"))
    assert plan.trigger.kind == "push"
    assert commit[:8] in plan.trigger.detail
    return summary


def wait_for_build(platform: Platform, repo: str, commit: str) -> BuildRecord:
    """Wait until a commit is built; the record of it."""
    record: BuildRecord = platform.wait_for(
        f"the build of {repo}@{commit[:8]}",
        lambda: find_build(platform.hooks, repo, commit),
        RUN_SECONDS,
        evidence=lambda: platform.hooks.gitbucket.statuses(repo, commit),
    )
    return record


def process_of(platform: Platform, run_id: str, stage: str) -> dict[str, Any] | None:
    """What is known of the process that a stage was started as last, which may have ended."""
    file = platform.settings.workspaces_dir / "digits" / safe_run_id(run_id) / stage / "process.json"
    try:
        facts: dict[str, Any] = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    return facts if facts.get("stage_pid") else None


@contextmanager
def held(pid: int) -> Iterator[None]:
    """Let a process do nothing meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def picture(platform: Platform) -> bytes:
    """One of the raw files."""
    store = platform.hooks.store
    return store.get_bytes(RAW, next(iter(store.list(RAW, "digits/3/"))).key)


def predicted(platform: Platform) -> dict[str, Any]:
    with ServingClient(platform.hooks.gateway.model_url("digits")) as client:
        return dict(client.predict(picture(platform), "image/png").body)
