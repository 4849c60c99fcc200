"""Deploy target `docker`: a release answers from a container of an image that holds its model, see `release_image`.

What changes lies in a volume of the pipeline: the journal of answers, and the environment of each release's
container, secrets among it, which is in no image and no container's settings.
"""

from __future__ import annotations

import io
import json
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from airloom.contract import ImageRef, Release, Stage
from airloom.errors import ConfigError, PlatformError
from airloom.hooks import docker_files
from airloom.hooks.docker_container import INSTANCE_LABEL, closed, limits
from airloom.hooks.docker_engine import connect, container_facts, engine_errors
from airloom.hooks.docker_runner import CA_VARIABLES
from airloom.hooks.process_environment import thread_environment
from airloom.hooks.release_image import RELEASE, RELEASE_LABEL, STATE, ReleaseImages, labels_of
from airloom.spec.pipeline import PipelineSpec

if TYPE_CHECKING:
    from airloom.settings import Settings

START_TIMEOUT_SECONDS = 120.0
GRACE_SECONDS = 40  # longer than a release needs to finish what it has and to empty its journal
PORT = 8080  # of the container
_TMP_BYTES = 256 * 2**20
_LOG_LINES = 15
# Reads the private environment and becomes the release, so that signals reach it.
_BOOT = (
    "import json, os, sys; e = json.load(open(sys.argv[1], encoding='utf-8')); "
    "os.execve(sys.executable, [sys.executable, 'main.py', *sys.argv[2:]], {**os.environ, **e})"
)


class DockerTarget:
    """Starts and stops containers of releases. Its methods are those of `ProcessTarget`.

    Args:
        published: a release's image in the registry, if it is there.
    """

    def __init__(
        self, settings: Settings, *, published: Callable[[Release], ImageRef | None] = lambda release: None
    ) -> None:
        self._settings = settings
        self._published = published
        self._api = connect(settings)
        if settings.database.startswith("sqlite"):
            raise ConfigError(
                "deploy target 'docker' needs a prediction log that containers reach; this one is SQLite",
                hint="set AIRLOOM_DATABASE_URL to a MySQL or PostgreSQL server, or use target 'process'",
            )
        if settings.docker_network == "host":
            raise ConfigError(
                "deploy target 'docker' needs a network of its own, but AIRLOOM_DOCKER_NETWORK is 'host'",
                hint="name the network that the gateway is in",
            )

    def start(self, release: Release, bundle: Path, spec: PipelineSpec) -> str:
        """Have a release answer beside whatever else does; the URL of its container, which is ready.

        Raises:
            PlatformError: it did not become ready; the message holds its last log lines.
            ConfigError: the release names no image.
            ServiceError: the engine lacks its image, and the registry refused or did not answer.
        """
        name = self._name(release.pipeline, release.version)
        image = ReleaseImages(self._settings).ensure(release, bundle, spec, self._published(release))
        facts = container_facts(self._api, name)
        if facts is not None and not facts["State"]["Running"]:
            self._remove(name)
            facts = None
        if facts is None:
            self._run(name, image, release, spec)
        return self._wait_ready(name)

    def url(self, pipeline: str, version: str) -> str | None:
        """Where a release answers, if it is ready."""
        name = self._name(pipeline, version)
        facts = container_facts(self._api, name)
        if facts is None or not facts["State"]["Running"]:
            return None
        return _url_of(name) if _is_ready(_url_of(name)) else None

    def running(self, pipeline: str) -> list[str]:
        """The versions of a pipeline that have a container."""
        labels = [f"{INSTANCE_LABEL}={self._settings.instance_id}", f"airloom.pipeline={pipeline}", RELEASE_LABEL]
        with engine_errors():
            found = self._api.containers(all=True, filters={"label": labels})
        return sorted(item["Labels"][RELEASE_LABEL] for item in found)

    def stop(self, pipeline: str, version: str) -> None:
        """Let a release finish what it has, and remove its container. None there: no change."""
        from docker.errors import NotFound

        name = self._name(pipeline, version)
        with engine_errors(), suppress(NotFound):
            self._api.stop(name, timeout=GRACE_SECONDS)
        self._remove(name)

    def _run(self, name: str, image: str, release: Release, spec: PipelineSpec) -> None:
        from docker.types import Mount

        settings, resources = self._settings, spec.stages[Stage.SERVE].resources
        volume = f"airloom-{settings.instance_id}-serving-{release.pipeline}"
        environment = {
            "AIRLOOM_PREDICTION_DB": settings.database,
            "AIRLOOM_SERVING_ADMIN_TOKEN": settings.secret("serving_admin_token"),
        }
        if settings.ca_bundle:
            environment |= dict.fromkeys(CA_VARIABLES, str(STATE / docker_files.CA_FILE))
        with engine_errors():
            self._api.create_volume(volume, labels={INSTANCE_LABEL: settings.instance_id})
            host = self._api.create_host_config(
                mounts=[Mount(str(STATE), volume, type="volume")],
                network_mode=settings.docker_network,
                restart_policy={"Name": "unless-stopped"},
                log_config={"Type": "json-file", "Config": {"max-size": "10m", "max-file": "3"}},
                **closed(_TMP_BYTES),
                **limits(
                    self._api,
                    memory_bytes=resources.memory,
                    cpus=resources.cpus,
                    shm_bytes=None,
                    gpu_key="resources.gpus",
                ),
            )
            private = STATE / "private" / f"{release.version}.json"
            request, result = RELEASE / "request.json", "/tmp/result.json"  # noqa: S108 - the container's own
            self._api.create_container(
                image,
                name=name,
                entrypoint=["python3", "-c", _BOOT, str(private)],
                command=[Stage.SERVE.value, "--request", str(request), "--result", result],
                user=f"{docker_files.USER}:{docker_files.USER}",
                environment={**thread_environment(resources.cpus), "AIRLOOM_PORT": str(PORT), "HOME": "/tmp"},  # noqa: S108 - the container's own
                labels=labels_of(self._settings, release),
                host_config=host,
            )
            bundle = Path(settings.ca_bundle).read_bytes() if settings.ca_bundle else b""
            self._api.put_archive(name, str(STATE), _private_files(private.name, environment, bundle))
            self._api.start(name)

    def _wait_ready(self, name: str) -> str:
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while True:
            facts = container_facts(self._api, name)
            if facts is None:
                raise PlatformError(f"the container {name} was removed while it started")
            if facts["State"]["Running"] and _is_ready(_url_of(name)):
                return _url_of(name)
            if facts["RestartCount"] > 2 or time.monotonic() > deadline:
                said = self._log(name)
                self._remove(name)
                raise PlatformError(f"the container {name} did not become ready; it said last: {said}")
            time.sleep(0.2)

    def _log(self, name: str) -> str:
        with engine_errors():
            lines = self._api.logs(name, tail=_LOG_LINES).decode(errors="replace").splitlines()
        return " | ".join(line.strip() for line in lines if line.strip())

    def _remove(self, name: str) -> None:
        from docker.errors import NotFound

        with engine_errors(), suppress(NotFound):
            self._api.remove_container(name, force=True)

    def _name(self, pipeline: str, version: str) -> str:
        return f"airloom-{self._settings.instance_id}-{pipeline.replace('_', '-')}-{version}"


def _private_files(name: str, environment: dict[str, str], ca_bundle: bytes) -> Iterator[bytes]:
    """The volume's folders and what only the release's user may read, as an archive."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for folder in ("journal", "private"):
            info = tarfile.TarInfo(folder)
            info.type, info.mode = tarfile.DIRTYPE, 0o700
            info.uid = info.gid = docker_files.USER
            archive.addfile(info)
        contents = {f"private/{name}": json.dumps(environment).encode()}
        if ca_bundle:
            contents[docker_files.CA_FILE] = ca_bundle
        for path, content in contents.items():
            info = tarfile.TarInfo(path)
            info.size, info.mode = len(content), 0o400
            info.uid = info.gid = docker_files.USER
            archive.addfile(info, io.BytesIO(content))
    yield file.getvalue()


def _url_of(name: str) -> str:
    """By the container's name, which its network resolves: its address may change when it starts again."""
    return f"http://{name}:{PORT}"


def _is_ready(url: str) -> bool:
    import httpx

    try:
        return httpx.get(f"{url}/health", timeout=3, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False
