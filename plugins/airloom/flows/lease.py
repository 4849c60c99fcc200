"""A lease: an object in the store that says who does something now, so that one machine at a time does it.

Who holds it writes it anew while the work goes on. One that was not written for as long as it says has been left by
somebody who was killed, and may be taken over. Every write is conditional on the object being the one that was read, so
of two takers one wins, and a holder that slept too long learns that the lease is another's.

Ages are the store's: both times come from one answer of it, so the machines' clocks do not matter. What is assumed:
the store does conditional writes of one object one after the other, and counts seconds evenly. On one machine a
holder's end is seen at once, by its process.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from airloom.contract import Frozen
from airloom.errors import AirloomError, ConflictError, NotFoundError
from airloom.hooks.process_tree import boot_id, is_alive, start_of

if TYPE_CHECKING:
    from airloom.hooks.object_store import ObjectStore

PREFIX = "leases/"
SECONDS = 60
_RENEWALS = 4  # in that time
_LOOK_SECONDS = 0.5


class LeaseLostError(ConflictError):
    """Another has taken the lease over: what was done under it may be done there as well."""


class Holder(Frozen):
    """`leases/….json` in the store.

    Attributes:
        place: the machine, and on it the container, in which `pid` is a process.
        started: tells the process from a later one with its id.
        seconds: how long the lease lasts after it was last written.
        renewals: how often it was written; with `id`, no two writes are alike, and so no two ETags.
        released: the work has ended; the object stays, since a removal could hit the next holder's. See `remove_old`.
    """

    id: str
    host: str
    place: str
    pid: int
    started: str
    since: datetime
    seconds: float
    renewals: int = 0
    released: bool = False

    def __str__(self) -> str:
        return f"{self.host} (process {self.pid}) since {self.since:%Y-%m-%d %H:%M:%S} UTC"

    def is_over(self, age_seconds: float) -> bool:
        """Whether the lease may be taken over, that many seconds after it was last written."""
        if self.released or age_seconds >= self.seconds:
            return True
        return self.place == _place() and not is_alive(self.pid, self.started)


class Lease:
    """A lease that is held."""

    def __init__(self, store: ObjectStore, bucket: str, key: str, holder: Holder, etag: str) -> None:
        self._store, self._bucket, self._key = store, bucket, key
        self._holder, self._etag = holder, etag
        self._lock = threading.Lock()
        self._lost = False

    def check(self) -> None:
        """Renew it now: whoever is about to write what others read asks whether the lease is still theirs.

        Raises:
            LeaseLostError: another has it.
            ServiceError: the store refused or did not answer.
        """
        self._write(self._holder.model_copy(update={"renewals": self._holder.renewals + 1}))

    def _write(self, holder: Holder) -> None:
        with self._lock:
            for _ in range(2):
                if self._lost:
                    break
                try:
                    self._etag = _put(self._store, self._bucket, self._key, holder, if_match=self._etag)
                    self._holder = holder
                    return
                except (ConflictError, NotFoundError):
                    self._lost = not self._is_ours()
        raise LeaseLostError(f"the lease {self._key} was taken over by another", hint="this process slept too long")

    def _is_ours(self) -> bool:
        """Whether it was an earlier write of this process, whose answer got lost, that came in between."""
        try:
            answer = self._store.get(self._bucket, self._key)
        except NotFoundError:
            return False
        found = _read(answer.body)
        if found is None or found.id != self._holder.id:
            return False
        self._etag = answer.etag
        return True

    def _keep(self, ended: threading.Event) -> None:
        while not ended.wait(self._holder.seconds / _RENEWALS):
            # What the store doesn't take now it may take the next time; a lost lease is met by `check`.
            with suppress(AirloomError):
                self.check()

    def _release(self) -> None:
        # Otherwise it runs out by itself.
        with suppress(AirloomError):
            self._write(self._holder.model_copy(update={"released": True}))


@contextmanager
def lease(
    store: ObjectStore,
    bucket: str,
    key: str,
    *,
    on_wait: Callable[[Holder], None] = lambda holder: None,
    seconds: float = SECONDS,
    wait: Callable[[float], object] = time.sleep,
) -> Iterator[Lease]:
    """Hold a lease, after waiting for whoever has it, and give it back at the end.

    Args:
        key: below `leases/`.
        on_wait: called once for each holder that is waited for.
        seconds: how long it lasts when this process is killed.
        wait: passes the time between two looks.

    Raises:
        ServiceError: the store refused or did not answer.
    """
    found = _take(store, bucket, f"{PREFIX}{key}", _myself(seconds), on_wait, wait)
    ended = threading.Event()
    keeper = threading.Thread(target=found._keep, args=(ended,), name="lease", daemon=True)
    keeper.start()
    try:
        yield found
    finally:
        ended.set()
        keeper.join()
        found._release()


def remove_old(store: ObjectStore, bucket: str, *, age_seconds: float, dry_run: bool = False) -> int:
    """Remove leases that nobody has held for that long; how many.

    Each is taken over first: until it is gone, whoever wants it waits, and a holder that came meanwhile keeps it.

    Args:
        dry_run: whether to only count them.

    Raises:
        ServiceError: the store refused or did not answer.
    """
    removed = 0
    for item in store.list(bucket, PREFIX):
        with suppress(ConflictError, NotFoundError):  # somebody has just taken or removed it
            answer = store.get(bucket, item.key)
            holder = _read(answer.body)
            if answer.age_seconds < age_seconds or (holder and not holder.is_over(answer.age_seconds)):
                continue
            if not dry_run:
                etag = _put(store, bucket, item.key, _myself(SECONDS), if_match=answer.etag)
                store.remove(bucket, item.key, if_match=etag)
            removed += 1
    return removed


def _take(  # noqa: PLR0917 - private, and only called above
    store: ObjectStore,
    bucket: str,
    key: str,
    holder: Holder,
    on_wait: Callable[[Holder], None],
    wait: Callable[[float], object],
) -> Lease:
    waited_for = ""
    while True:
        try:
            return Lease(store, bucket, key, holder, _put(store, bucket, key, holder, if_none_match=True))
        except ConflictError:
            pass
        try:
            answer = store.get(bucket, key)
        except NotFoundError:  # somebody has just cleaned up
            continue
        other = _read(answer.body)
        if other is None or other.is_over(answer.age_seconds):
            with suppress(ConflictError, NotFoundError):  # another taker was faster
                return Lease(store, bucket, key, holder, _put(store, bucket, key, holder, if_match=answer.etag))
            continue
        if other.id != waited_for:
            waited_for = other.id
            on_wait(other)
        wait(_LOOK_SECONDS)


def _put(store: ObjectStore, bucket: str, key: str, holder: Holder, **condition: Any) -> str:
    return store.put_json(bucket, key, holder.model_dump(mode="json"), **condition).etag


def _read(content: bytes) -> Holder | None:
    """None: it is of another version of Airloom, or of nobody."""
    try:
        return Holder.model_validate(json.loads(content))
    except (ValueError, ValidationError):
        return None


def _myself(seconds: float) -> Holder:
    return Holder(
        id=uuid.uuid4().hex,
        host=socket.gethostname(),
        place=_place(),
        pid=os.getpid(),
        started=start_of(os.getpid()) or "",
        since=datetime.now(UTC),
        seconds=seconds,
    )


def _place() -> str:
    """The namespace of this process's id; with the machine's start, which `started` holds too, it is unique."""
    try:
        return f"{boot_id()}:{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return uuid.uuid4().hex  # nobody's
