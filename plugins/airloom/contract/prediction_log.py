"""Tables of the prediction log: serving writes them, receipts and drift read them."""

from __future__ import annotations

import sqlalchemy as sa

metadata = sa.MetaData()

predictions = sa.Table(
    "predictions",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("pipeline", sa.String(40), nullable=False),
    sa.Column("release_version", sa.String(32), nullable=False),
    sa.Column("answered_at", sa.Float, nullable=False, doc="seconds since 1970, UTC"),
    sa.Column("latency_ms", sa.Float, nullable=False),
    sa.Column("input_sha256", sa.String(64), nullable=False),
    sa.Column("output", sa.JSON, nullable=False),
    sa.Index("predictions_by_time", "pipeline", "answered_at"),
)

inputs = sa.Table(
    "prediction_inputs",
    metadata,
    sa.Column("sha256", sa.String(64), primary_key=True),
    sa.Column("content", sa.LargeBinary(length=16 * 1024 * 1024), nullable=False),
    sa.Column("media_type", sa.String(100), nullable=False),
)
