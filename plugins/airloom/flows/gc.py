"""Free the room that ended runs take: their workspaces, stages that no live run owns, the engine's cache volume."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from airloom.contract import Frozen
from airloom.contract.plan import safe_run_id
from airloom.errors import ConfigError
from airloom.flows.lease import remove_old
from airloom.flows.reap import IsLive, Reaped, reap
from airloom.hooks.docker_cache import remove_cache
from airloom.settings import Settings

if TYPE_CHECKING:
    from airloom.hooks.connect import Hooks

KEEP_DAYS = 7.0
_DAY_SECONDS = 86400


class Removed(Frozen):
    """A run's folder that was removed."""

    pipeline: str
    run: str
    size_bytes: int


class Freed(Frozen):
    """What was ended and removed. `cache_volume`: whether the engine's copy of data versions was."""

    ended: list[Reaped]
    removed: list[Removed]
    cache_volume: bool = False
    leases: int = 0

    @property
    def size_bytes(self) -> int:
        return sum(item.size_bytes for item in self.removed)


def free_room(settings: Settings, *, is_live: IsLive, keep_days: float = KEEP_DAYS, dry_run: bool = False) -> Freed:
    """End stages that no live run owns, and remove the workspaces of runs that ended some days ago.

    The cache volume goes as a whole, when no stage has it and it was made some days ago, however often it was used
    since: so it never holds what only old runs read. The next stage begins a new one.

    A workspace holds copies: data versions, models, logs and results of stages lie in the stores. What goes with it is
    the way to look at a failed stage's files, and checkpoints of a training that nobody has taken up since.

    Args:
        is_live: says of a pipeline's run, named as its folder is, whether it may still need its workspace.
        keep_days: since anything in the workspace was written last, or the cache volume was made.
        dry_run: whether to only say what would be removed; stages are left alone too.

    Raises:
        ConfigError: `keep_days` is negative.
        UnavailableError: Airflow does not say which runs live; nothing was removed.
    """
    if keep_days < 0:
        raise ConfigError(f"days to keep must be 0 or more, found {keep_days:g}")
    ended = [] if dry_run else reap(settings, is_live=is_live)
    removed = []
    oldest = time.time() - keep_days * _DAY_SECONDS
    for folder in sorted(path for path in settings.workspaces_dir.glob("*/*") if path.is_dir()):
        pipeline, run = folder.parent.name, folder.name
        size, written = _size_and_age(folder)
        if written > oldest or is_live(pipeline, run):
            continue
        if not dry_run:
            _remove(folder)
        removed.append(Removed(pipeline=pipeline, run=run, size_bytes=size))
    return Freed(ended=ended, removed=removed, cache_volume=remove_cache(settings, made_before=oldest, dry_run=dry_run))


def remove_from_engine(settings: Settings) -> None:
    """Remove all that stages of this installation have on the engine, those that run among them.

    Raises:
        UnavailableError: stages have run there, and it does not answer.
    """
    reap(settings, is_live=lambda pipeline, run: False)
    remove_cache(settings, made_before=float("inf"))


def collect(hooks: Hooks, *, keep_days: float = KEEP_DAYS, dry_run: bool = False) -> Freed:
    """`free_room` for this machine, and the end of old leases of builds.

    Raises:
        ConfigError: `keep_days` is negative.
        UnavailableError: Airflow or the store did not answer.
    """
    settings = hooks.settings
    is_live = live_by_folder(hooks.airflow.live_runs())
    freed = free_room(settings, is_live=is_live, keep_days=keep_days, dry_run=dry_run)
    age = keep_days * _DAY_SECONDS
    leases = remove_old(hooks.store, settings.bucket_airloom, age_seconds=age, dry_run=dry_run)
    return freed.model_copy(update={"leases": leases})


def live_by_folder(live_runs: set[tuple[str, str]]) -> IsLive:
    """`is_live` from the pipelines and ids of all queued and running runs, by id or by folder's name."""
    names = {(pipeline, name) for pipeline, run_id in live_runs for name in (run_id, safe_run_id(run_id))}
    return lambda pipeline, run: (pipeline, run) in names


def _size_and_age(folder: Path) -> tuple[int, float]:
    size, written = 0, folder.stat().st_mtime
    for path in folder.rglob("*"):
        try:
            facts = path.lstat()
        except FileNotFoundError:
            continue
        size, written = size + facts.st_blocks * 512, max(written, facts.st_mtime)
    return size, written


def _remove(folder: Path) -> None:
    """A folder whose folders may be read-only; out of the way at once, so that nobody meets half of it."""
    doomed = folder.with_name(f".{folder.name}.{os.getpid()}.removed")
    folder.rename(doomed)
    for parent, _, _ in os.walk(doomed):
        Path(parent).chmod(0o700)
    shutil.rmtree(doomed, ignore_errors=True)
