"""Datasets in DVC's own format and layout, so that stock `dvc get` and `dvc pull` give them back.

DVC's libraries hash a folder, with their state database, so that a file that has not changed is not read again.
The objects are moved by the object store's client: DVC's own push takes several times as long for small files.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from airloom.errors import ContractError, NotFoundError, ServiceError
from airloom.hooks.object_store import SINGLE_PUT_MAX_BYTES, ObjectInfo, ObjectStore
from airloom.settings import Settings

DIR_SUFFIX = ".dir"
REMOTE_NAME = "airloom"
LISTED_AT_ONCE = 4
LIST_FROM_OBJECTS = 200  # from so many objects on, one listing costs less than a question for each


@dataclass(frozen=True)
class DatasetFile:
    """One file of a dataset. `size_bytes` is None where only a `.dir` object was read, which doesn't tell it."""

    name: str
    md5: str
    size_bytes: int | None = None


@dataclass(frozen=True)
class DatasetListing:
    """What a `.dir` object says: the files of a folder, sorted by name.

    `md5` ends in `.dir`, and is the same for equal folders.
    """

    md5: str
    files: tuple[DatasetFile, ...]

    @property
    def size_bytes(self) -> int:
        """Of all files; 0 where sizes are not known."""
        return sum(file.size_bytes or 0 for file in self.files)

    @cached_property
    def content(self) -> bytes:
        """The bytes of the `.dir` object, exactly as DVC writes them."""
        return json.dumps([{"md5": file.md5, "relpath": file.name} for file in self.files], sort_keys=True).encode()

    @classmethod
    def parse(cls, md5: str, content: bytes) -> DatasetListing:
        """Read a `.dir` object.

        Raises:
            ContractError: it is no such object, or its content does not fit its name.
        """
        if f"{_md5(content)}{DIR_SUFFIX}" != md5:
            raise ContractError(f"the listing {md5} holds other bytes than its name says (MD5 {_md5(content)})")
        try:
            files = tuple(DatasetFile(entry["relpath"], entry["md5"]) for entry in json.loads(content))
        except (ValueError, KeyError, TypeError) as error:
            raise ContractError(f"the listing {md5} is not one of DVC's: {error}") from error
        for file in files:
            if file.name.startswith("/") or ".." in file.name.split("/"):
                raise ContractError(f"the listing {md5} names {file.name!r}, which is outside the dataset")
        return cls(md5, files)


@dataclass(frozen=True)
class Pushed:
    """What a push moved. `present`: files that the remote had already."""

    uploaded: int
    present: int


def object_key(prefix: str, md5: str) -> str:
    """Where DVC keeps an object in a remote with this prefix."""
    return f"{prefix}/files/md5/{md5[:2]}/{md5[2:]}"


def pointer(listing: DatasetListing, path: str) -> bytes:
    """The `.dvc` file that stock DVC writes for a folder `path` beside it."""
    import yaml

    out = {
        "md5": listing.md5,
        "size": listing.size_bytes,
        "nfiles": len(listing.files),
        "hash": "md5",
        "path": path,
    }
    return yaml.safe_dump({"outs": [out]}, sort_keys=False, allow_unicode=True).encode()


def remote_config(bucket: str, prefix: str, endpoint_url: str) -> bytes:
    """`.dvc/config` with the one remote that the data is in. Keys come from the reader's environment."""
    return (
        f"[core]\n    remote = {REMOTE_NAME}\n"
        f"['remote \"{REMOTE_NAME}\"']\n    url = s3://{bucket}/{prefix}\n    endpointurl = {endpoint_url}\n"
    ).encode()


class DvcStore:
    """A local cache and a remote in the object store, both in DVC's layout.

    Args:
        bucket: with the remotes, each below a prefix of its own.
    """

    def __init__(self, *, cache_dir: Path, store: ObjectStore, bucket: str) -> None:
        self.cache_dir = cache_dir
        self.bucket = bucket
        self._store = store

    @classmethod
    def from_settings(cls, settings: Settings, store: ObjectStore) -> DvcStore:
        return cls(cache_dir=settings.dvc_cache_dir, store=store, bucket=settings.bucket_dvc)

    # Hashing

    def hash_folder(self, folder: Path) -> DatasetListing:
        """The listing of a folder; reads only files whose inode, time or size changed since they were last hashed.

        Raises:
            ContractError: it is missing or empty, or holds a link or `.dvcignore`.
        """
        from dvc_data.hashfile.build import IgnoreInCollectedDirError, build
        from dvc_objects.fs.local import LocalFileSystem

        _check_plain(folder)
        with _uncollected(), self._object_db() as database:
            try:
                _, meta, tree = build(database, str(folder.resolve()), LocalFileSystem(), "md5", dry_run=True)
            except IgnoreInCollectedDirError as error:
                raise ContractError(f"{folder} holds a .dvcignore, which would hide files from DVC") from error
            del meta
            files = sorted(
                (DatasetFile("/".join(key), hashed.value, meta.size) for key, meta, hashed in tree),
                key=lambda file: file.name,
            )
        listing = DatasetListing(tree.hash_info.value, tuple(files))
        if f"{_md5(listing.content)}{DIR_SUFFIX}" != listing.md5:
            raise ContractError(f"DVC hashed {folder} as {listing.md5}, which does not fit its listing")
        return listing

    # The remote

    def present(self, prefix: str, files: int) -> Mapping[str, ObjectInfo] | None:
        """What the remote has, by hash, for the `push` of so many files; None where that had better ask for each."""
        return self._all(prefix) if files >= LIST_FROM_OBJECTS else None

    def push(
        self, listing: DatasetListing, folder: Path, prefix: str, *, present: Mapping[str, ObjectInfo] | None = None
    ) -> Pushed:
        """Bring a folder to the remote: its files, then a check that all are there, then its `.dir` object.

        So a `.dir` object on the remote means that the dataset is whole. May be cut off and repeated.

        Args:
            present: what the remote has; looked up if not given.

        Raises:
            StorageFullError: the remote has no room; there is no `.dir` object then.
            ServiceError: the remote holds other bytes than were sent.
        """
        wanted = {file.md5: file for file in listing.files}
        found = self._find(prefix, [*wanted, listing.md5]) if present is None else present
        missing = [file for md5, file in wanted.items() if not _fits(found.get(md5), file)]
        self._store.upload_many(self.bucket, [(object_key(prefix, file.md5), folder / file.name) for file in missing])
        arrived = self._find(prefix, [file.md5 for file in missing]) if missing else {}
        for file in missing:
            if not _fits(arrived.get(file.md5), file):
                raise ServiceError(
                    f"{folder / file.name} did not arrive as {self._address(prefix, file.md5)}: "
                    f"expected {file.size_bytes} bytes with MD5 {file.md5}, found {arrived.get(file.md5)}",
                    hint="did somebody change the file meanwhile? Run the task again",
                )
        if listing.md5 not in found:
            self._store.put_bytes(self.bucket, object_key(prefix, listing.md5), listing.content)
        return Pushed(len(missing), len(wanted) - len(missing))

    def missing(self, prefix: str, md5: str) -> str | None:
        """Address of an object of this dataset that the remote lacks; None when it is whole."""
        try:
            wanted = {file.md5 for file in self.listing(prefix, md5).files} | {md5}
        except NotFoundError:
            return self._address(prefix, md5)
        for lost in sorted(wanted - self._find(prefix, wanted).keys()):
            return self._address(prefix, lost)
        return None

    def listing(self, prefix: str, md5: str) -> DatasetListing:
        """A dataset's listing, from the cache or the remote.

        Raises:
            NotFoundError: neither has it.
        """
        path = self._cached(md5)
        with suppress(OSError, ContractError):
            return DatasetListing.parse(md5, path.read_bytes())
        content = self._store.get_bytes(self.bucket, object_key(prefix, md5))
        listing = DatasetListing.parse(md5, content)
        _write_read_only(path, content)
        return listing

    # The cache

    def fetch(self, prefix: str, md5: str) -> DatasetListing:
        """Bring a dataset's objects into the cache, those that it lacks.

        Raises:
            NotFoundError: the remote lacks one; the message names it.
        """
        listing = self.listing(prefix, md5)
        lacking = {file.md5 for file in listing.files if not self._cached(file.md5).exists()}
        self._store.download_many(
            self.bucket, [(object_key(prefix, oid), None, self._cached(oid)) for oid in sorted(lacking)]
        )
        for oid in lacking:
            self._cached(oid).chmod(0o444)
        return listing

    def checkout(self, listing: DatasetListing, folder: Path) -> None:
        """Fill an empty folder with a fetched dataset, read-only: hard links into the cache where possible.

        Raises:
            ContractError: the cache holds damaged objects; they have been removed from it.
        """
        for file in listing.files:
            path = folder / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(self._cached(file.md5), path)
            except OSError:  # another file system, or no hard links there
                shutil.copyfile(self._cached(file.md5), path)
                path.chmod(0o444)
        made = {file.name: file.md5 for file in self.hash_folder(folder).files}
        damaged = [file for file in listing.files if made.get(file.name) != file.md5]
        for file in damaged:
            self._cached(file.md5).unlink(missing_ok=True)
        if damaged:
            raise ContractError(
                f"{len(damaged)} objects of the cache {self.cache_dir} were damaged, such as {damaged[0].md5}"
            )

    # Parts

    def _cached(self, md5: str) -> Path:
        return self.cache_dir / "files" / "md5" / md5[:2] / md5[2:]

    def _address(self, prefix: str, md5: str) -> str:
        return f"s3://{self.bucket}/{object_key(prefix, md5)}"

    def _find(self, prefix: str, hashes: Iterable[str]) -> Mapping[str, ObjectInfo]:
        """Those of the objects that the remote has, by hash."""
        wanted = list(hashes)
        if len(wanted) < LIST_FROM_OBJECTS:
            keys = [object_key(prefix, md5) for md5 in wanted]
            found = self._store.info_many(self.bucket, keys)
            return {md5: info for md5, info in zip(wanted, found, strict=True) if info is not None}
        return self._all(prefix)

    def _all(self, prefix: str) -> Mapping[str, ObjectInfo]:
        """Every object of the remote, by hash."""
        folder = f"{prefix}/files/md5/"
        # By first digit, several at a time: the server works on one page while another is read here.
        with _uncollected(), ThreadPoolExecutor(LISTED_AT_ONCE) as pool:
            parts = pool.map(lambda digit: list(self._store.list(self.bucket, folder + digit)), "0123456789abcdef")
            return {info.key[len(folder) :].replace("/", "", 1): info for part in parts for info in part}

    @contextmanager
    def _object_db(self) -> Iterator[object]:
        """DVC's view of the cache, with the state database that remembers hashes."""
        from dvc_data.hashfile.db.local import LocalHashFileDB
        from dvc_data.hashfile.state import State
        from dvc_objects.fs.local import LocalFileSystem

        folder = self.cache_dir / "state"
        folder.mkdir(parents=True, exist_ok=True)
        state = State(root_dir=str(self.cache_dir), tmp_dir=str(folder))
        try:
            yield LocalHashFileDB(LocalFileSystem(), str(self.cache_dir / "files" / "md5"), state=state)
        finally:
            state.close()


@contextmanager
def _uncollected() -> Iterator[None]:
    """Keep the garbage collector away while many small objects are made that all stay: it would look through them, and
    through all else that the process holds, again and again."""
    if not gc.isenabled():  # another thread is here already, and lets it run again
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _fits(found: ObjectInfo | None, file: DatasetFile) -> bool:
    """Whether the remote's object is the file: for files that went in one piece the ETag is the MD5."""
    if found is None or found.size_bytes != file.size_bytes:
        return False
    return found.etag == file.md5 or ("-" in found.etag and found.size_bytes > SINGLE_PUT_MAX_BYTES)


def _check_plain(folder: Path) -> None:
    if not folder.is_dir():
        raise ContractError(f"there is no dataset folder {folder}")
    empty = True
    left = [os.fspath(folder)]
    while left:
        with os.scandir(left.pop()) as entries:  # which mostly knows what each is without asking for it
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    left.append(entry.path)
                elif entry.is_file(follow_symlinks=False):
                    empty = False
                else:
                    raise ContractError(f"{entry.path} is no plain file", hint="a dataset holds files and folders only")
    if empty:
        raise ContractError(f"the dataset folder {folder} is empty")


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _write_read_only(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    temporary.write_bytes(content)
    temporary.chmod(0o444)
    temporary.replace(path)
