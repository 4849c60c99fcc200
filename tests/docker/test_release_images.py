"""Images of releases between the engine and a real registry: pushed once, noted, pulled, and a registry away."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from docker.errors import APIError, ImageNotFound

from airloom.contract import DeployTarget, ImageRef, Release
from airloom.errors import ConfigError, ServiceError, UnavailableError
from airloom.flows import receipts
from airloom.flows.release import publish_image, release_image
from airloom.hooks.connect import Hooks
from airloom.hooks.docker_engine import connect
from airloom.hooks.image_builder import ImageBuilder
from airloom.hooks.object_store import ObjectStore
from airloom.hooks.registry import Registry
from airloom.hooks.release_image import RELEASE_LABEL, ReleaseImages
from airloom.settings import Settings
from tests.conftest import make_settings
from tests.fixtures.image_registry import USER, ImageRegistry
from tests.fixtures.plans import make_spec

NAMESPACE = "airloom-test-release"
COMMIT = "c" * 40
MODEL = b"weights"


class Bench:
    """One pipeline's first release, whose serving image the registry holds."""

    def __init__(self, settings: Settings, registry: ImageRegistry, pipeline: str, folder: Path) -> None:
        self.settings, self.registry, self.pipeline = settings, registry, pipeline
        self.hooks, self.api = Hooks(settings), connect(settings)
        self.spec = make_spec(name=pipeline)
        self.name = f"{registry.host}/{NAMESPACE}/{pipeline}"
        self.serving = self._push_serving(f"{registry.host}/{NAMESPACE}/serve_{pipeline}")
        self.release = Release(
            pipeline=pipeline,
            version="1.0.0",
            created_at=datetime(2026, 11, 1, tzinfo=UTC),
            run_id="run-1",
            model_name=pipeline,
            model_version="1",
            model_uri="models:/m-1",
            model_digest="d" * 64,
            mlflow_run_id="r" * 32,
            data_tag=f"{pipeline}/CV_x_aaaaaaaa_DV_20261101T000000000Z",
            data_md5="0" * 32,
            serving_repo=f"serve_{pipeline}",
            serving_commit=COMMIT,
            environment="e" * 64,
            image=self.serving,
            plan="s3://airloom/runs/x/plan.json",
            lineage={},
            target=DeployTarget.DOCKER,
        )
        self.bundle = folder / "bundle"
        (self.bundle / "model").mkdir(parents=True)
        (self.bundle / "model" / "weights").write_bytes(MODEL)
        (self.bundle / "reference.json").write_text("{}")
        self.release.write(self.bundle / "release.json")

    def _push_serving(self, name: str) -> ImageRef:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            archive.addfile(tarfile.TarInfo("main.py"))
        self.api.import_image_from_data(buffer.getvalue(), repository=name, tag=COMMIT, changes=['CMD ["true"]'])
        digest = ImageBuilder(self.settings).push(name, COMMIT)
        return ImageRef(name=name, tag=COMMIT, digest=digest, pushed=True, runtime="f" * 64)

    def publish(self, **changes: Any) -> ImageRef | None:
        release = self.release.model_copy(update=changes)
        return publish_image(self.hooks, release, self.bundle, self.spec)

    def digest_of(self, repository: str, tag: str) -> str | None:
        return Registry(self.settings, self.registry.host).digest_of(f"{NAMESPACE}/{repository}", tag)

    def local(self) -> str | None:
        try:
            return str(self.api.inspect_image(f"{self.name}:1.0.0")["Id"])
        except ImageNotFound:
            return None

    def forget(self) -> None:
        """Have the engine hold none of these images, as one of another machine."""
        for image in self.api.images():
            for reference in [*(image.get("RepoTags") or []), *(image.get("RepoDigests") or [])]:
                if reference.startswith(f"{self.registry.host}/{NAMESPACE}/"):
                    with suppress(APIError):
                        self.api.remove_image(reference, force=True)


@pytest.fixture
def bench(
    s3_store: ObjectStore, session_settings: Settings, login_registry: ImageRegistry, tmp_path: Path
) -> Iterator[Bench]:
    settings = make_settings(
        tmp_path / "home",
        s3_port=session_settings.s3_port,
        registry=login_registry.host,
        registry_user=USER,
        image_namespace=NAMESPACE,
    )
    found = Bench(settings, login_registry, f"p{login_registry.port}", tmp_path)
    yield found
    found.forget()
    found.api.close()


def test_a_release_is_pushed_once_and_noted_by_digest(bench: Bench) -> None:
    image = bench.publish()
    assert image is not None
    assert (image.name, image.tag, image.pushed) == (bench.name, "1.0.0", True)
    assert image.size_bytes > 0
    assert bench.digest_of(bench.pipeline, "1.0.0") == image.digest
    assert release_image(bench.hooks, bench.release) == image
    # The serving image is found by its release too, and is the same one.
    tags = Registry(bench.settings, bench.registry.host).tags(f"{NAMESPACE}/serve_{bench.pipeline}")
    assert sorted(tags) == sorted([COMMIT, f"{bench.pipeline}-1.0.0"])
    assert bench.digest_of(f"serve_{bench.pipeline}", f"{bench.pipeline}-1.0.0") == bench.serving.digest
    bench.registry.kill()
    assert bench.publish() == image  # nothing is left to be pushed


def test_a_container_that_somebody_makes_of_a_release_is_not_the_installations(bench: Bench) -> None:
    """Else `airloom down` would end it, and it would count as what answers."""
    bench.publish()
    made = bench.api.create_container(bench.local(), command=["true"])["Id"]
    try:
        labels = bench.api.inspect_container(made)["Config"]["Labels"]
        assert labels["airloom.release"] == "1.0.0"
        own = {"label": f"airloom.instance={bench.settings.instance_id}"}
        assert bench.api.containers(all=True, filters=own) == []
    finally:
        bench.api.remove_container(made)


def test_another_engine_pulls_what_was_made(bench: Bench) -> None:
    image = bench.publish()
    assert image is not None
    made = bench.local()
    bench.forget()
    assert bench.local() is None
    pulled = ReleaseImages(bench.settings).ensure(bench.release, bench.bundle / "gone", bench.spec, image)
    assert (pulled, bench.local()) == (made, made)
    assert bench.api.inspect_image(pulled)["Config"]["Labels"][RELEASE_LABEL] == "1.0.0"
    container = bench.api.create_container(image.pull_ref)["Id"]
    try:
        stream, _ = bench.api.get_archive(container, "/airloom/release/model/weights")
        with tarfile.open(fileobj=io.BytesIO(b"".join(stream))) as archive:
            content = archive.extractfile("weights")
            assert content is not None
            assert content.read() == MODEL
    finally:
        bench.api.remove_container(container, force=True)


def test_a_registry_that_is_down_is_said_and_the_next_try_ends_it(bench: Bench) -> None:
    bench.registry.kill()
    with pytest.raises(UnavailableError, match="could not be pushed") as caught:
        bench.publish()
    assert caught.value.retryable
    assert release_image(bench.hooks, bench.release) is None
    made = bench.local()
    assert made is not None
    bench.registry.start()
    assert bench.digest_of(bench.pipeline, "1.0.0") is None
    image = bench.publish()
    assert image is not None
    assert bench.digest_of(bench.pipeline, "1.0.0") == image.digest
    assert bench.local() == made


def test_what_answers_starts_again_without_the_registry(bench: Bench) -> None:
    image = bench.publish()
    bench.registry.kill()
    assert ReleaseImages(bench.settings).ensure(bench.release, bench.bundle, bench.spec, image) == bench.local()
    bench.forget()
    with pytest.raises(ServiceError):
        ReleaseImages(bench.settings).ensure(bench.release, bench.bundle, bench.spec, image)


def test_a_wrong_password_pushes_nothing(bench: Bench) -> None:
    (bench.settings.secrets_dir / "registry_password").write_text("wrong-one")
    with pytest.raises(ServiceError, match=f"refuses .* user {USER}") as caught:
        bench.publish()
    assert "wrong-one" not in str(caught.value)
    assert release_image(bench.hooks, bench.release) is None


def test_only_releases_in_containers_are_pushed_and_only_to_a_registry(bench: Bench, tmp_path: Path) -> None:
    assert bench.publish(target=DeployTarget.PROCESS) is None
    bench.hooks = Hooks(make_settings(tmp_path / "no-registry", s3_port=bench.settings.s3_port))
    assert bench.publish() is None
    bench.hooks = Hooks(bench.settings)
    with pytest.raises(ConfigError, match="was made without an image"):
        bench.publish(image=None)
    assert bench.digest_of(bench.pipeline, "1.0.0") is None


def test_a_receipt_names_the_image(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = receipts.Recorded(
        id="x",
        pipeline=bench.pipeline,
        release="1.0.0",
        answered_at=0.0,
        latency_ms=1.0,
        input_sha256="0" * 64,
        output={},
        batch_size=1,
        batch_index=0,
        content=None,
        source="log",
    )
    monkeypatch.setattr(receipts, "find", lambda hooks, prediction_id: answer)
    value = bench.release.model_dump(mode="json")
    bench.hooks.store.put_json("airloom", f"releases/{bench.pipeline}/1.0.0.json", value)
    assert receipts.receipt(bench.hooks, "x").image is None
    image = bench.publish()
    found = receipts.receipt(bench.hooks, "x")
    assert (found.release, found.image) == (bench.release, image)
