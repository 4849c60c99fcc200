"""Read the objects of a manifest from an S3 store, and make sure that each is the one that was pinned."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from urllib.parse import urlsplit

import urllib3
from minio import Minio
from minio.error import S3Error

from airloom.contract import StageInputError
from preprocessing.source import Entry, read_manifest

_GONE = {"NoSuchKey", "NoSuchVersion", "NoSuchBucket"}
_REFUSED = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"}


class ObjectSource:
    """The objects that a manifest lists.

    Args:
        manifest: JSON lines; see `Entry`.
        source_uri: `s3://bucket/prefix/` that the keys lie under.
        endpoint: address of the store, such as `http://127.0.0.1:9000`. The access key and its secret are
            read from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.
        connections: requests that may be under way at once.
        retries: how often a request is tried again, for about half a minute in all.

    Raises:
        StageInputError: the manifest is unusable, or credentials are missing.
    """

    def __init__(self, manifest: Path, *, source_uri: str, endpoint: str, connections: int, retries: int = 6) -> None:
        uri, address = urlsplit(source_uri), urlsplit(endpoint)
        self.entries = read_manifest(manifest)
        self.prefix = uri.path.lstrip("/")
        self._bucket = uri.netloc
        self._endpoint = endpoint
        try:
            self._user = os.environ["AWS_ACCESS_KEY_ID"]
            secret = os.environ["AWS_SECRET_ACCESS_KEY"]
        except KeyError as error:
            raise StageInputError(f"{error.args[0]} is not set: the stage needs it to read {source_uri}") from None
        self._store = Minio(
            address.netloc,
            access_key=self._user,
            secret_key=secret,
            secure=address.scheme == "https",
            # Named, so that the client need not ask the store for it first.
            region=os.environ.get("AWS_REGION", "us-east-1"),
            http_client=urllib3.PoolManager(
                maxsize=connections,
                timeout=urllib3.Timeout(connect=5, read=60),
                retries=urllib3.Retry(total=retries, backoff_factor=0.5, status_forcelist=[500, 502, 503, 504]),
            ),
        )

    def read(self, entry: Entry) -> bytes:
        """Read one object whole.

        Raises:
            StageInputError: it is gone, has changed since the run was pinned, or may not be read.
            ConnectionError: the store does not answer, or broke off; trying again may help.
        """
        try:
            answer = self._store.get_object(self._bucket, entry.key, version_id=entry.version_id)
            try:
                content = bytes(answer.read())
                etag = answer.headers.get("ETag", "").strip('"')
            finally:
                answer.close()
                answer.release_conn()
        except S3Error as error:
            raise self._explained(entry, error) from error
        except urllib3.exceptions.HTTPError as error:
            raise ConnectionError(f"the object store at {self._endpoint} does not answer: {error}") from error
        self._verify(entry, content, etag)
        return content

    def _verify(self, entry: Entry, content: bytes, etag: str) -> None:
        pinned = entry.etag.strip('"')
        # An ETag with a dash belongs to a multipart upload and is no MD5 of the content.
        found = hashlib.md5(content, usedforsecurity=False).hexdigest() if pinned and "-" not in pinned else etag
        if len(content) != entry.size_bytes or (pinned and found != pinned):
            raise StageInputError(
                f"s3://{self._bucket}/{entry.key} changed after the run was pinned: expected {entry.size_bytes} bytes "
                f"with ETag {pinned}, found {len(content)} bytes with {found}; start a new run"
            )

    def _explained(self, entry: Entry, error: S3Error) -> Exception:
        name = f"s3://{self._bucket}/{entry.key}"
        if error.code in _GONE:
            version = f" (version {entry.version_id})" if entry.version_id else ""
            return StageInputError(f"{name}{version} was there when the run was pinned and is gone; start a new run")
        if error.code in _REFUSED:
            return StageInputError(
                f"the object store at {self._endpoint} refused {name} to the access key {self._user!r}: {error.code}; "
                "check the key's secret and rights"
            )
        return ConnectionError(f"the object store at {self._endpoint} failed on {name}: {error.code}: {error.message}")
