"""What the stack needs of this machine: found, needed, and what to do."""

from __future__ import annotations

import os
import re
import shutil
import socket
import stat
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from airloom.errors import AirloomError
from airloom.hooks.docker_engine import connect, connect_builder, engine_errors
from airloom.hooks.docker_gpu import probe_gpus
from airloom.settings import SECRET_NAMES, Settings
from airloom.stack.compose import REGISTRY_URL, Compose, own_registry

ENGINE_MINIMUM = (20, 10)
COMPOSE_MINIMUM = (2, 24)
MEMORY_MINIMUM_GIB = 6
DISK_MINIMUM_GIB = 15
TUN = Path("/dev/net/tun")


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
    return [
        *checks,
        *_gpu(settings, config),
        *_owner(settings, int(compose.environment["AIRLOOM_UID"])),
        _compose_version(compose),
        *_values(config),
        *_registry(settings),
        *_builder(settings, compose),
        *(_tun() if compose.builds_beside and _is_local(settings) else ()),
        *_mounts(settings, config),
        *_ports(compose, config),
    ]


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
    try:
        with closing(connect(settings)) as api, engine_errors():
            info: dict[str, Any] = api.info()
    except AirloomError as error:
        advice = "start Docker; see AIRLOOM_DOCKER_HOST"
        yield Check("engine", False, error.message[:200], "an engine that answers", advice)
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


def _gpu(settings: Settings, config: dict[str, Any]) -> Iterator[Check]:
    """Whether the engine starts a container with GPUs: its API does not tell otherwise."""
    if "dcgm-exporter" not in config["services"]:
        return
    try:
        with closing(connect(settings)) as api, engine_errors():
            refusal = probe_gpus(api, "nvidia")
    except AirloomError:
        return  # said of the engine itself
    advice = f"{refusal.hint}; or take gpu out of COMPOSE_PROFILES" if refusal else ""
    yield Check("GPUs", refusal is None, refusal.message if refusal else "a container starts with them", "GPUs", advice)


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


def _registry(settings: Settings) -> Iterator[Check]:
    """Whether the stack's containers can ask the registry that the engine pushes to."""
    if not settings.registry:
        return
    own = settings.registry in own_registry(settings)
    asked = settings.registry_url or (REGISTRY_URL if own else settings.registry)
    name = urlsplit(asked if "://" in asked else f"//{asked}").hostname or ""
    reached = name != "localhost" and not name.startswith("127.")
    advice = f"{name} leads nowhere from a container: give AIRLOOM_REGISTRY_URL an address that does"
    yield Check("registry", reached, asked, "an address that containers reach", advice)
    if own:
        user = settings.registry_user or "nobody"
        advice = "the stack's own registry takes no one without a login: AIRLOOM_REGISTRY_USER=airloom"
        yield Check("registry's user", bool(settings.registry_user), user, "one", advice)


def _builder(settings: Settings, compose: Compose) -> Iterator[Check]:
    """Another engine that builds: there has to be a registry between the two, and it has to answer."""
    if compose.builds_beside:
        advice = "name one: AIRLOOM_REGISTRY=127.0.0.1:5050 and AIRLOOM_REGISTRY_USER=airloom are the stack's own"
        found = settings.registry or "no registry"
        yield Check("builder", bool(settings.registry), found, "a registry, by which images get to the engine", advice)
    elif settings.build_host:
        needed = "an engine that answers, this machine and the stack's containers"
        address = urlsplit(settings.build_host)
        if address.scheme == "unix" or address.hostname == "localhost" or (address.hostname or "").startswith("127."):
            advice = "containers find nothing there: name an address such as tcp://build.example:2376"
            yield Check("builder", False, settings.build_host, needed, advice)
            return
        try:
            with closing(connect_builder(settings)) as api, engine_errors(builds=True):
                info: dict[str, Any] = api.info()
        except AirloomError as error:
            yield Check("builder", False, error.message[:200], needed, error.hint or "see AIRLOOM_BUILD_HOST")
            return
        rootless = any("name=rootless" in option for option in info.get("SecurityOptions") or ())
        yield Check("builder", True, f"{info['ServerVersion']}{', rootless' if rootless else ''}", needed)


def _is_local(settings: Settings) -> bool:
    """Whether the engine is this machine's."""
    address = settings.docker_host or os.environ.get("DOCKER_HOST", "")
    return not address or address.startswith("unix:")


def _tun() -> Iterator[Check]:
    """What a rootless engine's network begins with. udev opens it to all; where there is no udev, it may be root's."""
    needed, advice = f"{TUN}, open to all users", f"modprobe tun; chmod 0666 {TUN}"
    if not TUN.exists():
        yield Check("builder's network", False, f"no {TUN}", needed, advice)
        return
    mode = TUN.stat().st_mode
    yield Check("builder's network", mode & 0o006 == 0o006, stat.filemode(mode), needed, advice)


def _owner(settings: Settings, user_id: int) -> Iterator[Check]:
    """Airloom's own containers run as the secrets' owner; a rootless engine's root is that user."""
    if not user_id:
        yield Check("containers' user", True, "root", "somebody else, unless the engine is rootless")
    owners = {path.stat().st_uid for name in SECRET_NAMES if (path := settings.secrets_dir / name).is_file()}
    if user_id and owners - {user_id}:
        found = f"user {', '.join(map(str, sorted(owners)))}"
        advice = f"run it as that user, or: chown -R {user_id} {settings.secrets_dir}"
        yield Check("secrets' owner", False, found, f"user {user_id}, whom the containers run as", advice)


def _mounts(settings: Settings, config: dict[str, Any]) -> Iterator[Check]:
    """What services read of the project's folder: each runs as a user of its own."""
    project, home = settings.project, settings.home_dir.resolve()
    mounts = {
        Path(v["source"]) for s in config["services"].values() for v in s.get("volumes", []) if v["type"] == "bind"
    }
    closed = [
        path
        for mount in sorted(mounts)
        if mount.is_relative_to(project) and not mount.is_relative_to(home) and mount.exists()
        for path in [mount, *mount.rglob("*")]
        if path.stat().st_mode & (0o005 if path.is_dir() else 0o004) != (0o005 if path.is_dir() else 0o004)
    ]
    if closed:
        found = f"{closed[0].relative_to(project)} and {len(closed) - 1} more are closed to other users"
        yield Check("mounted files", False, found, "readable by all", "chmod -R o+rX monitoring images")


def _ports(compose: Compose, config: dict[str, Any]) -> Iterator[Check]:
    try:
        states = compose.states()
    except AirloomError:  # no engine, which is said above: nothing of the stack runs
        states = []
    running = {state["Service"] for state in states if state["State"] == "running"}
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
