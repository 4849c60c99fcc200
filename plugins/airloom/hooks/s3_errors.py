"""Turns what an S3 server answers into Airloom's errors."""

from __future__ import annotations

import re
from collections.abc import Mapping

from airloom.errors import (
    AirloomError,
    AuthError,
    ConflictError,
    NotFoundError,
    ServiceError,
    StorageFullError,
    UnavailableError,
)

_BAD_KEY = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "RequestTimeTooSkewed", "ExpiredToken", "InvalidToken"}
_FULL = {"XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "QuotaExceeded", "InsufficientStorage"}
_TEMPORARY_STATUS = {408, 429, 500, 502, 503, 504}
# HEAD has no body to say more.
_CODE_OF_STATUS: Mapping[int, str] = {403: "AccessDenied", 404: "NoSuchKey", 412: "PreconditionFailed"}

FULL_HINT = "free some room (`airloom gc`, or delete what nobody needs), or raise AIRLOOM_S3_QUOTA_MIB, and run again"


def code_and_message(status: int, body: bytes) -> tuple[str, str]:
    """S3's error code and message from an answer's XML, or what the status alone says."""
    text = body.decode(errors="replace")
    code = re.search(r"<Code>([^<]*)</Code>", text)
    message = re.search(r"<Message>([^<]*)</Message>", text)
    return (
        code[1] if code else _CODE_OF_STATUS.get(status, f"HTTP {status}"),
        message[1] if message else text.strip()[:200],
    )


def error_of(  # noqa: PLR0911 - a table of cases
    *, status: int, code: str, message: str, what: str, user: str, endpoint_url: str
) -> AirloomError:
    """The error for an answer.

    Args:
        what: the object or bucket, as `s3://…`.
        user: name of the access key.
    """
    if code in _BAD_KEY:
        return AuthError(
            f"the object store at {endpoint_url} refused the access key {user!r}: {code}: {message}",
            hint=f"the secret s3_{user}_secret differs from the store's; restart the store after changing it",
        )
    if status == 403:
        return AuthError(
            f"the access key {user!r} may not do this with {what} (object store {endpoint_url}: {code})",
            hint="the bucket may be missing, the key wrong, or the bucket another key's",
        )
    if code == "NoSuchBucket":
        bucket = what.removeprefix("s3://").split("/", 1)[0]
        return NotFoundError(
            f"the object store at {endpoint_url} has no bucket {bucket!r}",
            hint="starting the platform makes the buckets: airloom up --embedded",
        )
    if status == 404:
        return NotFoundError(f"{what} does not exist in the object store at {endpoint_url}")
    if status == 412 or code == "PreconditionFailed":
        return ConflictError(f"{what} exists already")
    if status == 507 or code in _FULL:
        return StorageFullError(f"the object store at {endpoint_url} is full: {what} was not written", hint=FULL_HINT)
    if status in _TEMPORARY_STATUS:
        return UnavailableError(
            f"the object store at {endpoint_url} failed on {what}: {code}: {message}",
            hint="it may be starting, or its disk may be full; its log says more",
        )
    return ServiceError(f"the object store at {endpoint_url} refused {what}: {status} {code}: {message}")


def unreachable(endpoint_url: str, error: BaseException) -> UnavailableError:
    """The error for no answer, or half of one."""
    reason = str(getattr(error, "reason", None) or error).rsplit(": ", 1)[-1]
    return UnavailableError(
        f"the object store at {endpoint_url} does not answer: {type(error).__name__}: {reason}",
        hint="is the platform running? airloom status",
    )
