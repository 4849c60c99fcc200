"""End stages and containers of tasks that no live run owns: of workers that were killed, of runs marked as failed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from airloom.contract import Frozen
from airloom.errors import NotFoundError
from airloom.hooks import process_tree
from airloom.hooks.docker_runner import LOCK_FILE, DockerRunner, find_containers
from airloom.hooks.docker_task import find_task_containers
from airloom.hooks.process_environment import JOB_VARIABLE, WORKSPACE_VARIABLE
from airloom.hooks.process_runner import ProcessRunner, find_jobs
from airloom.settings import Settings

if TYPE_CHECKING:
    from airloom.hooks.connect import Hooks

STOP_SECONDS = 5.0

IsLive = Callable[[str, str], bool]


class Reaped(Frozen):
    """A stage that was ended; of somebody's own DAG the container of a task, DAG and task named in their places."""

    pipeline: str
    run_id: str
    stage: str
    label: str


def reap(settings: Settings, *, is_live: IsLive) -> list[Reaped]:
    """Stop the stages of all runs of which `is_live(pipeline, run_id)` says no."""
    ended = []
    for handle, facts in find_jobs(settings.workspaces_dir):
        pipeline, run_id = str(facts["pipeline"]), str(facts["run_id"])
        if is_live(pipeline, run_id):
            continue
        ProcessRunner().stop(handle, STOP_SECONDS)
        ended.append(Reaped(pipeline=pipeline, run_id=run_id, stage=str(facts["stage"]), label=handle.label))
    return ended + _reap_containers(settings, is_live) + _reap_tasks(settings, is_live) + _reap_strays(settings)


def reap_run(settings: Settings, pipeline: str, run_id: str) -> list[Reaped]:
    """Stop the stages of one run, which has ended."""
    return reap(settings, is_live=lambda other, other_run: (other, other_run) != (pipeline, run_id))


def live_in_airflow(hooks: Hooks) -> IsLive:
    """Says of a run whether Airflow has it as queued or running.

    Raises (when called):
        UnavailableError: Airflow does not answer; then nobody knows, and nothing may be stopped.
    """

    def is_live(pipeline: str, run_id: str) -> bool:
        try:
            return hooks.airflow.run(pipeline, run_id)["state"] in {"queued", "running"}
        except NotFoundError:
            return False

    return is_live


def _reap_containers(settings: Settings, is_live: IsLive) -> list[Reaped]:
    """Containers and their volumes, whether they run or nobody came to collect them."""
    if not any(settings.workspaces_dir.glob(f"*/*/*/{LOCK_FILE}")):
        return []  # no stage was ever a container here, and there may be no engine to ask
    ended = []
    for handle, labels in find_containers(settings):
        pipeline, run_id = labels["airloom.pipeline"], labels["airloom.run"]
        if is_live(pipeline, run_id):
            continue
        runner = DockerRunner(settings)
        runner.stop(handle, STOP_SECONDS)
        runner.mark_collected(handle)
        ended.append(Reaped(pipeline=pipeline, run_id=run_id, stage=labels["airloom.stage"], label=handle.label))
    return ended


def _reap_tasks(settings: Settings, is_live: IsLive) -> list[Reaped]:
    """Containers that `StageDockerOperator` has started, whether they run or were kept for somebody to look at."""
    ended = []
    for found in find_task_containers(settings):
        if is_live(found.task.dag, found.task.run):
            continue
        found.end(STOP_SECONDS)
        ended.append(Reaped(pipeline=found.task.dag, run_id=found.task.run, stage=found.task.task, label=found.label))
    return ended


def _reap_strays(settings: Settings) -> list[Reaped]:
    """What stages have left behind whose watching process was killed: nobody holds it to its limits.

    The work itself is lost, so this does not depend on whether the run lives.
    """
    ended = []
    watched = {handle.id for handle, _ in find_jobs(settings.workspaces_dir)}
    strays: dict[str, Path] = {}
    for variables in process_tree.environments("AIRLOOM_STAGE_").values():
        workspace = Path(variables.get(WORKSPACE_VARIABLE, "/"))
        job_id = variables.get(JOB_VARIABLE, "")
        if job_id and job_id not in watched and workspace.is_relative_to(settings.workspaces_dir):
            strays[job_id] = workspace
    for job_id, workspace in strays.items():
        # A job that has just been started is watched by now, or its lock is held by whoever starts it.
        if ProcessRunner().find(workspace) is not None:
            continue
        process_tree.kill_marked(JOB_VARIABLE, job_id)
        pipeline, run = workspace.parts[-3:-1]
        ended.append(Reaped(pipeline=pipeline, run_id=run, stage=workspace.name, label=f"strays of job {job_id}"))
    return ended
