"""What a stage's container holds its inputs against before the stage begins."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from airloom.hooks import container_boot


def put(cache: Path, content: bytes, *, named_by: bytes | None = None) -> Path:
    """An object of the cache, named by its MD5 or by that of other bytes."""
    md5 = hashlib.md5(content if named_by is None else named_by, usedforsecurity=False).hexdigest()
    path = cache / "batch" / "files" / "md5" / md5[:2] / md5[2:]
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return path


def test_damaged_and_missing_objects_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, inputs = tmp_path / "cache", tmp_path / "inputs"
    monkeypatch.setattr(container_boot, "CACHE", f"{cache}/")
    (inputs / "dataset" / "deep").mkdir(parents=True)
    (inputs / "model").write_bytes(b"a plain file")
    links = {
        "whole": put(cache, b"whole"),
        "deep/largest": put(cache, bytes(3 * 2**20 + 1)),
        "empty": put(cache, b""),
        "deep/spoiled": put(cache, b"spoiled", named_by=b"as long"),
        "short": put(cache, b"", named_by=b"cut off"),
        "gone": cache / "batch" / "files" / "md5" / "00" / ("1" * 30),
    }
    for name, target in links.items():
        (inputs / "dataset" / name).symlink_to(target)
    (inputs / "elsewhere").symlink_to("/etc/hostname")
    wrong = {str(links[name]) for name in ("deep/spoiled", "short", "gone")}
    assert set(container_boot.damaged(str(inputs))) == wrong
    assert len(container_boot.damaged(str(inputs))) == 3


def test_no_inputs(tmp_path: Path) -> None:
    assert container_boot.damaged(str(tmp_path / "inputs")) == []
