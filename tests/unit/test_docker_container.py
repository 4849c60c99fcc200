"""Who watches a container and leaves before its end has shown every line that the file holds by then."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from airloom.errors import UnavailableError
from airloom.hooks import docker_container
from airloom.operators import wanted
from tests.fixtures.stage_repo import wait_until


class Engine:
    """It runs one container, and sends its log when a test lets it."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.sent = b""  # the log so far
        self.let_go = threading.Event()  # the stream, which is silent until then
        self.gone = False  # with its last words on their way to the reader
        self.asked = 0
        self.closed = threading.Event()  # by the reader of the log

    def logs(self, container: str, **options: Any) -> Iterator[bytes]:
        yield self.sent
        assert self.let_go.wait(60)
        yield b"too late\n"

    def inspect_container(self, container: str) -> dict[str, Any]:
        self.asked += 1
        if self.asked > 1 and self.gone:
            wait_until(lambda: self.log.read_bytes() == self.sent, "the file has it all")
            raise UnavailableError("the Docker engine does not answer")
        return {"State": {"Running": True}}

    def close(self) -> None:
        self.closed.set()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    found = Engine(tmp_path / "log")
    yield found
    found.let_go.set()


def watch(engine: Engine, *, on_log: Any, should_stop: Any = lambda: False) -> Any:
    return docker_container.watch(
        engine, lambda: engine, "c", engine.log,
        on_log=on_log, should_stop=should_stop, stop=lambda: None, poll_seconds=0.01,
    )  # fmt: skip


def test_an_engine_that_goes_away_takes_no_line_with_it(engine: Engine) -> None:
    """The next one begins where the file ends."""
    engine.sent, engine.gone, lines = b"line 0\nline 1\n", True, []
    with pytest.raises(UnavailableError, match="does not answer"):
        watch(engine, on_log=lines.append)
    assert lines == ["line 0", "line 1"]


def test_half_a_line_is_left_to_the_next_one_as_a_whole(engine: Engine) -> None:
    engine.sent, engine.gone, lines = b"line 0\nlin", True, []
    with pytest.raises(UnavailableError):
        watch(engine, on_log=lines.append)
    assert lines == ["line 0"]
    engine.sent, engine.asked = b"line 0\nline 1\n", 0
    with pytest.raises(UnavailableError):
        watch(engine, on_log=lines.append)
    assert lines == ["line 0", "line 1"]


class LeaveError(Exception):
    pass


def test_one_that_is_told_to_end_goes_and_nothing_is_written_after_it(engine: Engine) -> None:
    """It waits for no word from an engine that is silent."""
    engine.sent, lines = b"line 0\n", []

    def should_stop() -> bool:
        if lines:
            raise LeaveError
        return False

    with pytest.raises(LeaveError):
        watch(engine, on_log=lines.append, should_stop=should_stop)
    assert not engine.let_go.is_set()
    engine.let_go.set()
    assert engine.closed.wait(60)
    assert engine.log.read_bytes() == b"line 0\n"
    assert lines == ["line 0"]


def test_leaving_takes_less_than_airflow_gives_a_task() -> None:
    asking = wanted._ASK_SECONDS + docker_container.POLL_SECONDS
    assert asking + docker_container._LEAVE_SECONDS + docker_container._HAND_ON_SECONDS < wanted.STOP_SECONDS


def test_a_line_that_could_not_be_shown_hides_neither_its_error_nor_the_others(engine: Engine) -> None:
    engine.sent, lines = b"line 0\nline 1\nline 2\n", []

    def on_log(line: str) -> None:
        lines.append(line)
        if line == "line 0":
            raise LeaveError("the first")
        if line == "line 2":
            raise LeaveError("another")

    with pytest.raises(LeaveError, match="the first"):
        watch(engine, on_log=on_log)
    assert lines == ["line 0", "line 1", "line 2"]
