"""What the object store's client is made of, without a server."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from airloom.errors import (
    AirloomError,
    AuthError,
    ConfigError,
    ConflictError,
    NotFoundError,
    ServiceError,
    StorageFullError,
    UnavailableError,
)
from airloom.hooks import s3_http
from airloom.hooks.object_store import split_uri
from airloom.hooks.s3_errors import code_and_message, error_of
from airloom.hooks.s3_http import EMPTY_SHA256, Signer
from airloom.hooks.s3_listing import ObjectInfo, parse_page
from airloom.hooks.s3_quick import QuickPut


class _Clock(datetime):
    @classmethod
    def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
        return datetime(2013, 5, 24, tzinfo=UTC)


def test_the_signature_is_the_one_of_the_published_example(monkeypatch: pytest.MonkeyPatch) -> None:
    """https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html, example GET Object"""
    monkeypatch.setattr(s3_http, "datetime", _Clock)
    signer = Signer(
        access_key="AKIAIOSFODNN7EXAMPLE",
        secret_key="wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
        region="us-east-1",
        host="examplebucket.s3.amazonaws.com",
    )
    headers = signer.sign("GET", "/test.txt", "", {"Range": "bytes=0-9"}, EMPTY_SHA256)
    assert headers["authorization"] == (
        "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request, "
        "SignedHeaders=host;range;x-amz-content-sha256;x-amz-date, "
        "Signature=f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"
    )


V2 = b"""<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">
<Name>b</Name><IsTruncated>true</IsTruncated><NextContinuationToken>to/ken</NextContinuationToken>
<Contents><Key>a &amp; b</Key><ETag>&quot;e1&quot;</ETag><Size>3</Size><Owner><ID>x</ID></Owner></Contents>
<Contents><Key>folder/</Key><ETag>""</ETag><Size>0</Size></Contents></ListBucketResult>"""
VERSIONS = b"""<ListVersionsResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><IsTruncated>true</IsTruncated>
<NextKeyMarker>k</NextKeyMarker><NextVersionIdMarker>v2</NextVersionIdMarker>
<Version><Key>k</Key><VersionId>v1</VersionId><IsLatest>true</IsLatest><ETag>"n"</ETag><Size>1</Size></Version>
<Version><Key>k</Key><VersionId>v0</VersionId><IsLatest>false</IsLatest><ETag>"o"</ETag><Size>2</Size></Version>
<Version><Key>u</Key><VersionId>null</VersionId><IsLatest>true</IsLatest><ETag>"u"</ETag><Size>0</Size></Version>
<DeleteMarker><Key>d</Key><VersionId>v3</VersionId><IsLatest>true</IsLatest></DeleteMarker></ListVersionsResult>"""


def test_pages_of_listings_are_read_in_both_forms() -> None:
    page = parse_page(V2)
    assert page.objects == [ObjectInfo("a & b", "e1", 3)]
    assert page.next == {"continuation-token": "to/ken"}
    page = parse_page(VERSIONS)
    assert page.objects == [ObjectInfo("k", "n", 1, "v1"), ObjectInfo("u", "u", 0, None)]
    assert page.next == {"key-marker": "k", "version-id-marker": "v2"}
    assert parse_page(V2.replace(b"true", b"false")).next == {}
    with pytest.raises(ServiceError, match="something else than a listing"):
        parse_page(b"<html>")


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        (403, "SignatureDoesNotMatch", AuthError),
        (403, "AccessDenied", AuthError),
        (404, "NoSuchBucket", NotFoundError),
        (404, "NoSuchKey", NotFoundError),
        (412, "PreconditionFailed", ConflictError),
        (507, "HTTP 507", StorageFullError),
        (400, "XMinioStorageFull", StorageFullError),
        (503, "SlowDown", UnavailableError),
        (500, "InternalError", UnavailableError),
        (400, "InvalidArgument", ServiceError),
    ],
)
def test_each_answer_becomes_its_error(status: int, code: str, error: type[AirloomError]) -> None:
    body = f"<Error><Code>{code}</Code><Message>why</Message></Error>".encode()
    found, message = code_and_message(status, body)
    made = error_of(
        status=status, code=found, message=message, what="s3://b/k", user="airloom", endpoint_url="http://h:1"
    )
    assert type(made) is error
    assert made.retryable is (error is UnavailableError)
    assert "http://h:1" in str(made) or "s3://b/k" in str(made)


@pytest.mark.parametrize("uri", ["", "s3:/b/k", "s3://", "https://b/k", "b/k"])
def test_what_is_no_address_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match="is not an address in the object store"):
        split_uri(uri)


def test_an_address_falls_into_bucket_and_key() -> None:
    assert split_uri("s3://b/k/e/y") == ("b", "k/e/y")
    assert split_uri("s3://b") == ("b", "")


class _Server:
    """Answers each request on each connection with what it is told to; counts connections."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer
        self.connections = 0
        self.requests: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            with connection:
                while self._one(connection):
                    pass

    def _one(self, connection: socket.socket) -> bool:
        request = b""
        while not request.endswith(b"BODY"):
            part = connection.recv(1000)
            if not part:
                return False
            request += part
        self.requests.append(request)
        connection.sendall(self.answer)
        return b"200" in self.answer

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[_Server]:
    server = _Server(request.param)
    yield server
    server.close()


def _quick(port: int) -> QuickPut:
    return QuickPut("127.0.0.1", port, connect_seconds=2, read_seconds=2)


GOOD = b'HTTP/1.1 200 OK\r\nETag: "abc"\r\ncontent-length: 0\r\n\r\n'


@pytest.mark.parametrize("server", [GOOD], indirect=True)
def test_a_quick_put_keeps_its_connection(server: _Server) -> None:
    quick = _quick(server.port)
    assert [quick.put("/b/k", {"host": "h"}, b"BODY") for _ in range(3)] == ["abc"] * 3
    assert server.connections == 1
    assert server.requests[0] == b"PUT /b/k HTTP/1.1\r\nhost: h\r\ncontent-length: 4\r\n\r\nBODY"
    quick.close()


@pytest.mark.parametrize(
    "server",
    [
        b"HTTP/1.1 403 Forbidden\r\nETag: x\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n",
        GOOD.replace(b"length: 0", b"length: 5") + b"12345",
        GOOD.replace(b'ETag: "abc"\r\n', b""),
        GOOD.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"),
        b"HTTP/1.1 200 OK\r\nETag: a",
        b"nonsense\r\n\r\n",
        b"",
    ],
    indirect=True,
)
def test_any_other_answer_is_left_to_the_general_way(server: _Server) -> None:
    quick = _quick(server.port)
    assert quick.put("/b/k", {}, b"BODY") is None
    quick.close()


def test_no_server_is_left_to_the_general_way() -> None:
    assert _quick(1).put("/b/k", {}, b"BODY") is None
