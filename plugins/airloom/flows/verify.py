"""Verify a deployment from outside, make its model the champion, and end what it replaced."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from airloom.contract import Deployment, Release, RunPlan, VerifyReport
from airloom.errors import NotFoundError, RolledBackError, ServiceError, UnavailableError
from airloom.flows.deploy import undo
from airloom.flows.deployments import (
    ReferenceRow,
    answering,
    differences,
    ensure_url,
    one_at_a_time,
    reference_rows,
    target_of,
)
from airloom.flows.deployments import deployment as current
from airloom.flows.receipts import receipt
from airloom.flows.release import release_of
from airloom.flows.resolve import spec_of
from airloom.hooks.mlflow_records import CHAMPION
from airloom.hooks.serving import ServingClient

if TYPE_CHECKING:
    from airloom.hooks.connect import Hooks

_SHOWN_IDS = 5
_PATIENCE_SECONDS = 30.0


def verify_release(hooks: Hooks, *, plan: RunPlan, release: Release, deployment: Deployment) -> VerifyReport:
    """Ask the gateway what clients would ask, and hold the answers against the evaluation's.

    Every reference row must be answered by this release as the evaluation answered it, and an answer's receipt must
    lead back to this release. Then the model becomes the champion and earlier releases are drained and ended.
    Where a later run's release has the traffic, there is nothing to verify. A release that answered before this run
    keeps the traffic, whatever is found: the one before it has ended.

    Raises:
        RolledBackError: an answer was wrong; the earlier release answers again, with all traffic.
        ServiceError: the same of a release that answered before this run; nothing was undone.
        UnavailableError: MLflow or the store did not answer; nothing was undone.
    """
    if deployment.state == "superseded":
        return VerifyReport(release=release.version, checked=0, equal=0, superseded_by=deployment.previous)
    spec = spec_of(plan)
    target = target_of(hooks, spec)
    rows = reference_rows(hooks, release)
    with one_at_a_time(hooks, plan.pipeline):
        now = current(hooks, plan.pipeline)
        if now is not None and now.release != release.version and now.state != "rolled_back":
            # It had all traffic when `deploy` ended, so that this run did what it had to do. The champion is the
            # later run's to set, once it has verified its own.
            return VerifyReport(release=release.version, checked=0, equal=0, superseded_by=now.release)
        if answering(now) != release.version:
            found = f"release {now.release} ({now.state})" if now else "nothing"
            raise RolledBackError(f"{found} is deployed instead of release {release.version}")
        try:
            ids = _check(hooks, plan.pipeline, release, rows)
        except (ServiceError, RolledBackError, NotFoundError) as error:
            if deployment.unchanged:
                kind = UnavailableError if error.retryable else ServiceError
                raise kind(
                    f"release {release.version} goes on answering as before this run, but fails: {error.message}",
                    hint=error.hint,
                ) from error
            previous = deployment.previous
            old_url = ensure_url(hooks, target, plan.pipeline, previous) if previous else None
            reason = undo(
                hooks,
                spec,
                target,
                release,
                previous=previous,
                old_url=old_url,
                pinned_at=deployment.previous_pinned_at,
                error=error,
            )
            if old_url and previous:
                _make_champion(hooks, plan.pipeline, previous)
            raise RolledBackError(reason) from error
        hooks.mlflow.set_alias(release.model_name, CHAMPION, release.model_version)
        for version in target.running(plan.pipeline):
            if version != release.version:
                target.stop(plan.pipeline, version)
    return VerifyReport(
        release=release.version, checked=len(rows), equal=len(rows), sample_prediction_ids=ids[:_SHOWN_IDS]
    )


def _make_champion(hooks: Hooks, pipeline: str, version: str) -> None:
    """Let the champion be what answers again: that release's own run may have left this to the one rolled back."""
    with suppress(ServiceError, NotFoundError):  # the next release's run compares with what the alias says then
        release = release_of(hooks, pipeline, version)
        hooks.mlflow.set_alias(release.model_name, CHAMPION, release.model_version)


def _check(hooks: Hooks, pipeline: str, release: Release, rows: list[ReferenceRow]) -> list[str]:
    import tenacity

    # The gateway or the process may be starting again after a crash: that is no fault of the release.
    patiently = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(UnavailableError),
        stop=tenacity.stop_after_delay(_PATIENCE_SECONDS),
        wait=tenacity.wait_fixed(0.5),
        reraise=True,
    )
    with ServingClient(hooks.gateway.model_url(pipeline)) as client:
        wrong, ids = patiently(differences, client, rows, release)
    if wrong:
        raise RolledBackError(f"{len(wrong)} answers through the gateway are wrong; {wrong[0]}")
    # A release answers before its answers reach the prediction log.
    found = patiently.copy(retry=tenacity.retry_if_exception_type((UnavailableError, NotFoundError)))(
        receipt, hooks, ids[0]
    )
    if found.release.version != release.version:
        raise RolledBackError(f"the receipt of {ids[0]} leads to release {found.release.version}")
    return ids
