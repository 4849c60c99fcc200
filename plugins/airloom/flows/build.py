"""Turn a commit of a stage repo into something that runs can use, or say on the commit why it can't be."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from airloom.contract import CodePin
from airloom.contract.build import BuildFailure, BuildRecord
from airloom.contract.push import Asker
from airloom.errors import AirloomError, BuildFailedError, ContractError, NotFoundError, ServiceError
from airloom.flows.build_steps import BuildSteps, Step
from airloom.flows.checkout import ensure_checkout
from airloom.flows.lease import Lease, LeaseLostError, lease
from airloom.hooks.connect import Hooks

__all__ = [
    "build",
    "build_until",
    "builds_of",
    "built_commits",
    "ensure_checkout",
    "find_build",
    "find_failure",
    "note_told",
    "say_again",
]

STATUS_CONTEXT = "airloom/build"

Progress = Callable[[str], None]


@dataclass(frozen=True)
class _Wish:
    """What is asked of a build; see `build_until`."""

    until: Step
    pusher: str
    announce: bool
    asked_by: Asker


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
    """`build_until` its end."""
    record = build_until(
        hooks, repo, commit, "report", on_progress, pusher=pusher, announce=announce, asked_by=asked_by
    )
    assert record is not None  # noqa: S101 - whoever reports has one
    return record


def build_until(
    hooks: Hooks,
    repo: str,
    commit: str,
    until: Step,
    on_progress: Progress = lambda line: None,
    *,
    pusher: str = "",
    announce: bool = True,
    asked_by: Asker = "person",
) -> BuildRecord | None:
    """Take the steps of a build up to one of them; later calls, of other processes too, go on from there.

    The steps are: inspect (check the commit out, lint it), build (its image), test (load its entry point, run its
    tests), push (the image), report (record it, say so on the commit, tell Airflow).

    A commit that was built in the same environment is not built again; if Airflow has not heard of it, it
    is told now. That Airflow does not answer is no reason for a build to fail: the commit's status says so.
    A commit that failed fails again without being built, until a person asks.

    Args:
        commit: a full hash, or whatever names a commit.
        pusher: who pushed it; goes with the event.
        announce: whether to tell Airflow, so that the pipelines that use the repo start.
        asked_by: a person's wish is followed whatever came of earlier builds.

    Returns:
        The record; None before `report` for a commit that was not built before.

    Raises:
        BuildFailedError: the commit cannot be used; its status says why.
        NotFoundError: no such repo or commit.
        ServiceError: the git server or the object store refused or did not answer.
    """
    pin = hooks.git.commit(repo, commit)
    wish = _Wish(until, pusher, announce, asked_by)
    with _one_at_a_time(hooks, pin, on_progress):
        try:
            return _build_alone(hooks, pin, wish, on_progress)
        except BuildFailedError as error:
            _report(hooks, pin, "failure", error.message, on_progress)
            raise
        except AirloomError as error:
            _report(hooks, pin, "error", f"could not be built: {error.message}", on_progress)
            raise


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


def builds_of(hooks: Hooks, commits: Mapping[str, str]) -> dict[str, BuildRecord]:
    """repo -> the build of its commit, where there was one; none of what the store does not tell."""
    found: dict[str, BuildRecord] = {}
    with suppress(AirloomError):
        for repo, commit in commits.items():
            record = find_build(hooks, repo, commit)
            if record is not None:
                found[repo] = record
    return found


def note_told(hooks: Hooks, record: BuildRecord) -> None:
    """Note that the pipelines have started with a commit, and that nobody has to tell them."""
    _store(hooks, record.model_copy(update={"announced": True, "airflow": "told"}))


def built_commits(hooks: Hooks, repo: str) -> set[str]:
    """Commits of a repo whose build has ended, well or badly."""
    found = hooks.store.list(hooks.settings.bucket_airloom, f"builds/{repo}/")
    return {item.key.rpartition("/")[2].partition(".")[0] for item in found}


def _build_alone(hooks: Hooks, pin: CodePin, wish: _Wish, on_progress: Progress) -> BuildRecord | None:
    """Build while no other machine builds the same commit; who comes second finds what the first has made."""
    what = f"{pin.repo}@{pin.commit[:8]}"
    bucket, key = hooks.settings.bucket_airloom, f"builds/{pin.repo}/{pin.commit}.json"
    while True:
        try:
            with lease(
                hooks.store, bucket, key, on_wait=lambda holder: on_progress(f"{what} is being built by {holder}")
            ) as held:
                if wish.asked_by != "person":
                    _refuse_failed(hooks, pin)
                return _build(hooks, pin, wish, on_progress, held)
        except LeaseLostError:
            on_progress(f"{what}: this build slept so long that another has begun: what that makes counts")


def _build(hooks: Hooks, pin: CodePin, wish: _Wish, on_progress: Progress, held: Lease) -> BuildRecord | None:
    from airloom.flows.environment import store_environment

    started = "build started" if wish.until == "report" else wish.until
    environment = store_environment(hooks)
    steps = BuildSteps(
        hooks, pin, held, environment, on_progress, lambda: _report(hooks, pin, "pending", started, on_progress)
    )
    try:
        record = find_build(hooks, pin.repo, pin.commit)
        if record is not None and _is_current(hooks, pin, record, environment):
            built_at = f"{record.built_at:%Y-%m-%d %H:%M:%S} UTC"
            on_progress(f"{pin.repo}@{pin.commit[:8]} was built already at {built_at}: nothing to build")
            record = record.model_copy(update={"created": False})
            if wish.until != "report":
                return record
            steps.start(wish.asked_by, wish.pusher)
        else:
            steps.start(wish.asked_by, wish.pusher)
            steps.run(wish.until)
            if wish.until != "report":
                return None
            record = _recorded(hooks, steps.record(wish.pusher), record, held)
        record = _announced(hooks, pin, record, wish, on_progress)
    except LeaseLostError:
        raise
    except BuildFailedError as error:
        held.check()
        _keep_failure(hooks, pin, error, on_progress)
        steps.end("failed", error.message)
        raise
    except AirloomError as error:
        with suppress(AirloomError):  # the store is down
            steps.start(wish.asked_by, wish.pusher)
        steps.end("error", error.message)
        raise
    image = record.image.pull_ref if record.image else ""
    steps.end("built" if record.created else "found", airflow=record.airflow, image=image)
    return record


def _recorded(hooks: Hooks, record: BuildRecord, earlier: BuildRecord | None, held: Lease) -> BuildRecord:
    """Store a record; whether Airflow was told of an earlier build of the commit holds for this one."""
    if earlier is not None:
        record = record.model_copy(update={"announced": earlier.announced, "airflow": earlier.airflow})
    held.check()
    _store(hooks, record)
    return record


def _announced(hooks: Hooks, pin: CodePin, record: BuildRecord, wish: _Wish, on_progress: Progress) -> BuildRecord:
    """Say on the commit that it is built, and tell Airflow what it has not heard."""
    from airloom.flows.announce import announce as tell

    said = _said(record)
    if wish.announce and not record.announced:
        # Found after a kill, it says that telling is owed.
        record = record.model_copy(update={"airflow": "due"})
        _store(hooks, record)
        # The commit is built, however long it takes to tell Airflow.
        _report(hooks, pin, "success", said, on_progress)
        # One after the other of each repo, so that none is told of after a later one.
        with lease(hooks.store, hooks.settings.bucket_airloom, f"told/{pin.repo}.json"):
            telling, detail = tell(hooks, record, on_progress, of_main=wish.asked_by != "person")
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


def lost_image(hooks: Hooks, record: BuildRecord) -> str | None:
    """Why what a build has made is of no use any more, where images are made; None where it is.

    Raises:
        ServiceError: the engine or the registry refused or did not answer.
    """
    from airloom.flows import images

    if not images.makes_images(hooks.settings):
        return None
    if record.image is None:
        return "it was built without an image"
    if images.is_there(hooks.settings, record.image):
        return None
    return f"its image {record.image.name}:{record.image.tag} is gone"


def _is_current(hooks: Hooks, pin: CodePin, record: BuildRecord, environment: str) -> bool:
    """Whether a build is what it would be if it were made now."""
    from airloom.flows import images

    if not images.makes_images(hooks.settings):
        return record.environment == environment
    return images.is_current(hooks.settings, record.image, ensure_checkout(hooks, pin.repo, pin.commit))


# Saying


def say_again(hooks: Hooks, repo: str, commit: str, on_progress: Progress) -> str | None:
    """Set the status of a commit whose build has ended, where it is missing or still says otherwise; what it says now.

    The git server was away, or the build was killed, when it was to be said.

    Raises:
        ServiceError: the git server or the store refused or did not answer.
    """
    record = find_build(hooks, repo, commit)
    failure = find_failure(hooks, repo, commit) if record is None else None
    if record is None and failure is None:
        return None
    there = (row for row in hooks.gitbucket.statuses(repo, commit) if row["context"] == STATUS_CONTEXT)
    if next((row["state"] for row in there), "pending") != "pending":
        return None
    said = _said(record) if record else failure.reason if failure else ""
    state = "success" if record else "failure"
    return said if _report(hooks, hooks.git.commit(repo, commit), state, said, on_progress) else None


def _said(record: BuildRecord) -> str:
    return f"built: {', '.join(stage.value for stage in record.stages)}"


def _report(hooks: Hooks, pin: CodePin, state: str, description: str, on_progress: Progress) -> bool:
    """Set the commit's status; that it can't be set does not undo a build. Whether it was set."""
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
        return False
    return True


# Storing


def _key(repo: str, commit: str) -> str:
    return f"builds/{repo}/{commit}.json"


def _failure_key(repo: str, commit: str) -> str:
    return f"builds/{repo}/{commit}.failure.json"


def _store(hooks: Hooks, record: BuildRecord) -> None:
    value = record.model_copy(update={"created": True}).model_dump(mode="json")
    hooks.store.put_json(hooks.settings.bucket_airloom, _key(record.repo, record.commit), value)


@contextmanager
def _one_at_a_time(hooks: Hooks, pin: CodePin, on_progress: Progress) -> Iterator[None]:
    """Who builds the same commit on this machine waits here, without asking the store again and again."""
    path = hooks.settings.checkouts_dir / pin.repo / f".{pin.commit}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_progress(f"{pin.repo}@{pin.commit[:8]} is being built on this machine: waiting")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
