"""The platform's commands as people run them, on a platform of fake programs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from airloom.embedded.environment import base_environment
from airloom.embedded.instance import read_record
from airloom.embedded.launch import bring_down, is_running, launch, wait_ready
from airloom.settings import Settings
from tests.fixtures.fake_platform import PROGRAM, write


@pytest.fixture
def running(settings: Settings) -> Iterator[Settings]:
    write(settings, {"name": "a"}, {"name": "b", "depends_on": ["a"]})
    launch(settings, program=PROGRAM)
    wait_ready(settings, lambda _: None, timeout_seconds=120)
    yield settings
    if is_running(settings):
        bring_down(settings, lambda _: None)


def airloom(settings: Settings, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    start = "import sys; from airloom.cli.main import main; sys.argv[0] = 'airloom'; main()"
    return subprocess.run(
        [sys.executable, "-c", start, *arguments],
        env=base_environment(settings),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_status_logs_and_down(running: Settings) -> None:
    shown = airloom(running, "status", "--json")
    assert shown.returncode == 0
    value = json.loads(shown.stdout)
    assert (value["running"], value["ready"]) == (True, True)
    assert [service["name"] for service in value["services"]] == ["a", "b"]
    assert value["memory_bytes"] > sum(service["memory_bytes"] for service in value["services"]) > 0

    assert "ready" in airloom(running, "status").stdout
    assert "hello from a" in airloom(running, "logs", "a", "-n", "20").stdout
    both = airloom(running, "logs").stdout
    assert "a          | hello from a" in both
    assert "hello from b" in both
    missing = airloom(running, "logs", "nobody")
    assert missing.returncode == 4
    assert "there are: a, b" in missing.stderr

    down = airloom(running, "down")
    assert down.returncode == 0
    assert "the platform is down" in down.stdout
    assert "no platform runs" in airloom(running, "down").stdout
    after = airloom(running, "status", "--json")
    assert after.returncode == 10
    assert json.loads(after.stdout)["running"] is False
    assert "airloom up --embedded" in after.stderr


def test_second_up_and_clean_are_refused_while_it_runs(running: Settings) -> None:
    again = airloom(running, "up", "--embedded")
    assert again.returncode == 10
    assert "running already (process" in again.stderr
    refused = airloom(running, "clean", "--yes")
    assert refused.returncode == 10
    assert "airloom down" in refused.stderr
    assert running.secrets_dir.is_dir()


def test_down_ends_a_supervisor_that_no_longer_answers(running: Settings) -> None:
    Path(running.supervisor.removeprefix("unix:")).unlink()
    done = airloom(running, "down")
    assert done.returncode == 0
    assert not is_running(running)


def test_killed_supervisor_shows_as_not_running(running: Settings) -> None:
    record = read_record(running)
    assert record is not None
    os.kill(record.pid, signal.SIGKILL)
    shown = airloom(running, "status")
    assert shown.returncode == 10
    assert "is not running" in shown.stderr


def test_clean_asks_first_and_removes_read_only_folders(settings: Settings) -> None:
    checkout = settings.checkouts_dir / "repo" / "commit"
    checkout.mkdir(parents=True)
    (checkout / "main.py").write_text("x")
    checkout.chmod(0o555)
    assert airloom(settings, "clean", stdin="n\n").returncode == 1
    assert settings.home_dir.exists()
    assert airloom(settings, "clean", stdin="y\n").returncode == 0
    assert not settings.home_dir.exists()
    assert airloom(settings, "clean", "--yes").returncode == 0


def test_clean_spares_what_is_no_home_of_airloom(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("x")
    settings = Settings(_env_file=None, project=Path(__file__).parents[2], home=tmp_path / "precious")
    refused = airloom(settings, "clean", "--yes")
    assert refused.returncode == 2
    assert "nothing was removed" in refused.stderr
    assert (tmp_path / "precious" / "thesis.txt").exists()


def test_the_stack_is_not_started_beside_the_embedded_platform(running: Settings) -> None:
    asked = airloom(running, "up")
    assert asked.returncode != 0
    assert "the embedded platform runs here" in asked.stderr
    assert "airloom down" in asked.stderr


def test_init_makes_secrets_once(settings: Settings) -> None:
    (settings.secrets_dir / "git_password").unlink()
    assert "1 secret made" in airloom(settings, "init").stdout
    assert "all secrets are in" in airloom(settings, "init").stdout


def test_following_goes_on_over_a_rotation(settings: Settings) -> None:
    from airloom.cli.platform_logs import _Follower
    from airloom.embedded.rotating_log import RotatingLog

    log = RotatingLog(settings.log_dir / "a.log", max_bytes=20)
    log.write(b"before\n")
    follower = _Follower(settings.log_dir / "a.log")
    log.write(b"one\nhal")
    assert follower.new_lines() == ["one"]
    log.write(b"f\n")
    log.write(b"after rotation\n")
    assert follower.new_lines() == ["half", "after rotation"]
    log.close()
