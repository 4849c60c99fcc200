"""What the stack needs of this machine: found, needed, and what to do."""

from __future__ import annotations

import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from airloom.errors import AirloomError
from airloom.settings import SECRET_NAMES, Settings
from airloom.stack.compose import Compose

ENGINE_MINIMUM = (20, 10)
COMPOSE_MINIMUM = (2, 24)
MEMORY_MINIMUM_GIB = 6
DISK_MINIMUM_GIB = 15


@dataclass(frozen=True)
class Check:
    """One line of the table; `advice` says what to do when it is not `ok`."""

    name: str
    ok: bool
    found: str
    needed: str
    advice: str = ""


def check_machine(settings: Settings) -> list[Check]:
    """Every check; one that cannot be made is one that failed."""
    checks = [*_secrets(settings), *_engine(settings)]
    try:
        compose = Compose(settings)
        config = compose.config()
    except AirloomError as error:
        return [*checks, Check("compose", False, error.message, "Compose, and files that it takes", error.hint or "")]
    return [*checks, _compose_version(compose), *_values(config), *_ports(compose, config)]


def _secrets(settings: Settings) -> Iterator[Check]:
    missing, open_to_others = [], []
    for name in SECRET_NAMES:
        path = settings.secrets_dir / name
        if not path.is_file() or not path.stat().st_size:
            missing.append(name)
        elif path.stat().st_mode & 0o077:
            open_to_others.append(name)
    found = f"missing: {', '.join(missing)}" if missing else f"{len(SECRET_NAMES)} files"
    yield Check("secrets", not missing, found, f"{len(SECRET_NAMES)} files", "run: airloom init")
    if open_to_others:
        advice = f"chmod 600 {settings.secrets_dir}/*"
        yield Check("secrets' mode", False, f"others may read {', '.join(open_to_others)}", "0600", advice)


def _engine(settings: Settings) -> Iterator[Check]:
    import docker
    from docker.errors import DockerException

    try:
        client = docker.DockerClient(base_url=settings.docker_host) if settings.docker_host else docker.from_env()
        with closing(client):
            info: dict[str, Any] = client.info()
    except DockerException as error:
        yield Check(
            "engine", False, str(error)[:200], "an engine that answers", "start Docker; see AIRLOOM_DOCKER_HOST"
        )
        return
    version = str(info["ServerVersion"])
    yield Check(
        "engine", _numbers(version) >= ENGINE_MINIMUM, version, f">= {_dotted(ENGINE_MINIMUM)}", "update Docker"
    )
    memory = info["MemTotal"] / 2**30
    advice = "take memory from other work, or leave out profiles in COMPOSE_PROFILES"
    yield Check("memory", memory >= MEMORY_MINIMUM_GIB, f"{memory:.1f} GiB", f">= {MEMORY_MINIMUM_GIB} GiB", advice)
    root = info.get("DockerRootDir", "/")
    try:
        free = shutil.disk_usage(root).free / 2**30
        yield Check(
            "disk",
            free >= DISK_MINIMUM_GIB,
            f"{free:.0f} GiB free at {root}",
            f">= {DISK_MINIMUM_GIB} GiB",
            "make room: docker system df shows what takes it",
        )
    except OSError:  # a remote engine
        yield Check("disk", True, f"not known: {root} is not on this machine", f">= {DISK_MINIMUM_GIB} GiB")
    runtimes = info.get("Runtimes") or {}
    yield from _gpu(settings, runtimes)


def _gpu(settings: Settings, runtimes: dict[str, Any]) -> Iterator[Check]:
    try:
        wanted = "dcgm-exporter" in Compose(settings).config()["services"]
    except AirloomError:
        return  # said of Compose itself
    if wanted:
        advice = "install nvidia-container-toolkit, or take gpu out of COMPOSE_PROFILES"
        yield Check("GPU runtime", "nvidia" in runtimes, ", ".join(runtimes) or "none", "nvidia", advice)


def _compose_version(compose: Compose) -> Check:
    version = compose.run("version", "--short").strip()
    ok = _numbers(version) >= COMPOSE_MINIMUM
    return Check("compose", ok, version, f">= {_dotted(COMPOSE_MINIMUM)}", "update Docker's compose plugin")


def _values(config: dict[str, Any]) -> Iterator[Check]:
    services = config["services"]
    for what, one, other in (("object store", "minio", "seaweedfs"), ("git server", "gitbucket", "forge")):
        found = [name for name in (one, other) if name in services]
        advice = f"name {one} or {other}, and only one, in COMPOSE_PROFILES"
        yield Check(what, len(found) == 1, ", ".join(found) or "none", f"{one} or {other}", advice)
    if "gitbucket" in services:
        builder = "jenkins" if "jenkins" in services else "nothing"
        advice = "name jenkins in COMPOSE_PROFILES too, or forge in place of gitbucket"
        yield Check("builds", "jenkins" in services, builder, "jenkins, since gitbucket builds nothing itself", advice)
    open_ports = {p["host_ip"] for s in services.values() for p in s.get("ports", [])} - {"127.0.0.1", "::1"}
    if open_ports:
        yield Check("address", True, f"listens on {', '.join(sorted(open_ports))}", "on purpose, behind a firewall")


def _ports(compose: Compose, config: dict[str, Any]) -> Iterator[Check]:
    running = {state["Service"] for state in compose.states() if state["State"] == "running"}
    wanted = {
        (port["host_ip"], int(port["published"])): name
        for name, service in config["services"].items()
        if name not in running
        for port in service.get("ports", [])
    }
    taken = [f"{port} ({name})" for (host, port), name in wanted.items() if not _free(host, port)]
    count = f"{len(wanted)} free" if wanted else "all held by the stack"
    yield Check(
        "ports", not taken, f"taken: {', '.join(taken)}" if taken else count, "free", "change them in .env.local"
    )


def _free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(str(part) for part in version)
