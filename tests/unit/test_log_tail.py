"""Lines out of whatever programs write."""

from __future__ import annotations

from pathlib import Path

import pytest

from airloom.hooks.log_tail import MAX_LINE_BYTES, LineSplitter, LogTail, last_lines, line_start_before


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def split(*chunks: bytes, clock: Clock | None = None) -> list[str]:
    splitter = LineSplitter(clock=clock or Clock())
    lines = [line for chunk in chunks for line in splitter.feed(chunk)]
    lines += splitter.flush()
    assert splitter.consumed == sum(map(len, chunks))
    return lines


@pytest.mark.parametrize(
    ("chunks", "lines"),
    [
        ([], []),
        ([b"a\n"], ["a"]),
        ([b"a"], ["a"]),
        ([b"a\nb"], ["a", "b"]),
        ([b"a", b"b\nc", b"\n"], ["ab", "c"]),
        ([b"a\n\nb\n"], ["a", "", "b"]),
        ([b"a\r\nb\r\n"], ["a", "b"]),
        ([b"a\r", b"\nb\n"], ["a", "b"]),
        ([b"\xc3", b"\xa9\n"], ["é"]),
        ([b"a\xffb\n"], ["a�b"]),
        ([b"a\x00b\n"], ["a�b"]),
    ],
)
def test_lines(chunks: list[bytes], lines: list[str]) -> None:
    assert split(*chunks) == lines


def test_progress_bar_shows_its_first_and_last_state() -> None:
    assert split(*(f"\r{n}%".encode() for n in range(101)), b"\ndone\n") == ["", "100%", "done"]


def test_progress_bar_that_ends_with_the_log() -> None:
    assert split(b"1%\r2%\r3%\r") == ["1%", "3%"]


def test_progress_bar_shows_a_state_every_few_seconds() -> None:
    clock = Clock()
    splitter = LineSplitter(clock=clock, progress_seconds=5)
    lines = []
    for second in range(21):
        clock.now = second
        lines += splitter.feed(f"{second}s\r".encode())  # known to be complete when the next one comes
    lines += splitter.flush()
    assert lines == ["0s", "6s", "12s", "18s", "20s"]


def test_a_line_without_an_end_comes_in_pieces() -> None:
    text = "é" * MAX_LINE_BYTES
    lines = split(text.encode()[:5000], text.encode()[5000:])
    assert "".join(lines) == text
    assert all(len(line.encode()) <= MAX_LINE_BYTES for line in lines)
    assert len(lines) == 2


def test_tail_goes_on_from_an_offset(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    first = LogTail(path)
    assert list(first.read()) == []
    path.write_bytes(b"one\ntwo\nthr")
    assert list(first.read()) == ["one", "two"]
    assert first.offset == 8
    with path.open("ab") as file:
        file.write(b"ee\nfour")
    second = LogTail(path, offset=first.offset)
    assert list(second.rest()) == ["three", "four"]
    assert list(first.rest()) == ["three", "four"]


@pytest.mark.parametrize(("offset", "start"), [(0, 0), (2, 0), (4, 4), (6, 4), (11, 8), (1000, 8)])
def test_line_start(tmp_path: Path, offset: int, start: int) -> None:
    path = tmp_path / "log.txt"
    path.write_bytes(b"one\ntwo\nthree")
    assert line_start_before(path, offset) == start


def test_last_lines(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    assert last_lines(path, 3) == []
    path.write_bytes(b"\n".join(b"%d" % n for n in range(100)) + b"\n\n 1%\r 2%\r 3%\n")
    assert last_lines(path, 3) == ["98", "99", " 3%"]
