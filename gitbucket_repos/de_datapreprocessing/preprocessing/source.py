"""Where raw files come from: objects that the run's manifest pins, or a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Protocol

from pydantic import ValidationError

from airloom.contract import Frozen, StageInputError


class Entry(Frozen):
    """One raw file: one line of the manifest.

    Attributes:
        key: its full name in the store, or its path in the folder.
        etag: the store's checksum of it; empty where there is none.
        version_id: which of the store's versions is meant, where it keeps them.
    """

    key: str
    etag: str = ""
    size_bytes: int
    version_id: str | None = None


class Source(Protocol):
    """A list of raw files and a way to read each; `read` is called from many threads at once."""

    @property
    def entries(self) -> Sequence[Entry]: ...

    @property
    def prefix(self) -> str:
        """What every key starts with and which says nothing of the label."""
        ...

    def read(self, entry: Entry) -> bytes: ...


class FolderSource:
    """The files of a folder, as `<label>/<file>`."""

    prefix = ""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        self.entries = [
            Entry(key=path.relative_to(folder).as_posix(), size_bytes=path.stat().st_size) for path in paths
        ]

    def read(self, entry: Entry) -> bytes:
        return (self._folder / entry.key).read_bytes()


def read_manifest(path: Path) -> list[Entry]:
    """Read a manifest's entries, sorted by key.

    Raises:
        StageInputError: it is missing, or a line of it is not an entry.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise StageInputError(f"the manifest {path} cannot be read: {error.strerror}") from error
    entries = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entries.append(Entry.model_validate_json(line))
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"])) or "the line"
            raise StageInputError(f"{path}:{number}: {where}: {problem['msg']}, found {line[:200]!r}") from None
    return sorted(entries, key=lambda entry: entry.key)


def label_of(key: str, prefix: str) -> str | None:
    """The label folder of `<prefix><label>/<file>`; `None` for a file that lies anywhere else."""
    parts = PurePosixPath(key.removeprefix(prefix)).parts
    return parts[0] if len(parts) == 2 else None
