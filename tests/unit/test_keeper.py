"""Parts of the supervisor that need no process."""

from __future__ import annotations

from pathlib import Path

import pytest

from airloom.embedded.keeper import Timing
from airloom.embedded.process import describe_exit
from airloom.embedded.rotating_log import RotatingLog, tail
from airloom.embedded.service import Service
from airloom.embedded.supervisor import ordered
from airloom.errors import PlatformError


@pytest.mark.parametrize(
    ("failures", "seconds"), [(1, 0.5), (2, 1.0), (3, 2.0), (6, 16.0), (7, 30.0), (8, 30.0), (10_000, 30.0)]
)
def test_backoff_doubles_up_to_its_limit(failures: int, seconds: float) -> None:
    assert Timing().backoff_seconds(failures) == seconds


def service(name: str, *needs: str) -> Service:
    return Service(name=name, command=("true",), cwd=Path("/"), depends_on=needs)


def test_services_stand_behind_what_they_need() -> None:
    names = [s.name for s in ordered([service("c", "b"), service("b", "a"), service("a")])]
    assert names == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("services", "message"),
    [
        ([service("a", "b"), service("b", "a")], "in a circle: "),
        ([service("a", "nobody")], "a depends on nobody"),
        ([service("a"), service("a")], "stands twice"),
    ],
)
def test_services_without_an_order_are_refused(services: list[Service], message: str) -> None:
    with pytest.raises(PlatformError, match=message):
        ordered(services)


@pytest.mark.parametrize(
    ("code", "words"),
    [(0, "ended with exit code 0"), (3, "ended with exit code 3"), (-9, "was killed by SIGKILL"), (-99, "signal 99")],
)
def test_exit_codes_in_words(code: int, words: str) -> None:
    assert words in describe_exit(code)


def test_log_rotates_and_keeps_a_few(tmp_path: Path) -> None:
    log = RotatingLog(tmp_path / "a.log", max_bytes=100, kept=2)
    for number in range(10):
        log.write(f"{number}".encode() * 60 + b"\n")
    log.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.log", "a.log.1", "a.log.2"]
    assert (tmp_path / "a.log").read_text().startswith("9")
    assert (tmp_path / "a.log.2").read_text().startswith("7")


def test_log_goes_on_where_the_last_one_ended(tmp_path: Path) -> None:
    for word in (b"one\n", b"two\n"):
        log = RotatingLog(tmp_path / "a.log")
        log.write(word)
        log.close()
    assert tail(tmp_path / "a.log", 5) == ["one", "two"]


def test_log_that_cannot_be_written_loses_lines_and_says_how_much(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    folder.write_text("in the way")
    log = RotatingLog(folder / "a.log")
    log.write(b"lost\n")
    folder.unlink()
    log.write(b"kept\n")
    log.close()
    assert tail(folder / "a.log", 5) == ["--- airloom: 5 bytes of this log were lost, the disk had no room", "kept"]


def test_tail_of_no_log_is_empty(tmp_path: Path) -> None:
    assert tail(tmp_path / "none.log", 5) == []
