"""Copies of model artifacts on this machine, each in a folder named by its digest."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

from airloom.contract.digest import sha256_tree
from airloom.contract.model import MODEL_FILE
from airloom.errors import ContractError, StorageFullError
from airloom.hooks.mlflow_api import checked_path

_LEFTOVER_SECONDS = 3600.0


class ModelCache:
    """`<folder>/<digest>`: whole and read-only, or not there. Many processes may use one at once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, digest: str) -> Path | None:
        """The copy with this digest; one whose bytes have changed is taken away."""
        path = self._folder / digest
        if not path.is_dir():
            return None
        if sha256_tree(path) == digest:
            return path
        self._discard(path)
        return None

    def add(
        self,
        name: str,
        files: Mapping[str, int],
        download: Callable[[str, Path], None],
        *,
        expected_digest: str | None = None,
    ) -> Path:
        """Download the artifact among `files` (path -> size in bytes) and return its folder.

        Args:
            name: what messages call it.
            download: writes the file of a path to a place.

        Raises:
            ContractError: there is no artifact among the files, or its bytes are not those of the digest.
            StorageFullError: the disk is full.
        """
        root = artifact_root(name, files)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        made = Path(tempfile.mkdtemp(prefix=".download-", dir=self._folder))
        try:
            for path in files:
                if not PurePosixPath(path).is_relative_to(root):
                    continue
                target = made / PurePosixPath(checked_path(path)).relative_to(root)
                target.parent.mkdir(parents=True, exist_ok=True)
                download(path, target)
            digest = sha256_tree(made)
            if expected_digest and digest != expected_digest:
                raise ContractError(
                    f"the bytes of {name} have the digest {digest}, expected {expected_digest}",
                    hint="the stored model was changed or is damaged: train it again with --force",
                )
            return self._place(made, self._folder / digest, digest)
        except OSError as error:
            if error.errno in {28, 122}:  # ENOSPC, EDQUOT
                raise StorageFullError(f"no room for {name} in {self._folder}", hint="free disk space there") from error
            raise
        finally:
            if made.exists():
                _remove(made)

    def _place(self, made: Path, target: Path, digest: str) -> Path:
        """Give a whole copy its name. Of several made at once, the first stays."""
        _make_read_only(made)
        for _ in range(3):
            if self.find(digest):
                return target
            try:
                # A folder without the right to write may not be renamed by its owner on every system.
                made.chmod(0o755)
                made.rename(target)
                target.chmod(0o555)
                return target
            except OSError:
                if not target.exists():
                    raise
        return target

    def _discard(self, path: Path) -> None:
        """Take a folder out of sight in one step, then delete it."""
        aside = Path(tempfile.mkdtemp(prefix=".discarded-", dir=self._folder))
        try:
            path.chmod(0o755)
            path.rename(aside / path.name)
        except FileNotFoundError:  # somebody else did
            pass
        _remove(aside)

    def _remove_leftovers(self) -> None:
        """Delete what downloads that were killed left behind."""
        for path in self._folder.glob(".d*-*"):
            try:
                old = time.time() - path.stat().st_mtime > _LEFTOVER_SECONDS
            except FileNotFoundError:
                continue
            if old:
                _remove(path)


def artifact_root(name: str, files: Mapping[str, int]) -> PurePosixPath:
    """The folder with `model.json` among an artifact's files: at the top, or else the only one below.

    Raises:
        ContractError: there is none, or more than one.
    """
    found = sorted((PurePosixPath(path).parent for path in files if PurePosixPath(path).name == MODEL_FILE), key=str)
    if PurePosixPath() in found:
        return PurePosixPath()
    if len(found) != 1:
        raise ContractError(
            f"{name} has {len(found) or 'no'} files {MODEL_FILE} below its top folder, where one is expected",
            hint="the training stage must log a model artifact of airloom.contract.model",
        )
    return found[0]


def _make_read_only(folder: Path) -> None:
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            Path(parent, name).chmod(0o444)
        Path(parent).chmod(0o555)


def _remove(folder: Path) -> None:
    """Delete a folder, read-only or not."""
    for parent, _, _ in os.walk(folder):
        try:
            Path(parent).chmod(stat.S_IRWXU)
        except FileNotFoundError:
            continue
    shutil.rmtree(folder, ignore_errors=True)
