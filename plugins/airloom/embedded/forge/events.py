"""From a push to the deliveries that tell of it.

A hook script writes what was pushed into the folder `spool`, so that no push is forgotten when this server is
killed. A background thread turns each file into deliveries, and makes them, so that nobody who pushes waits.
"""

from __future__ import annotations

import http.client
import logging
import shlex
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from airloom.embedded.forge.repositories import ZERO, Commit, Repositories, Repository
from airloom.embedded.forge.shapes import Shapes, delivery_request, dumps
from airloom.embedded.forge.state import Row, State
from airloom.errors import NotFoundError

log = logging.getLogger(__name__)

# Tells people at once what a push to a branch starts. Tags cost nothing but the file.
POST_RECEIVE = """#!/bin/sh
# Written by Airloom each time the git server starts; changes are lost.
name={spool}/$(date +%s%N)-$$
branch=
{{
  pwd -P
  printf '%s\\n' "${{REMOTE_USER:-unknown}}"
  while read -r old new ref; do
    printf '%s %s %s\\n' "$old" "$new" "$ref"
    case "$ref" in refs/heads/*) branch=yes ;; esac
  done
  printf 'end\\n'
}} >"$name.part"
exec 3<"$name.part"
mv "$name.part" "$name.push"
if [ -n "$branch" ] && [ -n "$AIRLOOM_NOTIFY" ]; then
  "$AIRLOOM_PYTHON" -I -S "$AIRLOOM_NOTIFY" "$AIRLOOM_NOTIFY_URL" <&3 || :
fi
exit 0
"""
_ANSWER_SECONDS = 10
_RETRY_SECONDS = (1.0, 5.0, 30.0, 120.0, 600.0)
_IDLE_SECONDS = 30.0


@dataclass(frozen=True)
class RefChange:
    """One ref that a push moved, made (`before` is zeros) or deleted (`after` is zeros)."""

    ref: str
    before: str
    after: str

    @property
    def deletes(self) -> bool:
        return self.after == ZERO

    @property
    def branch(self) -> str | None:
        """The branch's name; None for a tag."""
        return self.ref.removeprefix("refs/heads/") if self.ref.startswith("refs/heads/") else None


@dataclass(frozen=True)
class Push:
    """One push: `event` is unique."""

    event: str
    repository: Repository
    pusher: str
    changes: list[RefChange]


def read_push(text: str, event: str, repositories: Repositories) -> Push | None:
    """What a hook script wrote; None for what cannot be one."""
    lines = text.splitlines()
    if len(lines) < 3 or lines[-1] != "end":
        return None
    folder = Path(lines[0])
    try:
        repository = repositories.get(folder.parent.name, folder.name.removesuffix(".git"))
    except NotFoundError:
        return None
    rows = [line.split(" ", 2) for line in lines[2:-1]]
    changes = [RefChange(ref=row[2], before=row[0], after=row[1]) for row in rows if len(row) == 3]
    return Push(event=event, repository=repository, pusher=lines[1], changes=changes)


class Events:
    """Owns the spool and the thread that delivers.

    Args:
        on_push: called for each push, before its deliveries.
        on_delivery: called with `delivered`, `retried` or `failed`.
    """

    def __init__(
        self,
        *,
        folder: Path,
        repositories: Repositories,
        state: State,
        shapes: Shapes,
        on_push: Callable[[Push], None],
        on_delivery: Callable[[str], None],
    ) -> None:
        self.spool = folder / "spool"
        self.hooks_dir = folder / "hooks"
        self._repositories = repositories
        self._state = state
        self._shapes = shapes
        self._on_push = on_push
        self._on_delivery = on_delivery
        self._wake = threading.Event()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="deliveries", daemon=True)

    def install(self) -> None:
        """Write the hook script that all repositories share."""
        self.spool.mkdir(parents=True, exist_ok=True)
        self.hooks_dir.mkdir(parents=True, exist_ok=True)
        script = self.hooks_dir / "post-receive"
        temporary = script.with_suffix(".tmp")
        temporary.write_text(POST_RECEIVE.format(spool=shlex.quote(str(self.spool))), encoding="utf-8")
        temporary.chmod(0o700)
        temporary.replace(script)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread; what was not delivered is delivered after the next start."""
        self._stopped.set()
        self._wake.set()

    def wake(self) -> None:
        """Look at the spool now."""
        self._wake.set()

    def _work(self) -> None:
        while not self._stopped.is_set():
            try:
                self._take_pushes()
                self._deliver_due()
            except Exception:
                log.exception("pushes could not be handled; they are tried again")
                self._stopped.wait(1.0)
            due = self._state.next_due()
            idle = _IDLE_SECONDS if due is None else min(max(due - time.time(), 0.0), _IDLE_SECONDS)
            self._wake.wait(idle)
            self._wake.clear()

    def _take_pushes(self) -> None:
        for path in sorted(self.spool.glob("*.push")):
            text = path.read_text(encoding="utf-8", errors="replace")
            push = read_push(text, path.stem, self._repositories)
            if push is None:
                log.warning("%s tells of no push of a known repository", path.name)
            else:
                self._on_push(push)
                for change in push.changes:
                    self._add_deliveries(push, change)
            path.unlink(missing_ok=True)

    def _add_deliveries(self, push: Push, change: RefChange) -> None:
        hooks = [row for row in self._state.hooks(push.repository.full_name) if "push" in row["events"].split(",")]
        if not hooks:
            return
        payload = self._shapes.push_payload(
            push.repository,
            ref=change.ref,
            before=change.before,
            after=change.after,
            commits=pushed_commits(push.repository, change),
            pusher=push.pusher,
        )
        for hook in hooks:
            self._state.add_delivery(
                guid=str(uuid.uuid4()), event=push.event, ref=change.ref, hook=hook, payload=dumps(payload)
            )

    def _deliver_due(self) -> None:
        while not self._stopped.is_set() and (row := self._state.next_delivery()) is not None:
            self._deliver(row)

    def _deliver(self, row: Row) -> None:
        body, headers = delivery_request(
            row["payload"], content_type=row["content_type"], secret=row["secret"], guid=row["guid"]
        )
        try:
            status, answer = _post(row["url"], body, headers)
        except (OSError, http.client.HTTPException, ValueError) as error:
            status, answer = 0, f"{type(error).__name__}: {error}"
        # Receivers such as Jenkins take a secret in the query.
        url = str(row["url"]).partition("?")[0]
        what = f"push event {row['guid']} of {row['repo']} ({row['ref']}) to {url}"
        if 200 <= status < 300:
            self._state.end_delivery(row["id"], state="delivered", answer=f"{status} {answer}"[:500])
            self._on_delivery("delivered")
            log.info("%s: %d", what, status)
        # An answer below 500 is a decision of the receiver's, which it won't change.
        elif (400 <= status < 500 and status not in {408, 429}) or row["attempts"] >= len(_RETRY_SECONDS):
            self._state.end_delivery(row["id"], state="failed", answer=f"{status} {answer}"[:500])
            self._on_delivery("failed")
            log.error("%s failed: %s %s", what, status or "no answer", answer[:200])
        else:
            delay = _RETRY_SECONDS[row["attempts"]]
            self._state.postpone_delivery(row["id"], seconds=delay, answer=f"{status} {answer}"[:500])
            self._on_delivery("retried")
            log.warning("%s: %s %s; again in %.0f s", what, status or "no answer", answer[:200], delay)


def pushed_commits(repository: Repository, change: RefChange) -> list[Commit]:
    """The commits that a push brought to a branch, oldest first; none for a tag or a deletion."""
    if change.branch is None or change.deletes:
        return []
    if change.before == ZERO:
        others = [f"^{sha}" for name, sha in repository.branches().items() if name != change.branch]
        found = repository.commits(change.after, *others) or repository.commits(change.after, limit=1)
    else:
        found = repository.commits(change.after, f"^{change.before}")
    return found[::-1]


def _post(url: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, str]:
    parts = urlsplit(url)
    kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
    if parts.scheme not in kinds or not parts.hostname:
        raise ValueError(f"{url!r} is no http address")
    connection = kinds[parts.scheme](parts.hostname, parts.port, timeout=_ANSWER_SECONDS)
    try:
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("POST", path, body=body, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read(2000).decode(errors="replace").strip()
    finally:
        connection.close()
