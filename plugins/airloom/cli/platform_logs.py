"""Shows log files, and goes on showing them."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from airloom.errors import NotFoundError

_POLL_SECONDS = 0.3


def show(folder: Path, service: str | None, *, follow: bool, lines: int) -> None:
    """Print the last lines of one service's log or of all, then go on if wanted.

    Raises:
        NotFoundError: that service has written no log.
    """
    from airloom.embedded.rotating_log import tail

    known = {path.stem: path for path in sorted(folder.glob("*.log"))}
    if service is not None and service not in known:
        raise NotFoundError(
            f"no log of a service {service!r} in {folder}", hint=f"there are: {', '.join(known) or 'none yet'}"
        )
    chosen = {service: known[service]} if service is not None else known
    width = max((len(name) for name in chosen), default=0)
    prefixes = {name: "" if service is not None else f"{name:<{width}} | " for name in chosen}
    followed = {name: _Follower(path) for name, path in chosen.items()} if follow else {}
    with suppress(KeyboardInterrupt, BrokenPipeError):
        for name, path in chosen.items():
            _print(prefixes[name], tail(path, lines) if lines else [])
        while followed:
            for name, follower in followed.items():
                _print(prefixes[name], follower.new_lines())
            time.sleep(_POLL_SECONDS)


def _print(prefix: str, lines: list[str]) -> None:
    for line in lines:
        sys.stdout.write(f"{prefix}{line}\n")
    sys.stdout.flush()


class _Follower:
    """Reads what is added to a file that is rotated now and then."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO = path.open("rb")
        self._file.seek(0, os.SEEK_END)
        self._rest = b""

    def new_lines(self) -> list[str]:
        data = self._rest + self._file.read()
        with suppress(FileNotFoundError):
            if self._path.stat().st_ino != os.fstat(self._file.fileno()).st_ino:
                self._file.close()
                self._file = self._path.open("rb")
                data += self._file.read()
        *whole, self._rest = data.split(b"\n")
        return [line.decode(errors="replace") for line in whole]
