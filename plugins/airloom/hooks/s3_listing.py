"""Pages of an S3 listing."""

from __future__ import annotations

from dataclasses import dataclass
from xml.etree import ElementTree

from airloom.errors import ServiceError


@dataclass(frozen=True)
class ObjectInfo:
    """One object of a listing. `version_id` is None where the bucket keeps no versions."""

    key: str
    etag: str
    size_bytes: int
    version_id: str | None = None


@dataclass(frozen=True)
class Page:
    """Some objects, and the query that asks for those after them; empty at the end."""

    objects: list[ObjectInfo]
    next: dict[str, str]


# In an answer to list-type=2 and to versions: what to repeat from one page to get the next.
_MARKERS = {
    "NextContinuationToken": "continuation-token",
    "NextKeyMarker": "key-marker",
    "NextVersionIdMarker": "version-id-marker",
}


def parse_page(content: bytes) -> Page:
    """Read one page, without folders, delete markers and versions that are not the newest.

    Raises:
        ServiceError: it is no listing.
    """
    try:
        # The store is ours or the user's own, and the parser resolves nothing from outside.
        root = ElementTree.fromstring(content)  # noqa: S314
    except ElementTree.ParseError as error:
        raise ServiceError(
            f"the object store answered with something else than a listing: {content[:100]!r}"
        ) from error
    space = root.tag.partition("}")[0] + "}" if root.tag.startswith("{") else ""
    entries = {f"{space}Contents", f"{space}Version"}
    key, etag, size, newest, version_id = (space + name for name in ("Key", "ETag", "Size", "IsLatest", "VersionId"))
    objects, truncated, markers = [], False, {}
    for element in root:
        if element.tag in entries:
            # One pass over the children: looking for each by name takes three times as long.
            fields = {child.tag: child.text or "" for child in element}
            if fields.get(newest) != "false" and not fields[key].endswith("/"):
                version = fields.get(version_id, "null")
                objects.append(
                    ObjectInfo(
                        fields[key],
                        fields.get(etag, "").strip('"'),
                        int(fields.get(size) or 0),
                        None if version in {"", "null"} else version,
                    )
                )
            continue
        name = element.tag.removeprefix(space)
        if name == "IsTruncated":
            truncated = element.text == "true"
        elif name in _MARKERS:
            markers[_MARKERS[name]] = element.text or ""
    return Page(objects, markers if truncated else {})
