"""Building and pushing images: BuildKit through Docker's own client, the registry through the engine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from airloom.errors import BuildFailedError, ConfigError, ServiceError, UnavailableError
from airloom.hooks.docker_engine import connect, engine_errors, login_of
from airloom.settings import Settings

BUILD_SECONDS = 3600.0
_TAIL_LINES = 40
_STEP_CHARACTERS = 110
_SHOWN_LINES = 5
_STEP = re.compile(r"#\d+ \[.*?\d+/\d+\] ")
_PREFIX = re.compile(r"^#\d+ (?:[\d.]+ )?")
_NO_ENGINE = ("Cannot connect to the Docker daemon", "error during connect")

Progress = Callable[[str], None]


class ImageBuilder:
    """Builds images in the engine that stages run on."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._api = connect(settings)

    def build(
        self,
        *,
        context: Path,
        dockerfile: Path,
        reference: str,
        arguments: Mapping[str, str],
        labels: Mapping[str, str],
        on_progress: Progress,
    ) -> str:
        """Build an image and call it `reference`; its id.

        Raises:
            BuildFailedError: the Dockerfile can't be built; the message ends with what the build said last.
            UnavailableError: the engine does not answer.
            ConfigError: there is no client that can build.
        """
        environment = {**os.environ, "DOCKER_BUILDKIT": "1"}
        if self._settings.docker_host:
            environment["DOCKER_HOST"] = self._settings.docker_host
        with tempfile.TemporaryDirectory(prefix="airloom-image-") as folder:
            note = Path(folder) / "id"
            command = [_client(), "build", "--progress", "plain", "--iidfile", str(note), "-t", reference]
            command += ["-f", str(dockerfile)]
            for name, value in arguments.items():
                command += ["--build-arg", f"{name}={value}"]
            for name, value in labels.items():
                command += ["--label", f"{name}={value}"]
            if self._settings.ca_bundle:
                command += ["--secret", f"id=ca,src={self._settings.ca_bundle}"]
            code, tail = _stream([*command, str(context)], environment, on_progress)
            if code != 0:
                raise _failure(reference, code, tail)
            return note.read_text(encoding="ascii").strip()

    def push(self, name: str, tag: str) -> str:
        """Push an image; the digest of its manifest in the registry.

        Raises:
            ServiceError: the registry refused.
            UnavailableError: it does not answer, or the push broke off. Nothing of it can be pulled.
        """
        digest = ""
        with engine_errors():
            for line in self._api.push(name, tag=tag, auth_config=login_of(self._settings), stream=True, decode=True):
                if "error" in line:
                    raise self._push_failure(f"{name}:{tag}", str(line["error"]))
                digest = line.get("aux", {}).get("Digest", digest)
        if not digest:
            raise UnavailableError(f"the push of {name}:{tag} ended without the registry's digest")
        return digest

    def run(self, image: str, folder: Path, command: list[str], *, limit_seconds: float) -> tuple[int | None, str]:
        """Run a command of an image in a copy of a folder, without network; exit code (None: too late) and output."""
        import requests

        from airloom.hooks import docker_files

        def owned(info: tarfile.TarInfo) -> tarfile.TarInfo:
            info.uid = info.gid = docker_files.USER
            info.mode |= 0o700 if info.isdir() else 0o400
            return info

        with engine_errors():
            host = self._api.create_host_config(network_mode="none", init=True, cap_drop=["ALL"], pids_limit=1024)
            variables = {"HOME": "/tmp", "PYTHONDONTWRITEBYTECODE": "1"}  # noqa: S108 - the container's own
            made = self._api.create_container(
                image,
                entrypoint=command[:1],
                command=command[1:],
                working_dir="/checks",
                user=f"{docker_files.USER}:{docker_files.USER}",
                environment=variables,
                host_config=host,
            )["Id"]
            try:
                with tempfile.TemporaryFile() as file:
                    with tarfile.open(fileobj=file, mode="w") as archive:
                        archive.add(folder, "checks", filter=owned)
                    file.seek(0)
                    self._api.put_archive(made, "/", file)
                self._api.start(made)
                code: int | None
                try:
                    code = int(self._api.wait(made, timeout=limit_seconds)["StatusCode"])
                except requests.RequestException:
                    code = None
                output = self._api.logs(made, tail=200).decode(errors="replace")
            finally:
                self._api.remove_container(made, force=True)
        return code, output

    def find(self, reference: str) -> dict[str, Any] | None:
        """What the engine knows of an image, if it has it."""
        from docker.errors import ImageNotFound

        with engine_errors():
            try:
                facts: dict[str, Any] = self._api.inspect_image(reference)
            except ImageNotFound:
                return None
        return facts

    def pull(self, reference: str) -> bool:
        """Fetch an image that a registry may have; whether it has."""
        from docker.errors import APIError

        try:
            self._api.pull(reference, auth_config=login_of(self._settings))
        except APIError:
            return False
        return True

    def _push_failure(self, reference: str, said: str) -> ServiceError:
        user = self._settings.registry_user or "nobody"
        low = said.lower()
        if "toomanyrequests" in low or "rate limit" in low:
            return UnavailableError(f"the registry limits {user}'s rate: {said}", hint="wait, or log in: docs/how-to")
        if "denied" in low or "unauthorized" in low or "no basic auth" in low or "authentication" in low:
            return ServiceError(
                f"the registry refuses {reference} from user {user}: {said}",
                hint="see AIRLOOM_REGISTRY_USER and the secret registry_password",
            )
        return UnavailableError(f"{reference} could not be pushed: {said}", hint="does AIRLOOM_REGISTRY answer?")


def _client() -> str:
    found = shutil.which("docker")
    if found is None:
        raise ConfigError("there is no docker client on PATH", hint="install Docker's own client")
    return found


def _stream(command: list[str], environment: dict[str, str], on_progress: Progress) -> tuple[int, list[str]]:
    """Exit code and last lines of a build; its steps are handed on."""
    tail: list[str] = []
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None  # noqa: S101
        try:
            for line in process.stdout:
                text = line.rstrip()
                tail = [*tail, text][-_TAIL_LINES:] if text else tail
                if _STEP.match(text):
                    on_progress(textwrap.shorten(text, _STEP_CHARACTERS, placeholder=" …"))
            code = process.wait(BUILD_SECONDS)
        except BaseException:
            process.kill()
            raise
    return code, tail


def _failure(reference: str, code: int, tail: list[str]) -> Exception:
    text = "\n".join(tail)
    if any(sign in text for sign in _NO_ENGINE):
        return UnavailableError(f"the Docker engine does not answer: {tail[-1]}", hint="does it run?")
    if "buildx" in text and "BuildKit" in text:
        return ConfigError(f"the docker client on PATH cannot build: {tail[-1]}", hint="install its plugin buildx")
    said = [_PREFIX.sub("", line).strip() for line in tail]
    said = [line for line in said if line and not line.startswith(("------", ">", "CACHED", "DONE", "executor failed"))]
    telling = [line for line in said if re.search(r"error|not found|fail|denied|no such", line, re.IGNORECASE)] or said
    return BuildFailedError(f"{reference}: docker build ended with {code}: {' | '.join(telling[-_SHOWN_LINES:])}")
