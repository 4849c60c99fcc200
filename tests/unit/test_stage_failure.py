"""From the way a stage ended to what people are told, and whether Airflow tries again."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from airloom.contract import Output, Stage, StageResult
from airloom.errors import ContractError, StageFailedError
from airloom.flows.stage_failure import check_outputs, failure_of, read_result
from airloom.hooks.runner import ExitReason, JobExit
from airloom.spec.pipeline import Resources

FREE = "No space left on device"


def failed(error: str) -> StageResult:
    return StageResult(stage=Stage.TRAIN, status="failed", error=error, started_at=1, finished_at=2)


def failure(job_exit: JobExit, *, said: str | None = None, log: tuple[str, ...] = (), **more: Any) -> StageFailedError:
    return failure_of(
        pipeline="digits",
        stage=Stage.TRAIN,
        job_exit=job_exit,
        result=failed(said) if said else None,
        log=log,
        log_file=Path("/tmp/airloom-test/log.txt"),
        resources=Resources(memory=2 * 2**30, timeout=60),
        **more,
    )


def code(number: int) -> JobExit:
    return JobExit(ExitReason.EXITED, exit_code=number, seconds=3.0)


def killed(number: int, **more: Any) -> JobExit:
    return JobExit(ExitReason.SIGNALLED, signal=number, seconds=3.0, **more)


@pytest.mark.parametrize(
    ("job_exit", "said", "in_message", "retryable"),
    [
        (code(1), "ValueError: no", "ValueError: no", False),
        (code(1), None, "its code failed (exit code 1)", False),
        (code(2), None, "wrong arguments, or no main.py", False),
        (code(64), "Field required", "Field required", False),
        (code(65), "no pictures", "no pictures", False),
        (code(75), "MLflow is away", "MLflow is away", True),
        (code(75), None, "did not answer (exit code 75)", True),
        (code(3), None, "exit code 3", False),
        (code(3), "oh", "exit code 3: oh", False),
        (code(0), None, "left no result that can be used", False),
        (code(0), "but no", "its result says that it failed: but no", False),
        (code(137), None, "killed by SIGKILL", True),
        (code(143), None, "killed by SIGTERM", True),
        (code(139), None, "crashed with SIGSEGV", False),
        (killed(signal.SIGKILL), None, "killed by SIGKILL after 3 s", True),
        (killed(signal.SIGTERM), None, "killed by SIGTERM", True),
        (killed(signal.SIGSEGV), None, "crashed with SIGSEGV", False),
        (killed(signal.SIGABRT), None, "crashed with SIGABRT", False),
        (killed(63), None, "crashed with signal 63", False),
        (JobExit(ExitReason.TIMEOUT, seconds=61, cpu_seconds=2), None, "limit of 60 s, with 2 s", True),
        (JobExit(ExitReason.STOPPED, seconds=5), None, "stopped after 5 s", True),
        (JobExit(ExitReason.LOST), None, "is gone", True),
        (JobExit(ExitReason.NOT_STARTED, detail="No such file: 'x'"), None, "No such file: 'x'", False),
        (
            JobExit(ExitReason.MEMORY_LIMIT, peak_memory_bytes=3 * 2**30),
            None,
            "3.00 GiB of memory; its limit is 2.00",
            False,
        ),
    ],
)
def test_table(job_exit: JobExit, said: str | None, in_message: str, retryable: bool) -> None:
    error = failure(job_exit, said=said)
    assert error.message.startswith("stage train failed: ")
    assert in_message in error.message
    assert error.retryable is retryable


def test_memory_limit_names_the_key_to_change() -> None:
    error = failure(JobExit(ExitReason.MEMORY_LIMIT, peak_memory_bytes=3 * 2**30))
    assert error.hint is not None
    assert "stages.train.resources.memory" in error.hint
    assert "dags/configs/digits.yaml" in error.hint


def test_a_kill_from_outside_names_the_memory_that_was_held() -> None:
    error = failure(killed(signal.SIGKILL, peak_memory_bytes=512 * 2**20))
    assert error.hint is not None
    assert "512 MiB" in error.hint


def test_the_end_of_the_log_is_shown_unless_the_data_was_bad() -> None:
    assert "  | Traceback" in failure(code(1), said="ValueError: no", log=("Traceback", "ValueError: no")).message
    assert "  | " not in failure(code(65), said="no pictures", log=("train: no pictures",)).message


@pytest.mark.parametrize(
    ("job_exit", "said", "log"),
    [
        (killed(signal.SIGBUS), None, ()),
        (code(135), None, ()),
        (code(1), "RuntimeError: DataLoader worker (pid 7) is killed by signal: Bus error.", ()),
        (code(1), None, ("RuntimeError: unable to allocate shared memory(shm)",)),
    ],
)
def test_full_shared_memory(job_exit: JobExit, said: str | None, log: tuple[str, ...]) -> None:
    error = failure(job_exit, said=said, log=log)
    assert error.hint is not None
    assert "shared memory is full" in error.hint
    assert "/dev/shm" in error.hint
    assert "free in /dev/shm" in error.hint
    assert not error.retryable


@pytest.mark.parametrize(
    ("said", "log"), [(f"OSError: [Errno 28] {FREE}: 'x'", ()), (None, (f"OSError: [Errno 28] {FREE}",))]
)
def test_full_disk(said: str | None, log: tuple[str, ...]) -> None:
    error = failure(code(1), said=said, log=log)
    assert error.hint is not None
    assert "there is no room left" in error.hint
    assert not error.retryable


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "there is no such file"),
        (b'{"stage": "train", "stat', "is not a valid StageResult"),
        (b"", "is not a valid StageResult"),
        (b"\xff\xfe", "is not a valid StageResult"),
        (b'{"stage": "evaluate", "status": "ok", "started_at": 1, "finished_at": 2}', "of 'evaluate', not of 'train'"),
    ],
)
def test_unusable_results(tmp_path: Path, content: bytes | None, why: str) -> None:
    path = tmp_path / "result.json"
    if content is not None:
        path.write_bytes(content)
    result, found = read_result(path, Stage.TRAIN)
    assert result is None
    assert why in found


def test_outputs_are_held_against_what_is_there(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights").write_bytes(b"12345")
    good = StageResult(stage=Stage.TRAIN, status="ok", outputs={"model": Output.of(model)}, started_at=1, finished_at=2)
    check_outputs(good, {"model": model})
    with pytest.raises(ContractError, match="did not ask for"):
        check_outputs(good, {"model": tmp_path / "other"})
    with pytest.raises(ContractError, match="did not ask for"):
        check_outputs(good, {})
    (model / "weights").write_bytes(b"1234")
    with pytest.raises(ContractError, match="1 files, 4 bytes; its result says 1 files, 5 bytes"):
        check_outputs(good, {"model": model})
