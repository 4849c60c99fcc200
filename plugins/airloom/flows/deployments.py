"""What answers for each pipeline: the stored state, the target that runs it, and putting both back together."""

from __future__ import annotations

import base64
import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from airloom.contract import Deployment, DeployTarget, Release
from airloom.errors import AirloomError, NotFoundError, ServiceError
from airloom.flows.release import REFERENCE_FILE, bundle_path, ensure_bundle, release_image, release_of
from airloom.flows.resolve import load_plan, spec_of
from airloom.hooks.gateway import Upstream
from airloom.spec.pipeline import PipelineSpec

if TYPE_CHECKING:
    from airloom.hooks.connect import Hooks
    from airloom.hooks.serving import ServingClient

# encode() rounds to 4 decimals, and another batch shape may flip the last of them.
TOLERANCE = 2e-4


@dataclass(frozen=True)
class ReferenceRow:
    """An input and the answer that the evaluation got for it."""

    id: str
    content: bytes
    media_type: str
    output: dict[str, Any]


class Target(Protocol):
    """What runs releases: one answers beside the others until it is stopped."""

    def start(self, release: Release, bundle: Path, spec: PipelineSpec) -> str:
        """Have a release answer; its URL, once it is ready. Raises PlatformError when it does not become so."""
        ...

    def url(self, pipeline: str, version: str) -> str | None:
        """Where a release answers, if it is ready."""
        ...

    def running(self, pipeline: str) -> list[str]:
        """The versions of a pipeline that were started and not stopped."""
        ...

    def stop(self, pipeline: str, version: str) -> None:
        """Let a release finish what it has, and end it. Not running: no change."""
        ...


def target_of(hooks: Hooks, spec: PipelineSpec) -> Target:
    """What runs the pipeline's releases."""
    if spec.deploy.target is DeployTarget.DOCKER:
        from airloom.hooks.deploy_docker import DockerTarget

        return DockerTarget(hooks.settings, published=lambda release: release_image(hooks, release))
    from airloom.hooks.deploy_process import ProcessTarget

    return ProcessTarget(hooks.settings, hooks.supervisor)


def deployment(hooks: Hooks, pipeline: str) -> Deployment | None:
    """What is deployed; `None` before the first time."""
    try:
        value = hooks.store.get_json(hooks.settings.bucket_airloom, _key(pipeline))
    except NotFoundError:
        return None
    return Deployment.stored(value, f"what is deployed of {pipeline}")


def save(
    hooks: Hooks,
    *,
    pipeline: str,
    release: str,
    previous: str | None,
    url: str,
    state: Literal["canary", "live", "rolled_back"],
    pinned_at: datetime | None,
    previous_pinned_at: datetime | None = None,
    unchanged: bool = False,
    detail: str = "",
) -> Deployment:
    """Write what is deployed."""
    found = Deployment(
        pipeline=pipeline,
        release=release,
        previous=previous,
        url=url,
        state=state,
        updated_at=datetime.now(UTC),
        detail=detail,
        pinned_at=pinned_at,
        previous_pinned_at=previous_pinned_at,
        unchanged=unchanged,
    )
    hooks.store.put_json(hooks.settings.bucket_airloom, _key(pipeline), found.model_dump(mode="json"))
    return found


def answering(found: Deployment | None) -> str | None:
    """The version that all traffic belongs to when no deployment is under way."""
    if found is None:
        return None
    return found.release if found.state == "live" else found.previous


@contextmanager
def one_at_a_time(hooks: Hooks, pipeline: str) -> Iterator[None]:
    """Let one task at a time change a pipeline's deployment; a killed one holds nothing."""
    hooks.settings.run_dir.mkdir(parents=True, exist_ok=True)
    with (hooks.settings.run_dir / f"deploy-{pipeline}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def direct(hooks: Hooks, spec: PipelineSpec, *shares: tuple[str, int]) -> None:
    """Give each of these processes its percentage of the traffic; those with 0 get none."""
    upstreams = [Upstream(url=url, weight=weight) for url, weight in shares if weight > 0]
    hooks.gateway.set_upstreams(spec.name, upstreams, max_body_bytes=spec.deploy.max_upload)


def reference_rows(hooks: Hooks, release: Release) -> list[ReferenceRow]:
    """What the release must answer, from its bundle."""
    rows = json.loads((bundle_path(hooks, release) / REFERENCE_FILE).read_bytes())["rows"]
    return [
        ReferenceRow(row["id"], base64.b64decode(row["image_base64"]), row["media_type"], row["output"]) for row in rows
    ]


def differences(client: ServingClient, rows: list[ReferenceRow], release: Release) -> tuple[list[str], list[str]]:
    """Ask for every row; one sentence for each answer that is not the evaluation's, and the predictions' ids.

    Raises:
        UnavailableError: nobody answers.
    """
    found, ids = [], []
    for row in rows:
        try:
            body = client.predict(row.content, row.media_type).body
        except ServiceError as error:
            if error.retryable:
                raise
            found.append(f"row {row.id}: {error}")
            continue
        ids.append(str(body.get("id")))
        if body.get("release") != release.version:
            found.append(f"row {row.id}: release {body.get('release')} answered, not {release.version}")
        else:
            found += [
                f"row {row.id}: {key} is {body.get(key)!r}, the evaluation had {value!r}"
                for key, value in row.output.items()
                if not _close(body.get(key), value)
            ]
    return found, ids


def ensure_url(hooks: Hooks, target: Target, pipeline: str, version: str) -> str | None:
    """Where a release answers; it is started if it isn't ready, as after a crash. None: it can't answer any more.

    Raises:
        UnavailableError: the store or an engine did not answer.
    """
    url = target.url(pipeline, version)
    if url is not None:
        return url
    try:
        return _started(hooks, pipeline, version)[1]
    except AirloomError as error:
        if error.retryable:
            raise
        return None


def restore_routes(hooks: Hooks) -> tuple[list[str], list[str]]:
    """Point the gateway at what is deployed; for a platform that starts.

    One pipeline that can't be restored keeps no other from answering.

    Returns:
        the pipelines and versions that answer again; one sentence for each that doesn't, with its reason.
    """
    restored, failed = [], []
    for item in hooks.store.list(hooks.settings.bucket_airloom, "deployments/"):
        pipeline = Path(item.key).stem
        try:
            version = _restore_route(hooks, pipeline)
        except AirloomError as error:
            failed.append(f"{pipeline}: {error.message}")
        else:
            if version:
                restored.append(f"{pipeline} {version}")
    return restored, failed


def _restore_route(hooks: Hooks, pipeline: str) -> str | None:
    # A run that the platform's end interrupted may be deploying again already.
    with one_at_a_time(hooks, pipeline):
        version = answering(deployment(hooks, pipeline))
        if version is None:
            return None
        spec, url = _started(hooks, pipeline, version)
        direct(hooks, spec, (url, 100))
        return version


def _started(hooks: Hooks, pipeline: str, version: str) -> tuple[PipelineSpec, str]:
    release = release_of(hooks, pipeline, version)
    spec = spec_of(load_plan(hooks, release.plan))
    return spec, target_of(hooks, spec).start(release, ensure_bundle(hooks, release), spec)


def _close(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, dict):
        return (
            isinstance(found, dict)
            and found.keys() == wanted.keys()
            and all(_close(found[key], value) for key, value in wanted.items())
        )
    if isinstance(wanted, list):
        return (
            isinstance(found, list)
            and len(found) == len(wanted)
            and all(_close(a, b) for a, b in zip(found, wanted, strict=True))
        )
    if isinstance(wanted, float) and isinstance(found, int | float):
        return abs(found - wanted) <= TOLERANCE
    return bool(found == wanted)


def _key(pipeline: str) -> str:
    return f"deployments/{pipeline}.json"
