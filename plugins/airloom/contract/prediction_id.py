"""The grammar of prediction ids: `<pipeline>-<release>-<26 characters that sort by time>`.

An id alone names its release. This is the only place that builds or parses one.
"""

from __future__ import annotations

import base64
import os
import re
import time
from datetime import UTC, datetime

from pydantic import Field

from airloom.contract.base import Frozen
from airloom.contract.version_tag import PIPELINE_PATTERN
from airloom.errors import NotFoundError

_ID = re.compile(rf"(?P<pipeline>{PIPELINE_PATTERN})-(?P<release>\d+\.\d+\.\d+)-(?P<unique>[0-9a-v]{{26}})")
_TIME_BYTES = 6
_RANDOM_BYTES = 10


def new_unique() -> str:
    """26 characters: the time in milliseconds, then 80 random bits, in an alphabet that keeps their order."""
    stamp = (time.time_ns() // 1_000_000).to_bytes(_TIME_BYTES, "big")
    return base64.b32hexencode(stamp + os.urandom(_RANDOM_BYTES))[:26].decode().lower()


class PredictionId(Frozen):
    """A prediction's id, taken apart."""

    pipeline: str = Field(pattern=f"^{PIPELINE_PATTERN}$")
    release: str = Field(pattern=r"^\d+\.\d+\.\d+$")
    unique: str = Field(pattern=r"^[0-9a-v]{26}$")

    @classmethod
    def parse(cls, text: str) -> PredictionId:
        """Take an id apart.

        Raises:
            NotFoundError: the text is no prediction id; the hint shows what one looks like.
        """
        match = _ID.fullmatch(text.strip())
        if match is None:
            shown = text if len(text) <= 100 else f"{text[:100]}…"
            raise NotFoundError(
                f"{shown!r} is not a prediction id",
                hint="one looks like digits-1.0.3-068d5u3k1l6bg9vq2m0h4n7c8e: it is the `id` of an answer of /predict",
            )
        return cls(pipeline=match["pipeline"], release=match["release"], unique=match["unique"])

    @property
    def time(self) -> datetime:
        """When the prediction was made, to the millisecond."""
        padded = f"{self.unique.upper()}======"
        milliseconds = int.from_bytes(base64.b32hexdecode(padded)[:_TIME_BYTES], "big")
        return datetime.fromtimestamp(milliseconds / 1000, tz=UTC)

    def __str__(self) -> str:
        return f"{self.pipeline}-{self.release}-{self.unique}"
