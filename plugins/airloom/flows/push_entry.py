"""Records of the ledger of pushes: written, read, and those of a build."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime

from pydantic import ValidationError

from airloom.contract.push import KINDS, PREFIX, Outcome, PushBuildEnd, PushBuildStart, PushDelivery, PushEntry
from airloom.errors import AirloomError, ConflictError, ContractError, NotFoundError
from airloom.hooks.connect import Hooks

REASON_CHARACTERS = 1000
_READERS = 8


def write_entry(hooks: Hooks, entry: PushEntry) -> None:
    """Write a record, once.

    Raises:
        ServiceError: the store refused or did not answer.
    """
    with suppress(ConflictError):  # an earlier try has written it
        hooks.store.put_json(
            hooks.settings.bucket_airloom, entry.key, entry.model_dump(mode="json"), if_none_match=True
        )


def note_delivery(hooks: Hooks, repo: str, rev: str, delivery: str, *, pusher: str) -> None:
    """Note an event that another receiver than Airloom's own took, and handed on to a build: once.

    Raises:
        NotFoundError: no such repo or commit.
        ServiceError: the git server or the store did not answer.
    """
    pin = hooks.git.commit(repo, rev)
    entry = PushDelivery(
        repo=repo,
        commit=pin.commit,
        id=delivery,
        at=datetime.now(UTC),
        ref="refs/heads/main",
        pusher=pusher,
        message=pin.message.partition("\n")[0],
        outcome="build",
        reason="handed on to a build",
    )
    # Each step of a build tells of it, and each retry.
    known = hooks.store.list(hooks.settings.bucket_airloom, f"{PREFIX}{repo}/{pin.commit}/")
    if _what_of(entry.key) not in {_what_of(item.key) for item in known}:
        write_entry(hooks, entry)


def _what_of(key: str) -> str:
    """Kind and id of a record: its name without the time."""
    return entry_name(key).partition("-")[2]


def entry_name(key: str) -> str:
    """The last part of a record's key: names sort by time."""
    return key.rpartition("/")[2]


def read_entries(hooks: Hooks, keys: list[str]) -> list[PushEntry]:
    """Records in the keys' order, without those that another version of Airloom has written.

    Raises:
        ServiceError: the store refused or did not answer.
    """

    def read(key: str) -> PushEntry | None:
        kind = KINDS.get(entry_name(key).partition("-")[2].partition("-")[0])
        if kind is None:
            return None
        try:
            return kind.model_validate(hooks.store.get_json(hooks.settings.bucket_airloom, key))
        except (NotFoundError, ContractError, ValidationError):
            return None

    with ThreadPoolExecutor(_READERS, thread_name_prefix="pushes") as threads:
        return [entry for entry in threads.map(read, keys) if entry is not None]


class BuildEntry:
    """One build in the ledger, from its start on. A record that can't be written stops nothing.

    Args:
        start: written here, unless an earlier process of the build has done so.
    """

    def __init__(self, hooks: Hooks, start: PushBuildStart, on_progress: Callable[[str], None]) -> None:
        self._hooks = hooks
        self._start = start
        self._on_progress = on_progress
        self._begun = self._write(start)

    def end(self, outcome: Outcome, reason: str, *, airflow: str = "", image: str = "") -> None:
        """Note the end. Nothing is noted of a build whose start could not be: the store is down."""
        if not self._begun:
            return
        now = datetime.now(UTC)
        self._write(
            PushBuildEnd(
                repo=self._start.repo,
                commit=self._start.commit,
                id=self._start.id,
                at=now,
                seconds=round((now - self._start.at).total_seconds(), 3),
                outcome=outcome,
                reason=reason[:REASON_CHARACTERS],
                airflow=airflow,
                image=image,
            )
        )

    def _write(self, entry: PushEntry) -> bool:
        try:
            write_entry(self._hooks, entry)
        except AirloomError as error:
            self._on_progress(f"the ledger of pushes could not be written: {error.message}")
            return False
        return True
