"""Read a growing log as lines, whatever programs write into it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

MAX_LINE_BYTES = 8192
PROGRESS_SECONDS = 5.0
_CHUNK_BYTES = 256 * 1024
# What moves a terminal's cursor, erases, or sets its title; colours (…m) stay, since Airflow's UI shows them.
_TERMINAL = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-ln-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[()][0-9A-B]|[\x00-\x08\x0b-\x1a]"
)


class LineSplitter:
    """Bytes in, lines out.

    A line that ends in a carriage return is one state of a progress bar, which the next one overwrites on a
    terminal: of those, one in `progress_seconds` is handed on, and the last. Lines longer than
    `MAX_LINE_BYTES` come in pieces.

    Attributes:
        consumed: how many bytes went into the lines handed on, from the first one fed.
    """

    def __init__(
        self, *, progress_seconds: float = PROGRESS_SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.consumed = 0
        self._rest = b""
        self._progress_seconds = progress_seconds
        self._clock = clock
        self._shown_at = float("-inf")
        self._overwritten: bytes | None = None

    def feed(self, content: bytes) -> Iterator[str]:
        """The lines that are complete by now."""
        data = self._rest + content
        start = 0
        while True:
            end, width = _line_end(data, start)
            if end < 0:
                break
            line = data[start:end]
            start = end + width
            self.consumed += len(line) + width
            if data[end : end + 1] == b"\r" and width == 1:
                yield from self._progress(line)
            else:
                yield from self._line(line)
        self._rest = data[start:]
        while len(self._rest) > MAX_LINE_BYTES:
            piece, self._rest = _cut(self._rest)
            self.consumed += len(piece)
            yield from self._line(piece)

    def flush(self) -> Iterator[str]:
        """What is left when no more will come: a line without an end, and a progress bar's last state."""
        rest, self._rest = self._rest, b""
        self.consumed += len(rest)
        if rest or self._overwritten:
            yield from self._line(rest.rstrip(b"\r"))

    def _progress(self, line: bytes) -> Iterator[str]:
        now = self._clock()
        if now - self._shown_at > self._progress_seconds:
            self._shown_at, self._overwritten = now, None
            yield from _pieces(line)
        else:
            self._overwritten = line

    def _line(self, line: bytes) -> Iterator[str]:
        last, self._overwritten = self._overwritten, None
        # An empty end after a bar means that its last state stays on the screen.
        yield from _pieces(line or last or b"")


class LogTail:
    """A log file read from an offset on, while others write to it."""

    def __init__(self, path: Path, *, offset: int = 0) -> None:
        self._path = path
        self._start = offset
        self._offset = offset
        self._splitter = LineSplitter()

    @property
    def offset(self) -> int:
        """Up to where lines were handed on."""
        return self._start + self._splitter.consumed

    def read(self) -> Iterator[str]:
        """The lines that have been completed since the last call."""
        while True:
            try:
                with self._path.open("rb") as file:
                    file.seek(self._offset)
                    content = file.read(_CHUNK_BYTES)
            except FileNotFoundError:
                return
            if not content:
                return
            self._offset += len(content)
            yield from self._splitter.feed(content)

    def rest(self) -> Iterator[str]:
        """All that is left, when nobody writes any more."""
        yield from self.read()
        yield from self._splitter.flush()


def printable(line: str) -> str:
    """The line without what only a terminal can make something of."""
    return _TERMINAL.sub("", line)


def last_lines(path: Path, count: int, *, within_bytes: int = 64 * 1024) -> list[str]:
    """The last lines of a log that are not empty; none where there is no log."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - within_bytes))
            content = file.read()
    except OSError:
        return []
    splitter = LineSplitter(progress_seconds=float("inf"))
    lines = [line for line in (*splitter.feed(content), *splitter.flush()) if line.strip()]
    return lines[-count:]


def line_start_before(path: Path, offset: int) -> int:
    """The start of the line that holds an offset."""
    try:
        with path.open("rb") as file:
            start = max(0, offset - MAX_LINE_BYTES)
            file.seek(start)
            before = file.read(offset - start)
    except OSError:
        return 0
    found = max(before.rfind(b"\n"), before.rfind(b"\r"))
    return start + found + 1 if found >= 0 else start


def _line_end(data: bytes, start: int) -> tuple[int, int]:
    """Where the next line ends and how wide its end is; (-1, 0) where that is not known yet."""
    newline, carriage = data.find(b"\n", start), data.find(b"\r", start)
    if carriage < 0 or 0 <= newline < carriage:
        return (newline, 1) if newline >= 0 else (-1, 0)
    if carriage + 1 == len(data):  # the next byte tells whether this is \r\n
        return -1, 0
    return (carriage, 2) if data[carriage + 1 : carriage + 2] == b"\n" else (carriage, 1)


def _cut(data: bytes) -> tuple[bytes, bytes]:
    """A first piece of at most `MAX_LINE_BYTES` that does not end inside a character."""
    end = MAX_LINE_BYTES
    while end > MAX_LINE_BYTES - 4 and data[end] & 0xC0 == 0x80:
        end -= 1
    return data[:end], data[end:]


def _pieces(line: bytes) -> Iterator[str]:
    while len(line) > MAX_LINE_BYTES:
        piece, line = _cut(line)
        yield _text(piece)
    yield _text(line)


def _text(line: bytes) -> str:
    return line.decode(errors="replace").replace("\0", "�")
