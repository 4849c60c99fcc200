"""The object store: any server that speaks S3."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from airloom.contract.digest import canonical_json
from airloom.errors import AirloomError, ConfigError, ConflictError, ContractError, NotFoundError, StorageFullError
from airloom.hooks import s3_minio
from airloom.hooks.s3_errors import FULL_HINT, code_and_message, error_of, unreachable
from airloom.hooks.s3_http import QUICK_MAX_BYTES, Response, S3Http
from airloom.hooks.s3_listing import ObjectInfo, Page, parse_page
from airloom.hooks.s3_room import no_room
from airloom.settings import Settings

if TYPE_CHECKING:
    from minio import Minio

T = TypeVar("T")

DEFAULT_RETRY_SECONDS = 10.0
THREADS = 16
SINGLE_PUT_MAX_BYTES = 64 * 2**20  # larger files go in parts
PART_BYTES = 32 * 2**20
__all__ = ["ObjectInfo", "ObjectStore", "split_uri"]


def split_uri(uri: str) -> tuple[str, str]:
    """`s3://bucket/key` → (bucket, key).

    Raises:
        ConfigError: it is no such address.
    """
    scheme, _, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    if scheme != "s3" or not bucket:
        raise ConfigError(f"{uri!r} is not an address in the object store", hint="expected s3://<bucket>/<key>")
    return bucket, key


class ObjectStore:
    """Reads and writes objects, many at a time. Safe to share between threads.

    Every method raises AuthError (the key was refused), NotFoundError (no such bucket or object), StorageFullError (no
    room left) and UnavailableError (no answer, also after trying again for `retry_seconds`).

    Args:
        room: says why there is no room left, or None; asked when a write fails for a reason the server does not give.
    """

    def __init__(
        self,
        *,
        endpoint_url: str,
        access_key: str,
        secret_key: str,
        region: str = "us-east-1",
        retry_seconds: float = DEFAULT_RETRY_SECONDS,
        threads: int = THREADS,
        room: Callable[[str], str | None] = lambda bucket: None,
    ) -> None:
        self.endpoint_url = endpoint_url
        self.access_key = access_key
        self._secret_key = secret_key
        self._region = region
        self._retry_seconds = retry_seconds
        self._threads = threads
        self._room = room
        self._http = S3Http(
            endpoint_url=endpoint_url, access_key=access_key, secret_key=secret_key, region=region, connections=threads
        )
        self._minio: Minio | None = None

    @classmethod
    def from_settings(
        cls, settings: Settings, *, user: str = "airloom", retry_seconds: float = DEFAULT_RETRY_SECONDS
    ) -> ObjectStore:
        """With the key of `user`: airloom, mlflow or admin. Only admin may make buckets."""
        return cls(
            endpoint_url=settings.s3_endpoint_url,
            access_key=user,
            secret_key=settings.secret(f"s3_{user}_secret"),
            region=settings.s3_region,
            retry_seconds=retry_seconds,
            # Only the embedded store's disk and status can be looked at.
            room=(lambda bucket: None) if settings.s3_url else (lambda bucket: no_room(settings, bucket)),
        )

    def __repr__(self) -> str:
        return f"ObjectStore({self.endpoint_url!r}, access_key={self.access_key!r})"

    split_uri = staticmethod(split_uri)

    # Single objects

    def put_bytes(
        self,
        bucket: str,
        key: str,
        content: bytes,
        *,
        media_type: str = "application/octet-stream",
        if_none_match: bool = False,
        if_match: str | None = None,
    ) -> ObjectInfo:
        """Write an object, whole or not at all.

        Args:
            if_match: ETag that the object must have.

        Raises:
            ConflictError: `if_none_match` is set and the object exists, or it is not the one of `if_match`.
        """
        headers = {"content-type": media_type}
        if if_none_match:
            headers["if-none-match"] = "*"
        if if_match is not None:
            headers["if-match"] = f'"{if_match}"'
        tries = 0

        def put() -> Response:
            nonlocal tries
            tries += 1
            return self._send("PUT", bucket, key, body=content, headers=headers)

        try:
            answer = self._retrying(put)
        except ConflictError:
            # Did an earlier try write it, and only its answer got lost?
            if tries > 1 and (self.info(bucket, key) or ObjectInfo(key, "", -1)).etag == _md5(content):
                return ObjectInfo(key, _md5(content), len(content))
            if if_match is not None:
                raise ConflictError(f"s3://{bucket}/{key} was written by another meanwhile") from None
            raise
        return ObjectInfo(key, answer.etag, len(content), answer.headers.get("x-amz-version-id"))

    def get_bytes(self, bucket: str, key: str, *, version_id: str | None = None) -> bytes:
        """Read an object."""
        return self._retrying(lambda: self._send("GET", bucket, key, query=_version_query(version_id))).body

    def get(self, bucket: str, key: str) -> Response:
        """Read an object with its ETag and age."""
        return self._retrying(lambda: self._send("GET", bucket, key))

    def put_json(
        self, bucket: str, key: str, value: Any, *, if_none_match: bool = False, if_match: str | None = None
    ) -> ObjectInfo:
        """Write a value as JSON: sorted keys, no spaces.

        Raises:
            ConflictError: see `put_bytes`.
        """
        content = (canonical_json(value) + "\n").encode()
        return self.put_bytes(
            bucket, key, content, media_type="application/json", if_none_match=if_none_match, if_match=if_match
        )

    def get_json(self, bucket: str, key: str) -> Any:
        """Read a JSON value.

        Raises:
            ContractError: the object is no JSON.
        """
        import json

        try:
            return json.loads(self.get_bytes(bucket, key))
        except ValueError as error:
            raise ContractError(f"s3://{bucket}/{key} is not valid JSON: {error}") from error

    def info(self, bucket: str, key: str) -> ObjectInfo | None:
        """An object's size and ETag; None when there is none."""
        try:
            answer = self._retrying(lambda: self._send("HEAD", bucket, key))
        except NotFoundError:
            return None
        size = int(answer.headers.get("Content-Length", 0))
        return ObjectInfo(key, answer.etag, size, answer.headers.get("x-amz-version-id"))

    def exists(self, bucket: str, key: str) -> bool:
        """Whether there is such an object."""
        return self.info(bucket, key) is not None

    def remove(self, bucket: str, key: str, *, if_match: str | None = None) -> None:
        """Delete an object, if there is one.

        Args:
            if_match: ETag that it must have. Not every store heeds it.

        Raises:
            ConflictError: it has another, or is gone, says a store that heeds it.
        """
        headers = None if if_match is None else {"if-match": f'"{if_match}"'}
        with suppress(NotFoundError):
            self._retrying(lambda: self._send("DELETE", bucket, key, headers=headers))

    def upload(self, bucket: str, key: str, path: Path) -> None:
        """Write a file's content as an object. Up to 64 MiB its ETag is the content's MD5."""
        size = path.stat().st_size
        if size <= QUICK_MAX_BYTES and self._http.put_small(bucket, key, path.read_bytes()):
            return
        if size <= SINGLE_PUT_MAX_BYTES:
            self._retrying(lambda: self._send("PUT", bucket, key, body=path))
        else:
            self._call(
                f"s3://{bucket}/{key}",
                lambda client: client.fput_object(bucket, key, str(path), part_size=PART_BYTES),
                bucket=bucket,
            )

    def download(self, bucket: str, key: str, path: Path, *, version_id: str | None = None) -> None:
        """Read an object into a file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")

        def get() -> None:
            answer = self._send("GET", bucket, key, query=_version_query(version_id), stream=True)
            stream = answer.stream
            if stream is None:
                raise RuntimeError("a good answer to a request for a stream has one")
            try:
                with temporary.open("wb") as file:
                    shutil.copyfileobj(stream, file, 2**20)
            finally:
                stream.release_conn()

        try:
            self._retrying(get)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    # Many objects

    def upload_many(self, bucket: str, files: Iterable[tuple[str, Path]]) -> None:
        """`upload` each (key, file), many at a time. The first error stops the rest."""
        self._each(lambda pair: self.upload(bucket, pair[0], pair[1]), files)

    def download_many(self, bucket: str, files: Iterable[tuple[str, str | None, Path]]) -> None:
        """`download` each (key, version, file), many at a time. The first error stops the rest."""
        self._each(lambda part: self.download(bucket, part[0], part[2], version_id=part[1]), files)

    def info_many(self, bucket: str, keys: Iterable[str]) -> list[ObjectInfo | None]:
        """`info` of each, many at a time, in their order."""
        with ThreadPoolExecutor(self._threads, thread_name_prefix="object-store") as pool:
            return [*pool.map(lambda key: self.info(bucket, key), keys)]

    def list(self, bucket: str, prefix: str = "", *, versions: bool = False) -> Iterator[ObjectInfo]:
        """All objects below a prefix, in the order of their keys.

        Args:
            versions: with the id of each object's newest version, where the bucket keeps versions; costs more.
        """
        marker: dict[str, str] = {}
        while True:
            page = self._page(bucket, {**({"versions": ""} if versions else {"list-type": "2"}), **marker}, prefix)
            yield from page.objects
            if not page.next:
                return
            marker = page.next

    def _page(self, bucket: str, query: dict[str, str], prefix: str) -> Page:
        query = {**query, "prefix": prefix, "max-keys": "1000"}
        encoded = "&".join(f"{name}={quote(value, safe='-_.~')}" for name, value in sorted(query.items()))
        answer = self._retrying(lambda: self._send("GET", bucket, "", query=encoded))
        return parse_page(answer.body)

    # Buckets

    def ensure_bucket(self, name: str, *, versioned: bool = False) -> None:
        """Make a bucket unless it exists, and let it keep versions if wanted."""
        self._call(f"s3://{name}", lambda client: s3_minio.ensure_bucket(client, name, versioned), bucket=name)

    def is_versioned(self, bucket: str) -> bool:
        """Whether the bucket keeps versions."""
        return self._call(f"s3://{bucket}", lambda client: s3_minio.is_versioned(client, bucket), bucket=bucket)

    # How requests are sent

    def _send(
        self,
        method: str,
        bucket: str,
        key: str,
        *,
        body: bytes | Path | None = None,
        headers: dict[str, str] | None = None,
        query: str = "",
        stream: bool = False,
    ) -> Response:
        from urllib3.exceptions import HTTPError

        try:
            answer = self._http.request(method, bucket, key, body=body, headers=headers, query=query, stream=stream)
        except (HTTPError, ConnectionError) as error:
            raise unreachable(self.endpoint_url, error) from error
        if answer.status < 300:
            return answer
        code, message = code_and_message(answer.status, answer.body)
        raise self._error(answer.status, code, message, f"s3://{bucket}/{key}", bucket, writes=method == "PUT")

    def _error(self, status: int, code: str, message: str, what: str, bucket: str, *, writes: bool) -> AirloomError:
        if writes and status >= 500:
            reason = self._room(bucket)
            if reason:
                return StorageFullError(
                    f"the object store at {self.endpoint_url} is full ({reason}): {what} was not written",
                    hint=FULL_HINT,
                )
        return error_of(
            status=status,
            code=code,
            message=message,
            what=what,
            user=self.access_key,
            endpoint_url=self.endpoint_url,
        )

    def _call(self, what: str, action: Callable[[Minio], T], *, bucket: str) -> T:
        """Something that the `minio` client does, with its errors made Airloom's."""
        from minio.error import InvalidResponseError, S3Error, ServerError
        from urllib3.exceptions import HTTPError

        def call() -> T:
            try:
                return action(self._client())
            except S3Error as error:
                status = error.response.status if error.response else 500
                raise self._error(
                    status, error.code or "", error.message or "", what, bucket, writes=status >= 500
                ) from error
            except (InvalidResponseError, ServerError) as error:
                status = getattr(error, "status_code", None) or 500
                raise self._error(status, f"HTTP {status}", str(error), what, bucket, writes=True) from error
            except (HTTPError, ConnectionError) as error:
                raise unreachable(self.endpoint_url, error) from error

        return self._retrying(call)

    def _retrying(self, action: Callable[[], T]) -> T:
        """Do it again while the error says that this may help, for `retry_seconds` in all."""
        from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

        if not self._retry_seconds:
            return action()
        try:
            return action()
        except AirloomError as error:
            if not error.retryable:
                raise
        return Retrying(
            stop=stop_after_delay(self._retry_seconds),
            wait=wait_random_exponential(multiplier=0.3, max=2.0),
            retry=retry_if_exception(lambda error: isinstance(error, AirloomError) and error.retryable),
            reraise=True,
        )(action)

    def _each(self, action: Callable[[T], None], items: Iterable[T]) -> None:
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="object-store")
        try:
            for _ in pool.map(action, items):
                pass
        finally:
            pool.shutdown(cancel_futures=True)

    def _client(self) -> Minio:
        if self._minio is None:
            self._minio = s3_minio.connect(
                self.endpoint_url, self.access_key, self._secret_key, region=self._region, connections=self._threads
            )
        return self._minio


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _version_query(version_id: str | None) -> str:
    return f"versionId={version_id}" if version_id else ""
