"""Writes what becomes of a push into the ledger of pushes. A record that can't be written stops nothing."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime

from airloom.contract import CodePin
from airloom.contract.push import Asker, Outcome, PushBuildEnd, PushBuildStart, PushEntry
from airloom.errors import AirloomError, ConflictError
from airloom.hooks.connect import Hooks

log = logging.getLogger(__name__)

REASON_CHARACTERS = 1000


def write_entry(hooks: Hooks, entry: PushEntry) -> None:
    """Write a record, once.

    Raises:
        ServiceError: the store refused or did not answer.
    """
    with suppress(ConflictError):  # an earlier try has written it
        hooks.store.put_json(
            hooks.settings.bucket_airloom, entry.key, entry.model_dump(mode="json"), if_none_match=True
        )


class BuildEntry:
    """Start and end of one build."""

    def __init__(
        self, hooks: Hooks, pin: CodePin, asked_by: Asker, pusher: str, on_progress: Callable[[str], None]
    ) -> None:
        self.asked_by = asked_by
        self._hooks = hooks
        self._pin = pin
        self.pusher = pusher
        self._on_progress = on_progress
        self._id = uuid.uuid4().hex[:16]
        self._started: datetime | None = None

    def start(self) -> None:
        """Note the start, as soon as the store is known to answer."""
        self._started = datetime.now(UTC)
        pin = self._pin
        self._write(
            PushBuildStart(
                repo=pin.repo,
                commit=pin.commit,
                id=self._id,
                at=self._started,
                asked_by=self.asked_by,
                pusher=self.pusher,
                message=pin.message.partition("\n")[0],
            )
        )

    def end(self, outcome: Outcome, reason: str, *, airflow: str = "") -> None:
        """Note the end. Nothing is noted of a build whose start could not be: the store is down."""
        if self._started is None:
            return
        now = datetime.now(UTC)
        self._write(
            PushBuildEnd(
                repo=self._pin.repo,
                commit=self._pin.commit,
                id=self._id,
                at=now,
                seconds=round((now - self._started).total_seconds(), 3),
                outcome=outcome,
                reason=reason[:REASON_CHARACTERS],
                airflow=airflow,
            )
        )

    def _write(self, entry: PushEntry) -> None:
        try:
            write_entry(self._hooks, entry)
        except AirloomError as error:
            self._started = None
            self._on_progress(f"the ledger of pushes could not be written: {error.message}")
