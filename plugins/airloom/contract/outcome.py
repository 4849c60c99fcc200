"""What the tasks of a run hand to each other, as JSON."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import Field

from airloom.contract.base import Frozen
from airloom.contract.enums import Stage
from airloom.contract.plan import DataVersion
from airloom.contract.result import StageResult


class StageOutcome(Frozen):
    """A stage's result and how it came about.

    Attributes:
        cache: `hit`: an equal stage ran before and its result is used; `miss`: it ran now;
            `forced`: it ran although an equal one had.
        reason: for people: which earlier run is reused, or what differs.
        key: digest of everything that the result depends on.
        seconds, cpu_seconds, peak_memory_bytes: of all processes of the stage together; 0 for a hit.
        data_version: for a hit of preprocess: where its dataset is.
    """

    stage: Stage
    cache: Literal["hit", "miss", "forced"]
    reason: str
    key: str
    seconds: float
    cpu_seconds: float = 0.0
    peak_memory_bytes: int = 0
    result: StageResult
    data_version: DataVersion | None = None


class ValidationReport(Frozen):
    """One sentence for each check of the data, with its figures."""

    checks: list[str]
    failed: list[str] = Field(default_factory=list)


class Deployment(Frozen):
    """What answers requests for a pipeline: `deployments/<pipeline>.json` in the store.

    Attributes:
        state: `canary` while traffic moves, `live` when all of it has, `rolled_back` when the
            release was withdrawn and `previous` answers. `superseded`, which is returned and never stored, when
            `previous` is of a later run and goes on answering.
        url: of the serving process itself; clients use the gateway.
        pinned_at: when the run that brought what answers was pinned to its commits; None: not known.
        previous_pinned_at: the same of what `release` took the traffic from.
        unchanged: the release had all traffic when the run came to deploy it, as with a run that finds all its
            results made. Nothing has been moved, so there is nothing to give back.
    """

    pipeline: str
    release: str
    previous: str | None
    url: str
    state: Literal["canary", "live", "rolled_back", "superseded"]
    updated_at: datetime
    detail: str = ""
    pinned_at: datetime | None = None
    previous_pinned_at: datetime | None = None
    unchanged: bool = False


class VerifyReport(Frozen):
    """Answers that came through the gateway, held against the evaluation's.

    Attributes:
        superseded_by: the release of a later run that had the traffic before anything was checked.
    """

    release: str
    checked: int
    equal: int
    superseded_by: str | None = None
    sample_prediction_ids: list[str] = Field(default_factory=list)
