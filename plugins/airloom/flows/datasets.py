"""Datasets of data versions as folders that stages read."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from airloom.contract import DataVersion, VersionTag
from airloom.errors import ContractError, NotFoundError
from airloom.hooks.connect import Hooks
from airloom.hooks.dvc import DIR_SUFFIX, DvcStore


def materialize(hooks: Hooks, data_version: DataVersion) -> Path:
    """The dataset of a data version as a read-only folder, `<home>/datasets/<md5>`.

    It is made whole or not at all, from the local cache and the DVC remote, and its content is checked against the
    version's hash, also when it exists already. Equal versions share one folder; any number of callers at once.

    Raises:
        NotFoundError: the remote lacks an object; names the tag and the object.
    """
    settings = hooks.settings
    remote = DvcStore.from_settings(settings, hooks.store)
    folder = settings.home_dir / "datasets" / data_version.md5.removesuffix(DIR_SUFFIX)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f".{folder.name}.lock")):
        if folder.exists():
            if _is_whole(remote, folder, data_version.md5):
                return folder
            _discard(folder)
        for leftover in folder.parent.glob(f".{folder.name}.*.tmp"):
            _discard(leftover)
        try:
            _make(remote, folder, data_version)
        except NotFoundError as error:
            raise NotFoundError(
                f"the data version {data_version.tag} is not whole: {error.message}",
                hint="restore the object store from a backup, or run the pipeline with force to make the data again",
            ) from error
    return folder


def objects_of(hooks: Hooks, data_version: DataVersion) -> dict[str, str]:
    """The MD5 of each file of a data version, by its name below the folder."""
    remote = DvcStore.from_settings(hooks.settings, hooks.store)
    listing = remote.listing(VersionTag.parse(data_version.tag).pipeline, data_version.md5)
    return {file.name: file.md5 for file in listing.files}


def _make(remote: DvcStore, folder: Path, data_version: DataVersion) -> None:
    pipeline = VersionTag.parse(data_version.tag).pipeline
    for attempt in (1, 2):
        temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
        temporary.mkdir()
        try:
            remote.checkout(remote.fetch(pipeline, data_version.md5), temporary)
        except ContractError:
            # Damaged objects of the cache are gone now: fetch them anew, once.
            _discard(temporary)
            if attempt == 2:
                raise
        else:
            for parent, _, _ in os.walk(temporary):
                Path(parent).chmod(0o555)
            temporary.rename(folder)
            return


def _is_whole(remote: DvcStore, folder: Path, md5: str) -> bool:
    try:
        return remote.hash_folder(folder).md5 == md5
    except ContractError:
        return False


def _discard(folder: Path) -> None:
    """Delete a folder whose folders may be read-only."""
    for parent, _, _ in os.walk(folder):
        Path(parent).chmod(0o755)
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One at a time; the kernel frees it with its holder."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
