"""Which type of file a body is, told by its first bytes rather than by what its sender says."""

from __future__ import annotations

from serving.problems import ProblemError, unsupported, unusable

GENERIC = "application/octet-stream"
# Types that say nothing of a body: the second is what curl sends with --data-binary unless told otherwise.
_SILENT = frozenset({"", GENERIC, "application/x-www-form-urlencoded"})

_SIGNATURES = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF87a", "image/gif"),
    (b"GIF89a", "image/gif"),
    (b"BM", "image/bmp"),
    (b"II*\x00", "image/tiff"),
    (b"MM\x00*", "image/tiff"),
    (b"%PDF-", "application/pdf"),
    (b"PK\x03\x04", "application/zip"),
)
_ALIASES = {"image/jpg": "image/jpeg", "image/pjpeg": "image/jpeg", "image/x-png": "image/png"}
_SNIFFED = {media_type for _, media_type in _SIGNATURES} | {"image/webp"}


def sniff(content: bytes) -> str | None:
    """The media type that the first bytes stand for, or `None`."""
    for signature, media_type in _SIGNATURES:
        if content.startswith(signature):
            return media_type
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "image/webp"
    return None


def plain(content_type: str) -> str:
    """A Content-Type header without its parameters, in lower case, aliases resolved."""
    name = content_type.partition(";")[0].strip().lower()
    return _ALIASES.get(name, name)


def media_type_of(content: bytes, declared: str, accepted: list[str]) -> str:
    """The type that a body is to be decoded as.

    A model that states no types takes whatever its `decode` takes.

    Raises:
        ProblemError: the body is empty, or it is or is said to be of a type that the model does not take.
    """
    if not content:
        raise unusable("the body is empty")
    named = declared not in _SILENT
    if not accepted:
        return declared if named else GENERIC
    if named and declared not in accepted:
        raise unsupported(declared if len(declared) <= 100 else f"{declared[:100]}…", accepted)
    found = sniff(content)
    if found is not None and found in accepted:
        return found
    unrecognisable = [name for name in accepted if name not in _SNIFFED]
    if found is None and unrecognisable:
        if declared in unrecognisable:
            return declared
        if not named and len(unrecognisable) == 1:
            return unrecognisable[0]
    if found is None and named:
        raise _mislabelled(declared)
    raise unsupported(found or "this content", accepted)


def _mislabelled(declared: str) -> ProblemError:
    return unusable(f"the body is said to be {declared}, but its first bytes are not")
