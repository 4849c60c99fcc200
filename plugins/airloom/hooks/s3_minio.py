"""The little that the `minio` client does: what is asked too rarely to be quick. It is imported when it is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minio import Minio


def connect(endpoint_url: str, access_key: str, secret_key: str, *, region: str, connections: int) -> Minio:
    """A client that tries nothing again: its caller does."""
    import urllib3
    from minio import Minio

    scheme, _, host = endpoint_url.partition("://")
    return Minio(
        host,
        access_key,
        secret_key,
        secure=scheme == "https",
        region=region,
        http_client=urllib3.PoolManager(
            maxsize=connections, retries=False, timeout=urllib3.Timeout(connect=5.0, read=120.0)
        ),
    )


def ensure_bucket(client: Minio, name: str, versioned: bool) -> None:
    """Make a bucket unless it exists, and let it keep versions if wanted."""
    from minio.error import S3Error

    if not client.bucket_exists(name):
        try:
            client.make_bucket(name)
        except S3Error as error:
            if error.code not in {"BucketAlreadyOwnedByYou", "BucketAlreadyExists"}:
                raise
    if versioned and not is_versioned(client, name):
        from minio.versioningconfig import ENABLED, VersioningConfig

        client.set_bucket_versioning(name, VersioningConfig(ENABLED))


def is_versioned(client: Minio, name: str) -> bool:
    """Whether a bucket keeps versions."""
    return bool(client.get_bucket_versioning(name).status == "Enabled")
