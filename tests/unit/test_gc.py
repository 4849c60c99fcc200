"""What `airloom gc` removes, and what it leaves alone."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from airloom.contract.plan import safe_run_id
from airloom.errors import ConfigError
from airloom.flows.gc import free_room, live_by_folder
from airloom.settings import Settings

DAY = 86400


def workspace(settings: Settings, run: str, *, days: float) -> Path:
    folder = settings.workspaces_dir / "digits" / safe_run_id(run)
    (folder / "train" / "outputs").mkdir(parents=True)
    (folder / "train" / "outputs" / "big").write_bytes(b"x" * 100_000)
    (folder / "train" / "outputs").chmod(0o555)
    when = time.time() - days * DAY
    for path in [*folder.rglob("*"), folder]:
        os.utime(path, (when, when))
    return folder


def test_old_runs_go_and_others_stay(settings: Settings) -> None:
    old = workspace(settings, "manual__2026-01-01T00:00:00+00:00", days=8)
    young = workspace(settings, "young", days=6)
    live = workspace(settings, "scheduled__2026-01-02T00:00:00+00:00", days=30)
    is_live = live_by_folder({("digits", "scheduled__2026-01-02T00:00:00+00:00")})
    seen = free_room(settings, is_live=is_live, dry_run=True)
    assert old.exists()
    freed = free_room(settings, is_live=is_live)
    assert seen.removed == freed.removed
    assert [item.run for item in freed.removed] == [old.name]
    assert 100_000 <= freed.size_bytes < 200_000
    assert not old.exists()
    assert young.exists()
    assert live.exists()
    assert free_room(settings, is_live=is_live).removed == []


def test_a_file_that_was_written_lately_keeps_its_run(settings: Settings) -> None:
    folder = workspace(settings, "old", days=30)
    (folder / "train" / "log.txt").write_text("just now")
    assert free_room(settings, is_live=lambda pipeline, run: False).removed == []
    assert len(free_room(settings, is_live=lambda pipeline, run: False, keep_days=0).removed) == 1


def test_negative_days_are_refused(settings: Settings) -> None:
    with pytest.raises(ConfigError, match="-1"):
        free_room(settings, is_live=lambda pipeline, run: False, keep_days=-1)
