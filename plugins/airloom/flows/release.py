"""Make a release: an immutable, numbered thing that can be served without any other service."""

from __future__ import annotations

import json
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from airloom.contract import (
    DataVersion,
    DeployTarget,
    GateDecision,
    ImageRef,
    Release,
    RunPlan,
    Stage,
    StageOutcome,
    Verdict,
)
from airloom.errors import ConflictError, ContractError, NotFoundError
from airloom.flows.checkout import ensure_checkout
from airloom.flows.lease import lease
from airloom.flows.resolve import plan_uri, spec_of
from airloom.spec.pipeline import PipelineSpec

if TYPE_CHECKING:
    from airloom.hooks.connect import Hooks

REFERENCE_FILE = "reference.json"
RELEASE_TAG = "airloom.release"


def make_release(
    hooks: Hooks,
    *,
    plan: RunPlan,
    decision: GateDecision,
    train: StageOutcome,
    evaluate: StageOutcome,
    data_version: DataVersion,
) -> Release:
    """Number a promoted candidate and put together what serving needs.

    The patch is one more than the last release's of this MAJOR.MINOR. A run has one release at most, and the same
    model, serving code and environment is the release that it was before: making it again changes nothing.

    Raises:
        ContractError: the gate did not promote the candidate.
        NotFoundError: the model, the serving commit or the evaluation's reference rows are gone.
        ServiceError: another service refused or did not answer; made again, the release gets the same number.
    """
    if decision.verdict is not Verdict.PROMOTED:
        raise ContractError(f"model {decision.model_version} was {decision.verdict}, so there is nothing to release")
    reference = _reference(hooks, plan, evaluate)
    spec = spec_of(plan)
    serving = plan.code_of(Stage.SERVE)
    model_uri, model_digest = train.result.facts["model_uri"], train.result.facts["model_digest"]
    wanted = Release(
        pipeline=plan.pipeline,
        version=f"{spec.deploy.version}.0",
        created_at=datetime.now(UTC),
        run_id=plan.run_id,
        model_name=decision.model_name,
        model_version=decision.model_version,
        model_uri=model_uri,
        model_digest=model_digest,
        mlflow_run_id=decision.mlflow_run_id,
        data_tag=data_version.tag,
        data_md5=data_version.md5,
        serving_repo=serving.repo,
        serving_commit=serving.commit,
        environment=plan.stages[Stage.SERVE].environment,
        image=plan.stages[Stage.SERVE].image,
        plan=plan_uri(hooks, plan),
        lineage={repo: pin.commit for repo, pin in sorted(plan.code.items())},
        metrics=decision.metrics,
        target=spec.deploy.target,
    )
    release = _number(hooks, wanted)
    # Kept under the release's number, so that its bundle can be made anew on any machine.
    hooks.store.put_bytes(hooks.settings.bucket_airloom, _reference_key(release), reference)
    publish_image(hooks, release, ensure_bundle(hooks, release, reference), spec)
    hooks.mlflow.set_version_tags(release.model_name, release.model_version, {RELEASE_TAG: release.version})
    return release


def releases(hooks: Hooks, pipeline: str) -> list[Release]:
    """All releases of a pipeline, oldest first."""
    bucket = hooks.settings.bucket_airloom
    found = [
        Release.stored(hooks.store.get_json(bucket, item.key), item.key)
        for item in hooks.store.list(bucket, f"releases/{pipeline}/")
    ]
    return sorted(found, key=lambda release: _numbers(release.version))


def release_of(hooks: Hooks, pipeline: str, version: str) -> Release:
    """One release.

    Raises:
        NotFoundError: there is none of that number.
    """
    key = _key(pipeline, version)
    return Release.stored(hooks.store.get_json(hooks.settings.bucket_airloom, key), key)


def bundle_path(hooks: Hooks, release: Release) -> Path:
    """`model/`, `serving/`, `release.json` and `reference.json` of a release on this machine."""
    return hooks.settings.releases_dir / release.pipeline / release.version


def ensure_bundle(hooks: Hooks, release: Release, reference: bytes | None = None) -> Path:
    """A release's folder on this machine; made whole or not at all.

    Raises:
        NotFoundError: the model, the serving commit or the reference rows are gone.
    """
    bundle = bundle_path(hooks, release)
    if bundle.is_dir():
        return bundle
    rows = reference or hooks.store.get_bytes(hooks.settings.bucket_airloom, _reference_key(release))
    model = hooks.mlflow.download_model(release.model_uri, release.model_digest)
    serving = ensure_checkout(hooks, release.serving_repo, release.serving_commit)
    bundle.parent.mkdir(parents=True, exist_ok=True)
    temporary = bundle.with_name(f".{bundle.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        # Copies, not links: a release stays what it was when a cache is cleaned or damaged.
        shutil.copytree(model, temporary / "model")
        shutil.copytree(serving, temporary / "serving")
        for folder in (temporary, *(path for path in temporary.rglob("*") if path.is_dir())):
            folder.chmod(0o755)
        release.write(temporary / "release.json")
        (temporary / REFERENCE_FILE).write_bytes(rows)
        temporary.rename(bundle)
    except OSError:
        if not bundle.is_dir():  # else another task was faster
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return bundle


def publish_image(hooks: Hooks, release: Release, bundle: Path, spec: PipelineSpec) -> ImageRef | None:
    """Push the image of a release, once, where releases answer from containers and there is a registry.

    Its digest is noted when the registry has it whole, so that every engine runs that very image.

    Raises:
        ServiceError: the engine or the registry refused or did not answer; nothing was noted.
    """
    if release.target is not DeployTarget.DOCKER or not hooks.settings.registry:
        return None
    bucket, key = hooks.settings.bucket_airloom, _image_key(release)
    with lease(hooks.store, bucket, key):
        found = release_image(hooks, release)
        if found is not None:
            return found
        from airloom.hooks.release_image import ReleaseImages

        image = ReleaseImages(hooks.settings).publish(release, bundle, spec)
        hooks.store.put_json(bucket, key, image.model_dump(mode="json"))
        return image


def release_image(hooks: Hooks, release: Release) -> ImageRef | None:
    """The image of a release in the registry; None where it is not there.

    Raises:
        ServiceError: the store refused or did not answer.
    """
    key = _image_key(release)
    try:
        value = hooks.store.get_json(hooks.settings.bucket_airloom, key)
    except NotFoundError:
        return None
    return ImageRef.stored(value, key)


def _number(hooks: Hooks, wanted: Release) -> Release:
    """Give the release its number by a conditional write: two at once get two numbers."""
    bucket = hooks.settings.bucket_airloom
    while True:
        earlier = releases(hooks, wanted.pipeline)
        for release in reversed(earlier):
            if _is_same(release, wanted):
                return release
        major, minor, _ = _numbers(wanted.version)
        patches = [
            _numbers(release.version)[2] for release in earlier if _numbers(release.version)[:2] == (major, minor)
        ]
        version = f"{major}.{minor}.{max(patches, default=-1) + 1}"
        release = wanted.model_copy(update={"version": version})
        try:
            hooks.store.put_json(
                bucket, _key(release.pipeline, version), release.model_dump(mode="json"), if_none_match=True
            )
        except ConflictError:
            continue  # another run took the number: look again
        return release


def _is_same(release: Release, wanted: Release) -> bool:
    def identity(of: Release) -> tuple[object, ...]:
        return (of.model_digest, of.model_version, of.serving_commit, of.environment, _numbers(of.version)[:2])

    return identity(release) == identity(wanted)


def _reference(hooks: Hooks, plan: RunPlan, evaluate: StageOutcome) -> bytes:
    """The evaluation's reference rows: from its report, and kept in the store for when that is gone."""
    digest = evaluate.result.facts.get("predictions_digest", evaluate.key)
    bucket, key = hooks.settings.bucket_airloom, f"references/{plan.pipeline}/{digest}.json"
    report = evaluate.result.outputs.get("report")
    path = report.path / REFERENCE_FILE if report else None
    if path is not None and path.is_file():
        content = path.read_bytes()
        hooks.store.put_bytes(bucket, key, content)
    else:
        try:
            content = hooks.store.get_bytes(bucket, key)
        except NotFoundError as error:
            raise NotFoundError(
                f"the reference rows of the evaluation {digest[:12]} are gone from {path} and from s3://{bucket}/{key}",
                hint="run again with --force, which evaluates anew",
            ) from error
    if not json.loads(content).get("rows"):
        raise ContractError(
            f"{REFERENCE_FILE} of the evaluation {digest[:12]} has no rows",
            hint="the evaluate stage must write some, so that serving can be held against it",
        )
    return content


def _reference_key(release: Release) -> str:
    return f"references/{release.pipeline}/release-{release.version}.json"


def _image_key(release: Release) -> str:
    return f"release-images/{release.pipeline}/{release.version}.json"


def _key(pipeline: str, version: str) -> str:
    return f"releases/{pipeline}/{version}.json"


def _numbers(version: str) -> tuple[int, int, int]:
    major, minor, patch = version.split(".")
    return int(major), int(minor), int(patch)
