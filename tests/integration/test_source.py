"""Pinning a run's raw data on a real object store."""

from __future__ import annotations

import json

import pytest

from airloom.errors import DataRejectedError
from airloom.flows.source import pin_source
from airloom.hooks.connect import Hooks
from airloom.hooks.object_store import ObjectStore
from airloom.settings import Settings
from airloom.spec.pipeline import Source


def test_a_pin_keeps_the_bytes_that_were_there(s3_store: ObjectStore, session_settings: Settings) -> None:
    hooks = Hooks(session_settings)
    source = Source(uri="s3://raw/pinned/")
    for number in range(1100):  # more than a page
        s3_store.put_bytes("raw", f"pinned/{number % 7}/{number:04d}.png", b"%d" % number)
    s3_store.put_bytes("raw", "pinned-not/x.png", b"x")
    first = pin_source(hooks, source, "runs/p/one")
    assert (first.objects, first.uri, first.manifest) == (1100, source.uri, "s3://airloom/runs/p/one/manifest.jsonl")
    lines = s3_store.get_bytes(*s3_store.split_uri(first.manifest)).decode().splitlines()
    entries = [json.loads(line) for line in lines]
    assert [entry["key"] for entry in entries] == sorted(entry["key"] for entry in entries)
    assert sum(entry["size_bytes"] for entry in entries) == first.size_bytes
    assert pin_source(hooks, source, "runs/p/two").digest == first.digest

    s3_store.put_bytes("raw", "pinned/0/0000.png", b"9")
    assert pin_source(hooks, source, "runs/p/three").digest != first.digest
    old = next(entry for entry in entries if entry["key"] == "pinned/0/0000.png")
    assert s3_store.get_bytes("raw", old["key"], version_id=old["version_id"]) == b"0"
    s3_store.put_bytes("raw", "pinned/0/0000.png", b"0")
    assert pin_source(hooks, source, "runs/p/four").digest == first.digest


def test_an_empty_source_says_what_to_do(s3_store: ObjectStore, session_settings: Settings) -> None:
    with pytest.raises(DataRejectedError, match=r"no raw data at s3://raw/nothing-here/") as caught:
        pin_source(Hooks(session_settings), Source(uri="s3://raw/nothing-here/"), "runs/p/five")
    assert "source.uri" in str(caught.value.hint)
