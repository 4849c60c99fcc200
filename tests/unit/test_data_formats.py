"""Manifests of sources, and DVC's files as stock DVC writes them."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest

from airloom.errors import ContractError
from airloom.flows.source import manifest_lines, source_digest
from airloom.hooks.dvc import DatasetFile, DatasetListing, DvcStore, object_key, pointer, remote_config
from airloom.hooks.object_store import ObjectInfo, ObjectStore

A, B = ObjectInfo("raw/a.png", "e1", 3, "v1"), ObjectInfo("raw/ü.png", "e2", 4)

# What `dvc add` of DVC 3.67 wrote for the files below.
LISTING = (
    b'[{"md5": "60b725f10c9c85c70d97880dfe8191b3", "relpath": "B"}, '
    b'{"md5": "60b725f10c9c85c70d97880dfe8191b3", "relpath": "a"}, '
    b'{"md5": "3b5d5c3712955042212316173ccf37be", "relpath": "sub/b"}, '
    b'{"md5": "66ddcd97cfdeabb2f6fb8a999b4bc76f", "relpath": "\\u00e9 x"}]'
)
LISTING_MD5 = "86bd6a146d3086b4aaaaa681494e07fb.dir"
POINTER = b"""outs:
- md5: 86bd6a146d3086b4aaaaa681494e07fb.dir
  size: 8
  nfiles: 4
  hash: md5
  path: digits
"""
CONFIG = b"""[core]
    remote = airloom
['remote "airloom"']
    url = s3://dvc/digits
    endpointurl = http://127.0.0.1:1
"""


@pytest.fixture
def remote(tmp_path: Path) -> DvcStore:
    """A cache without a reachable remote: hashing needs none."""
    store = ObjectStore(endpoint_url="http://127.0.0.1:1", access_key="a", secret_key="b", retry_seconds=0)
    return DvcStore(cache_dir=tmp_path / "cache", store=store, bucket="dvc")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "digits"
    (folder / "sub").mkdir(parents=True)
    for name, content in (("a", b"a\n"), ("B", b"a\n"), ("sub/b", b"b\n"), ("é x", "é".encode())):
        (folder / name).write_bytes(content)
    return folder


def test_a_manifest_has_one_object_a_line() -> None:
    lines = manifest_lines([A, B]).decode().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"key": "raw/a.png", "etag": "e1", "size_bytes": 3, "version_id": "v1"},
        {"key": "raw/ü.png", "etag": "e2", "size_bytes": 4, "version_id": None},
    ]


def test_a_sources_digest_depends_on_names_and_bytes_alone() -> None:
    digest = source_digest([A, B])
    assert digest == source_digest([B, ObjectInfo(A.key, A.etag, A.size_bytes, "another version of the same bytes")])
    changed = [ObjectInfo("raw/b.png", "e1", 3), ObjectInfo(A.key, "e9", 3), ObjectInfo(A.key, "e1", 4)]
    assert len({digest, source_digest([A]), *(source_digest([other, B]) for other in changed)}) == 5


def test_a_folder_is_hashed_as_dvc_does(remote: DvcStore, folder: Path) -> None:
    listing = remote.hash_folder(folder)
    assert (listing.md5, listing.content) == (LISTING_MD5, LISTING)
    assert pointer(listing, "digits") == POINTER
    assert (len(listing.files), listing.size_bytes) == (4, 8)
    assert DatasetListing.parse(LISTING_MD5, LISTING).files == tuple(
        DatasetFile(file.name, file.md5) for file in listing.files
    )


def test_a_change_is_seen_although_hashes_are_remembered(remote: DvcStore, folder: Path) -> None:
    first = remote.hash_folder(folder)
    assert remote.hash_folder(folder) == first
    (folder / "a").write_bytes(b"c\n")
    assert remote.hash_folder(folder).md5 != first.md5
    (folder / "a").unlink()
    assert len(remote.hash_folder(folder).files) == 3


def test_the_remote_is_laid_out_and_configured_as_dvc_expects() -> None:
    assert object_key("digits", LISTING_MD5) == "digits/files/md5/86/bd6a146d3086b4aaaaa681494e07fb.dir"
    assert remote_config("dvc", "digits", "http://127.0.0.1:1") == CONFIG


def test_what_is_no_dataset_is_refused(remote: DvcStore, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="no dataset folder"):
        remote.hash_folder(tmp_path / "nowhere")
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    with pytest.raises(ContractError, match="is empty"):
        remote.hash_folder(tmp_path / "empty")
    (folder / "sub" / ".dvcignore").touch()
    with pytest.raises(ContractError, match="dvcignore"):
        remote.hash_folder(folder)
    (folder / "sub" / ".dvcignore").unlink()
    (folder / "link").symlink_to(folder / "a")
    with pytest.raises(ContractError, match="link is no plain file"):
        remote.hash_folder(folder)


@pytest.mark.parametrize("content", [LISTING[:-1], b"", b'{"a": 1}'])
def test_a_damaged_listing_is_refused(content: bytes) -> None:
    with pytest.raises(ContractError, match="other bytes than its name says"):
        DatasetListing.parse(LISTING_MD5, content)


@pytest.mark.parametrize("name", ["../up", "/etc/passwd", "a/../../b"])
def test_a_listing_cannot_reach_outside_its_folder(name: str) -> None:
    evil = DatasetListing("", (DatasetFile(name, "0" * 32),)).content
    import hashlib

    with pytest.raises(ContractError, match="outside the dataset"):
        DatasetListing.parse(hashlib.md5(evil).hexdigest() + ".dir", evil)


def test_the_garbage_collector_rests_while_hashing_only(
    remote: DvcStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    real = DvcStore._object_db
    monkeypatch.setattr(DvcStore, "_object_db", lambda store: seen.append(gc.isenabled()) or real(store))
    remote.hash_folder(folder)
    assert gc.isenabled()
    (folder / ".dvcignore").touch()
    with pytest.raises(ContractError, match="dvcignore"):
        remote.hash_folder(folder)
    assert gc.isenabled()
    assert seen == [False, False]
