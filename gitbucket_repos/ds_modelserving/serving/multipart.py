"""Take the file out of a form, as browsers send it."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from serving.problems import ProblemError, too_large

FIELD = "file"


async def file_of(body: bytes, content_type: str, limit_bytes: int) -> tuple[bytes, str]:
    """The content and the declared type of the field `file`. The body is in memory already, and within its limit.

    Raises:
        ProblemError: the form is malformed, has no such file, or the file is too large.
    """

    async def whole() -> AsyncGenerator[bytes, None]:
        yield body

    parser = MultiPartParser(Headers({"content-type": content_type}), whole(), max_files=1, max_fields=8)
    parser.spool_max_size = len(body) + 1  # never to a file
    try:
        form = await parser.parse()
    except (MultiPartException, ValueError, KeyError) as error:
        reason = error.message if isinstance(error, MultiPartException) else "it is malformed"
        raise ProblemError(
            422, "unusable_form", f"the form cannot be read: {reason}", f"send one file in the field {FIELD!r}"
        ) from None
    try:
        upload = form.get(FIELD)
        if not isinstance(upload, UploadFile):
            raise ProblemError(
                422, "unusable_form", f"the form has no file {FIELD!r}", f"send the picture in the field {FIELD!r}"
            )
        content = await upload.read()
    finally:
        await form.close()
    if len(content) > limit_bytes:
        raise too_large(limit_bytes)
    return content, upload.content_type or ""
