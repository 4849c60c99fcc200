"""Why a stage has no result: from its exit, its result file and the end of its log to one error."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from airloom.contract import ExitCode, Stage, StageResult
from airloom.errors import ContractError, StageFailedError
from airloom.hooks.process_tree import describe_signal
from airloom.hooks.runner import ExitReason, JobExit
from airloom.spec.pipeline import Resources

LOG_LINES = 15
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
_LEAST_BYTES = 64 * 2**10
_SIGNAL_BASE = 128  # shells and containers report a signal as exit code 128 + number
_FULL = ("No space left on device", "Errno 28", "Disk quota exceeded")
_SHARED_MEMORY_FULL = ("Bus error", "unable to allocate shared memory", "out of shared memory")
_KILLED_FROM_OUTSIDE = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}

# Exit code -> what it means where the stage itself has not said, and whether trying again may help.
EXIT_CODES = {
    ExitCode.FAILED: ("its code failed", False),
    2: ("it could not be started: wrong arguments, or no main.py in the repo", False),
    ExitCode.BAD_REQUEST: ("it could not use the request", False),
    ExitCode.BAD_DATA: ("it could not use its input", False),
    ExitCode.TEMPORARY: ("something outside did not answer", True),
}


def read_result(path: Path, stage: Stage) -> tuple[StageResult | None, str]:
    """The result file; or None and why there is none that can be used."""
    try:
        result = StageResult.read(path)
    except ContractError as error:
        return None, error.message
    except (OSError, UnicodeDecodeError) as error:
        return None, f"{path} cannot be read: {error}"
    if result.stage is not stage:
        return None, f"{path} is the result of {result.stage.value!r}, not of {stage.value!r}"
    return result, ""


def check_outputs(result: StageResult, outputs: dict[str, Path]) -> None:
    """Hold what a result says it wrote against what is there.

    Raises:
        ContractError: an output lies elsewhere, is missing, or has other files than the result says.
    """
    for name, output in result.outputs.items():
        allowed = outputs.get(name)
        if allowed is None or output.path.resolve() != allowed.resolve():
            raise ContractError(
                f"the result's output {name!r} is at {output.path}, which the request did not ask for",
                hint=f"the request's outputs are: {', '.join(f'{key} ({path})' for key, path in outputs.items())}",
            )
        sizes = [path.stat().st_size for path in output.path.rglob("*") if path.is_file()]
        if (len(sizes), sum(sizes)) != (output.files, output.size_bytes):
            raise ContractError(
                f"the output {name!r} holds {len(sizes)} files, {sum(sizes)} bytes; its result says {output.files} "
                f"files, {output.size_bytes} bytes",
                hint="something else writes into the workspace, or the stage measured before it was done",
            )


def failure_of(
    *,
    pipeline: str,
    stage: Stage,
    job_exit: JobExit,
    result: StageResult | None,
    why_no_result: str = "",
    log: Sequence[str],
    log_file: Path,
    resources: Resources,
) -> StageFailedError:
    """The error for a stage that gave no result that can be used.

    Args:
        result: what it wrote, if that can be read at all.
        log: the last lines of its log.
    """
    said = (result.error or "") if result is not None and result.status == "failed" else ""
    reason, hint, retryable = _explain(
        job_exit,
        config=f"dags/configs/{pipeline}.yaml",
        stage=stage,
        resources=resources,
        said=said,
        why_no_result=why_no_result,
    )
    room = _no_room(log_file.parent, job_exit, "\n".join((said, *log)))
    if room is not None:
        hint, retryable = room, False
    lines = [f"stage {stage.value} failed: {reason}"]
    if log and not (said and job_exit.exit_code == ExitCode.BAD_DATA):
        lines += [f"the end of its log ({log_file}):", *(f"  | {line}" for line in log)]
    return StageFailedError("\n".join(lines), hint=hint, retryable=retryable)


def _explain(
    job_exit: JobExit, *, config: str, stage: Stage, resources: Resources, said: str, why_no_result: str
) -> tuple[str, str | None, bool]:
    """(reason, hint, retryable)"""
    limits = f"stages.{stage.value}.resources"
    ended = job_exit.reason
    found: tuple[str, str | None, bool]
    if ended is ExitReason.MEMORY_LIMIT:
        reason = f"it held {_size(job_exit.peak_memory_bytes)} of memory; its limit is {_size(resources.memory)}"
        found = reason, f"raise {limits}.memory in {config}, or let the stage need less", False
    elif ended is ExitReason.TIMEOUT:
        reason = (
            f"it ran longer than its limit of {resources.timeout:g} s, with {job_exit.cpu_seconds:g} s of processor"
        )
        found = reason, f"raise {limits}.timeout in {config} if it was not stuck", True
    elif ended is ExitReason.STOPPED:
        found = f"it was stopped after {job_exit.seconds:g} s", None, True
    elif ended is ExitReason.LOST:
        why = job_exit.detail or "it is gone, and so is what watched it: both were killed, or the machine restarted"
        found = why, None, True
    elif ended is ExitReason.NOT_STARTED:
        found = f"it could not be started: {job_exit.detail}", "is the checkout whole? build the commit again", False
    elif ended is ExitReason.SIGNALLED:
        found = _explain_signal(job_exit.signal or 0, job_exit)
    else:
        found = _explain_code(job_exit, said=said, why_no_result=why_no_result)
    return found


def _explain_code(job_exit: JobExit, *, said: str, why_no_result: str) -> tuple[str, str | None, bool]:
    code = job_exit.exit_code or 0
    if code == 0 and said:
        return f"it ended with exit code 0, but its result says that it failed: {said}", None, False
    if code == 0:
        reason = f"it ended with exit code 0, but left no result that can be used: {why_no_result}"
        return reason, "main.py must end with: raise SystemExit(run_stage_main({...}))", False
    if code in EXIT_CODES:
        meaning, retryable = EXIT_CODES[code]
        return said or f"{meaning} (exit code {code})", None, retryable
    if _SIGNAL_BASE < code <= _SIGNAL_BASE + signal.SIGRTMAX:
        return _explain_signal(code - _SIGNAL_BASE, job_exit)
    return f"it ended with exit code {code}" + (f": {said}" if said else ""), None, False


def _explain_signal(number: int, job_exit: JobExit) -> tuple[str, str | None, bool]:
    name = describe_signal(number)
    if number in _KILLED_FROM_OUTSIDE:
        reason = f"it was killed by {name} after {job_exit.seconds:g} s"
        if number != signal.SIGKILL:
            return reason, None, True
        hint = (
            f"nobody in Airloom did that; if the machine ran out of memory (the stage held "
            f"{_size(job_exit.peak_memory_bytes)}), lower its resources.memory so that it is stopped with a reason"
        )
        return reason, hint, True
    return f"it crashed with {name}", "a fault in native code: see the end of its log", False


def _no_room(workspace: Path, job_exit: JobExit, text: str) -> str | None:
    """What to do if the disk or shared memory was full; None if nothing says so."""
    bus_error = signal.SIGBUS in (job_exit.signal, (job_exit.exit_code or 0) - _SIGNAL_BASE)
    if bus_error or any(sign in text for sign in _SHARED_MEMORY_FULL):
        return (
            f"shared memory is full: {_room(SHARED_MEMORY)}; free some (ls -l {SHARED_MEMORY}), make it larger "
            "(mount -o remount,size=…), or let the stage use fewer loader workers and smaller batches"
        )
    failed = job_exit.reason is ExitReason.EXITED and job_exit.exit_code
    # On a full disk the stage could not even say so.
    if any(sign in text for sign in _FULL) or (failed and _free_bytes(workspace) < _LEAST_BYTES):
        return f"there is no room left: {_room(workspace)}; {_room(SHARED_MEMORY)}; delete what is not needed"
    return None


def _free_bytes(folder: Path) -> float:
    with suppress(OSError):
        return shutil.disk_usage(folder).free
    return float("inf")


def _room(folder: Path) -> str:
    with suppress(OSError):
        usage = shutil.disk_usage(folder)
        return f"{_size(usage.free)} of {_size(usage.total)} free in {folder}"
    return f"{folder} cannot be looked at"


def _size(size_bytes: int) -> str:
    if size_bytes >= 2**30:
        return f"{size_bytes / 2**30:.2f} GiB"
    if size_bytes >= 2**20:
        return f"{size_bytes / 2**20:.0f} MiB"
    return f"{size_bytes / 2**10:.0f} KiB"
