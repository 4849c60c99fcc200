"""Removes an installation."""

from __future__ import annotations

import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from airloom.errors import ConfigError
from airloom.settings import Settings

_OWN = ("secrets", "run", "data", "logs")


def size_bytes(folder: Path) -> int:
    """What the files below a folder take on disk."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.lstat().st_blocks * 512
    return total


def remove_home(settings: Settings) -> None:
    """Remove the home folder and its sockets. The platform must be down.

    Raises:
        ConfigError: the folder is not, or not only, an installation's.
    """
    home = settings.home_dir.resolve()
    project = settings.project.resolve()
    if home == Path.home() or home == project or home in project.parents or not any((home / n).is_dir() for n in _OWN):
        raise ConfigError(f"{home} does not look like a home of Airloom: nothing was removed", hint="see AIRLOOM_HOME")
    sockets = settings.socket_path("x").parent
    if sockets != settings.run_dir:
        shutil.rmtree(sockets, ignore_errors=True)
    shutil.rmtree(home, onerror=_make_writable)
    if settings.home_dir.is_symlink():
        settings.home_dir.unlink()


def _make_writable(function: Callable[..., Any], path: str, _: object) -> None:
    """Checkouts are read-only, and a folder that can't be written keeps its files."""
    for folder in (Path(path).parent, Path(path)):
        with suppress(OSError):
            folder.chmod(folder.stat().st_mode | stat.S_IRWXU)
    if Path(path).is_dir() and not Path(path).is_symlink():
        shutil.rmtree(path)
    else:
        function(path)
