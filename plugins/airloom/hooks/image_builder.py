"""Building images and trying them: BuildKit through Docker's own client, all else through the engine's API."""

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

from airloom.errors import BuildFailedError, ConfigError, UnavailableError
from airloom.hooks.docker_engine import builder_variables, connect_builder
from airloom.hooks.engine_images import EngineImages
from airloom.hooks.follow import follow
from airloom.settings import Settings

BUILD_SECONDS = 3600.0
_TAIL_LINES = 40
_STEP_CHARACTERS = 110
_SHOWN_LINES = 5
_STEP = re.compile(r"#\d+ \[.*?\d+/\d+\] ")
_PREFIX = re.compile(r"^#\d+ (?:[\d.]+ )?")
_NO_ENGINE = ("Cannot connect to the Docker daemon", "error during connect")

Progress = Callable[[str], None]


class ImageBuilder(EngineImages):
    """Builds images in the engine of AIRLOOM_BUILD_HOST, or else in the one that stages run on.

    References are those of the installation, whatever the engine that builds calls the registry.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, connect_builder(settings), builds=bool(settings.build_host))

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
            UnavailableError: the engine does not answer, or the build does not end.
            ConfigError: there is no client that can build.
        """
        environment = {**os.environ, "DOCKER_BUILDKIT": "1", **builder_variables(self._settings)}
        with tempfile.TemporaryDirectory(prefix="airloom-image-") as folder:
            note = Path(folder) / "id"
            command = [_client(), "build", "--progress", "plain", "--iidfile", str(note)]
            command += ["-t", self.called(reference), "-f", str(dockerfile)]
            for name, value in arguments.items():
                command += ["--build-arg", f"{name}={value}"]
            for name, value in labels.items():
                command += ["--label", f"{name}={value}"]
            if self._settings.ca_bundle:
                command += ["--secret", f"id=ca,src={self._settings.ca_bundle}"]

            def show(line: str) -> None:
                if _STEP.match(line):
                    on_progress(textwrap.shorten(line, _STEP_CHARACTERS, placeholder=" …"))

            try:
                done = follow(
                    [*command, str(context)], environment, show, timeout_seconds=BUILD_SECONDS, errors_too=True
                )
            except subprocess.TimeoutExpired as error:
                raise UnavailableError(f"{reference}: docker build did not end within {BUILD_SECONDS:g} s") from error
            if done.returncode:
                said = [line.rstrip() for line in done.stdout.splitlines() if line.strip()]
                raise _failure(reference, done.returncode, said[-_TAIL_LINES:])
            return note.read_text(encoding="ascii").strip()

    def run(
        self, image: str, folder: Path | None, command: list[str], *, limit_seconds: float
    ) -> tuple[int | None, str]:
        """Run a command of an image, without network; exit code (None: too late) and output.

        Args:
            folder: to run it in a copy of; without one, it meets the files that the image holds.
        """
        import requests

        from airloom.hooks import docker_files

        with self._errors():
            host = self._api.create_host_config(network_mode="none", init=True, cap_drop=["ALL"], pids_limit=1024)
            variables = {"HOME": "/tmp", "PYTHONDONTWRITEBYTECODE": "1"}  # noqa: S108 - the container's own
            made = self._api.create_container(
                self.called(image),
                entrypoint=command[:1],
                command=command[1:],
                working_dir="/checks" if folder else "/app",
                user=f"{docker_files.USER}:{docker_files.USER}",
                environment=variables,
                host_config=host,
            )["Id"]
            try:
                if folder:
                    with tempfile.TemporaryFile() as file:
                        with tarfile.open(fileobj=file, mode="w") as archive:
                            archive.add(folder, "checks", filter=docker_files.owned)
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


def _client() -> str:
    found = shutil.which("docker")
    if found is None:
        raise ConfigError("there is no docker client on PATH", hint="install Docker's own client")
    return found


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
