"""Why a run was started, read from what Airflow knows of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from airloom.contract.assets import STAGE_ASSET_PREFIX
from airloom.contract.plan import Trigger

AssetEvents = Mapping[Any, Sequence[Any]]
_BY_EVENTS = "asset_triggered"


def pushed_commits(events: AssetEvents | None) -> dict[str, str]:
    """repo -> the commit of the latest event of each stage repo's asset among those that started a run."""
    return {repo: extra["commit"] for repo, extra in _pushes(events).items() if extra.get("commit")}


def trigger_of(dag_run: Any, events: AssetEvents | None) -> Trigger:
    """Why the run was started and by whom."""
    pushes = _pushes(events)
    if pushes:
        pushers = sorted({str(extra["pusher"]) for extra in pushes.values() if extra.get("pusher")})
        details = [
            f"{repo}@{str(extra.get('commit', ''))[:8]} {first_line(str(extra.get('message', '')))}".strip()
            for repo, extra in pushes.items()
        ]
        return Trigger(kind="push", by=", ".join(pushers), detail="; ".join(details))
    kinds = {"scheduled": "schedule", _BY_EVENTS: "asset", "backfill": "schedule"}
    kind = kinds.get(_run_type(dag_run), "manual")
    by = getattr(dag_run, "triggering_user_name", None) or ""
    return Trigger.model_validate({"kind": kind, "by": by, "detail": ""})


def pinned_at(dag_run: Any) -> datetime:
    """When what a run is pinned to was decided: by the newest of the events that started it, else now.

    Runs of two events come one after the other, but their first tasks may not.
    """
    due: datetime = dag_run.run_after
    return due if _run_type(dag_run) == _BY_EVENTS else datetime.now(UTC)


def first_line(message: str) -> str:
    """The first line of a commit message, cut where it is too long to show."""
    return message.strip().partition("\n")[0][:80]


def _run_type(dag_run: Any) -> str:
    return str(getattr(dag_run.run_type, "value", dag_run.run_type))


def _pushes(events: AssetEvents | None) -> dict[str, Mapping[str, Any]]:
    """repo -> `extra` of its latest event."""
    latest: dict[str, Mapping[str, Any]] = {}
    for asset, happened in (events or {}).items():
        name = str(getattr(asset, "uri", None) or getattr(asset, "name", asset))
        if not name.startswith(STAGE_ASSET_PREFIX) or not happened:
            continue
        newest = max(happened, key=lambda event: event.timestamp)
        latest[name.removeprefix(STAGE_ASSET_PREFIX).rstrip("/")] = newest.extra or {}
    return dict(sorted(latest.items()))
