"""The journal and its drain, with a real SQLite database."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa

import serving.journal
from airloom.contract.journal import encode_entry, find_entry, read_entries
from airloom.contract.prediction_id import PredictionId, new_unique
from airloom.contract.prediction_log import predictions
from serving.drain import Drainer
from serving.journal import JournalWriter, Signal, lock_owner
from serving.metrics import Metrics


def pieces(prediction_id: str, content: bytes = b"picture") -> list[bytes]:
    return [
        *encode_entry(
            prediction_id=prediction_id,
            pipeline="tiny",
            release="1.0.0",
            answered_at=1795235586.25,
            latency_ms=0.5,
            input_sha256=hashlib.sha256(content).hexdigest(),
            output_json='{"label":"ü\\n"}',
            media_type="image/png",
            batch_size=1,
            batch_index=0,
            content=content,
        )
    ]


def rows(database: Path) -> list[str]:
    if not database.exists():
        return []
    engine = sa.create_engine(f"sqlite:///{database}")
    try:
        with engine.connect() as connection:
            return sorted(connection.scalars(sa.select(predictions.c.id)))
    except sa.exc.OperationalError:
        return []
    finally:
        engine.dispose()


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


def drainer(writer: JournalWriter, folder: Path, url: str | None, metrics: Metrics | None = None) -> Drainer:
    return Drainer(writer, journal_dir=folder, url=url, signal=Signal(), metrics=metrics or Metrics("tiny"))


def test_entries_come_back_as_written_up_to_a_torn_one(tmp_path: Path) -> None:
    contents = [b"", b"with\nnewlines\n", bytes(range(256))]
    whole = b"".join(b"".join(pieces(f"id-{n}", content)) for n, content in enumerate(contents))
    for cut in (0, 1, 5, 300):
        path = tmp_path / "a.journal"
        path.write_bytes(whole[: len(whole) - cut])
        with path.open("rb") as file:
            entries = [entry for entry, _ in read_entries(file)]
        assert [entry.content for entry in entries] == contents[: 3 if cut == 0 else 2]
    assert entries[0].output == {"label": "ü\n"}


def test_an_id_is_found_in_any_folder_and_only_whole_entries_count(tmp_path: Path) -> None:
    writer = JournalWriter(tmp_path / "tiny" / "a", max_bytes=10**6)
    writer.append(pieces("first") + pieces("second"))
    found = find_entry(tmp_path, "second")
    assert found is not None
    assert found.content == b"picture"
    assert find_entry(tmp_path, "secon") is None
    assert find_entry(tmp_path / "missing", "second") is None
    writer.close(drained=True)
    assert list(tmp_path.rglob("*.journal")) == []


def test_everything_gets_to_the_database_and_complete_segments_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving.journal, "SEGMENT_BYTES", 2000)
    signal = Signal()
    writer = JournalWriter(tmp_path / "journal", max_bytes=10**6, on_append=signal.set)
    ids = [f"tiny-1.0.0-{new_unique()}" for _ in range(50)]
    for prediction_id in ids:
        assert writer.append(pieces(prediction_id))
    assert len(list(writer.folder.glob("*.journal"))) > 5
    drain = Drainer(
        writer,
        journal_dir=tmp_path / "journal",
        url=f"sqlite:///{tmp_path / 'log.db'}",
        signal=signal,
        metrics=Metrics("tiny"),
    )
    drain.start()
    until(lambda: len(rows(tmp_path / "log.db")) == 50)
    until(lambda: list(writer.folder.glob("*.journal")) == [writer.current])
    writer.append(pieces("tiny-1.0.0-last"))
    assert drain.stop()
    assert rows(tmp_path / "log.db") == sorted([*ids, "tiny-1.0.0-last"])
    writer.close(drained=True)
    assert list((tmp_path / "journal").iterdir()) == []


def test_leftovers_of_the_dead_are_taken_over_and_those_of_the_living_are_not(tmp_path: Path) -> None:
    folder, database = tmp_path / "journal", tmp_path / "log.db"
    dead = JournalWriter(folder, max_bytes=10**6)
    dead.append(pieces("dead-1") + pieces("dead-2"))
    os.write(dead._file, b'{"id":"torn')
    os.close(dead._lock)  # what the system does when a process ends
    living = JournalWriter(folder, max_bytes=10**6)
    living.append(pieces("living"))
    mine = JournalWriter(folder, max_bytes=10**6)
    drain = drainer(mine, folder, f"sqlite:///{database}")
    drain.start()
    until(lambda: rows(database) == ["dead-1", "dead-2"])
    until(lambda: not dead.folder.exists())
    assert drain.stop()
    assert living.folder.exists()
    assert lock_owner(living.folder) is None
    assert rows(database) == ["dead-1", "dead-2"]


def test_draining_twice_writes_once(tmp_path: Path) -> None:
    folder, database = tmp_path / "journal", tmp_path / "log.db"
    writer = JournalWriter(folder, max_bytes=10**6)
    writer.append(pieces("one") + pieces("two"))
    for _ in range(2):
        drain = drainer(writer, folder, f"sqlite:///{database}")
        drain.start()
        assert drain.stop()
    assert rows(database) == ["one", "two"]


def test_a_database_that_is_down_keeps_the_journal_and_one_that_is_back_gets_it(tmp_path: Path) -> None:
    folder, database = tmp_path / "journal", tmp_path / "missing" / "log.db"
    database.parent.write_text("a file where the folder should be")
    signal, metrics = Signal(), Metrics("tiny")
    writer = JournalWriter(folder, max_bytes=10**6, on_append=signal.set)
    drain = Drainer(writer, journal_dir=folder, url=f"sqlite:///{database}", signal=signal, metrics=metrics)
    drain.start()
    writer.append(pieces("kept"))
    until(lambda: drain.failing)
    assert drain.backlog_bytes() > 0
    assert b"airloom_serving_drain_failures_total 0" not in metrics.render()
    database.parent.unlink()
    until(lambda: rows(database) == ["kept"])
    until(lambda: not drain.failing)
    assert drain.stop()


def test_a_row_that_the_database_refuses_does_not_hold_up_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, database = tmp_path / "journal", tmp_path / "log.db"
    write = Drainer._write_rows

    def refuse(self: Drainer, batch: list) -> None:
        if any(entry.id == "bad" for entry in batch):
            raise sa.exc.DataError("insert", {}, Exception("too long"))
        write(self, batch)

    monkeypatch.setattr(Drainer, "_write_rows", refuse)
    writer = JournalWriter(folder, max_bytes=10**6)
    writer.append(pieces("good-1") + pieces("bad") + pieces("good-2"))
    drain = drainer(writer, folder, f"sqlite:///{database}")
    drain.start()
    assert drain.stop()
    assert rows(database) == ["good-1", "good-2"]
    assert find_entry(folder, "bad") is not None


def test_a_write_that_fails_half_way_leaves_no_half_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = JournalWriter(tmp_path, max_bytes=10**6)
    assert writer.append(pieces("before"))
    real = os.writev
    monkeypatch.setattr(os, "writev", lambda descriptor, parts: real(descriptor, [b"".join(parts)[:40]]))
    assert not writer.append(pieces("half"))
    monkeypatch.undo()
    assert writer.append(pieces("after"))
    with writer.current.open("rb") as file:
        assert [entry.id for entry, _ in read_entries(file)] == ["before", "after"]


def test_ids_are_taken_apart(tmp_path: Path) -> None:
    text = f"my_pipeline-1.0.12-{new_unique()}"
    parsed = PredictionId.parse(f" {text}\n")
    assert (parsed.pipeline, parsed.release, str(parsed)) == ("my_pipeline", "1.0.12", text)
    assert abs(parsed.time.timestamp() - time.time()) < 60
