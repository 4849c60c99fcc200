"""Find what pushes should have led to and did not, and do it: an event may be lost, a builder killed, Airflow away."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Literal

from airloom.contract import Frozen
from airloom.contract.build import BuildRecord
from airloom.contract.push import PREFIX, PushBuildEnd, PushBuildStart, PushEntry, PushSeen
from airloom.errors import AirloomError, BuildFailedError, ContractError, NotFoundError
from airloom.flows.announce import is_known, users_of
from airloom.flows.build import build, built_commits, find_build, find_failure, lost_image, note_told, say_again
from airloom.flows.changes import decide_tip
from airloom.flows.push_entry import read_entries, write_entry
from airloom.flows.resolve import load_plan, run_plan_uri
from airloom.hooks.connect import Hooks
from airloom.spec.load import load_pipelines

BRANCH = "main"
# A build that began longer ago and has not ended was killed.
BUILD_LIMIT = timedelta(minutes=20)
# Whoever receives events gets this long, so that one commit is not built on two machines at once.
GRACE = timedelta(minutes=1)
_LONGEST_WAIT = timedelta(hours=6)
_RUNS_AT_MOST = 10

Progress = Callable[[str], None]


class Action(Frozen):
    """What was done about a stage repo, and why.

    Attributes:
        did: `said`: set the commit's status, which was missing; `left`: it is to be looked at again; `error`: something
            else than the commit stood in the way.
    """

    repo: str
    commit: str
    did: Literal["built", "told", "said", "failed", "left", "error"]
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
    """Compare `main` of each stage repo with builds, images, statuses and events, and make up for what is missing.

    Nothing is done twice: a commit that was built is not built again, one that failed waits for a person, one that
    is being built is left to whoever builds it. What is as it should be is not in the answer.

    Args:
        repos: those of all pipelines when not given, so that a repo which none uses is not met again and again.
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
    base: str | None = tip
    if find_build(hooks, repo, tip) is None and find_failure(hooks, repo, tip) is None:
        decision = decide_tip(hooks.git.mirror(repo), tip, built_commits(hooks, repo))
        if decision.commit is not None:
            return _build(hooks, repo, tip, decision.reason, grace=grace, on_progress=on_progress)
        base = decision.base
    # The tip is as far as stages go what was built there. Older commits are not looked at.
    return _made_good(hooks, repo, base, grace, on_progress) if base else None


def _made_good(hooks: Hooks, repo: str, commit: str, grace: timedelta, on_progress: Progress) -> Action | None:
    """Whether the image of a commit whose build has ended is there, Airflow knows of it, and its status says so."""
    record = find_build(hooks, repo, commit)
    if record is not None:
        if datetime.now(UTC) - record.built_at < grace:
            return None
        lost = lost_image(hooks, record)
        if lost is not None:
            # Whoever has run with it has been told; the others still are.
            tell = record.airflow == "due"
            return _build(hooks, repo, commit, lost, grace=grace, on_progress=on_progress, tell=tell)
        if record.airflow in {"due", "no pipeline"}:
            told = _tell(hooks, record, on_progress)
            if told is not None:
                return told
    if _begun(_entries(hooks, repo, commit)):
        return None
    said = say_again(hooks, repo, commit, on_progress)
    return Action(repo=repo, commit=commit, did="said", why=said) if said else None


def _tell(hooks: Hooks, record: BuildRecord, on_progress: Progress) -> Action | None:
    def action(did: Literal["told", "left", "error"], why: str) -> Action:
        return Action(repo=record.repo, commit=record.commit, did=did, why=why)

    # Asked first, so that a pipeline that Airflow cannot read fills no ledger.
    if not is_known(hooks, record.repo):
        return action("left", "Airflow has not read a pipeline that uses it")
    users = users_of(hooks, record.repo)
    if users and all(_has_run(hooks, name, record) for name in users):
        # Whoever adds a pipeline, or finds that a push has started none, mostly runs it: that is what telling would do.
        note_told(hooks, record)
        return None
    told = build(hooks, record.repo, record.commit, on_progress, pusher=record.pusher, asked_by="reconciler")
    if told.airflow == "due":
        return action("error", "Airflow could not be told")
    return action("told", f"Airflow had not been told; now: {told.airflow}")


def _has_run(hooks: Hooks, pipeline: str, record: BuildRecord) -> bool:
    """Whether one of a pipeline's latest runs is pinned to a commit."""
    try:
        runs = hooks.airflow.runs(pipeline, limit=_RUNS_AT_MOST)
    except NotFoundError:
        return False
    for run in runs:
        with suppress(NotFoundError, ContractError):  # it ended before it had one
            plan = load_plan(hooks, run_plan_uri(hooks, pipeline, run["dag_run_id"]))
            if any((pin.repo, pin.commit) == (record.repo, record.commit) for pin in plan.code.values()):
                return True
    return False


def _build(
    hooks: Hooks, repo: str, tip: str, reason: str, *, grace: timedelta, on_progress: Progress, tell: bool = True
) -> Action:
    wait = _why_wait(hooks, repo, tip, grace)
    if wait is not None:
        return Action(repo=repo, commit=tip, did="left", why=wait)
    try:
        record = build(hooks, repo, tip, on_progress, announce=tell, asked_by="reconciler")
    except BuildFailedError as error:
        return Action(repo=repo, commit=tip, did="failed", why=error.message)
    except AirloomError as error:
        return Action(repo=repo, commit=tip, did="error", why=error.message)
    return Action(repo=repo, commit=tip, did="built", why=f"{reason}; Airflow: {record.airflow}")


def _why_wait(hooks: Hooks, repo: str, tip: str, grace: timedelta) -> str | None:
    """Why a commit that has no build is left alone for now."""
    now = datetime.now(UTC)
    entries = _entries(hooks, repo, tip)
    if _begun(entries):
        return "its build has begun"
    ends = {entry.id: entry.at for entry in entries if isinstance(entry, PushBuildEnd)}
    starts = {entry.id: entry.at for entry in entries if isinstance(entry, PushBuildStart)}
    tries = list((starts | ends).values())
    if tries:
        # Whatever prevented it may pass; each try waits twice as long as the one before.
        due = max(tries) + min(timedelta(minutes=2 ** min(len(tries), 10)), _LONGEST_WAIT)
        return f"tried {len(tries)} times; the next try is due at {due:%H:%M:%S} UTC" if now < due else None
    seen = [entry.at for entry in entries if isinstance(entry, PushSeen)]
    if not seen:
        write_entry(hooks, PushSeen(repo=repo, commit=tip, id=tip, at=now))
    return "its event may still come" if now - min(seen, default=now) < grace else None


def _entries(hooks: Hooks, repo: str, commit: str) -> list[PushEntry]:
    found = hooks.store.list(hooks.settings.bucket_airloom, f"{PREFIX}{repo}/{commit}/")
    return read_entries(hooks, sorted(item.key for item in found))


def _begun(entries: list[PushEntry]) -> bool:
    """Whether a build has begun that may still be under way."""
    ended = {entry.id for entry in entries if isinstance(entry, PushBuildEnd)}
    starts = [entry for entry in entries if isinstance(entry, PushBuildStart) and entry.id not in ended]
    return any(datetime.now(UTC) - entry.at < BUILD_LIMIT for entry in starts)
