"""Pin the raw data of a run: which objects, and which bytes of them."""

from __future__ import annotations

from airloom.contract.digest import canonical_json, sha256_bytes
from airloom.contract.plan import SourcePin
from airloom.errors import DataRejectedError
from airloom.hooks.connect import Hooks
from airloom.hooks.object_store import ObjectInfo, split_uri
from airloom.spec.pipeline import Source

MANIFEST_FILE = "manifest.jsonl"


def pin_source(hooks: Hooks, source: Source, run_prefix: str) -> SourcePin:
    """List the raw data as it is now and store the list at `<run_prefix>/manifest.jsonl`.

    Where the bucket keeps versions, the list names them, so that the run reads these bytes even if somebody
    replaces them meanwhile. Two sources with the same keys, ETags and sizes have the same digest.

    Args:
        run_prefix: key prefix in the bucket `airloom`, without a slash at its end.

    Raises:
        DataRejectedError: there is nothing at the source.
    """
    store, settings = hooks.store, hooks.settings
    bucket, prefix = split_uri(source.uri)
    found = sorted(
        (item for item in store.list(bucket, prefix, versions=store.is_versioned(bucket)) if item.key[-1:] != "/"),
        key=lambda item: item.key,
    )
    if not found:
        raise DataRejectedError(
            f"no raw data at {source.uri}: the object store at {store.endpoint_url} has no object with that prefix",
            hint=f"put files into bucket {bucket!r} below {prefix!r}, or correct source.uri in the pipeline's YAML",
        )
    key = f"{run_prefix}/{MANIFEST_FILE}"
    store.put_bytes(settings.bucket_airloom, key, manifest_lines(found), media_type="application/jsonl")
    return SourcePin(
        uri=source.uri,
        manifest=f"s3://{settings.bucket_airloom}/{key}",
        digest=source_digest(found),
        objects=len(found),
        size_bytes=sum(item.size_bytes for item in found),
    )


def manifest_lines(found: list[ObjectInfo]) -> bytes:
    """The manifest: one JSON object a line, in the order given."""
    lines = (
        canonical_json(
            {"key": item.key, "etag": item.etag, "size_bytes": item.size_bytes, "version_id": item.version_id}
        )
        for item in found
    )
    return "".join(f"{line}\n" for line in lines).encode()


def source_digest(found: list[ObjectInfo]) -> str:
    """SHA-256 over (key, etag, size) of each object, sorted by key: what the data is, not when it was written."""
    facts = sorted((item.key, item.etag, item.size_bytes) for item in found)
    return sha256_bytes("".join(canonical_json(fact) + "\n" for fact in facts).encode())
