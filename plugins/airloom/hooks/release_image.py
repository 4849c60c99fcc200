"""The image of a release: the serving image plus `/airloom/release`, made once, by the engine alone, never changed."""

from __future__ import annotations

import io
import tarfile
import tempfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from airloom.contract import ImageRef, Release, Stage, StageRequest
from airloom.errors import ConfigError
from airloom.hooks.docker_container import INSTANCE_LABEL
from airloom.hooks.docker_engine import connect, engine_errors, ensure_image
from airloom.hooks.engine_images import EngineImages
from airloom.spec.pipeline import PipelineSpec

if TYPE_CHECKING:
    from airloom.settings import Settings

RELEASE = PurePosixPath("/airloom/release")
STATE = PurePosixPath("/var/lib/airloom")
RELEASE_LABEL = "airloom.release"


def labels_of(settings: Settings, release: Release) -> dict[str, str]:
    """What containers of a release are found by."""
    return {
        INSTANCE_LABEL: settings.instance_id,
        "airloom.pipeline": release.pipeline,
        RELEASE_LABEL: release.version,
    }


class ReleaseImages:
    """Makes images of releases, and pushes them."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._api = connect(settings)
        self._images = EngineImages(settings, self._api)

    def ensure(self, release: Release, bundle: Path, spec: PipelineSpec, published: ImageRef | None = None) -> str:
        """Have the engine hold a release's image, `<namespace>/<pipeline>:<version>`; its id.

        Args:
            published: the image in the registry, which is pulled where the engine lacks it; without it one is made.

        Raises:
            ConfigError: the release names no serving image.
            ServiceError: the engine or the registry refused or did not answer.
        """
        name = self._name(release)
        with engine_errors():
            if published is not None:
                ensure_image(self._api, self._settings, published.pull_ref)
                self._api.tag(published.pull_ref, published.name, published.tag)
                return str(self._api.inspect_image(published.pull_ref)["Id"])
            found = self._images.find(f"{name}:{release.version}")
            return str(found["Id"]) if found else self._make(name, release, bundle, spec)

    def publish(self, release: Release, bundle: Path, spec: PipelineSpec) -> ImageRef:
        """Push a release's image, made now if the engine lacks it, and tag the serving image with the release.

        Broken off anywhere, it can be done again: the same tags get the same content.

        Raises:
            ConfigError: the release names no serving image.
            ServiceError: the engine or the registry refused.
            UnavailableError: one of them does not answer.
        """
        image = self.ensure(release, bundle, spec)
        name, serving = self._name(release), serving_image(release)
        if serving.pushed:
            # With the pipeline's name: several pipelines may serve by one repo, each with a 1.0.0.
            tag = f"{release.pipeline}-{release.version}"
            with engine_errors():
                ensure_image(self._api, self._settings, serving.pull_ref)
            self._images.tag(serving.pull_ref, serving.name, tag)
            self._images.push(serving.name, tag)
        digest = self._images.push(name, release.version)
        with engine_errors():
            size_bytes = int(self._api.inspect_image(image)["Size"])
        return ImageRef(
            name=name,
            tag=release.version,
            digest=digest,
            pushed=True,
            runtime=serving.runtime,
            size_bytes=size_bytes,
        )

    def _make(self, name: str, release: Release, bundle: Path, spec: PipelineSpec) -> str:
        serving = serving_image(release)
        ensure_image(self._api, self._settings, serving.pull_ref)
        made = self._api.create_container(serving.pull_ref, labels=labels_of(self._settings, release))["Id"]
        try:
            with tempfile.TemporaryFile() as file:
                _pack(file, release, bundle, spec)
                file.seek(0)
                self._api.put_archive(made, "/", file)
            # The image has the labels of what it was made from: a container that somebody else makes of it is not ours.
            labels = f'LABEL {INSTANCE_LABEL}="" org.opencontainers.image.version="{release.version}"'
            committed = self._api.commit(made, repository=name, tag=release.version, changes=labels)
        finally:
            self._api.remove_container(made, force=True)
        return str(committed["Id"])

    def _name(self, release: Release) -> str:
        settings = self._settings
        return "/".join(p for p in (settings.registry.strip("/"), settings.image_namespace, release.pipeline) if p)


def serving_image(release: Release) -> ImageRef:
    """The image of the release's serving commit. Raises ConfigError: the release names none."""
    if release.image is None:
        raise ConfigError(
            f"release {release.version} of {release.pipeline} was made without an image",
            hint="run the pipeline again: its runs pin the image of the serving repo's commit now",
        )
    return release.image


def _pack(file: Any, release: Release, bundle: Path, spec: PipelineSpec) -> None:
    """The release's files as an archive: its model, its record, the reference rows, and the request to serve."""
    stage = spec.stages[Stage.SERVE]
    request = StageRequest(
        pipeline=release.pipeline,
        run_id=release.run_id,
        stage=Stage.SERVE,
        commit=release.serving_commit,
        params={
            "host": "0.0.0.0",  # noqa: S104 - of the container, which publishes no port
            "max_upload_bytes": spec.deploy.max_upload,
            "journal_dir": str(STATE / "journal"),
            **stage.params,
        },
        inputs={"model": Path(RELEASE / "model"), "release": Path(RELEASE / "release.json")},
        seed=stage.seed,
    )

    def readable(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = 0
        info.uname = info.gname = ""
        info.mode = 0o755 if info.isdir() else 0o644
        return info

    where = RELEASE.relative_to("/")
    with tarfile.open(fileobj=file, mode="w") as archive:
        for folder in (where.parent, where):
            info = tarfile.TarInfo(str(folder))
            info.type = tarfile.DIRTYPE
            archive.addfile(readable(info))
        for name in ("model", "release.json", "reference.json"):
            archive.add(bundle / name, str(where / name), filter=readable)
        content = request.model_dump_json().encode()
        info = tarfile.TarInfo(str(where / "request.json"))
        info.size = len(content)
        archive.addfile(readable(info), io.BytesIO(content))
