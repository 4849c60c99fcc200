"""Move journal entries to the prediction log, in batches, however often this is interrupted."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa

from airloom.contract.journal import SEGMENT_SUFFIX, JournalEntry, encode_entry, read_entries, segments
from airloom.contract.prediction_log import engine_for, inputs, insert_or_ignore, metadata, predictions
from serving.journal import JournalWriter, Signal, lock_owner, size_of
from serving.metrics import Metrics

log = logging.getLogger(__name__)

BATCH_ROWS = 500
BATCH_BYTES = 8 * 2**20
GATHER_SECONDS = 0.25  # between an answer and its row, so that rows come in batches
ADOPT_SECONDS = 15.0  # between looks for what dead processes left
MAX_PAUSE_SECONDS = 15.0  # between tries while the database is down
STOP_SECONDS = 10.0


class Drainer:
    """A thread that empties this process's journal, and those of dead ones, into the database.

    A row that is there already is left alone, so entries may be drained twice: offsets are kept in memory only.

    Args:
        url: SQLAlchemy URL of the prediction log; `None` keeps everything in the journal.
    """

    def __init__(self, journal: JournalWriter, *, journal_dir: Path, url: str | None, signal: Signal, metrics: Metrics):
        self._journal = journal
        self._journal_dir = journal_dir
        self._url = url
        self._signal = signal
        self._metrics = metrics
        self._engine: sa.Engine | None = None
        self._offsets: dict[Path, int] = {}
        self._stopping = threading.Event()
        self._down_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="drain", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> bool:
        """Drain what is left, as far as the database takes it, and end. Whether all of it was."""
        self._stopping.set()
        self._signal.set()
        if self._thread.ident is not None:
            self._thread.join(STOP_SECONDS)
        drained = not self._thread.is_alive() and self.backlog_bytes() == 0
        if not drained:
            log.warning("%d bytes stay in the journal; the next process drains them", self.backlog_bytes())
        if self._engine is not None:
            self._engine.dispose()
        return drained

    def backlog_bytes(self) -> int:
        """Of this process's entries that the database does not have yet."""
        return sum(
            max(size_of(path) - self._offsets.get(path, 0), 0)
            for path in self._journal.folder.glob(f"*{SEGMENT_SUFFIX}")
        )

    @property
    def failing(self) -> bool:
        """Whether the database took nothing at the last try."""
        return self._down_since is not None

    def _run(self) -> None:
        if self._url is None:
            log.warning("no prediction log is configured: predictions stay in the journal %s", self._journal.folder)
            return
        pause, next_adoption = 0.0, 0.0
        while True:
            stopping = self._stopping.is_set()
            try:
                self._drain_own()
                if not stopping and time.monotonic() >= next_adoption:
                    next_adoption = time.monotonic() + ADOPT_SECONDS
                    self._adopt_leftovers()
                self._recovered()
                pause = 0.0
            except Exception as error:
                self._failed(error)
                pause = min(max(1.0, pause * 2), MAX_PAUSE_SECONDS)
            if stopping:
                return
            if pause:
                self._stopping.wait(pause)
            else:
                self._signal.wait(ADOPT_SECONDS)
                self._stopping.wait(GATHER_SECONDS)

    def _drain_own(self) -> None:
        complete = self._journal.current.name
        for path in sorted(self._journal.folder.glob(f"*{SEGMENT_SUFFIX}")):
            self._drain(path)
            if path.name < complete:
                path.unlink()
                self._offsets.pop(path, None)

    def _adopt_leftovers(self) -> None:
        """Drain the folders of processes that ended without doing so: whoever gets a folder's lock owns it."""
        for folder in sorted(self._journal_dir.iterdir()):
            if not folder.is_dir() or folder == self._journal.folder:
                continue
            if folder.name.startswith(".new-") and time.time() - folder.stat().st_mtime < ADOPT_SECONDS:
                continue
            lock = lock_owner(folder)
            if lock is None:
                continue
            try:
                for path in segments(folder):
                    self._drain(path)
                    self._offsets.pop(path, None)
                shutil.rmtree(folder, ignore_errors=True)
                log.info("took over the journal of a process that had ended: %s", folder.name)
            finally:
                os.close(lock)

    def _drain(self, path: Path) -> None:
        for batch, end in _batches(path, self._offsets.get(path, 0)):
            self._insert(batch)
            self._offsets[path] = end
            self._metrics.drained.inc(len(batch))

    def _insert(self, batch: list[JournalEntry]) -> None:
        try:
            self._write_rows(batch)
        except (sa.exc.OperationalError, sa.exc.InterfaceError):
            raise
        except (sa.exc.DBAPIError, sa.exc.StatementError) as error:
            if len(batch) == 1:
                log.error("the prediction log refuses %s, which is kept beside the journal: %s", batch[0].id, error)
                self._keep_refused(batch[0])
                return
            for entry in batch:
                self._insert([entry])

    def _write_rows(self, batch: list[JournalEntry]) -> None:
        if self._engine is None:
            engine = engine_for(self._url or "")
            metadata.create_all(engine)
            self._engine = engine
        contents = {entry.input_sha256: entry for entry in batch}
        with self._engine.begin() as connection:
            dialect = connection.dialect.name
            connection.execute(
                insert_or_ignore(inputs, dialect),
                [
                    {"sha256": sha256, "content": entry.content, "media_type": entry.media_type}
                    for sha256, entry in contents.items()
                ],
            )
            connection.execute(
                insert_or_ignore(predictions, dialect),
                [
                    {
                        "id": entry.id,
                        "pipeline": entry.pipeline,
                        "release_version": entry.release,
                        "answered_at": entry.answered_at,
                        "latency_ms": entry.latency_ms,
                        "input_sha256": entry.input_sha256,
                        "output": entry.output,
                        "batch_size": entry.batch_size,
                        "batch_index": entry.batch_index,
                    }
                    for entry in batch
                ],
            )

    def _keep_refused(self, entry: JournalEntry) -> None:
        import json

        pieces = encode_entry(
            prediction_id=entry.id,
            pipeline=entry.pipeline,
            release=entry.release,
            answered_at=entry.answered_at,
            latency_ms=entry.latency_ms,
            input_sha256=entry.input_sha256,
            output_json=json.dumps(entry.output),
            media_type=entry.media_type,
            batch_size=entry.batch_size,
            batch_index=entry.batch_index,
            content=entry.content,
        )
        with (self._journal_dir / f"refused{SEGMENT_SUFFIX}").open("ab", buffering=0) as file:
            file.write(b"".join(pieces))

    def _failed(self, error: Exception) -> None:
        self._metrics.drain_failures.inc()
        if self._down_since is None:
            self._down_since = time.monotonic()
            reason = (str(getattr(error, "orig", None) or error).splitlines() or [type(error).__name__])[0]
            log.warning("the prediction log is down, so the journal grows and answers go on: %s", reason)
            if not isinstance(error, sa.exc.SQLAlchemyError | OSError):
                log.error("this is not the database's fault", exc_info=error)

    def _recovered(self) -> None:
        if self._down_since is not None:
            log.warning("the prediction log is back after %.0f s", time.monotonic() - self._down_since)
            self._down_since = None


def _batches(path: Path, offset: int) -> Iterator[tuple[list[JournalEntry], int]]:
    batch: list[JournalEntry] = []
    size_bytes, end = 0, offset
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        file.seek(offset)
        for entry, position in read_entries(file):
            batch.append(entry)
            size_bytes += len(entry.content)
            end = position
            if len(batch) >= BATCH_ROWS or size_bytes >= BATCH_BYTES:
                yield batch, end
                batch, size_bytes = [], 0
    if batch:
        yield batch, end
