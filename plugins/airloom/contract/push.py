"""What became of a push: records that are written once each, and joined when they are read.

Each is an object `pushes/<repo>/<commit>/<time>-<kind>-<id>.json` in the store.
"""

from __future__ import annotations

import hashlib
import re
from datetime import UTC, datetime
from typing import ClassVar, Literal

from airloom.contract.base import Frozen

PREFIX = "pushes/"
_PLAIN = re.compile(r"[A-Za-z0-9-]{1,64}")

Asker = Literal["push", "reconciler", "person"]
Outcome = Literal["built", "found", "failed", "error"]


class PushEntry(Frozen):
    """What all records have: the commit that they are about, and what tells them apart.

    Attributes:
        id: of the delivery, or of the build.
    """

    kind: ClassVar[str] = ""
    schema_version: Literal[1] = 1
    repo: str
    commit: str
    id: str
    at: datetime

    @property
    def key(self) -> str:
        """Where it stands in the store's bucket; the same for the same record."""
        safe = self.id if _PLAIN.fullmatch(self.id) else hashlib.sha256(self.id.encode()).hexdigest()[:32]
        return f"{PREFIX}{self.repo}/{self.commit}/{self.at.astimezone(UTC):%Y%m%dT%H%M%S%fZ}-{self.kind}-{safe}.json"


class PushDelivery(PushEntry):
    """An event that was received.

    Attributes:
        at: when it was received.
        reason: why it led to a build, or to none.
    """

    kind: ClassVar[str] = "delivery"
    ref: str
    pusher: str
    message: str = ""
    outcome: Literal["build", "ignored"]
    reason: str


class PushBuildStart(PushEntry):
    """A build that has begun."""

    kind: ClassVar[str] = "start"
    asked_by: Asker
    pusher: str
    message: str


class PushBuildEnd(PushEntry):
    """A build that has ended; one without it was killed, or runs.

    Attributes:
        outcome: `found` is a build that was there already, `error` one that something else than the commit prevented.
        airflow: what came of telling Airflow.
        image: what was built, where the installation builds images, as it can be pulled.
    """

    kind: ClassVar[str] = "end"
    seconds: float
    outcome: Outcome
    reason: str
    airflow: str = ""
    image: str = ""


class PushSeen(PushEntry):
    """The reconciler has met a commit that nobody had built."""

    kind: ClassVar[str] = "seen"


KINDS: dict[str, type[PushEntry]] = {kind.kind: kind for kind in (PushDelivery, PushBuildStart, PushBuildEnd, PushSeen)}
