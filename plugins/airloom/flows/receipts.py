"""What a prediction's id leads back to.

`receipt` answers within a second, so nothing here imports more than the database needs; the store's client is
loaded only where the release is not on this machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airloom.contract.enums import DeployTarget
from airloom.contract.image import ImageRef
from airloom.contract.prediction_id import PredictionId
from airloom.contract.release import Receipt, Release
from airloom.errors import ContractError, NotFoundError, ServiceError, UnavailableError

if TYPE_CHECKING:
    from airloom.hooks.connect import Hooks
    from airloom.settings import Settings

RELEASE_FILE = "release.json"


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A prediction as it was recorded, wherever that was found.

    Attributes:
        content: the input; `None` where only the answer was looked for, or the input is gone.
        source: `log` or `journal`.
    """

    id: str
    pipeline: str
    release: str
    answered_at: float
    latency_ms: float
    input_sha256: str
    output: dict[str, Any]
    batch_size: int
    batch_index: int
    content: bytes | None
    source: str


def journal_root(settings: Settings) -> Path:
    """Where serving processes of this machine keep what the prediction log doesn't have yet."""
    return settings.home_dir / "journal"


def receipt(hooks: Hooks, prediction_id: str) -> Receipt:
    """The receipt of a prediction, from its id alone.

    Raises:
        NotFoundError: the text is no id, nobody answered with it, or its release is gone.
        UnavailableError: the prediction log did not answer, and no journal on this machine has the id.
    """
    recorded = find(hooks, prediction_id)
    release = release_of(hooks, recorded.pipeline, recorded.release)
    return Receipt(
        prediction_id=recorded.id,
        answered_at=datetime.fromtimestamp(recorded.answered_at, tz=UTC),
        pipeline=recorded.pipeline,
        latency_ms=recorded.latency_ms,
        input_sha256=recorded.input_sha256,
        output=recorded.output,
        release=release,
        image=_image_of(hooks, release),
    )


def find(hooks: Hooks, prediction_id: str, *, with_content: bool = False) -> Recorded:
    """Look for a prediction in the log, then in the journals of this machine.

    Raises:
        NotFoundError: the text is no id, or it is recorded nowhere.
        UnavailableError: the log did not answer, and no journal has it.
    """
    parsed = PredictionId.parse(prediction_id)
    wanted = str(parsed)
    outage: UnavailableError | None = None
    # Twice: an entry may move from the journal to the log between the two looks.
    for _ in range(2):
        try:
            recorded = _from_log(hooks, wanted, with_content)
        except UnavailableError as error:
            outage, recorded = error, None
        recorded = recorded or _from_journal(hooks, wanted)
        if recorded is not None:
            return recorded
    if outage is not None:
        raise outage
    raise NotFoundError(f"no prediction {wanted} is recorded", hint=_hint(hooks, parsed))


def release_of(hooks: Hooks, pipeline: str, version: str) -> Release:
    """A release, from the copy on this machine or else from the store: it is written once, so both are the same.

    Raises:
        NotFoundError: neither has it.
        UnavailableError: this machine does not have it, and the store did not answer.
    """
    local = bundle_of(hooks.settings, pipeline, version) / RELEASE_FILE
    if local.is_file():
        with suppress(ContractError):  # half gone: ask the store
            return Release.read(local)
    try:
        value = hooks.store.get_json(hooks.settings.bucket_airloom, f"releases/{pipeline}/{version}.json")
    except NotFoundError:
        raise NotFoundError(
            f"release {version} of {pipeline} is neither in the store nor on this machine",
            hint=f"see what there is: airloom lineage {pipeline}",
        ) from None
    return Release.stored(value, f"release {version} of {pipeline}")


def _image_of(hooks: Hooks, release: Release) -> ImageRef | None:
    """Where there may be one, the store is asked; a receipt does without its answer."""
    if release.image is None or not release.image.pushed or release.target is not DeployTarget.DOCKER:
        return None
    from airloom.flows.release import release_image

    try:
        return release_image(hooks, release)
    except ServiceError:
        return None


def bundle_of(settings: Settings, pipeline: str, version: str) -> Path:
    """The folder of a release on this machine, whether it is there or not."""
    return settings.releases_dir / pipeline / version


def _from_log(hooks: Hooks, prediction_id: str, with_content: bool) -> Recorded | None:
    row = hooks.predictions.get(prediction_id)
    if row is None:
        return None
    stored = hooks.predictions.input(row.input_sha256) if with_content else None
    return Recorded(
        id=row.id,
        pipeline=row.pipeline,
        release=row.release,
        answered_at=row.answered_at,
        latency_ms=row.latency_ms,
        input_sha256=row.input_sha256,
        output=row.output,
        batch_size=row.batch_size,
        batch_index=row.batch_index,
        content=stored.content if stored else None,
        source="log",
    )


def _from_journal(hooks: Hooks, prediction_id: str) -> Recorded | None:
    from airloom.contract.journal import find_entry

    entry = find_entry(journal_root(hooks.settings), prediction_id)
    if entry is None:
        return None
    return Recorded(
        id=entry.id,
        pipeline=entry.pipeline,
        release=entry.release,
        answered_at=entry.answered_at,
        latency_ms=entry.latency_ms,
        input_sha256=entry.input_sha256,
        output=entry.output,
        batch_size=entry.batch_size,
        batch_index=entry.batch_index,
        content=entry.content,
        source="journal",
    )


def _hint(hooks: Hooks, parsed: PredictionId) -> str:
    if not any(_known(hooks, parsed)):
        return f"nothing was ever served as {parsed.pipeline} {parsed.release} here: is it another installation's id?"
    made = parsed.time.strftime("%Y-%m-%d %H:%M:%S UTC")
    return f"by its id it was made at {made}; see the latest ones: airloom predictions {parsed.pipeline}"


def _known(hooks: Hooks, parsed: PredictionId) -> Iterator[bool]:
    yield bundle_of(hooks.settings, parsed.pipeline, parsed.release).is_dir()
    with suppress(UnavailableError):
        yield hooks.predictions.count(parsed.pipeline) > 0
