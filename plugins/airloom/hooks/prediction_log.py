"""The prediction log: what served models answered, and to which input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from airloom.errors import UnavailableError
from airloom.settings import Settings

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine, Row


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One answered prediction.

    Attributes:
        answered_at: seconds since 1970, UTC.
        batch_size / batch_index: of the batch that the model saw, and this one's place in it.
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


@dataclass(frozen=True, kw_only=True)
class PredictionInput:
    """The bytes that a prediction was made from."""

    sha256: str
    content: bytes
    media_type: str


class PredictionLog:
    """Reads the tables of `airloom.contract.prediction_log`; serving writes them.

    Args:
        url: SQLAlchemy URL of the database.
    """

    def __init__(self, url: str) -> None:
        self._url = url

    @classmethod
    def from_settings(cls, settings: Settings) -> PredictionLog:
        """The log of this installation."""
        return cls(settings.database)

    def create_tables(self) -> None:
        """Create the tables that are missing."""
        from airloom.contract.prediction_log import metadata

        with self._reached():
            metadata.create_all(self._engine)

    def get(self, prediction_id: str) -> Prediction | None:
        """The prediction with this id, or `None`."""
        from airloom.contract.prediction_log import predictions

        with self._connected() as connection:
            row = connection.execute(predictions.select().where(predictions.c.id == prediction_id)).one_or_none()
        return _prediction(row) if row is not None else None

    def input(self, sha256: str) -> PredictionInput | None:
        """The input with this digest, or `None`."""
        from airloom.contract.prediction_log import inputs

        with self._connected() as connection:
            row = connection.execute(inputs.select().where(inputs.c.sha256 == sha256)).one_or_none()
        return PredictionInput(sha256=row.sha256, content=row.content, media_type=row.media_type) if row else None

    def recent(self, pipeline: str, n: int = 20) -> list[Prediction]:
        """The last `n` predictions of a pipeline, newest first."""
        from airloom.contract.prediction_log import predictions

        query = (
            predictions.select()
            .where(predictions.c.pipeline == pipeline)
            .order_by(predictions.c.answered_at.desc(), predictions.c.id.desc())
            .limit(n)
        )
        with self._connected() as connection:
            return [_prediction(row) for row in connection.execute(query)]

    def count(self, pipeline: str) -> int:
        """How many predictions of a pipeline the log holds."""
        import sqlalchemy as sa

        from airloom.contract.prediction_log import predictions

        query = sa.select(sa.func.count()).select_from(predictions).where(predictions.c.pipeline == pipeline)
        with self._connected() as connection:
            return int(connection.execute(query).scalar_one())

    @cached_property
    def _engine(self) -> Engine:
        from airloom.contract.prediction_log import engine_for

        return engine_for(self._url)

    @cached_property
    def _engine_with_tables(self) -> Engine:
        self.create_tables()
        return self._engine

    @contextmanager
    def _connected(self) -> Iterator[Connection]:
        with self._reached(), self._engine_with_tables.connect() as connection:
            yield connection

    @contextmanager
    def _reached(self) -> Iterator[None]:
        import sqlalchemy as sa

        try:
            yield
        except sa.exc.DBAPIError as error:
            reason = str(error.orig).splitlines()[0]
            raise UnavailableError(
                f"the prediction log at {sa.make_url(self._url).render_as_string(hide_password=True)} "
                f"did not answer: {reason}",
                hint="see: airloom status",
            ) from error


def _prediction(row: Row[Any]) -> Prediction:
    return Prediction(
        id=row.id,
        pipeline=row.pipeline,
        release=row.release_version,
        answered_at=row.answered_at,
        latency_ms=row.latency_ms,
        input_sha256=row.input_sha256,
        output=row.output,
        batch_size=row.batch_size,
        batch_index=row.batch_index,
    )
