"""Tables of the prediction log: serving writes them, receipts and drift read them."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import sqlalchemy as sa

metadata = sa.MetaData()

predictions = sa.Table(
    "predictions",
    metadata,
    sa.Column("id", sa.String(100), primary_key=True),
    sa.Column("pipeline", sa.String(40), nullable=False),
    sa.Column("release_version", sa.String(32), nullable=False),
    sa.Column("answered_at", sa.Double, nullable=False, doc="seconds since 1970, UTC"),
    sa.Column("latency_ms", sa.Double, nullable=False),
    sa.Column("input_sha256", sa.String(64), nullable=False),
    sa.Column("output", sa.JSON, nullable=False),
    # Numeric libraries may round the last bit differently for batches of another size: a replay needs both.
    sa.Column("batch_size", sa.Integer, nullable=False, default=1, server_default="1"),
    sa.Column("batch_index", sa.Integer, nullable=False, default=0, server_default="0"),
    sa.Index("predictions_by_time", "pipeline", "answered_at"),
)

inputs = sa.Table(
    "prediction_inputs",
    metadata,
    sa.Column("sha256", sa.String(64), primary_key=True),
    sa.Column("content", sa.LargeBinary(length=16 * 1024 * 1024), nullable=False),
    sa.Column("media_type", sa.String(100), nullable=False),
)


def engine_for(url: str) -> sa.Engine:
    """An engine that several processes may share: SQLite gets a write-ahead log and waits for locks."""
    parsed = sa.make_url(url)
    is_sqlite = parsed.get_backend_name() == "sqlite"
    if is_sqlite and parsed.database:
        with suppress(OSError):  # connecting says better what is wrong
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(parsed, pool_pre_ping=not is_sqlite)
    if is_sqlite:

        @sa.event.listens_for(engine, "connect")
        def configure(connection: Any, _: Any) -> None:
            cursor = connection.cursor()
            cursor.execute("PRAGMA busy_timeout=10000")
            cursor.execute("PRAGMA journal_mode=WAL")
            cursor.execute("PRAGMA synchronous=NORMAL")
            cursor.close()

    return engine


def insert_or_ignore(table: sa.Table, dialect: str) -> sa.Insert:
    """An insert that leaves rows alone whose key is there: writing the same rows again changes nothing."""
    if dialect == "sqlite":
        return table.insert().prefix_with("OR IGNORE")
    if dialect in {"mysql", "mariadb"}:
        return table.insert().prefix_with("IGNORE")
    from sqlalchemy.dialects.postgresql import insert

    return insert(table).on_conflict_do_nothing()
