"""Deploy a release: beside the old one, in steps, watched, and undone by itself."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING

from airloom.contract import Deployment, Release, RunPlan
from airloom.errors import AirloomError, PlatformError, RolledBackError, ServiceError
from airloom.flows.deployments import (
    ReferenceRow,
    Target,
    answering,
    deployment,
    differences,
    direct,
    ensure_url,
    one_at_a_time,
    reference_rows,
    save,
    target_of,
)
from airloom.flows.release import ensure_bundle
from airloom.flows.resolve import spec_of
from airloom.hooks.serving import ServingClient
from airloom.spec.pipeline import Canary, PipelineSpec

if TYPE_CHECKING:
    from airloom.hooks.connect import Hooks

OnStep = Callable[[str], None]

PROBES_PER_SECOND = 20.0
# Fewer answers than this say nothing of a median; a step's own probes give more.
_MIN_PROBES = 10
# A median of a few milliseconds doubles when another process takes the processor for a moment.
_LATENCY_FLOOR_SECONDS = 0.02


def deploy_release(hooks: Hooks, *, plan: RunPlan, release: Release, on_step: OnStep = lambda text: None) -> Deployment:
    """Start a release beside the one that answers and move the traffic to it in the pipeline's canary steps.

    Each step lasts `canary.step_time`. The release must answer the evaluation's reference rows as the evaluation
    did; at every step its 5xx rate (of all its traffic) and its median latency (of probes sent to both releases by
    turns) must keep within the pipeline's bounds. The earlier release goes on running until `verify` has passed.
    Killed and tried again, it starts over. Where what answers is of a run that was pinned later, such as one of a
    revert that had less to do, that goes on answering, and nothing is started.

    Raises:
        RolledBackError: the release did not hold; the earlier one answers again, with all traffic.
        UnavailableError: the gateway or the store did not answer.
    """
    spec = spec_of(plan)
    target = target_of(hooks, spec)
    live = partial(save, hooks, pipeline=plan.pipeline, release=release.version, state="live")
    with one_at_a_time(hooks, plan.pipeline):
        before = deployment(hooks, plan.pipeline)
        previous, pinned_at = answering(before), before.pinned_at if before else None
        if before and previous == release.version:
            url = target.start(release, ensure_bundle(hooks, release), spec)
            direct(hooks, spec, (url, 100))
            on_step(f"release {release.version} answers already")
            # Else another one was tried since, and gave the traffic back: what this one once took it from is over.
            own = before.release == release.version
            return live(
                previous=before.previous if own else None,
                url=url,
                pinned_at=max(pinned_at or plan.created_at, plan.created_at),
                previous_pinned_at=before.previous_pinned_at if own else None,
                # A try after this run's own has moved the traffic finds it here too.
                unchanged=not own or before.unchanged or pinned_at != plan.created_at,
            )
        if previous and pinned_at and pinned_at > plan.created_at:
            found = _superseded(plan, release, previous, pinned_at)
            on_step(f"release {release.version} is superseded: {found.detail}")
            return found
        old_url = ensure_url(hooks, target, plan.pipeline, previous) if previous else None
        try:
            url = _roll_out(
                hooks, spec, target, release, previous=previous, old_url=old_url, pinned_at=pinned_at, on_step=on_step
            )
            return live(previous=previous, url=url, pinned_at=plan.created_at, previous_pinned_at=pinned_at)
        except (PlatformError, ServiceError, RolledBackError) as error:
            reason = undo(
                hooks, spec, target, release, previous=previous, old_url=old_url, pinned_at=pinned_at, error=error
            )
            on_step(reason)
            raise RolledBackError(reason, hint=f"release {release.version} is kept; mend its cause and push") from error


def undo(
    hooks: Hooks,
    spec: PipelineSpec,
    target: Target,
    release: Release,
    *,
    previous: str | None,
    old_url: str | None,
    pinned_at: datetime | None,
    error: AirloomError,
) -> str:
    """Give all traffic back to the earlier release and end this one; what happened, for people.

    Args:
        pinned_at: when the run that brought the earlier release was pinned, if that is known.
    """
    if old_url:
        direct(hooks, spec, (old_url, 100))
    else:
        hooks.gateway.remove(spec.name)
    with suppress(PlatformError):
        target.stop(spec.name, release.version)
    now = f"release {previous} answers" if old_url else "nothing is served"
    reason = f"release {release.version} was rolled back, {now}: {error.message}"
    save(
        hooks,
        pipeline=spec.name,
        release=release.version,
        previous=previous,
        url=old_url or "",
        state="rolled_back",
        pinned_at=pinned_at,
        detail=reason,
    )
    return reason


def _roll_out(
    hooks: Hooks,
    spec: PipelineSpec,
    target: Target,
    release: Release,
    *,
    previous: str | None,
    old_url: str | None,
    pinned_at: datetime | None,
    on_step: OnStep,
) -> str:
    """Move the traffic; the URL of the release, which has all of it then."""
    bundle = ensure_bundle(hooks, release)
    on_step(f"starting release {release.version}" + (f" beside {previous}" if old_url else ""))
    url = target.start(release, bundle, spec)
    rows = reference_rows(hooks, release)
    with ServingClient(url) as new:
        wrong, _ = differences(new, rows, release)
        if wrong:
            raise RolledBackError(f"{len(wrong)} reference answers differ from the evaluation's; {wrong[0]}")
        on_step(f"release {release.version} at {url} gives the evaluation's answers to {len(rows)} reference rows")
        if old_url is None:
            direct(hooks, spec, (url, 100))
            why = f"release {previous} answers no more" if previous else "there was no earlier release"
            on_step(f"100% of the traffic: {why}")
        else:
            save(
                hooks,
                pipeline=spec.name,
                release=release.version,
                previous=previous,
                url=url,
                state="canary",
                pinned_at=pinned_at,
            )
            slowest = 0.0
            with ServingClient(old_url) as old:
                for percent in spec.deploy.canary.steps:
                    direct(hooks, spec, (old_url, 100 - percent), (url, percent))
                    figures, slowest = _watch(spec.deploy.canary, rows, old=old, new=new, slowest=slowest)
                    on_step(f"{percent}% of the traffic: {figures}")
    return url


def _superseded(plan: RunPlan, release: Release, by: str, pinned_at: datetime) -> Deployment:
    detail = (
        f"release {by} answers, whose run was pinned later: at {pinned_at:%Y-%m-%d %H:%M:%S}, this one at "
        f"{plan.created_at:%Y-%m-%d %H:%M:%S}; to serve this one all the same, start a run of its commits"
    )
    return Deployment(
        pipeline=plan.pipeline,
        release=release.version,
        previous=by,
        url="",
        state="superseded",
        updated_at=datetime.now(UTC),
        detail=detail,
        pinned_at=pinned_at,
    )


def _watch(
    canary: Canary, rows: list[ReferenceRow], *, old: ServingClient, new: ServingClient, slowest: float
) -> tuple[str, float]:
    """Watch one step; what was seen, and the earlier release's slowest median so far, in seconds.

    Args:
        slowest: of the steps before. A release that has most of the traffic is slower than one that has none of it,
            so the new one is held against the earlier one's slowest step: its first, mostly.

    Raises:
        RolledBackError: a bound was passed.
        UnavailableError: the new release does not answer.
    """
    start = new.counters()
    old_seconds: list[float] = []
    new_seconds: list[float] = []
    deadline = time.monotonic() + canary.step_time
    while time.monotonic() < deadline or len(new_seconds) < _MIN_PROBES:
        row = rows[len(new_seconds) % len(rows)]
        # By turns, so that what slows the machine slows both.
        with suppress(ServiceError):
            old_seconds.append(old.predict(row.content, row.media_type).seconds)
        new_seconds.append(new.predict(row.content, row.media_type).seconds)
        time.sleep(1 / PROBES_PER_SECOND)
    seen = new.counters().since(start)
    rate = seen.failed / seen.answered if seen.answered else 0.0
    if rate > canary.max_error_rate:
        raise RolledBackError(
            f"{seen.failed} of its {seen.answered} answers failed, {rate:.2%}; allowed are {canary.max_error_rate:.2%}"
        )
    new_median = statistics.median(new_seconds)
    text = f"{seen.answered} answers, {seen.failed} failed, median {new_median * 1000:.1f} ms"
    old_median = max(slowest, statistics.median(old_seconds)) if old_seconds else slowest
    if not old_median:
        return text, slowest
    ratio = new_median / old_median
    if ratio > canary.max_latency_ratio and new_median > _LATENCY_FLOOR_SECONDS:
        raise RolledBackError(
            f"its median latency is {new_median * 1000:.1f} ms, {ratio:.1f} times the earlier release's "
            f"{old_median * 1000:.1f} ms; allowed are {canary.max_latency_ratio:g} times"
        )
    return f"{text} ({ratio:.2f} times the earlier release's)", old_median
