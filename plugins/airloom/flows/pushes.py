"""What became of each push: the ledger's records, joined with Airflow's runs and with releases."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any, Literal, TypeVar

from pydantic import Field

from airloom.contract import Frozen
from airloom.contract.assets import stage_asset
from airloom.contract.build import BuildRecord
from airloom.contract.push import PREFIX, PushBuildEnd, PushBuildStart, PushDelivery, PushEntry
from airloom.errors import ConflictError, NotFoundError, ServiceError
from airloom.flows.build import build
from airloom.flows.push_entry import entry_name, read_entries
from airloom.hooks.connect import Hooks

_EVENTS_AT_MOST = 300
_SHORT_AT_LEAST = 4

E = TypeVar("E", bound=PushEntry)
BuildState = Literal["none", "running or killed", "built", "found", "failed", "error"]


class PushRun(Frozen):
    """A run that a push has started."""

    pipeline: str
    run_id: str
    state: str
    started_at: datetime | None = None
    ended_at: datetime | None = None
    verdict: str | None = None
    release: str | None = None


class Push(Frozen):
    """One pushed commit, and all that is known of it.

    Attributes:
        asked_by: who wanted the first build: an event, the reconciler or a person.
        deliveries: of the events that told of it, oldest first; empty where all were lost.
        build: of the last one that ended otherwise than by finding an earlier one's result.
        image: what the build made, where the installation builds images.
        airflow: what came of telling Airflow, see `BuildRecord`.
        waited_seconds: from the first delivery to the build's start.
        total_seconds: from the first thing known of the push to the end of its last run.
    """

    repo: str
    commit: str
    message: str
    pusher: str
    asked_by: str = ""
    received_at: datetime | None = None
    deliveries: list[str] = Field(default_factory=list)
    reason: str = ""
    build: BuildState = "none"
    build_started_at: datetime | None = None
    build_seconds: float | None = None
    builds: int = 0
    image: str = ""
    airflow: str = ""
    runs: list[PushRun] = Field(default_factory=list)
    waited_seconds: float | None = None
    total_seconds: float | None = None


class Pushes(Frozen):
    """The newest pushes, newest first, and what stood in the way of knowing more."""

    pushes: list[Push]
    problems: list[str] = Field(default_factory=list)


def list_pushes(hooks: Hooks, *, repo: str | None = None, limit: int = 20) -> Pushes:
    """The newest pushes, of one repo or of all.

    Raises:
        ServiceError: the object store refused or did not answer. Without Airflow, runs are left out.
    """
    groups = _newest(_keys(hooks, f"{PREFIX}{repo}/" if repo else PREFIX), limit)
    entries = read_entries(hooks, [key for keys in groups.values() for key in keys])
    problems: list[str] = []
    runs = _runs_of(hooks, {name for name, _ in groups}, problems)
    found = []
    for name, commit in groups:
        own = [entry for entry in entries if (entry.repo, entry.commit) == (name, commit)]
        if own:
            found.append(_push(own, runs.get((name, commit), [])))
    return Pushes(pushes=[_with_releases(hooks, push, problems) for push in found], problems=sorted(set(problems)))


def replay(hooks: Hooks, target: str, on_progress: Callable[[str], None] = lambda line: None) -> BuildRecord:
    """Do once more what a push leads to: what is done already stays, what failed is tried again.

    Args:
        target: `REPO@COMMIT`, or the id of a delivery in the ledger.

    Raises:
        NotFoundError: there is no such delivery or commit.
        ConflictError: several deliveries begin like that.
        BuildFailedError, ServiceError: see `build`.
    """
    repo, at, commit = target.partition("@")
    pusher = ""
    if not at:
        delivery = _delivery(hooks, target)
        repo, commit, pusher = delivery.repo, delivery.commit, delivery.pusher
    elif not (repo and commit):
        raise NotFoundError(f"{target!r} names no push", hint="give REPO@COMMIT or the id of a delivery")
    return build(hooks, repo, commit, on_progress, pusher=pusher)


def _delivery(hooks: Hooks, name: str) -> PushDelivery:
    keys = [key for key in _keys(hooks, PREFIX) if f"-{PushDelivery.kind}-{name}" in key.rpartition("/")[2]]
    found = [entry for entry in read_entries(hooks, keys) if isinstance(entry, PushDelivery)]
    if not found or len(name) < _SHORT_AT_LEAST:
        raise NotFoundError(f"no delivery {name!r} is in the ledger of pushes", hint="list them: airloom pushes")
    if len({entry.id for entry in found}) > 1:
        raise ConflictError(f"{len(found)} deliveries begin with {name!r}", hint="give more of the id")
    return found[-1]


# Reading


def _keys(hooks: Hooks, prefix: str) -> list[str]:
    return [item.key for item in hooks.store.list(hooks.settings.bucket_airloom, prefix)]


def _newest(keys: Iterable[str], limit: int) -> dict[tuple[str, str], list[str]]:
    """(repo, commit) -> keys of its records in order of time; the pushes with the newest first record come first."""
    groups: dict[tuple[str, str], list[str]] = {}
    for key in keys:
        parts = key.removeprefix(PREFIX).split("/")
        if len(parts) == 3:
            groups.setdefault((parts[0], parts[1]), []).append(key)
    ordered = sorted(groups, key=lambda group: min(map(entry_name, groups[group])), reverse=True)
    return {group: sorted(groups[group], key=entry_name) for group in ordered[:limit]}


# Joining


def _push(entries: list[PushEntry], runs: list[PushRun]) -> Push:
    deliveries, starts, ends = _of(PushDelivery, entries), _of(PushBuildStart, entries), _of(PushBuildEnd, entries)
    first = min(entry.at for entry in entries)
    by_id = {entry.id: entry for entry in ends}
    start, end = _build_that_counts(starts, by_id)
    state: BuildState = end.outcome if end else "running or killed" if start else "none"
    told = [entry.airflow for entry in ends if entry.airflow]
    finished = [run.ended_at for run in runs if run.ended_at]
    reasons = [end.reason if end else "", *(entry.reason for entry in deliveries[-1:])]
    return Push(
        repo=entries[0].repo,
        commit=entries[0].commit,
        message=next(
            filter(None, [*(entry.message for entry in starts), *(entry.message for entry in deliveries)]), ""
        ),
        pusher=next(filter(None, [*(entry.pusher for entry in deliveries), *(entry.pusher for entry in starts)]), ""),
        asked_by=starts[0].asked_by if starts else "",
        received_at=deliveries[0].at if deliveries else None,
        deliveries=[entry.id for entry in deliveries],
        reason=next((reason for reason in reasons if reason), ""),
        build=state,
        build_started_at=start.at if start else None,
        build_seconds=end.seconds if end else None,
        builds=len(starts),
        image=next((entry.image for entry in reversed(ends) if entry.image), ""),
        airflow=told[-1] if told else "",
        runs=runs,
        waited_seconds=_between(deliveries[0].at, starts[0].at) if deliveries and starts else None,
        total_seconds=_between(first, max(finished)) if finished and len(finished) == len(runs) else None,
    )


def _of(kind: type[E], entries: list[PushEntry]) -> list[E]:
    return [entry for entry in entries if isinstance(entry, kind)]


def _build_that_counts(
    starts: list[PushBuildStart], ends: dict[str, PushBuildEnd]
) -> tuple[PushBuildStart | None, PushBuildEnd | None]:
    """The last build, but rather one that did something than one that found it done."""
    pairs = [(start, ends.get(start.id)) for start in starts]
    did = [pair for pair in pairs if pair[1] is not None and pair[1].outcome != "found"]
    pairs = did or [pair for pair in pairs if pair[1] is not None] or pairs
    return pairs[-1] if pairs else (None, None)


def _between(earlier: datetime, later: datetime) -> float:
    return round((later - earlier).total_seconds(), 3)


def _runs_of(hooks: Hooks, repos: Iterable[str], problems: list[str]) -> dict[tuple[str, str], list[PushRun]]:
    """(repo, commit) -> the runs that are pinned to it: of the events that a run has taken, the newest counts."""
    found: dict[tuple[str, str], list[PushRun]] = {}
    for repo in sorted(repos):
        try:
            events = hooks.airflow.asset_events(stage_asset(repo), limit=_EVENTS_AT_MOST)
        except NotFoundError:
            continue
        except ServiceError as error:
            problems.append(f"runs are not shown: {error.message}")
            break
        taken: set[tuple[str, str]] = set()
        for event in events:
            commit = str((event.get("extra") or {}).get("commit", ""))
            for run in event.get("created_dagruns") or []:
                key = (run["dag_id"], run["run_id"])
                if key not in taken:
                    taken.add(key)
                    found.setdefault((repo, commit), []).append(_run(run))
    return found


def _run(run: dict[str, Any]) -> PushRun:
    return PushRun(
        pipeline=run["dag_id"],
        run_id=run["run_id"],
        state=run["state"],
        started_at=run.get("start_date"),
        ended_at=run.get("end_date"),
    )


def _with_releases(hooks: Hooks, push: Push, problems: list[str]) -> Push:
    """With the gate's verdict and the release of each run, as far as there are any."""
    runs = []
    for run in push.runs:
        verdict = release = None
        try:
            outcome = hooks.ledger.run(run.pipeline, run.run_id)
            verdict = outcome.verdict if outcome else None
            if verdict != "rejected":
                release = hooks.airflow.xcom(run.pipeline, run.run_id, "release")["version"]
        except NotFoundError:
            pass
        except ServiceError as error:
            problems.append(f"releases are not shown: {error.message}")
        runs.append(run.model_copy(update={"verdict": verdict, "release": release}))
    return push.model_copy(update={"runs": runs}) if runs else push
