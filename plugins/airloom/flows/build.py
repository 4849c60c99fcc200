"""Turn a commit of a stage repo into something that runs can use, or say on the commit why it can't be."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import airloom
from airloom.contract import CodePin
from airloom.contract.build import BuildFailure, BuildRecord
from airloom.contract.push import Asker
from airloom.errors import AirloomError, BuildFailedError, ContractError, NotFoundError, ServiceError
from airloom.flows.checkout import ensure_checkout
from airloom.flows.push_entry import BuildEntry
from airloom.hooks.connect import Hooks
from airloom.settings import Settings
from airloom.spec.stage_repo import StageRepo

__all__ = ["build", "built_commits", "ensure_checkout", "find_build", "find_failure"]

STATUS_CONTEXT = "airloom/build"
LINT_RULES = "E9,F63,F7,F82"  # what cannot run: syntax, undefined names, comparisons that are always one way
_LINT_SECONDS = 60.0
_ENTRY_SECONDS = 90.0
_TEST_SECONDS = 300.0
_SHOWN_CHARACTERS = 600

Progress = Callable[[str], None]


def build(
    hooks: Hooks,
    repo: str,
    commit: str,
    on_progress: Progress = lambda line: None,
    *,
    pusher: str = "",
    announce: bool = True,
    asked_by: Asker = "person",
) -> BuildRecord:
    """Build a commit: check it out, lint it, load its entry point, record it, and tell Airflow.

    A commit that was built in the same environment is not built again; if Airflow has not heard of it, it
    is told now. That Airflow does not answer is no reason for a build to fail: the commit's status says so.
    A commit that failed fails again without being built, until a person asks.

    Args:
        commit: a full hash, or whatever names a commit.
        pusher: who pushed it; goes with the event.
        announce: whether to tell Airflow, so that the pipelines that use the repo start.
        asked_by: a person's wish is followed whatever came of earlier builds.

    Raises:
        BuildFailedError: the commit cannot be used; its status says why.
        NotFoundError: no such repo or commit.
        ServiceError: the git server or the object store refused or did not answer.
    """
    pin = hooks.git.commit(repo, commit)
    with _one_at_a_time(hooks, pin):
        entry = BuildEntry(hooks, pin, asked_by, pusher, on_progress)
        try:
            if asked_by != "person":
                _refuse_failed(hooks, pin)
            record = _build(hooks, pin, entry, on_progress, announce)
        except BuildFailedError as error:
            _keep_failure(hooks, pin, error, on_progress)
            _report(hooks, pin, "failure", error.message, on_progress)
            entry.end("failed", error.message)
            raise
        except AirloomError as error:
            _report(hooks, pin, "error", f"could not be built: {error.message}", on_progress)
            entry.end("error", error.message)
            raise
        image = record.image.pull_ref if record.image else ""
        entry.end("built" if record.created else "found", "", airflow=record.airflow, image=image)
        return record


def find_build(hooks: Hooks, repo: str, commit: str) -> BuildRecord | None:
    """The record of a commit's last build that went well, if there is a readable one.

    It is a fact of the past. Whether it is what a build would make today is asked only by a build.
    """
    try:
        return BuildRecord.model_validate(hooks.store.get_json(hooks.settings.bucket_airloom, _key(repo, commit)))
    except (NotFoundError, ContractError, ValueError):
        return None


def find_failure(hooks: Hooks, repo: str, commit: str) -> BuildFailure | None:
    """Why a commit's last build failed, if it did."""
    key = _failure_key(repo, commit)
    try:
        return BuildFailure.model_validate(hooks.store.get_json(hooks.settings.bucket_airloom, key))
    except (NotFoundError, ContractError, ValueError):
        return None


def built_commits(hooks: Hooks, repo: str) -> set[str]:
    """Commits of a repo whose build has ended, well or badly."""
    found = hooks.store.list(hooks.settings.bucket_airloom, f"builds/{repo}/")
    return {item.key.rpartition("/")[2].partition(".")[0] for item in found}


def _build(hooks: Hooks, pin: CodePin, entry: BuildEntry, on_progress: Progress, announce: bool) -> BuildRecord:
    from airloom.flows.announce import announce as tell
    from airloom.flows.environment import store_environment

    what = f"{pin.repo}@{pin.commit[:8]}"
    environment = store_environment(hooks)
    entry.start()
    earlier = find_build(hooks, pin.repo, pin.commit)
    if earlier is not None and _is_current(hooks, pin, earlier, environment):
        on_progress(f"{what} was built already at {earlier.built_at:%Y-%m-%d %H:%M:%S} UTC: nothing to build")
        record = earlier.model_copy(update={"created": False})
    else:
        record = _make(hooks, pin, environment, on_progress, entry.pusher)
        if earlier is not None:
            record = record.model_copy(update={"announced": earlier.announced, "airflow": earlier.airflow})
            _store(hooks, record)
    said = f"built: {', '.join(stage.value for stage in record.stages)}"
    if announce and not record.announced:
        # Found after a kill, it says that telling is owed.
        record = record.model_copy(update={"airflow": "due"})
        _store(hooks, record)
        # The commit is built, however long it takes to tell Airflow.
        _report(hooks, pin, "success", said, on_progress)
        telling, detail = tell(hooks, record, on_progress, of_main=entry.asked_by != "person")
        record = record.model_copy(update={"announced": telling == "told", "airflow": telling})
        _store(hooks, record)
        said = f"{said}; {detail}"
    _report(hooks, pin, "success", said, on_progress)
    return record


def _refuse_failed(hooks: Hooks, pin: CodePin) -> None:
    """Raises BuildFailedError with the reason of then when the commit's build has failed."""
    failure = find_failure(hooks, pin.repo, pin.commit)
    if failure is not None and find_build(hooks, pin.repo, pin.commit) is None:
        again = f"to have it built once more: airloom build {pin.repo}@{pin.commit[:8]}"
        raise BuildFailedError(failure.reason, hint=failure.hint or again)


def _keep_failure(hooks: Hooks, pin: CodePin, error: BuildFailedError, on_progress: Progress) -> None:
    failure = BuildFailure(
        repo=pin.repo, commit=pin.commit, reason=error.message, hint=error.hint, failed_at=datetime.now(UTC)
    )
    key = _failure_key(pin.repo, pin.commit)
    try:
        hooks.store.put_json(hooks.settings.bucket_airloom, key, failure.model_dump(mode="json"))
    except AirloomError as problem:
        on_progress(f"the failure could not be recorded: {problem.message}")


def _is_current(hooks: Hooks, pin: CodePin, record: BuildRecord, environment: str) -> bool:
    """Whether a build is what it would be if it were made now."""
    from airloom.flows import images

    if not images.makes_images(hooks.settings):
        return record.environment == environment
    return images.is_current(hooks.settings, record.image, ensure_checkout(hooks, pin.repo, pin.commit))


def _make(hooks: Hooks, pin: CodePin, environment: str, on_progress: Progress, pusher: str) -> BuildRecord:
    from airloom.flows import images

    started = time.monotonic()
    what = f"{pin.repo}@{pin.commit[:8]}"
    _report(hooks, pin, "pending", "build started", on_progress)
    on_progress(f"{what}: checking out")
    folder = ensure_checkout(hooks, pin.repo, pin.commit)
    on_progress(f"{what}: linting")
    _lint(what, folder)
    on_progress(f"{what}: loading main.py")
    _load_entry_point(what, folder)
    stages = StageRepo.load(folder)
    image = None
    if images.makes_images(hooks.settings):

        def check(built: str) -> None:
            on_progress(f"{what}: testing")
            _test(hooks.settings, what, folder, stages.tests, built)

        image = images.build_stage_image(hooks.settings, pin, folder, on_progress, check)
    else:
        on_progress(f"{what}: testing")
        _test(hooks.settings, what, folder, stages.tests)
    record = BuildRecord(
        repo=pin.repo,
        commit=pin.commit,
        message=pin.message,
        author=pin.author,
        pusher=pusher,
        environment=environment,
        stages={stage: stages.code_digest(folder, stage) for stage in stages.stages},
        image=image,
        built_at=datetime.now(UTC),
        seconds=round(time.monotonic() - started, 3),
    )
    _store(hooks, record)
    on_progress(f"{what}: built in {record.seconds:.1f} s: {', '.join(stage.value for stage in record.stages)}")
    return record


# Checks


def _lint(what: str, folder: Path) -> None:
    """Raises BuildFailedError with the first findings; does nothing where ruff isn't installed."""
    ruff = shutil.which("ruff", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))))
    if ruff is None:
        return
    command = [ruff, "check", "--isolated", "--no-cache", "--quiet", "--output-format", "concise"]
    code, output = _run([*command, "--select", LINT_RULES, "."], folder, _LINT_SECONDS)
    if code == 1:
        raise BuildFailedError(f"{what}: {_shortened(output.splitlines()[:5])}")
    if code != 0:
        raise ServiceError(f"ruff could not be run on {what}: {_shortened(output.splitlines()[-5:])}")


def _load_entry_point(what: str, folder: Path) -> None:
    """Raises BuildFailedError when `python main.py --help` fails."""
    if not (folder / "main.py").is_file():
        raise BuildFailedError(f"{what}: there is no main.py", hint="every stage of a repo starts from it")
    code, output = _run([sys.executable, "main.py", "--help"], folder, _ENTRY_SECONDS)
    if code is None:
        raise BuildFailedError(f"{what}: `python main.py --help` did not end within {_ENTRY_SECONDS:.0f} s")
    if code != 0:
        last = [line for line in output.splitlines() if line.strip()][-4:]
        raise BuildFailedError(f"{what}: `python main.py --help` ended with {code}: {_shortened(last)}")


def _test(settings: Settings, what: str, folder: Path, tests: list[str], image: str | None = None) -> None:
    """Raises BuildFailedError when a test fails: in the image where there is one, else with this Python's packages."""
    if not tests:
        return
    arguments = ["-m", "pytest", "-q", "-x", "--tb=line", "-p", "no:cacheprovider", *tests]
    if image is None:
        code, output = _run([sys.executable, *arguments], folder, _TEST_SECONDS)
    else:
        from airloom.hooks.image_builder import ImageBuilder

        command = ["python", *arguments]
        code, output = ImageBuilder(settings).run(image, folder, command, limit_seconds=_TEST_SECONDS)
    if code is None:
        raise BuildFailedError(
            f"{what}: its tests did not end within {_TEST_SECONDS:.0f} s", hint="name quick ones in stages.yaml: tests"
        )
    if code != 0:
        last = [line for line in output.splitlines() if line.strip()][-4:]
        raise BuildFailedError(f"{what}: its tests failed: {_shortened(last)}")


def _run(command: Sequence[str], folder: Path, limit_seconds: float) -> tuple[int | None, str]:
    """Exit code (None: out of time) and output of a program that knows nothing of this process's environment."""
    with tempfile.TemporaryDirectory(prefix="airloom-build-") as home:
        environment = {
            "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.defpath)),
            "HOME": home,
            "TMPDIR": home,
            "LANG": "C.UTF-8",
            # The contract is all that stage code may import of the platform.
            "PYTHONPATH": str(Path(airloom.__file__).parent.parent),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=limit_seconds)
            code: int | None = process.returncode
        except subprocess.TimeoutExpired:
            code, output = None, b""
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return code, output.decode(errors="replace")


def _shortened(lines: Sequence[str]) -> str:
    text = " | ".join(line.strip() for line in lines)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"


# Saying


def _report(hooks: Hooks, pin: CodePin, state: str, description: str, on_progress: Progress) -> None:
    """Set the commit's status; that it can't be set does not undo a build."""
    try:
        hooks.gitbucket.set_status(
            pin.repo,
            pin.commit,
            state=state,  # type: ignore[arg-type]
            context=STATUS_CONTEXT,
            description=" ".join(description.split()),
            target_url=hooks.settings.build_url or None,
        )
    except (ServiceError, NotFoundError) as error:
        on_progress(f"the commit's status could not be set: {error.message}")


# Storing


def _key(repo: str, commit: str) -> str:
    return f"builds/{repo}/{commit}.json"


def _failure_key(repo: str, commit: str) -> str:
    return f"builds/{repo}/{commit}.failure.json"


def _store(hooks: Hooks, record: BuildRecord) -> None:
    value = record.model_copy(update={"created": True}).model_dump(mode="json")
    hooks.store.put_json(hooks.settings.bucket_airloom, _key(record.repo, record.commit), value)


@contextmanager
def _one_at_a_time(hooks: Hooks, pin: CodePin) -> Iterator[None]:
    """Who builds the same commit meanwhile waits, and then finds the record."""
    path = hooks.settings.checkouts_dir / pin.repo / f".{pin.commit}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
