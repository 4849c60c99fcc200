"""A real supervisor over small real programs."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from airloom.embedded import guard
from airloom.embedded.instance import is_locked, read_record
from airloom.embedded.launch import bring_down, is_running, launch, wait_ready
from airloom.errors import ConflictError, NotFoundError, PlatformError
from airloom.hooks.supervisor import Phase, Supervisor
from airloom.settings import Settings
from tests.fixtures import fake_platform
from tests.fixtures.fake_platform import PROGRAM, READY, WAIT, write

IGNORE_TERM = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"


def until(condition: Callable[[], object], what: str, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """A process whose new parent has not yet taken note of its end is dead all the same."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def supervisor(settings: Settings) -> Iterator[Supervisor]:
    """A client; whatever the test leaves running is ended."""
    yield Supervisor.from_settings(settings)
    record = read_record(settings)
    if record and is_running(settings):
        os.kill(record.pid, signal.SIGKILL)
    guard.end_members(settings.instance_id, grace_seconds=0)
    until(lambda: not is_locked(settings), "the guard is gone")


def up(settings: Settings, *services: dict[str, object]) -> int:
    write(settings, *services)
    pid = launch(settings, program=PROGRAM)
    wait_ready(settings, lambda _: None, timeout_seconds=120)
    return pid


def guards_of(supervisor_pid: int) -> list[int]:
    found = []
    for child in psutil.Process(supervisor_pid).children():
        with suppress(psutil.Error):  # it has just ended
            if alive(child.pid) and any(part.endswith("guard.py") for part in child.cmdline()):
                found.append(child.pid)
    return found


def events(settings: Settings, kind: str) -> list[str]:
    lines = (settings.home_dir / "events").read_text().splitlines()
    return [line.split()[1] for line in lines if line.startswith(kind)]


def log(settings: Settings, name: str, rotated: str = "") -> str:
    path = settings.log_dir / f"{name}.log{rotated}"
    return path.read_text() if path.exists() else ""


def test_starts_in_order_and_stops_in_reverse(settings: Settings, supervisor: Supervisor) -> None:
    up(
        settings,
        {"name": "c", "depends_on": ["b"]},
        {"name": "b", "depends_on": ["a"]},
        {"name": "a"},
    )
    assert events(settings, "start") == ["a", "b", "c"]
    assert [(state.name, state.state) for state in supervisor.services()] == [(n, Phase.READY) for n in "abc"]
    assert bring_down(settings, lambda _: None)
    assert events(settings, "end") == ["c", "b", "a"]
    assert guard.members(settings.instance_id) == set()
    assert not is_locked(settings)
    assert read_record(settings) is None
    with pytest.raises(PlatformError, match="not running"):
        supervisor.services()


def test_independent_services_start_side_by_side(settings: Settings, supervisor: Supervisor) -> None:
    # Each becomes ready only when the other has started as well.
    code = 'while len((folder / "events").read_text().splitlines()) < 2: time.sleep(0.02)\n' + READY + WAIT
    up(settings, {"name": "a", "code": code}, {"name": "b", "code": code})
    assert all(state.ready for state in supervisor.services())


def test_child_sees_a_small_environment(
    settings: Settings, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_CLOUD_TOKEN", "do-not-pass-on")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    up(settings, {"name": "a", "code": "print(sorted(os.environ), flush=True)\n" + READY + WAIT})
    # What a service writes is in its log a moment after it is ready.
    until(lambda: "'PATH'" in log(settings, "a"), "its environment in the log")
    seen = log(settings, "a")
    assert "'AIRLOOM_S3_PORT'" in seen
    assert "MY_CLOUD_TOKEN" not in seen
    assert "PYTHONPATH" not in seen


def test_crashed_service_starts_again_later_and_later(settings: Settings, supervisor: Supervisor) -> None:
    up(settings, {"name": "a"}, {"name": "b"})
    first = supervisor.service("a").pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    until(lambda: (state := supervisor.service("a")).ready and state.pid != first, "a runs again")
    assert supervisor.service("a").restarts == 1
    assert supervisor.service("b").restarts == 0
    assert "was killed by SIGKILL; starting again in 0.1 s" in log(settings, "a")
    second = supervisor.service("a").pid
    assert second is not None
    os.kill(second, signal.SIGKILL)
    until(lambda: supervisor.service("a").restarts == 2, "a runs a third time")
    assert "starting again in 0.2 s" in log(settings, "a")


def test_service_that_no_longer_answers_starts_again(settings: Settings, supervisor: Supervisor) -> None:
    up(settings, {"name": "a"})
    first = supervisor.service("a").pid
    (settings.home_dir / "a.ready").unlink()
    until(lambda: (state := supervisor.service("a")).ready and state.pid != first, "a was started again")
    assert "did not answer for 1 s" in log(settings, "a")


def test_failing_service_is_named_with_its_log(settings: Settings, supervisor: Supervisor) -> None:
    write(
        settings, {"name": "good"}, {"name": "bad", "code": 'print("the disk is on fire", flush=True); sys.exit(3)\n'}
    )
    launch(settings, program=PROGRAM)
    with pytest.raises(PlatformError, match=r"(?s)bad does not start(?=.*exit code 3)(?=.*the disk is on fire)"):
        wait_ready(settings, lambda _: None, timeout_seconds=120)
    until(lambda: supervisor.service("good").ready, "the other service")


def test_late_service_counts_as_failed(settings: Settings, supervisor: Supervisor) -> None:
    write(settings, {"name": "slow", "code": WAIT, "start_timeout": 0.5})
    launch(settings, program=PROGRAM)
    # The reason itself, or the log's end where the next start has begun already.
    with pytest.raises(PlatformError, match=r"(?s)slow does not start.*not ready after 0.5 s"):
        wait_ready(settings, lambda _: None, timeout_seconds=120)


def test_stop_ends_in_sigkill_for_the_whole_group(settings: Settings, supervisor: Supervisor) -> None:
    code = IGNORE_TERM + "if os.fork() == 0: time.sleep(600)\n" + READY + WAIT
    up(settings, {"name": "stubborn", "code": code, "grace": 0.5})
    pid = supervisor.service("stubborn").pid
    assert pid is not None
    group = [process.pid for process in psutil.Process(pid).children()] + [pid]
    assert len(group) == 2
    bring_down(settings, lambda _: None)
    assert not any(alive(pid) for pid in group)
    assert "did not stop within 0.5 s and was killed" in log(settings, "stubborn")


def test_nothing_outlives_a_killed_supervisor(settings: Settings, supervisor: Supervisor) -> None:
    # A grandchild in a session of its own, one without the mark in its environment, one deaf to SIGTERM.
    code = """
import subprocess
subprocess.Popen(["sleep", "600"], start_new_session=True)
subprocess.Popen(["sleep", "601"], start_new_session=True, env={})
subprocess.Popen([sys.executable, "-c", "import signal,time; signal.signal(15, signal.SIG_IGN); time.sleep(602)"])
"""
    pid = up(settings, {"name": "a", "code": code + READY + WAIT}, {"name": "b", "code": IGNORE_TERM + READY + WAIT})
    a = supervisor.service("a").pid
    family = psutil.Process(pid).children(recursive=True)
    assert len([process for process in family if process.ppid() == a]) == 3
    os.kill(pid, signal.SIGKILL)
    until(lambda: guard.members(settings.instance_id) == set(), "no process is left")
    until(lambda: not any(alive(process.pid) for process in family), "nor its descendants")
    # And a new start is not hindered by the old one's remains.
    up(settings, {"name": "a"})
    assert supervisor.service("a").ready


def test_start_clears_what_was_left_when_guard_and_supervisor_were_killed(
    settings: Settings, supervisor: Supervisor
) -> None:
    pid = up(settings, {"name": "a"})
    left = supervisor.service("a").pid
    guards = guards_of(pid)
    assert len(guards) == 1
    os.kill(pid, signal.SIGSTOP)  # so that it can't put up a new guard
    os.kill(guards[0], signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    until(lambda: not is_locked(settings), "both are gone")
    assert left is not None
    assert alive(left)
    up(settings, {"name": "a"})
    assert not alive(left)


def test_a_killed_guard_is_replaced(settings: Settings, supervisor: Supervisor) -> None:
    pid = up(settings, {"name": "a"})

    first = guards_of(pid)
    os.kill(first[0], signal.SIGKILL)
    until(lambda: guards_of(pid) not in ([], first), "another guard")
    assert len(guards_of(pid)) == 1
    os.kill(pid, signal.SIGKILL)
    until(lambda: guard.members(settings.instance_id) == set(), "no process is left")
    until(lambda: not is_locked(settings), "the next start can begin")


def test_second_start_is_refused_with_the_reason(settings: Settings, supervisor: Supervisor) -> None:
    pid = up(settings, {"name": "a"})
    with pytest.raises(PlatformError, match=rf"running already \(process {pid}, since 20..-") as caught:
        launch(settings, program=PROGRAM)
    assert str(settings.home_dir) in str(caught.value)
    assert supervisor.service("a").ready


def test_taken_port_stops_the_start(settings: Settings, supervisor: Supervisor) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", settings.s3_port))
        other.listen()
        write(settings, {"name": "a"}, {"name": "s3", "ports": [settings.s3_port]})
        expected = rf"port {settings.s3_port} \(AIRLOOM_S3_PORT\) for s3 is taken by process {os.getpid()}"
        with pytest.raises(PlatformError, match=expected):
            launch(settings, program=PROGRAM)
    assert not (settings.home_dir / "events").exists()
    assert not is_locked(settings)


def test_heavy_output_is_rotated(settings: Settings, supervisor: Supervisor) -> None:
    code = 'for i in range(20_000): print(f"{i:06d}", "x" * 40)\nprint("all written", flush=True)\n' + READY + WAIT
    up(settings, {"name": "a", "code": code})
    # A later line of the supervisor's own may have begun another file.
    until(lambda: "all written" in log(settings, "a") + log(settings, "a", ".1"), "the end of the output")
    files = sorted(settings.log_dir.glob("a.log*"))
    assert [file.name for file in files] == ["a.log", "a.log.1", "a.log.2", "a.log.3"]
    assert all(file.stat().st_size <= fake_platform.FAST.log_bytes + 2**16 for file in files)


DYNAMIC = """
import http.server, os, sys, signal
print(sorted(k + "=" + v for k, v in os.environ.items() if k.startswith("MY_")), flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/ready" else 404)
        self.end_headers()
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_dynamic_service_survives_the_platform(settings: Settings, supervisor: Supervisor, tmp_path: Path) -> None:
    up(settings, {"name": "a"})
    wanted = {
        "command": [sys.executable, "-c", DYNAMIC, "{port}"],
        "cwd": str(tmp_path),
        "env": {"MY_TOKEN": "secret:serving_admin_token", "MY_PORT": "{port}"},
        "ready_path": "/ready",
    }
    accepted = supervisor.start("serve-1", **wanted)  # type: ignore[arg-type]
    state = supervisor.wait_ready("serve-1", 120)
    assert supervisor.start("serve-1", **wanted).pid == state.pid  # type: ignore[arg-type]
    assert accepted.port == state.port
    other = supervisor.start("serve-2", **wanted)  # type: ignore[arg-type]
    assert other.port != state.port
    with pytest.raises(ConflictError, match="another definition"):
        supervisor.start("serve-1", **{**wanted, "ready_path": "/else"})  # type: ignore[arg-type]

    secret = settings.secret("serving_admin_token")
    until(lambda: f"MY_TOKEN={secret}" in log(settings, "serve-1"), "its environment in the log")
    kept = (settings.data_dir / "supervisor" / "services.json").read_text()
    assert "secret:serving_admin_token" in kept
    assert secret not in kept

    supervisor.stop("serve-2")
    supervisor.stop("serve-2")
    bring_down(settings, lambda _: None)
    up(settings, {"name": "a"})
    again = supervisor.wait_ready("serve-1", 120)
    assert again.port == state.port
    assert again.pid != state.pid
    with pytest.raises(NotFoundError, match="serve-2"):
        supervisor.service("serve-2")
    supervisor.stop("serve-1")
    assert [state.name for state in supervisor.services()] == ["a"]


def test_dynamic_service_that_cannot_start_says_why(settings: Settings, supervisor: Supervisor, tmp_path: Path) -> None:
    up(settings, {"name": "a"})
    supervisor.start("bad", command=["/bin/sh", "-c", "echo no model here; exit 65"], cwd=str(tmp_path))
    with pytest.raises(PlatformError, match=r"(?s)bad is not ready(?=.*exit code 65)(?=.*no model here)"):
        supervisor.wait_ready("bad", 120)
    with pytest.raises(ConflictError, match="part of the platform"):
        supervisor.stop("a")


def test_metrics_and_memory(settings: Settings, supervisor: Supervisor) -> None:
    up(settings, {"name": "a"})
    text = supervisor.metrics()
    assert 'airloom_service_up{service="a"} 1' in text
    assert 'airloom_service_restarts_total{service="a"} 0' in text
    assert supervisor.services(memory=True)[0].memory_bytes > 2**20


def test_socket_is_private(settings: Settings, supervisor: Supervisor) -> None:
    up(settings, {"name": "a"})
    path = Path(settings.supervisor.removeprefix("unix:"))
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o077 == 0
