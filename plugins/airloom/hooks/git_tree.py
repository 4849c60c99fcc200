"""The files of a commit: into a folder, byte for byte, whole or not at all; or some of them at once."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from airloom.errors import ContractError
from airloom.hooks.git_command import run_git

_BATCH_BYTES = 32 * 1024 * 1024
_LEFTOVER_SECONDS = 3600


@dataclass(frozen=True)
class _Entry:
    mode: str
    object_id: str
    size_bytes: int
    path: str


def export_tree(git_dir: Path, commit: str, dest: Path, *, read_only: bool) -> None:
    """Write the commit's files to `dest`, which appears complete or not at all.

    Raises:
        ContractError: the commit holds a path or a link that leads out of the folder.
    """
    dest.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(dest.parent)
    temporary = Path(tempfile.mkdtemp(prefix=".export-", dir=dest.parent))
    try:
        temporary.chmod(0o755)
        for batch in _batches(_entries(git_dir, commit)):
            _write(git_dir, batch, temporary)
        if read_only:
            _make_read_only(temporary)
        try:
            temporary.rename(dest)
        except OSError:
            if not dest.is_dir():
                raise
            remove_folder(temporary)  # another process was faster
    except BaseException:
        remove_folder(temporary)
        raise


def read_blobs(git_dir: Path, commit: str, paths: Iterable[str]) -> dict[str, bytes] | None:
    """Those of the files that a commit has, by one git process; None where there is no such commit.

    Args:
        commit: full hash.
    """
    names = list(paths)
    asked = "".join(f"{name}\n" for name in (f"{commit}^{{commit}}", *(f"{commit}:{name}" for name in names)))
    answer = io.BytesIO(run_git(("cat-file", "--batch"), git_dir=git_dir, stdin=os.fsencode(asked)).stdout)
    found: dict[str, bytes] = {}
    for name in ("", *names):
        facts = answer.readline().rsplit(maxsplit=2)
        if facts[-1] == b"missing":
            if not name:
                return None
            continue
        content = answer.read(int(facts[-1]) + 1)[:-1]  # a line end follows
        if facts[-2] == b"blob":
            found[name] = content
    return found


def checked_path(name: str) -> str:
    """The name, if it is one inside a repo. Raises ContractError."""
    path = PurePosixPath(name)
    parts = name.split("/")
    if (
        path.is_absolute()
        or {"\0", "\n"} & set(name)
        or any(p in {"", ".", ".."} or p.lower() == ".git" for p in parts)
    ):
        raise ContractError(f"{name!r} is no path inside a repo")
    return name


def remove_folder(folder: Path) -> None:
    """Remove a folder that may be read-only; nothing happens where there is none."""
    for path, _, _ in os.walk(folder):
        Path(path).chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)


def _entries(git_dir: Path, commit: str) -> Iterator[_Entry]:
    listed = run_git(("ls-tree", "-r", "-l", "-z", "--full-tree", commit), git_dir=git_dir).stdout
    for line in listed.split(b"\0"):
        if line:
            facts, _, name = line.partition(b"\t")
            mode, kind, object_id, size = facts.decode().split()
            if kind == "blob":  # a submodule is no file
                yield _Entry(mode, object_id, int(size), os.fsdecode(name))


def _batches(entries: Iterator[_Entry]) -> Iterator[list[_Entry]]:
    batch: list[_Entry] = []
    total = 0
    for entry in entries:
        if batch and total + entry.size_bytes > _BATCH_BYTES:
            yield batch
            batch, total = [], 0
        batch.append(entry)
        total += entry.size_bytes
    if batch:
        yield batch


def _write(git_dir: Path, batch: list[_Entry], folder: Path) -> None:
    wanted = "".join(f"{entry.object_id}\n" for entry in batch).encode()
    content = memoryview(run_git(("cat-file", "--batch"), git_dir=git_dir, stdin=wanted).stdout)
    position = 0
    for entry in batch:
        header_bytes = len(f"{entry.object_id} blob {entry.size_bytes}\n")
        start = position + header_bytes
        data = bytes(content[start : start + entry.size_bytes])
        position = start + entry.size_bytes + 1  # a line end follows
        target = _inside(folder, entry.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if entry.mode == "120000":
            _inside(folder, os.path.normpath(os.path.join(os.path.dirname(entry.path), os.fsdecode(data))))  # noqa: PTH118, PTH120
            target.symlink_to(os.fsdecode(data))
        else:
            target.write_bytes(data)
            target.chmod(0o755 if entry.mode == "100755" else 0o644)


def _inside(folder: Path, name: str) -> Path:
    parts = name.split("/")
    if name.startswith("/") or any(part in {"", ".."} or part.lower() == ".git" for part in parts):
        raise ContractError(f"the commit holds {name!r}, which leads out of its folder")
    target = folder / name
    # A link among the parents would carry the file elsewhere.
    if not target.parent.resolve().is_relative_to(folder.resolve()):
        raise ContractError(f"the commit holds {name!r}, which leads out of its folder")
    return target


def _make_read_only(folder: Path) -> None:
    for path, _, files in os.walk(folder):
        for name in files:
            file = Path(path) / name
            if not file.is_symlink():
                file.chmod(file.stat().st_mode & 0o555)
        Path(path).chmod(0o555)


def _remove_leftovers(parent: Path) -> None:
    for leftover in parent.glob(".export-*"):
        try:
            if time.time() - leftover.stat().st_mtime > _LEFTOVER_SECONDS:
                remove_folder(leftover)
        except FileNotFoundError:  # somebody else removed it
            continue
