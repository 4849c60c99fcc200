"""Names of what Airflow schedules on: a new build of a stage repo is an event of that repo's asset."""

from __future__ import annotations

STAGE_ASSET_PREFIX = "airloom://stage-repos/"


def stage_asset(repo: str) -> str:
    """Name and URI of a stage repo's asset. Its events carry `repo`, `commit`, `message` and `pusher`."""
    return f"{STAGE_ASSET_PREFIX}{repo}"
