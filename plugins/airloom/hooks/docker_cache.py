"""The cache volume: an engine's own copy of data versions, sent there once and read by every stage.

It holds batches. A batch is a folder laid out as DVC's cache, which one sender writes once, under a name that nobody
else has, and an index beside it, which comes when all of the batch is there. So nothing that a stage may be reading is
ever written over, whoever else fills the volume meanwhile, and what a killed sender left is not believed.
"""

from __future__ import annotations

import fcntl
import io
import json
import logging
import secrets
import tarfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from airloom.errors import UnavailableError
from airloom.hooks.docker_container import INSTANCE_LABEL
from airloom.hooks.docker_engine import connect, engine_errors
from airloom.settings import Settings

CACHE = PurePosixPath("/airloom-cache")
LOCK_FILE = "docker-cache.lock"
_INDEXES = CACHE / "batches"
_MADE_LABEL = "airloom.made"
_BLOCK = 512  # of an archive

log = logging.getLogger(__name__)


class CacheVolume:
    """The cache volume of an installation on an engine."""

    def __init__(self, api: Any, settings: Settings) -> None:
        self._api = api
        self._labels = {INSTANCE_LABEL: settings.instance_id}
        self._lock_file = settings.home_dir / LOCK_FILE
        self.name = f"airloom-{settings.instance_id}-dvc-cache"

    def mount(self) -> Any:
        """For a stage's container, which cannot write to it. Makes the volume."""
        from docker.types import Mount

        self._lock_file.touch()  # first: who cleans up asks no engine that no stage has used
        self._api.create_volume(self.name, labels={**self._labels, _MADE_LABEL: str(int(time.time()))})
        return Mount(str(CACHE), self.name, type="volume", read_only=True)

    def ensure(self, container: str, image: str, objects: Mapping[str, Path]) -> dict[str, str]:
        """Send the objects that the volume lacks.

        Args:
            container: which has the volume; as long as there is one, nobody can remove it.
            objects: a file with these bytes by MD5.

        Returns:
            where the container has each object, by MD5
        """
        known = self._known(container)
        if objects.keys() - known:
            with self._lock_file.open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # two stages that start at once here: the second waits for the first
                known = self._known(container)
                lacking = {md5: path for md5, path in objects.items() if md5 not in known}
                if lacking:
                    known |= self._send(container, image, lacking)
        return {md5: known[md5] for md5 in objects}

    def forget(self, container: str, image: str, paths: list[str]) -> None:
        """Have damaged objects sent again by whoever needs them next."""
        left: dict[str, list[str]] = {}
        for md5, path in self._known(container).items():
            left.setdefault(_batch_of(path), []).append(md5)
        lost = set(paths)
        with self._sender(container, image) as sender:
            for batch, hashes in left.items():
                whole = [md5 for md5 in hashes if _path(batch, md5) not in lost]
                if len(whole) < len(hashes):
                    self._api.put_archive(sender, str(CACHE), _index(batch, whole))

    def remove(self, *, made_before: float, dry_run: bool = False) -> bool:
        """Remove the volume if it is that old and no container has it; whether it was, or would be, removed."""
        from docker.errors import APIError, NotFound

        with engine_errors():
            try:
                made = float(self._api.inspect_volume(self.name)["Labels"][_MADE_LABEL])
            except NotFound:
                return False
            if made >= made_before or self._api.containers(all=True, filters={"volume": self.name}):
                return False
            if not dry_run:
                try:
                    self._api.remove_volume(self.name)
                except APIError as error:
                    if error.status_code != 409:
                        raise
                    return False  # a stage has just begun to use it
            return True

    def _known(self, container: str) -> dict[str, str]:
        """Where every object is that an index names. An index that cannot be read counts as none."""
        from docker.errors import NotFound

        try:
            chunks, _ = self._api.get_archive(container, str(_INDEXES), chunk_size=2**20)
        except NotFound:
            return {}
        found: dict[str, str] = {}
        with suppress(tarfile.TarError), tarfile.open(fileobj=io.BytesIO(b"".join(chunks))) as archive:
            for member in archive:
                file = archive.extractfile(member)
                if file is not None:
                    with suppress(ValueError):  # half of one
                        batch = PurePosixPath(member.name).stem
                        found |= {md5: _path(batch, md5) for md5 in json.load(file)}
        return found

    def _send(self, container: str, image: str, objects: Mapping[str, Path]) -> dict[str, str]:
        batch = secrets.token_hex(8)
        with self._sender(container, image) as sender:
            self._api.put_archive(sender, str(CACHE), _objects(batch, objects))
            self._api.put_archive(sender, str(CACHE), _index(batch, list(objects)))
        return {md5: _path(batch, md5) for md5 in objects}

    @contextmanager
    def _sender(self, container: str, image: str) -> Iterator[str]:
        """A container that may write to the volume. Never started: the engine takes files as soon as it is made."""
        from docker.errors import NotFound
        from docker.types import Mount

        remove_sender(self._api, container)
        mount = Mount(str(CACHE), self.name, type="volume")
        host = self._api.create_host_config(mounts=[mount], network_mode="none")
        made = self._api.create_container(
            image, name=_sender_of(container), command=["-"], labels=self._labels, host_config=host
        )
        try:
            yield made["Id"]
        finally:
            with suppress(NotFound):
                self._api.remove_container(made["Id"], force=True)


def remove_sender(api: Any, container: str) -> None:
    """Remove what a killed process left that was sending for this stage's container."""
    from docker.errors import NotFound

    with suppress(NotFound):
        api.remove_container(_sender_of(container), force=True)


def remove_cache(settings: Settings, *, made_before: float, dry_run: bool = False) -> bool:
    """`CacheVolume.remove` for this installation; an engine that does not answer is passed over."""
    if not (settings.home_dir / LOCK_FILE).exists():
        return False
    try:
        return CacheVolume(connect(settings), settings).remove(made_before=made_before, dry_run=dry_run)
    except UnavailableError as error:
        log.warning("the cache volume was not looked for: %s", error)
        return False


def _sender_of(container: str) -> str:
    return f"{container}-sender"


def _path(batch: str, md5: str) -> str:
    return str(CACHE / _name(batch, md5))


def _name(batch: str, md5: str) -> str:
    return f"{batch}/files/md5/{md5[:2]}/{md5[2:]}"


def _batch_of(path: str) -> str:
    return PurePosixPath(path).relative_to(CACHE).parts[0]


def _objects(batch: str, objects: Mapping[str, Path]) -> Iterator[bytes]:
    """An archive of a batch, piece by piece: data versions may be larger than memory and than the disk's room."""
    folders = [batch, f"{batch}/files", f"{batch}/files/md5"]
    for folder in [*folders, *sorted({f"{batch}/files/md5/{md5[:2]}" for md5 in objects})]:
        yield _folder(folder)
    for md5, path in objects.items():
        with path.open("rb") as file:
            info = tarfile.TarInfo(_name(batch, md5))
            info.size, info.mode = path.stat().st_size, 0o444
            yield info.tobuf()
            while piece := file.read(2**20):
                yield piece
        yield bytes(-info.size % _BLOCK)
    yield bytes(2 * _BLOCK)


def _index(batch: str, hashes: list[str]) -> bytes:
    content = json.dumps(sorted(hashes)).encode()
    info = tarfile.TarInfo(f"{_INDEXES.name}/{batch}.json")
    info.size, info.mode = len(content), 0o444
    return b"".join((_folder(_INDEXES.name), info.tobuf(), content, bytes(-info.size % _BLOCK), bytes(2 * _BLOCK)))


def _folder(name: str) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.mode = tarfile.DIRTYPE, 0o755
    return info.tobuf()
