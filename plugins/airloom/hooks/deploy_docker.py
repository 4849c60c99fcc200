"""Deploy target `docker`: a release answers from a container of an image that holds its model.

The release image is the serving image plus `/airloom/release`: made once, by the engine alone, and never changed.
What changes lies in a volume of the pipeline: the journal of answers, and the environment of each release's
container, secrets among it, which is in no image and no container's settings.
"""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from airloom.contract import Release, Stage, StageRequest
from airloom.errors import ConfigError, PlatformError
from airloom.hooks import docker_files
from airloom.hooks.docker_engine import connect, container_facts, engine_errors, ensure_image
from airloom.hooks.docker_runner import CA_VARIABLES, INSTANCE_LABEL
from airloom.spec.pipeline import PipelineSpec

if TYPE_CHECKING:
    from airloom.settings import Settings

START_TIMEOUT_SECONDS = 120.0
GRACE_SECONDS = 40  # longer than a release needs to finish what it has and to empty its journal
RELEASE = PurePosixPath("/airloom/release")
STATE = PurePosixPath("/var/lib/airloom")
RELEASE_LABEL = "airloom.release"
PORT = 8080  # of the container
_LOG_LINES = 15
# Reads the private environment and becomes the release, so that signals reach it.
_BOOT = (
    "import json, os, sys; e = json.load(open(sys.argv[1], encoding='utf-8')); "
    "os.execve(sys.executable, [sys.executable, 'main.py', *sys.argv[2:]], {**os.environ, **e})"
)


class DockerTarget:
    """Starts and stops containers of releases. Its methods are those of `ProcessTarget`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
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
        """
        name = self._name(release.pipeline, release.version)
        image = self._ensure_release_image(release, bundle, spec)
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

    def _ensure_release_image(self, release: Release, bundle: Path, spec: PipelineSpec) -> str:
        """`<namespace>/<pipeline>:<version>`, by id."""
        from docker.errors import ImageNotFound

        if release.image is None:
            raise ConfigError(
                f"release {release.version} of {release.pipeline} was made without an image",
                hint="run the pipeline again: its runs pin the image of the serving repo's commit now",
            )
        name = "/".join(p for p in (self._settings.registry, self._settings.image_namespace, release.pipeline) if p)
        with engine_errors():
            try:
                return str(self._api.inspect_image(f"{name}:{release.version}")["Id"])
            except ImageNotFound:
                pass
            ensure_image(self._api, self._settings, release.image.pull_ref)
            made = self._api.create_container(release.image.pull_ref, labels=self._labels(release))["Id"]
            try:
                with tempfile.TemporaryFile() as file:
                    self._pack(file, release, bundle, spec)
                    file.seek(0)
                    self._api.put_archive(made, "/", file)
                labels = (
                    f'LABEL {RELEASE_LABEL}="{release.version}" org.opencontainers.image.version="{release.version}"'
                )
                committed = self._api.commit(made, repository=name, tag=release.version, changes=labels)
            finally:
                self._api.remove_container(made, force=True)
        return str(committed["Id"])

    def _pack(self, file: Any, release: Release, bundle: Path, spec: PipelineSpec) -> None:
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

    def _run(self, name: str, image: str, release: Release, spec: PipelineSpec) -> None:
        from docker.types import Mount

        settings, limits = self._settings, spec.stages[Stage.SERVE].resources
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
                read_only=True,
                tmpfs={"/tmp": "size=256m,mode=1777"},  # noqa: S108 - the container's own
                init=True,
                cap_drop=["ALL"],
                security_opt=["no-new-privileges"],
                mem_limit=limits.memory,
                memswap_limit=limits.memory,
                nano_cpus=int(min(limits.cpus, self._api.info()["NCPU"]) * 1e9),
                pids_limit=1024,
                restart_policy={"Name": "unless-stopped"},
                log_config={"Type": "json-file", "Config": {"max-size": "10m", "max-file": "3"}},
            )
            private = STATE / "private" / f"{release.version}.json"
            request, result = RELEASE / "request.json", "/tmp/result.json"  # noqa: S108 - the container's own
            self._api.create_container(
                image,
                name=name,
                entrypoint=["python3", "-c", _BOOT, str(private)],
                command=[Stage.SERVE.value, "--request", str(request), "--result", result],
                user=f"{docker_files.USER}:{docker_files.USER}",
                environment={"AIRLOOM_PORT": str(PORT), "HOME": "/tmp"},  # noqa: S108 - the container's own
                labels=self._labels(release),
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

    def _labels(self, release: Release) -> dict[str, str]:
        return {
            INSTANCE_LABEL: self._settings.instance_id,
            "airloom.pipeline": release.pipeline,
            RELEASE_LABEL: release.version,
        }

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
