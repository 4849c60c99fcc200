"""Tables and engine of the ledger. Imports SQLAlchemy, so `ledger` imports this only when it is used."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    DateTime,
    Dialect,
    Engine,
    Float,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
    make_url,
)
from sqlalchemy.pool import NullPool
from sqlalchemy.schema import CreateTable
from sqlalchemy.types import TypeDecorator

# A busy disk may hold up SQLite's one writer for seconds; a task's end waits no longer than this for its record.
WRITE_TIMEOUT_SECONDS = 15.0


class UtcDateTime(TypeDecorator[datetime]):
    """A moment: stored as UTC, read back as UTC, also where the database keeps no time zone."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value.astimezone(UTC).replace(tzinfo=None) if value is not None else None

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        return value.replace(tzinfo=UTC) if value is not None else None


metadata = MetaData()

tasks = Table(
    "task_outcomes",
    metadata,
    Column("pipeline", String(64), primary_key=True),
    Column("run_id", String(250), primary_key=True),
    Column("task", String(100), primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("state", String(20), nullable=False),
    Column("started_at", UtcDateTime),
    Column("finished_at", UtcDateTime),
    Column("seconds", Float),
    Column("cache", String(10)),
    Column("reason", Text, nullable=False, default=""),
    Column("figures", JSON, nullable=False, default=dict),
    Column("has_figures", Boolean, nullable=False, default=False),
)

runs = Table(
    "run_outcomes",
    metadata,
    Column("pipeline", String(64), primary_key=True),
    Column("run_id", String(250), primary_key=True),
    Column("state", String(20), nullable=False, default="running"),
    Column("verdict", String(20)),
    Column("started_at", UtcDateTime),
    Column("finished_at", UtcDateTime),
)


def make_engine(database: str) -> Engine:
    """An engine for a SQLAlchemy URL whose tables exist; several processes may do this at once."""
    url = make_url(database)
    if url.get_backend_name() == "sqlite":
        if url.database:
            Path(url.database).parent.mkdir(parents=True, exist_ok=True)
        # No pool: the processes that use this fork, and an open SQLite file must not cross a fork.
        engine = create_engine(url, poolclass=NullPool, connect_args={"timeout": WRITE_TIMEOUT_SECONDS})
        event.listen(engine, "connect", _on_sqlite_connect)
    else:
        engine = create_engine(url, pool_pre_ping=True, pool_timeout=WRITE_TIMEOUT_SECONDS)
    with engine.begin() as connection:
        for table in (tasks, runs):
            connection.execute(CreateTable(table, if_not_exists=True))
    return engine


def _on_sqlite_connect(connection: Any, _record: Any) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")
