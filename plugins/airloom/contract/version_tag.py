"""The grammar of version tags: `<pipeline>/CV_<slug>_<short sha>_DV_<UTC time>`.

This is the only place that builds or parses one.
"""

from __future__ import annotations

import re
import unicodedata
from datetime import UTC, datetime, timedelta

from pydantic import Field

from airloom.contract.base import Frozen
from airloom.errors import ContractError

PIPELINE_PATTERN = r"[a-z][a-z0-9]*(?:_[a-z0-9]+)*"
SLUG_MAX_LENGTH = 40
SHORT_SHA_LENGTH = 8
EMPTY_SLUG = "no-message"

_TAG = re.compile(
    rf"(?P<pipeline>{PIPELINE_PATTERN})/CV_(?P<slug>[a-z0-9]+(?:-[a-z0-9]+)*)"
    rf"_(?P<short_sha>[0-9a-f]{{{SHORT_SHA_LENGTH}}})_DV_(?P<time>\d{{8}}T\d{{9}}Z)"
)


def slugify(message: str) -> str:
    """The first line of a commit message as lower-case ASCII words joined by `-`, at most 40 characters.

    Accents are dropped, everything else that is not a letter or digit separates words, and a message
    without any becomes `no-message`.
    """
    first_line = message.strip().split("\n", 1)[0]
    plain = unicodedata.normalize("NFKD", first_line).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
    return slug[:SLUG_MAX_LENGTH].rstrip("-") or EMPTY_SLUG


class VersionTag(Frozen):
    """A version tag, taken apart.

    `time` is UTC with millisecond precision; `short_sha` is the first 8 hex digits of the code commit.
    """

    pipeline: str = Field(pattern=f"^{PIPELINE_PATTERN}$")
    slug: str
    short_sha: str
    time: datetime

    @classmethod
    def make(cls, *, pipeline: str, commit: str, message: str, time: datetime) -> VersionTag:
        """The tag for a code commit with this message and data made at this time."""
        utc = time.astimezone(UTC)
        milliseconds = utc.microsecond // 1000 * 1000
        return cls(
            pipeline=pipeline,
            slug=slugify(message),
            short_sha=commit[:SHORT_SHA_LENGTH],
            time=utc.replace(microsecond=milliseconds),
        )

    @classmethod
    def parse(cls, name: str) -> VersionTag:
        """Take a tag's name apart.

        Raises:
            ContractError: the name does not follow the grammar.
        """
        match = _TAG.fullmatch(name)
        if match is None:
            raise ContractError(
                f"{name!r} is not a version tag",
                hint="expected <pipeline>/CV_<slug>_<8 hex digits>_DV_<YYYYMMDDThhmmssmmmZ>",
            )
        stamp = match["time"]
        try:
            time = datetime.strptime(stamp[:15] + stamp[15:18] + "000", "%Y%m%dT%H%M%S%f").replace(tzinfo=UTC)
        except ValueError:
            raise ContractError(f"{name!r} is not a version tag: {stamp!r} is not a time") from None
        return cls(pipeline=match["pipeline"], slug=match["slug"], short_sha=match["short_sha"], time=time)

    def next(self) -> VersionTag:
        """The same tag one millisecond later: for when another run holds this one."""
        return self.model_copy(update={"time": self.time + timedelta(milliseconds=1)})

    def __str__(self) -> str:
        stamp = self.time.strftime("%Y%m%dT%H%M%S") + f"{self.time.microsecond // 1000:03d}Z"
        return f"{self.pipeline}/CV_{self.slug}_{self.short_sha}_DV_{stamp}"
