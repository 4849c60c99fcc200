"""Checks made before anything is started: ports and room."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from airloom.embedded.service import Service
from airloom.errors import PlatformError
from airloom.settings import Settings

SHARED_MEMORY_NEEDED_BYTES = 64 * 2**20  # torch's loaders and Airflow's queues
HOME_NEEDED_BYTES = 2 * 2**30
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - the kernel's, not a temporary file


@dataclass(frozen=True)
class PortUse:
    """A port that somebody is about to listen on."""

    port: int
    service: str


def port_range(text: str) -> range:
    """`8100-8119` as a range, its end included."""
    first, last = (int(part) for part in text.split("-"))
    return range(first, last + 1)


def setting_of(settings: Settings, port: int) -> str | None:
    """The variable that a port comes from."""
    for field in type(settings).model_fields:
        value = getattr(settings, field)
        if (field.endswith("_port") and value == port) or (field.endswith("_ports") and port in port_range(value)):
            return f"AIRLOOM_{field.upper()}"
    return None


def bind_error(host: str, port: int) -> OSError | None:
    """Why nobody can listen on a port now; None when it is free."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # As servers do: a connection of an earlier server that lingers is no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            return error
    return None


def holder_of(port: int) -> str:
    """The process that listens on a port, in words."""
    try:
        connections = psutil.net_connections(kind="tcp")
    except (psutil.AccessDenied, OSError):
        return "a process that cannot be seen from here"
    for connection in connections:
        if connection.status == psutil.CONN_LISTEN and tuple(connection.laddr)[1:2] == (port,):
            if connection.pid is None:
                return "a process of another user"
            try:
                process = psutil.Process(connection.pid)
                command = " ".join(process.cmdline())[:100] or process.name()
                return f"process {connection.pid} of {process.username()}: {command}"
            except psutil.Error:
                return f"process {connection.pid}"
    return "a process that cannot be seen from here"


def check_ports(settings: Settings, uses: Iterable[PortUse]) -> None:
    """See that every port is free and named once.

    Raises:
        PlatformError: lists each port that is not, its setting, and who holds it.
    """
    problems: list[str] = []
    seen: dict[int, str] = {}
    for use in uses:
        setting = setting_of(settings, use.port) or "no setting"
        where = f"port {use.port} ({setting}) for {use.service}"
        if use.port in seen:
            problems.append(f"{where} is also the port of {seen[use.port]}")
            continue
        seen[use.port] = use.service
        error = bind_error(settings.bind_host, use.port)
        if error is None:
            continue
        if error.errno == errno.EADDRINUSE:
            problems.append(f"{where} is taken by {holder_of(use.port)}")
        else:
            problems.append(f"{where} cannot be used on {settings.bind_host}: {error.strerror}")
    if problems:
        raise PlatformError(
            "\n".join(problems),
            hint="stop that process, or set another port in .env.local (the names in brackets are those of .env)",
        )


def service_ports(services: Iterable[Service]) -> list[PortUse]:
    """All ports of static services."""
    return [PortUse(port, service.name) for service in services for port in service.ports]


def check_room(
    settings: Settings,
    *,
    shared_memory: Path = SHARED_MEMORY,
    shared_memory_bytes: int = SHARED_MEMORY_NEEDED_BYTES,
    home_bytes: int = HOME_NEEDED_BYTES,
) -> None:
    """See that there is room in shared memory and on the disk of the home folder.

    Raises:
        PlatformError: says what was found, what is needed, and what to do.
    """
    try:
        free = shutil.disk_usage(shared_memory).free
        with tempfile.NamedTemporaryFile(dir=shared_memory, prefix="airloom-") as file:
            os.posix_fallocate(file.fileno(), 0, min(shared_memory_bytes, 2**20))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise PlatformError(
                f"{shared_memory} cannot be written: {error.strerror}",
                hint=f"mount it: mount -t tmpfs -o size=1g tmpfs {shared_memory} (in a container: --shm-size=1g)",
            ) from error
        free = 0
    if free < shared_memory_bytes:
        raise PlatformError(
            f"{shared_memory} has {_mebibytes(free)} free, {_mebibytes(shared_memory_bytes)} are needed",
            hint=f"remove what fills it (ls -lh {shared_memory}), or enlarge it: "
            f"mount -o remount,size=1g {shared_memory} (in a container: --shm-size=1g)",
        )
    settings.home_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    free = shutil.disk_usage(settings.home_dir).free
    if free < home_bytes:
        raise PlatformError(
            f"the disk of {settings.home_dir} has {_mebibytes(free)} free, {_mebibytes(home_bytes)} are needed",
            hint="make room there, or set AIRLOOM_HOME in .env.local to a folder on another disk",
        )


def _mebibytes(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.0f} MiB"
