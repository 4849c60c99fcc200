"""Run one stage of a run: from the cache, by adopting a process that runs already, or by starting one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from airloom.contract import DataVersion, Frozen, Runner, RunPlan, Stage, StageOutcome, StageRequest, StageResult
from airloom.contract.plan import safe_run_id
from airloom.errors import AirloomError, ConflictError, ContractError, StorageFullError
from airloom.flows import cache
from airloom.flows.resolve import spec_of
from airloom.flows.stage_failure import LOG_LINES, check_outputs, failure_of, read_result
from airloom.flows.stage_inputs import KEPT_OUTPUTS, OUTPUTS, StageInputs, inputs_of, tracking_of
from airloom.hooks.docker_runner import DockerRunner
from airloom.hooks.log_tail import last_lines
from airloom.hooks.process_runner import ProcessRunner
from airloom.hooks.runner import (
    LOG_FILE,
    OUTPUTS_FOLDER,
    RESULT_FILE,
    ExitReason,
    JobExit,
    JobHandle,
    OnLog,
    ShouldStop,
    StageJob,
)
from airloom.hooks.runner import Runner as StageRunner
from airloom.settings import Settings
from airloom.spec.pipeline import Resources

if TYPE_CHECKING:
    from airloom.hooks.connect import Hooks
    from airloom.hooks.docker_engine import FindLogin

TRY_FILE = "try.json"
STOP_SECONDS = 10.0

OnStart = Callable[[StageRunner, JobHandle], None]


class StageTry(Frozen):
    """What the start of a job decided, for whoever collects it: `try.json` in the workspace."""

    key: str
    cache: Literal["miss", "forced"]
    reason: str
    mlflow_run_id: str | None = None


@dataclass(frozen=True)
class _Work:
    """One stage of one run, with all that its parts need."""

    hooks: Hooks
    plan: RunPlan
    stage: Stage
    inputs: StageInputs
    parts: cache.KeyParts
    workspace: Path
    runner: StageRunner
    data_version: DataVersion | None
    on_log: OnLog
    try_number: int

    @property
    def resources(self) -> Resources:
        return spec_of(self.plan).stages[self.stage].resources

    @property
    def outputs(self) -> dict[str, Path]:
        return {name: self.workspace / OUTPUTS_FOLDER / name for name in OUTPUTS[self.stage]}


def run_stage(
    hooks: Hooks,
    *,
    plan: RunPlan,
    stage: Stage,
    data_version: DataVersion | None = None,
    train: StageOutcome | None = None,
    on_log: OnLog = print,
    should_stop: ShouldStop = lambda: False,
    on_start: OnStart = lambda runner, handle: None,
    runner: StageRunner | None = None,
    registry_login: FindLogin | None = None,
    try_number: int = 1,
) -> StageOutcome:
    """The outcome of a stage. May be killed anywhere and called again: the work is done once.

    Args:
        data_version: needed by train and evaluate.
        train: needed by evaluate.
        on_log: gets every line of the stage's log, and a few about it.
        should_stop: asked several times a second; what it raises leaves the stage running, to be adopted.
        on_start: gets the runner and the job as soon as one runs.
        runner: instead of the one that the plan names.
        registry_login: for runner `docker`, asked only when an image has to be pulled.
        try_number: of the task that calls.

    Raises:
        StageFailedError: the stage gave no result; says why, and whether trying again may help.
        ContractError: an earlier task has not handed on what the stage needs.
        StorageFullError: no room for the stage's files.
        UnavailableError: the store, the git server or MLflow does not answer.
    """
    inputs = inputs_of(hooks, plan, stage, data_version=data_version, train=train)
    work = _Work(
        hooks=hooks,
        plan=plan,
        stage=stage,
        inputs=inputs,
        parts=cache.key_parts(plan, stage, inputs.digests),
        workspace=workspace_of(hooks.settings, plan.pipeline, plan.run_id, stage),
        runner=runner or runner_of(hooks.settings, plan, registry_login),
        data_version=data_version,
        on_log=on_log,
        try_number=try_number,
    )
    try:
        handle = _adopt(work)
        if handle is None:
            decided = _look_up(work)
            if isinstance(decided, StageOutcome):
                return decided
            handle = _start(work, *decided)
        on_start(work.runner, handle)
        job_exit = work.runner.wait(handle, on_log, should_stop)
        return _collect(work, handle, job_exit)
    except OSError as error:
        if error.errno in {28, 122}:  # ENOSPC, EDQUOT
            free = shutil.disk_usage(hooks.settings.home_dir).free
            raise StorageFullError(
                f"no room for the files of stage {stage.value} in {work.workspace} ({free / 2**20:.0f} MiB free)",
                hint="free disk space; `airloom gc` removes the workspaces of ended runs",
            ) from error
        raise


def workspace_of(settings: Settings, pipeline: str, run_id: str, stage: Stage) -> Path:
    """Where a stage's request, result, inputs, outputs and log stand."""
    return settings.workspaces_dir / pipeline / safe_run_id(run_id) / stage.value


def runner_of(settings: Settings, plan: RunPlan, registry_login: FindLogin | None = None) -> StageRunner:
    """The runner that a plan names.

    Raises:
        UnavailableError: the Docker engine does not answer.
    """
    if plan.runner is Runner.PROCESS:
        return ProcessRunner()
    return DockerRunner(settings, login=registry_login)


NOT_ITS_OWN_END = frozenset({ExitReason.STOPPED, ExitReason.LOST, ExitReason.SIGNALLED})


def _adopt(work: _Work) -> JobHandle | None:
    """A job of an earlier try that is this very work, running or ended; anything else that runs here is stopped."""
    handle = work.runner.find(work.workspace)
    if handle is None:
        return None
    if handle.key != work.parts.key:
        if handle.running:
            work.on_log(f"{handle.label} works on other inputs: stopping it")
            work.runner.stop(handle, STOP_SECONDS)
        return None
    if handle.running:
        work.on_log(f"adopting {handle.label}, which an earlier try started; its log goes on here")
        return handle
    if handle.collected:
        # Known to the cache by now, unless the dataset of preprocess has no version yet.
        reusable = work.stage is Stage.PREPROCESS and not work.plan.force and _ended_well(work)
        return handle if reusable else None
    if not _ended_well(work):
        reason = work.runner.wait(handle, work.on_log, lambda: False).reason
        if reason in NOT_ITS_OWN_END:
            # Somebody ended it from outside, with the platform, say: that is no result, and costs no try.
            work.on_log(f"{handle.label} of an earlier try did not end by itself ({reason.value}): starting anew")
            return None
    work.on_log(f"{handle.label} of an earlier try has ended meanwhile: taking its result")
    return handle


def _ended_well(work: _Work) -> bool:
    result, _ = read_result(work.workspace / RESULT_FILE, work.stage)
    if result is None or result.status != "ok":
        return False
    with suppress(ContractError):
        check_outputs(result, work.outputs)
        return True
    return False


def _look_up(work: _Work) -> StageOutcome | tuple[Literal["miss", "forced"], str]:
    """An earlier result, or why there is none to be used."""
    if work.plan.force:
        return "forced", "the run was told to run every stage"
    from airloom.flows.cache_lookup import lookup

    found = lookup(work.hooks, work.parts)
    if found.entry is None:
        return "miss", found.reason
    work.on_log(f"cache hit: {found.reason}; saves {found.entry.seconds:.1f} s")
    result = found.entry.result
    return StageOutcome(
        stage=work.stage,
        cache="hit",
        reason=found.reason,
        key=work.parts.key,
        seconds=0.0,
        result=result.model_copy(update={"facts": _with_known(work, result)}),
        data_version=found.entry.data_version,
    )


def _start(work: _Work, cached: Literal["miss", "forced"], reason: str) -> JobHandle:
    from airloom.flows.checkout import ensure_checkout

    plan, stage, workspace = work.plan, work.stage, work.workspace
    code = plan.code_of(stage)
    checkout = ensure_checkout(work.hooks, code.repo, code.commit)
    inputs = work.inputs.fetch(workspace / "inputs")
    tracking = tracking_of(work.hooks, plan, stage, work.data_version)
    _prepare_outputs(work)
    request = StageRequest(
        pipeline=plan.pipeline,
        run_id=plan.run_id,
        stage=stage,
        commit=code.commit,
        params=plan.stages[stage].params,
        inputs=inputs,
        outputs=work.outputs,
        facts=dict(work.inputs.facts),
        tracking=tracking,
        seed=plan.stages[stage].seed,
    )
    limits, image = work.resources, plan.stages[stage].image
    job = StageJob(
        pipeline=plan.pipeline,
        run_id=plan.run_id,
        stage=stage,
        key=work.parts.key,
        workspace=workspace,
        checkout=checkout,
        environment=work.inputs.environment,
        cpus=limits.cpus,
        memory_bytes=limits.memory,
        timeout_seconds=limits.timeout,
        gpus=limits.gpus,
        shm_bytes=limits.shm,
        tmp_bytes=limits.tmp,
        image=image.pull_ref if image else None,
        objects=work.inputs.objects() if plan.runner is Runner.DOCKER else {},
        try_number=work.try_number,
    )
    request.write(job.request_file)
    mlflow_run_id = tracking.run_id if tracking else None
    StageTry(key=job.key, cache=cached, reason=reason, mlflow_run_id=mlflow_run_id).write(workspace / TRY_FILE)
    try:
        handle = work.runner.start(job)
    except ConflictError:
        # Another try was faster; the same work is adopted.
        found = work.runner.find(workspace)
        if found is None or found.key != job.key:
            raise
        return found
    work.on_log(f"cache {cached}: {reason}")
    work.on_log(f"started {handle.label} from {code.repo}@{code.commit[:8]}; log: {workspace / LOG_FILE}")
    return handle


def _prepare_outputs(work: _Work) -> None:
    """Empty output folders, but for what a later try of the same work goes on with."""
    work.workspace.mkdir(parents=True, exist_ok=True)
    earlier = _read_try(work)
    same = earlier is not None and earlier.key == work.parts.key
    for name, folder in work.outputs.items():
        if not (same and name in KEPT_OUTPUTS):
            _remove(folder)
        folder.mkdir(parents=True, exist_ok=True)


def _collect(work: _Work, handle: JobHandle, job_exit: JobExit) -> StageOutcome:
    """From a job's exit and result file to the outcome.

    Raises:
        StageFailedError: there is no result that can be used.
    """
    result, why = read_result(work.workspace / RESULT_FILE, work.stage)
    if job_exit.reason is ExitReason.EXITED and job_exit.exit_code == 0 and result and result.status == "ok":
        try:
            check_outputs(result, work.outputs)
        except ContractError as error:
            result, why = None, error.message
        else:
            return _succeed(work, handle, job_exit, result)
    log_file = work.workspace / LOG_FILE
    failure = failure_of(
        pipeline=work.plan.pipeline,
        stage=work.stage,
        job_exit=job_exit,
        result=result,
        why_no_result=why,
        log=last_lines(log_file, LOG_LINES),
        log_file=log_file,
        resources=work.resources,
    )
    work.runner.mark_collected(handle)
    _finish_tracking(work, "KILLED" if job_exit.reason is ExitReason.STOPPED else "FAILED")
    raise failure


def _succeed(work: _Work, handle: JobHandle, job_exit: JobExit, result: StageResult) -> StageOutcome:
    started = _read_try(work)
    outcome = StageOutcome(
        stage=work.stage,
        cache=started.cache if started else "miss",
        reason=started.reason if started else "started by an earlier try",
        key=work.parts.key,
        seconds=job_exit.seconds,
        cpu_seconds=job_exit.cpu_seconds,
        peak_memory_bytes=job_exit.peak_memory_bytes,
        result=result.model_copy(update={"facts": _with_known(work, result, started)}),
    )
    work.on_log(
        f"stage {work.stage.value} is done: {job_exit.seconds:.1f} s, {job_exit.cpu_seconds:.1f} s of processor, "
        f"at most {job_exit.peak_memory_bytes / 2**20:.0f} MiB of memory"
    )
    if work.stage is not Stage.PREPROCESS:  # whose dataset is of use to others only once it has a version
        try:
            cache.record(work.hooks, work.plan, outcome, inputs=work.inputs.digests)
        except AirloomError as error:
            work.on_log(f"the result was not noted for later runs: {error}")
    if work.stage is Stage.EVALUATE:  # the last to log; the gate writes only tags and artifacts
        _finish_tracking(work, "FINISHED")
    work.runner.mark_collected(handle)
    return outcome


def _with_known(work: _Work, result: StageResult, started: StageTry | None = None) -> dict[str, str]:
    """A result's facts and those that the platform knows better."""
    facts = {**result.facts, **work.inputs.known}
    if "champion_version" not in work.inputs.known:
        facts.pop("champion_version", None)
    if started is not None and started.mlflow_run_id:
        facts["mlflow_run_id"] = started.mlflow_run_id
    return facts


def _finish_tracking(work: _Work, status: str) -> None:
    """End the MLflow run that a stage logged to; a later try, or stage, runs it again."""
    started = _read_try(work)
    if started is not None and started.mlflow_run_id:
        with suppress(AirloomError):  # how the stage itself ended is what matters
            work.hooks.mlflow.finish_run(started.mlflow_run_id, status)


def _read_try(work: _Work) -> StageTry | None:
    try:
        return StageTry.read(work.workspace / TRY_FILE)
    except ContractError:
        return None


def _remove(folder: Path) -> None:
    """Delete a folder whose folders may be read-only."""
    for parent, _, _ in os.walk(folder):
        Path(parent).chmod(0o755)
    shutil.rmtree(folder, ignore_errors=True)
