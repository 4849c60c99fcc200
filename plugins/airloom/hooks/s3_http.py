"""Signed S3 requests for objects, over kept connections.

The `minio` client reads a whole body into memory, offers no conditional writes, and spends more time on a small
object than the store does. So objects and listings go this way; buckets and uploads in parts go through `minio`.
"""

from __future__ import annotations

import hashlib
import hmac
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING
from urllib.parse import quote, urlsplit

from airloom.errors import ServiceError
from airloom.hooks.s3_quick import QuickPut

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse, HTTPConnectionPool

EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
CONNECT_SECONDS = 5.0
READ_SECONDS = 120.0
QUICK_MAX_BYTES = 512 * 1024  # files up to here are read into memory and written the quick way


@dataclass(frozen=True)
class Response:
    """An answer whose body has been read, unless it was asked for as a stream."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    stream: BaseHTTPResponse | None = None

    @property
    def etag(self) -> str:
        return self.headers.get("ETag", "").strip('"')

    @property
    def age_seconds(self) -> float:
        """How long before this answer the object was written, both by the store's clock, which counts seconds.

        Raises:
            ServiceError: the store did not say.
        """
        try:
            asked, written = (parsedate_to_datetime(self.headers[name]) for name in ("Date", "Last-Modified"))
        except (KeyError, ValueError) as error:
            raise ServiceError(f"the object store gave no time: {error}") from error
        return (asked - written).total_seconds()


class Signer:
    """AWS Signature Version 4 for one key.

    https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html
    """

    def __init__(self, *, access_key: str, secret_key: str, region: str, host: str) -> None:
        self._access_key = access_key
        self._secret_key = secret_key
        self._region = region
        self._host = host
        self._key_of_day: tuple[str, bytes] = ("", b"")

    def sign(self, method: str, path: str, query: str, headers: Mapping[str, str], body_sha256: str) -> dict[str, str]:
        """All headers of a request. `path` and `query` are encoded already, `query` is sorted."""
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        signed = {name.lower(): value for name, value in headers.items()}
        signed |= {"host": self._host, "x-amz-content-sha256": body_sha256, "x-amz-date": stamp}
        names = sorted(signed)
        listed = ";".join(names)
        lines = "".join(f"{name}:{signed[name]}\n" for name in names)
        request = f"{method}\n{path}\n{query}\n{lines}\n{listed}\n{body_sha256}"
        day = stamp[:8]
        scope = f"{day}/{self._region}/s3/aws4_request"
        digest = hashlib.sha256(request.encode()).hexdigest()
        text = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{digest}"
        signature = hmac.new(self._day_key(day), text.encode(), "sha256").hexdigest()
        signed["authorization"] = (
            f"AWS4-HMAC-SHA256 Credential={self._access_key}/{scope}, SignedHeaders={listed}, Signature={signature}"
        )
        return signed

    def _day_key(self, day: str) -> bytes:
        known, key = self._key_of_day
        if known != day:
            key = f"AWS4{self._secret_key}".encode()
            for part in (day, self._region, "s3", "aws4_request"):
                key = hmac.new(key, part.encode(), "sha256").digest()
            self._key_of_day = (day, key)
        return key


class S3Http:
    """Sends signed requests; as many at a time as `connections`."""

    def __init__(self, *, endpoint_url: str, access_key: str, secret_key: str, region: str, connections: int) -> None:
        import urllib3

        parts = urlsplit(endpoint_url)
        self._signer = Signer(access_key=access_key, secret_key=secret_key, region=region, host=parts.netloc)
        self._endpoint_url = endpoint_url
        self._connections = connections
        self._timeout = urllib3.Timeout(connect=CONNECT_SECONDS, read=READ_SECONDS)
        self._quick: QuickPut | None = None
        if parts.scheme == "http" and parts.hostname:
            self._quick = QuickPut(
                parts.hostname, parts.port or 80, connect_seconds=CONNECT_SECONDS, read_seconds=READ_SECONDS
            )
        self._lock = threading.Lock()
        self._pool: HTTPConnectionPool | None = None

    def request(
        self,
        method: str,
        bucket: str,
        key: str,
        *,
        body: bytes | Path | None = None,
        headers: Mapping[str, str] | None = None,
        query: str = "",
        stream: bool = False,
    ) -> Response:
        """Send one request, once.

        Args:
            body: bytes, or a file that is sent as it is read.
            stream: leave the body of a good answer to be read from `Response.stream`, which must be closed.

        Raises:
            urllib3.exceptions.HTTPError: no answer, or not a whole one.
        """
        path = f"/{bucket}/{quote(key, safe='/-_.~')}"  # the bucket itself for an empty key
        if isinstance(body, Path):
            with body.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                size = file.tell()
                file.seek(0)
                signed = self._signer.sign(method, path, query, headers or {}, digest)
                return self._send(method, path, query, signed, file, size, stream=stream)
        digest = hashlib.sha256(body).hexdigest() if body else EMPTY_SHA256
        length = len(body) if body is not None else None
        signed = self._signer.sign(method, path, query, headers or {}, digest)
        return self._send(method, path, query, signed, body, length, stream=stream)

    def put_small(self, bucket: str, key: str, content: bytes) -> str | None:
        """Write a small object without asking for anything else, the quick way.

        Returns:
            Its ETag; None when it may or may not have been written: use `request` then, which says why.
        """
        if self._quick is None:
            return None
        path = f"/{bucket}/{quote(key, safe='/-_.~')}"
        return self._quick.put(
            path, self._signer.sign("PUT", path, "", {}, hashlib.sha256(content).hexdigest()), content
        )

    def _send(  # noqa: PLR0917 - private, and only called above
        self,
        method: str,
        path: str,
        query: str,
        signed: dict[str, str],
        body: bytes | IO[bytes] | None,
        size: int | None,
        *,
        stream: bool,
    ) -> Response:
        if size is not None:
            signed["content-length"] = str(size)
        target = f"{path}?{query}" if query else path
        answer = self._connection_pool().urlopen(
            method,
            target,
            body=body,
            headers=signed,
            retries=False,
            preload_content=False,
            timeout=self._timeout,
        )
        if stream and answer.status < 300:
            return Response(answer.status, answer.headers, b"", answer)
        try:
            content = answer.read()
        finally:
            answer.release_conn()
        return Response(answer.status, answer.headers, content)

    def _connection_pool(self) -> HTTPConnectionPool:
        import urllib3

        if self._pool is None:
            with self._lock:
                if self._pool is None:
                    self._pool = urllib3.connection_from_url(self._endpoint_url, maxsize=self._connections, block=False)
        return self._pool
