"""The ledger of task outcomes and runs: what the metrics and run pages are made of.

Writers are short-lived task processes on one machine or several, so every write is one small transaction
that replaces its own row: repeating it changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from types import ModuleType
from typing import TYPE_CHECKING, Any

from airloom.errors import UnavailableError
from airloom.settings import Settings

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine, Table

# Upper bounds of the buckets in which durations are counted.
DURATION_BUCKETS_SECONDS = (0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)


@dataclass(frozen=True, kw_only=True)
class TaskOutcome:
    """One try of one task.

    Attributes:
        state: `running`, `success`, `failed`, `up_for_retry` or `skipped`.
        cache: of a stage: `hit`, `miss` or `forced`.
        reason: for people: why the result was reused, or why the task failed.
        values: figures by name: metrics, `rows`, `size_bytes` …
    """

    pipeline: str
    run_id: str
    task: str
    attempt: int
    state: str
    started_at: datetime | None = None
    finished_at: datetime | None = None
    seconds: float | None = None
    cache: str | None = None
    reason: str = ""
    values: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RunOutcome:
    """One run; `verdict` is the gate's, once it has decided."""

    pipeline: str
    run_id: str
    state: str
    verdict: str | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class DurationSummary:
    """How long a task took, over all its ended tries: `buckets` are the counts up to each bound."""

    pipeline: str
    task: str
    state: str
    count: int
    seconds: float
    buckets: tuple[int, ...]


class Ledger:
    """Tables in any database that SQLAlchemy knows; made when they are first needed."""

    def __init__(self, url: str) -> None:
        self._url = url

    @classmethod
    def from_settings(cls, settings: Settings) -> Ledger:
        """The ledger of this installation."""
        return cls(settings.database)

    # Writing

    def record_task(self, outcome: TaskOutcome) -> None:
        """Write one try; a later write of the same try replaces it.

        Raises:
            UnavailableError: the database cannot be written now.
        """
        key = {"pipeline": outcome.pipeline, "run_id": outcome.run_id, "task": outcome.task, "attempt": outcome.attempt}
        values = {
            "state": outcome.state,
            "started_at": outcome.started_at,
            "finished_at": outcome.finished_at,
            "seconds": outcome.seconds,
            "cache": outcome.cache,
            "reason": outcome.reason[:2000],
            "figures": dict(outcome.values),
            "has_figures": bool(outcome.values),
        }
        self._replace(self._tables.tasks, key, values)

    def record_run(
        self,
        pipeline: str,
        run_id: str,
        *,
        state: str | None = None,
        verdict: str | None = None,
        started_at: datetime | None = None,
        finished_at: datetime | None = None,
    ) -> None:
        """Write what is known of a run; what is not given keeps the value it had.

        That it is running, written late, does not undo that it has ended since it began.

        Raises:
            UnavailableError: the database cannot be written now.
        """
        given = {"state": state, "verdict": verdict, "started_at": started_at, "finished_at": finished_at}
        values = {name: value for name, value in given.items() if value is not None}
        key = {"pipeline": pipeline, "run_id": run_id}
        if state == "running" and started_at is not None:
            self._replace(self._tables.runs, key, values, unless=self._tables.runs.c.finished_at >= started_at)
        else:
            self._replace(self._tables.runs, key, values)

    # Reading

    def tasks(self, pipeline: str, run_id: str) -> list[TaskOutcome]:
        """All tries of a run's tasks, in the order in which they started."""
        from sqlalchemy import select

        table = self._tables.tasks
        query = select(table).where(table.c.pipeline == pipeline, table.c.run_id == run_id)
        with self._connection() as connection:
            rows = connection.execute(query.order_by(table.c.started_at, table.c.attempt)).mappings().all()
        return [_task_of(row) for row in rows]

    def run(self, pipeline: str, run_id: str) -> RunOutcome | None:
        """One run, or `None` if the ledger has not heard of it."""
        from sqlalchemy import select

        table = self._tables.runs
        query = select(table).where(table.c.pipeline == pipeline, table.c.run_id == run_id)
        with self._connection() as connection:
            row = connection.execute(query).mappings().first()
        return RunOutcome(**row) if row else None

    def durations(self) -> list[DurationSummary]:
        """Durations of ended tries by pipeline, task and state."""
        from sqlalchemy import Integer, func, select

        table = self._tables.tasks
        bounds = [func.sum((table.c.seconds <= bound).cast(Integer)) for bound in DURATION_BUCKETS_SECONDS]
        query = (
            select(table.c.pipeline, table.c.task, table.c.state, func.count(), func.sum(table.c.seconds), *bounds)
            .where(table.c.seconds.is_not(None))
            .group_by(table.c.pipeline, table.c.task, table.c.state)
        )
        with self._connection() as connection:
            rows = connection.execute(query).all()
        return [
            DurationSummary(pipeline=p, task=t, state=s, count=n, seconds=total, buckets=tuple(int(b) for b in buckets))
            for p, t, s, n, total, *buckets in rows
        ]

    def task_counts(self) -> list[tuple[str, str, str, int]]:
        """(pipeline, task, state, ended tries): these only grow."""
        columns = self._tables.tasks.c
        return self._counts(columns.pipeline, columns.task, columns.state, where=columns.state != "running")

    def cache_counts(self) -> list[tuple[str, str, str, int]]:
        """(pipeline, stage, `hit` | `miss` | `forced`, times)."""
        columns = self._tables.tasks.c
        return self._counts(columns.pipeline, columns.task, columns.cache, where=columns.cache.is_not(None))

    def run_counts(self) -> list[tuple[str, str, int]]:
        """(pipeline, state, runs), running ones too."""
        columns = self._tables.runs.c
        return self._counts(columns.pipeline, columns.state)

    def verdict_counts(self) -> list[tuple[str, str, int]]:
        """(pipeline, verdict, runs)."""
        columns = self._tables.runs.c
        return self._counts(columns.pipeline, columns.verdict, where=columns.verdict.is_not(None))

    def last_ends(self) -> dict[tuple[str, str], datetime]:
        """(pipeline, state) -> when a run last ended so."""
        from sqlalchemy import func, select

        table = self._tables.runs
        query = select(table.c.pipeline, table.c.state, func.max(table.c.finished_at)).where(table.c.state != "running")
        with self._connection() as connection:
            rows = connection.execute(query.group_by(table.c.pipeline, table.c.state)).all()
        return {(pipeline, state): at for pipeline, state, at in rows if at is not None}

    def oldest_running(self) -> dict[str, datetime]:
        """pipeline -> when the first of its runs that still run began."""
        from sqlalchemy import func, select

        table = self._tables.runs
        query = select(table.c.pipeline, func.min(table.c.started_at)).where(table.c.state == "running")
        with self._connection() as connection:
            rows = connection.execute(query.group_by(table.c.pipeline)).all()
        return {pipeline: at for pipeline, at in rows if at is not None}

    def latest_runs(self) -> list[RunOutcome]:
        """The run of each pipeline that began last."""
        from sqlalchemy import func, select

        table = self._tables.runs
        latest = select(table.c.pipeline, func.max(table.c.started_at).label("at")).group_by(table.c.pipeline)
        newest = latest.subquery()
        query = select(table).join(
            newest, (table.c.pipeline == newest.c.pipeline) & (table.c.started_at == newest.c.at)
        )
        with self._connection() as connection:
            rows = connection.execute(query.order_by(table.c.run_id)).mappings().all()
        return list({row["pipeline"]: RunOutcome(**row) for row in rows}.values())

    def rejections_in_a_row(self) -> dict[str, int]:
        """pipeline -> candidates that the gate has rejected since it last promoted one."""
        from sqlalchemy import Integer, func, or_, select

        table = self._tables.runs
        promoted = (
            select(table.c.pipeline, func.max(table.c.started_at).label("at"))
            .where(table.c.verdict == "promoted")
            .group_by(table.c.pipeline)
            .subquery()
        )
        later = or_(promoted.c.at.is_(None), table.c.started_at > promoted.c.at)
        query = (
            select(table.c.pipeline, func.sum(((table.c.verdict == "rejected") & later).cast(Integer())))
            .outerjoin(promoted, table.c.pipeline == promoted.c.pipeline)
            .where(table.c.verdict.is_not(None))
            .group_by(table.c.pipeline)
        )
        with self._connection() as connection:
            return {pipeline: int(count) for pipeline, count in connection.execute(query).all()}

    def latest_values(self) -> list[TaskOutcome]:
        """The latest successful try of each task that has figures."""
        from sqlalchemy import func, select

        table = self._tables.tasks
        latest = (
            select(table.c.pipeline, table.c.task, func.max(table.c.finished_at).label("at"))
            .where(table.c.state == "success", table.c.has_figures)
            .group_by(table.c.pipeline, table.c.task)
            .subquery()
        )
        query = select(table).join(
            latest,
            (table.c.pipeline == latest.c.pipeline)
            & (table.c.task == latest.c.task)
            & (table.c.finished_at == latest.c.at),
        )
        with self._connection() as connection:
            return [_task_of(row) for row in connection.execute(query).mappings().all()]

    # The database

    def _counts(self, *columns: Any, where: Any = None) -> list[Any]:
        from sqlalchemy import func, select

        query = select(*columns, func.count()).group_by(*columns).order_by(*columns)
        with self._connection() as connection:
            rows = connection.execute(query if where is None else query.where(where)).all()
        return [tuple(row) for row in rows]

    def _replace(self, table: Table, key: Mapping[str, Any], values: Mapping[str, Any], unless: Any = None) -> None:
        """Insert or update a row; one for which `unless` holds stays as it is."""
        from sqlalchemy import select
        from sqlalchemy.exc import IntegrityError

        match = [table.c[name] == value for name, value in key.items()]
        for last in (False, True):
            try:
                with self._connection() as connection:
                    if unless is not None and connection.execute(select(1).where(*match, unless)).first():
                        return
                    if not connection.execute(table.update().where(*match).values(**key, **values)).rowcount:
                        connection.execute(table.insert().values(**key, **values))
                return
            except IntegrityError:  # another process has inserted it meanwhile
                if last:
                    raise

    @contextmanager
    def _connection(self) -> Iterator[Connection]:
        from sqlalchemy.exc import IntegrityError, SQLAlchemyError

        try:
            with self._engine.begin() as connection:
                yield connection
        except IntegrityError:
            raise
        except (SQLAlchemyError, OSError) as error:
            raise UnavailableError(
                f"the ledger cannot be used now: {error}", hint="see AIRLOOM_DATABASE_URL"
            ) from error

    @property
    def _tables(self) -> ModuleType:
        from airloom.hooks import ledger_tables

        return ledger_tables

    @cached_property
    def _engine(self) -> Engine:
        engine: Engine = self._tables.make_engine(self._url)
        return engine


def _task_of(row: Mapping[Any, Any]) -> TaskOutcome:
    kept = {name: value for name, value in row.items() if name not in {"figures", "has_figures"}}
    return TaskOutcome(**kept, values=row["figures"] or {})
