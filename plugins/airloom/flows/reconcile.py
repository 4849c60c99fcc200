"""Find what pushes should have led to and did not, and do it: an event may be lost, a builder killed, Airflow away."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Literal

from airloom.contract import Frozen
from airloom.contract.push import PREFIX, PushBuildEnd, PushBuildStart, PushSeen
from airloom.errors import AirloomError, BuildFailedError, NotFoundError
from airloom.flows.build import build, built_commits, find_build, find_failure
from airloom.flows.changes import decide_tip
from airloom.flows.push_entry import read_entries, write_entry
from airloom.hooks.connect import Hooks
from airloom.spec.load import load_pipelines

BRANCH = "main"
# A build that began longer ago and has not ended was killed.
BUILD_LIMIT = timedelta(minutes=20)
# Whoever receives events gets this long, so that one commit is not built on two machines at once.
GRACE = timedelta(minutes=1)
_LONGEST_WAIT = timedelta(hours=6)

Progress = Callable[[str], None]


class Action(Frozen):
    """What was done about a stage repo, and why.

    Attributes:
        did: `left`: it is to be looked at again; `error`: something else than the commit stood in the way.
    """

    repo: str
    commit: str
    did: Literal["built", "told", "failed", "left", "error"]
    why: str

    def __str__(self) -> str:
        return f"{self.repo}@{self.commit[:8]} {self.did}: {self.why}" if self.commit else f"{self.repo}: {self.why}"


def reconcile(
    hooks: Hooks,
    *,
    repos: list[str] | None = None,
    grace: timedelta = GRACE,
    on_progress: Progress = lambda line: None,
) -> list[Action]:
    """Compare `main` of each stage repo with what was built and told, and make up for what is missing.

    Nothing is done twice: a commit that was built is not built again, one that failed waits for a person, one that
    is being built is left to whoever builds it. What is as it should be is not in the answer.

    Args:
        repos: those of all pipelines when not given.
        grace: how long a commit is left to the events' receiver after it was first seen here.
    """
    if repos is None:
        specs, _ = load_pipelines(hooks.settings.configs_dir)
        repos = sorted({repo for spec in specs for repo in spec.repos})
    actions = []
    for repo in repos:
        try:
            action = _reconcile(hooks, repo, grace, on_progress)
        except AirloomError as error:
            action = Action(repo=repo, commit="", did="error", why=error.message)
        if action is not None:
            on_progress(str(action))
            actions.append(action)
    return actions


def _reconcile(hooks: Hooks, repo: str, grace: timedelta, on_progress: Progress) -> Action | None:
    try:
        tip = hooks.git.head(repo, BRANCH)
    except NotFoundError:
        return None  # nobody has pushed yet
    now = datetime.now(UTC)
    base: str | None = tip
    if find_build(hooks, repo, tip) is None and find_failure(hooks, repo, tip) is None:
        decision = decide_tip(hooks.git.mirror(repo), tip, built_commits(hooks, repo))
        if decision.commit is not None:
            return _build(hooks, repo, tip, decision.reason, grace=grace, on_progress=on_progress)
        base = decision.base
    # The tip is as far as stages go what was built there; was Airflow told of that?
    record = find_build(hooks, repo, base) if base else None
    if record is None or record.airflow != "due" or now - record.built_at < grace:
        return None
    told = build(hooks, repo, record.commit, on_progress, pusher=record.pusher, asked_by="reconciler")
    if told.airflow == "due":
        return Action(repo=repo, commit=record.commit, did="error", why="Airflow could not be told")
    return Action(repo=repo, commit=record.commit, did="told", why=f"Airflow had not been told; now: {told.airflow}")


def _build(hooks: Hooks, repo: str, tip: str, reason: str, *, grace: timedelta, on_progress: Progress) -> Action:
    wait = _why_wait(hooks, repo, tip, grace)
    if wait is not None:
        return Action(repo=repo, commit=tip, did="left", why=wait)
    try:
        record = build(hooks, repo, tip, on_progress, asked_by="reconciler")
    except BuildFailedError as error:
        return Action(repo=repo, commit=tip, did="failed", why=error.message)
    except AirloomError as error:
        return Action(repo=repo, commit=tip, did="error", why=error.message)
    return Action(repo=repo, commit=tip, did="built", why=f"{reason}; Airflow: {record.airflow}")


def _why_wait(hooks: Hooks, repo: str, tip: str, grace: timedelta) -> str | None:
    """Why a commit that has no build is left alone for now."""
    now = datetime.now(UTC)
    bucket = hooks.settings.bucket_airloom
    keys = sorted(item.key for item in hooks.store.list(bucket, f"{PREFIX}{repo}/{tip}/"))
    entries = read_entries(hooks, keys)
    ends = {entry.id: entry for entry in entries if isinstance(entry, PushBuildEnd)}
    open_starts = [entry for entry in entries if isinstance(entry, PushBuildStart) and entry.id not in ends]
    if any(now - entry.at < BUILD_LIMIT for entry in open_starts):
        return "its build has begun"
    tries = [entry.at for entry in (*ends.values(), *open_starts)]
    if tries:
        # Whatever prevented it may pass; each try waits twice as long as the one before.
        due = max(tries) + min(timedelta(minutes=2 ** min(len(tries), 10)), _LONGEST_WAIT)
        return f"tried {len(tries)} times; the next try is due at {due:%H:%M:%S} UTC" if now < due else None
    seen = [entry.at for entry in entries if isinstance(entry, PushSeen)]
    if not seen:
        write_entry(hooks, PushSeen(repo=repo, commit=tip, id=tip, at=now))
    return "its event may still come" if now - min(seen, default=now) < grace else None
