"""Reading a manifest's objects, against a small HTTP server that answers as an S3 store does."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from preprocess_samples import Preprocess, png

from airloom.contract import StageInputError
from preprocessing.object_source import ObjectSource

Objects = dict[tuple[str, str | None], bytes]


class Store(ThreadingHTTPServer):
    """Answers GET /raw/<key>[?versionId=v] from `objects`; `refuses` makes every answer an error of that code."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: Objects = {}
        self.refuses: str | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def manifest(self, path: Path) -> Path:
        lines = [
            {"key": key, "etag": hashlib.md5(body).hexdigest(), "size_bytes": len(body), "version_id": version}
            for (key, version), body in self.objects.items()
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path


class Handler(BaseHTTPRequestHandler):
    server: Store
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        uri = urlsplit(self.path)
        version = parse_qs(uri.query).get("versionId", [None])[0]
        body = self.server.objects.get((uri.path.removeprefix("/raw/"), version))
        code = self.server.refuses or (None if body is not None else "NoSuchKey")
        if code:
            body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
        assert body is not None
        self.send_response({None: 200, "NoSuchKey": 404}.get(code, 403))
        self.send_header("Content-Type", "application/xml")
        self.send_header("ETag", f'"{hashlib.md5(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "reader")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    server = Store()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def source_of(store: Store, manifest: Path) -> ObjectSource:
    return ObjectSource(manifest, source_uri="s3://raw/digits/", endpoint=store.endpoint, connections=2, retries=0)


def test_objects_and_a_folder_give_the_same_dataset(
    store: Store, preprocess: Preprocess, raw: Path, tmp_path: Path
) -> None:
    for path in raw.rglob("*.png"):
        store.objects[f"digits/{path.relative_to(raw).as_posix()}", None] = path.read_bytes()
    manifest = store.manifest(tmp_path / "manifest.jsonl")
    facts = {"source_uri": "s3://raw/digits/", "s3_endpoint": store.endpoint}
    result = preprocess("objects", inputs={"manifest": manifest}, facts=facts)
    assert result.metrics["rows"] == 180
    assert result.metrics["rows.test"] == preprocess("folder").metrics["rows.test"]


def test_the_pinned_version_is_read(store: Store, tmp_path: Path) -> None:
    store.objects["digits/a/1.png", "old"] = b"old"
    source = source_of(store, store.manifest(tmp_path / "manifest.jsonl"))
    store.objects["digits/a/1.png", None] = b"new"
    assert source.read(source.entries[0]) == b"old"


def test_an_object_that_changed_is_refused(store: Store, tmp_path: Path) -> None:
    store.objects["digits/a/1.png", None] = png(1)
    source = source_of(store, store.manifest(tmp_path / "manifest.jsonl"))
    store.objects["digits/a/1.png", None] = png(2)
    with pytest.raises(StageInputError, match="changed after the run was pinned"):
        source.read(source.entries[0])


def test_an_object_that_is_gone_is_named(store: Store, tmp_path: Path) -> None:
    store.objects["digits/a/1.png", None] = png(1)
    source = source_of(store, store.manifest(tmp_path / "manifest.jsonl"))
    store.objects.clear()
    with pytest.raises(StageInputError, match=r"s3://raw/digits/a/1\.png was there"):
        source.read(source.entries[0])


def test_a_refused_access_key_is_named(store: Store, tmp_path: Path) -> None:
    store.objects["digits/a/1.png", None] = png(1)
    source = source_of(store, store.manifest(tmp_path / "manifest.jsonl"))
    store.refuses = "SignatureDoesNotMatch"
    with pytest.raises(StageInputError, match=r"refused .* to the access key 'reader'"):
        source.read(source.entries[0])


def test_a_store_that_does_not_answer_is_worth_another_try(store: Store, tmp_path: Path) -> None:
    store.objects["digits/a/1.png", None] = png(1)
    source = source_of(store, store.manifest(tmp_path / "manifest.jsonl"))
    store.shutdown()
    store.server_close()
    with pytest.raises(ConnectionError, match="does not answer"):
        source.read(source.entries[0])


def test_a_broken_manifest_names_its_line(store: Store, tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text('{"key": "a", "size_bytes": 1}\n{"key": "b"}\n')
    with pytest.raises(StageInputError, match=r"manifest\.jsonl:2: size_bytes: Field required"):
        source_of(store, manifest)


def test_missing_credentials_are_named(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StageInputError, match="AWS_SECRET_ACCESS_KEY is not set"):
        source_of(store, store.manifest(tmp_path / "manifest.jsonl"))
