"""What the git server remembers beside the repositories: hooks, statuses, releases, deliveries, receipts, builds."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_SCHEMA = """
CREATE TABLE IF NOT EXISTS hook (
  id INTEGER PRIMARY KEY, repo TEXT NOT NULL, url TEXT NOT NULL, content_type TEXT NOT NULL, secret TEXT,
  events TEXT NOT NULL, UNIQUE (repo, url));
CREATE TABLE IF NOT EXISTS status (
  id INTEGER PRIMARY KEY, repo TEXT NOT NULL, sha TEXT NOT NULL, context TEXT NOT NULL, state TEXT NOT NULL,
  target_url TEXT, description TEXT, creator TEXT NOT NULL, created_at TEXT NOT NULL, updated_at TEXT NOT NULL,
  UNIQUE (repo, sha, context));
CREATE TABLE IF NOT EXISTS release (
  repo TEXT NOT NULL, tag TEXT NOT NULL, name TEXT NOT NULL, body TEXT, author TEXT NOT NULL, created_at TEXT NOT NULL,
  PRIMARY KEY (repo, tag));
CREATE TABLE IF NOT EXISTS delivery (
  id INTEGER PRIMARY KEY, guid TEXT NOT NULL, event TEXT NOT NULL, ref TEXT NOT NULL, hook_id INTEGER NOT NULL,
  repo TEXT NOT NULL, url TEXT NOT NULL, payload TEXT NOT NULL, state TEXT NOT NULL, attempts INTEGER NOT NULL,
  next_at REAL NOT NULL, answer TEXT, created_at TEXT NOT NULL, ended_at TEXT, UNIQUE (event, ref, hook_id));
CREATE INDEX IF NOT EXISTS delivery_pending ON delivery (state, next_at);
CREATE TABLE IF NOT EXISTS wanted (repo TEXT PRIMARY KEY, "commit" TEXT NOT NULL, pusher TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS receipt (id INTEGER PRIMARY KEY, value TEXT NOT NULL);
"""
_DELIVERIES_KEPT = 2000
_RECEIPTS_KEPT = 10_000

Row = sqlite3.Row


class State:
    """One SQLite file; safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._connection.row_factory = sqlite3.Row
        self._connection.executescript(f"PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; {_SCHEMA}")
        path.chmod(0o600)  # hooks carry their secrets

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def _rows(self, sql: str, values: Sequence[Any] = ()) -> list[Row]:
        with self._lock:
            return self._connection.execute(sql, values).fetchall()

    def _row(self, sql: str, values: Sequence[Any] = ()) -> Row | None:
        rows = self._rows(sql, values)
        return rows[0] if rows else None

    # Hooks

    def hooks(self, repo: str) -> list[Row]:
        return self._rows("SELECT * FROM hook WHERE repo = ? ORDER BY url", (repo,))

    def hook(self, repo: str, number: int) -> Row | None:
        return self._row("SELECT * FROM hook WHERE repo = ? AND id = ?", (repo, number))

    def add_hook(self, repo: str, *, url: str, content_type: str, secret: str | None, events: str) -> Row:
        """Raises sqlite3.IntegrityError when the repo has a hook with this URL."""
        row = self._row(
            "INSERT INTO hook (repo, url, content_type, secret, events) VALUES (?, ?, ?, ?, ?) RETURNING *",
            (repo, url, content_type, secret, events),
        )
        return _made(row)

    def change_hook(self, number: int, *, url: str, content_type: str, secret: str | None, events: str) -> Row | None:
        return self._row(
            "UPDATE hook SET url = ?, content_type = ?, secret = ?, events = ? WHERE id = ? RETURNING *",
            (url, content_type, secret, events, number),
        )

    def remove_hook(self, number: int) -> None:
        self._rows("DELETE FROM hook WHERE id = ?", (number,))

    # Statuses

    def set_status(
        self,
        repo: str,
        sha: str,
        *,
        context: str,
        state: str,
        target_url: str | None,
        description: str | None,
        creator: str,
    ) -> Row:
        """Set the status of a commit in a context; the one before is replaced."""
        now = utc_now()
        row = self._row(
            "INSERT INTO status (repo, sha, context, state, target_url, description, creator, created_at, updated_at)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (repo, sha, context) DO UPDATE SET state = excluded.state,"
            " target_url = excluded.target_url, description = excluded.description, creator = excluded.creator,"
            " updated_at = excluded.updated_at RETURNING *",
            (repo, sha, context, state, target_url, description, creator, now, now),
        )
        return _made(row)

    def statuses(self, repo: str, sha: str) -> list[Row]:
        return self._rows("SELECT * FROM status WHERE repo = ? AND sha = ? ORDER BY updated_at DESC, id", (repo, sha))

    def built_commits(self, repo: str, context: str) -> set[str]:
        """Commits whose status in a context is final: a success or a failure, not an error that may pass."""
        rows = self._rows(
            "SELECT sha FROM status WHERE repo = ? AND context = ? AND state IN ('success', 'failure')", (repo, context)
        )
        return {row["sha"] for row in rows}

    # Releases

    def releases(self, repo: str) -> list[Row]:
        return self._rows("SELECT * FROM release WHERE repo = ? ORDER BY created_at DESC, tag", (repo,))

    def release(self, repo: str, tag: str) -> Row | None:
        return self._row("SELECT * FROM release WHERE repo = ? AND tag = ?", (repo, tag))

    def set_release(self, repo: str, tag: str, *, name: str, body: str | None, author: str) -> Row:
        row = self._row(
            "INSERT INTO release (repo, tag, name, body, author, created_at) VALUES (?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (repo, tag) DO UPDATE SET name = excluded.name, body = excluded.body RETURNING *",
            (repo, tag, name, body, author, utc_now()),
        )
        return _made(row)

    # Deliveries

    def add_delivery(self, *, guid: str, event: str, ref: str, hook: Row, payload: str) -> None:
        """Keep a delivery to be made; the same event is not taken twice."""
        self._rows(
            "INSERT OR IGNORE INTO delivery (guid, event, ref, hook_id, repo, url, payload, state, attempts, next_at,"
            " created_at) VALUES (?, ?, ?, ?, ?, ?, ?, 'pending', 0, 0, ?)",
            (guid, event, ref, hook["id"], hook["repo"], hook["url"], payload, utc_now()),
        )

    def next_delivery(self) -> Row | None:
        """The oldest delivery that is due, with its hook's content type and secret."""
        return self._row(
            "SELECT delivery.*, hook.content_type, hook.secret FROM delivery JOIN hook ON hook.id = delivery.hook_id"
            " WHERE state = 'pending' AND next_at <= ? ORDER BY delivery.id LIMIT 1",
            (time.time(),),
        )

    def next_due(self) -> float | None:
        """When the next delivery is due, as seconds since 1970."""
        row = self._row("SELECT min(next_at) AS due FROM delivery WHERE state = 'pending'")
        return row["due"] if row else None

    def end_delivery(self, number: int, *, state: str, answer: str) -> None:
        self._rows(
            "UPDATE delivery SET state = ?, answer = ?, attempts = attempts + 1, ended_at = ? WHERE id = ?",
            (state, answer, utc_now(), number),
        )
        self._rows("DELETE FROM delivery WHERE state != 'pending' AND id <= ?", (number - _DELIVERIES_KEPT,))

    def postpone_delivery(self, number: int, *, seconds: float, answer: str) -> None:
        self._rows(
            "UPDATE delivery SET attempts = attempts + 1, next_at = ?, answer = ? WHERE id = ?",
            (time.time() + seconds, answer, number),
        )

    def deliveries(self, repo: str, *, limit: int = 50) -> list[Row]:
        return self._rows("SELECT * FROM delivery WHERE repo = ? ORDER BY id DESC LIMIT ?", (repo, limit))

    # Received events that the ledger of pushes has not taken yet

    def add_receipt(self, value: str) -> None:
        """Keep one; the oldest go when there are too many."""
        row = _made(self._row("INSERT INTO receipt (value) VALUES (?) RETURNING id", (value,)))
        self._rows("DELETE FROM receipt WHERE id <= ?", (row["id"] - _RECEIPTS_KEPT,))

    def receipts(self, limit: int) -> list[Row]:
        return self._rows("SELECT * FROM receipt ORDER BY id LIMIT ?", (limit,))

    def remove_receipt(self, number: int) -> None:
        self._rows("DELETE FROM receipt WHERE id = ?", (number,))

    # Builds that are to be made

    def want_build(self, repo: str, commit: str, pusher: str) -> None:
        """Ask for the build of a commit; one that waits for an earlier commit is replaced."""
        self._rows(
            'INSERT INTO wanted (repo, "commit", pusher) VALUES (?, ?, ?) ON CONFLICT (repo) DO UPDATE SET'
            ' "commit" = excluded."commit", pusher = excluded.pusher',
            (repo, commit, pusher),
        )

    def wanted_builds(self) -> list[Row]:
        return self._rows("SELECT * FROM wanted ORDER BY repo")

    def wanted_build(self, repo: str) -> Row | None:
        return self._row("SELECT * FROM wanted WHERE repo = ?", (repo,))

    def build_ended(self, repo: str, commit: str) -> None:
        """Forget a wish, unless a newer commit has taken its place."""
        self._rows('DELETE FROM wanted WHERE repo = ? AND "commit" = ?', (repo, commit))


def utc_now() -> str:
    """Now, as GitBucket writes times, with microseconds so that they sort."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _made(row: Row | None) -> Row:
    if row is None:
        raise RuntimeError("the row was not written")
    return row
