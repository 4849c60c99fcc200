"""Checks before a start."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from airloom.embedded.ports import PortUse, check_ports, check_room, port_range, setting_of
from airloom.errors import PlatformError
from airloom.settings import Settings


def test_free_ports_pass(settings: Settings) -> None:
    check_ports(settings, [PortUse(settings.s3_port, "s3"), PortUse(settings.git_port, "git")])


def test_taken_port_names_port_setting_service_and_holder(settings: Settings) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", settings.git_port))
        other.listen()
        with pytest.raises(PlatformError) as caught:
            check_ports(settings, [PortUse(settings.git_port, "git"), PortUse(settings.s3_port, "s3")])
    message = caught.value.message
    assert message.startswith(f"port {settings.git_port} (AIRLOOM_GIT_PORT) for git is taken by process {os.getpid()}")
    assert "s3" not in message
    assert ".env.local" in str(caught.value)


def test_port_that_is_taken_on_all_addresses_is_taken(settings: Settings) -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", settings.s3_port))
        other.listen()
        with pytest.raises(PlatformError, match="AIRLOOM_S3_PORT"):
            check_ports(settings, [PortUse(settings.s3_port, "s3")])


def test_connection_that_lingers_is_no_obstacle(settings: Settings) -> None:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", settings.s3_port))
        server.listen()
        with socket.create_connection(("127.0.0.1", settings.s3_port)):
            accepted, _ = server.accept()
            accepted.close()  # this side closes first, and is the one that lingers
    check_ports(settings, [PortUse(settings.s3_port, "s3")])


def test_one_port_for_two_services_is_refused(settings: Settings) -> None:
    uses = [PortUse(settings.s3_port, "s3"), PortUse(settings.s3_port, "git")]
    with pytest.raises(PlatformError, match="for git is also the port of s3"):
        check_ports(settings, uses)


def test_setting_of_a_port_in_a_range(settings: Settings) -> None:
    ports = port_range(settings.serving_ports)
    assert setting_of(settings, ports[0]) == "AIRLOOM_SERVING_PORTS"
    assert setting_of(settings, ports[-1]) == "AIRLOOM_SERVING_PORTS"
    assert setting_of(settings, 1) is None


def test_too_little_shared_memory_says_found_needed_and_what_to_do(settings: Settings) -> None:
    with pytest.raises(PlatformError, match=r"/dev/shm has [\d,]+ MiB free, 1,024,000,000 MiB are needed") as caught:
        check_room(settings, shared_memory_bytes=1_000_000 * 2**30)
    assert "mount -o remount" in str(caught.value)


def test_shared_memory_that_cannot_be_written(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(PlatformError, match="cannot be written: No such file") as caught:
        check_room(settings, shared_memory=tmp_path / "missing")
    assert "mount -t tmpfs" in str(caught.value)


def test_too_little_disk_says_found_needed_and_what_to_do(settings: Settings) -> None:
    with pytest.raises(PlatformError, match=rf"disk of {settings.home_dir} has [\d,]+ MiB free") as caught:
        check_room(settings, home_bytes=1_000_000 * 2**30)
    assert "AIRLOOM_HOME" in str(caught.value)


def test_enough_room_passes(settings: Settings) -> None:
    check_room(settings, shared_memory_bytes=1, home_bytes=1)
