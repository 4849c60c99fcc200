"""GitBucket's JSON, key for key, as far as Airloom and its users read it."""

from __future__ import annotations

import hashlib
import hmac
import json
import zlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, urlencode

from airloom.embedded.forge.repositories import ZERO, Commit, Repository, Tag
from airloom.embedded.forge.state import Row

Json = dict[str, Any]


def when(value: datetime) -> str:
    """A time as GitBucket writes it: UTC, whole seconds."""
    return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Shapes:
    """Builds the JSON of one server.

    Args:
        base_url: under which clients reach it.
        admin: name of the user who may administer.
    """

    def __init__(self, base_url: str, *, admin: str = "admin") -> None:
        self.base_url = base_url.rstrip("/")
        self._admin = admin

    def url(self, *parts: str) -> str:
        """An address below the server; each part is quoted, its slashes kept."""
        return "/".join((self.base_url, *(quote(part, safe="/") for part in parts)))

    def user(self, name: str) -> Json:
        return {
            "login": name,
            "email": f"{name}@localhost",
            "type": "User",
            "site_admin": name == self._admin,
            "created_at": "2026-01-01T00:00:00Z",
            "url": self.url("api/v3/users", name),
            "html_url": self.url(name),
        }

    def repository(self, repository: Repository) -> Json:
        full_name = repository.full_name
        return {
            "id": zlib.crc32(full_name.encode()),
            "name": repository.name,
            "full_name": full_name,
            "description": repository.description(),
            "watchers": 0,
            "forks": 0,
            "private": True,
            "default_branch": "main",
            "owner": self.user(repository.owner),
            "has_issues": False,
            "forks_count": 0,
            "watchers_count": 0,
            "url": self.url("api/v3/repos", full_name),
            "clone_url": self.url("git", f"{full_name}.git"),
            "html_url": self.url(full_name),
        }

    def hook(self, row: Row) -> Json:
        """Without its secret, which GitBucket doesn't show either."""
        return {
            "type": "Repository",
            "id": row["id"],
            "name": "web",
            "active": True,
            "events": row["events"].split(","),
            "config": {"content_type": row["content_type"], "url": row["url"]},
            "url": self.url("api/v3", row["repo"], "hooks", str(row["id"])),
        }

    def status(self, row: Row) -> Json:
        return {
            "created_at": row["created_at"][:19] + "Z",
            "updated_at": row["updated_at"][:19] + "Z",
            "state": row["state"],
            "target_url": row["target_url"],
            "description": row["description"],
            "id": row["id"],
            "context": row["context"],
            "creator": self.user(row["creator"]),
            "url": self.url("api/v3/repos", row["repo"], "commits", row["sha"], "statuses"),
        }

    def combined_status(self, repository: Repository, sha: str, rows: Sequence[Row]) -> Json:
        states = {row["state"] for row in rows}
        if states & {"error", "failure"}:
            state = "failure"
        elif not states or "pending" in states:
            state = "pending"
        else:
            state = "success"
        return {
            "state": state,
            "sha": sha,
            "total_count": len(rows),
            "statuses": [self.status(row) for row in rows],
            "repository": self.repository(repository),
            "url": self.url("api/v3/repos", repository.full_name, "commits", sha, "status"),
        }

    def tag(self, repository: Repository, tag: Tag) -> Json:
        return {
            "ref": f"refs/tags/{tag.name}",
            "node_id": "",
            "url": self.url(repository.full_name, "refs/tags", tag.name),
            "object": {
                "sha": tag.commit,
                "type": "commit",
                "url": self.url(repository.full_name, "tags", tag.commit),
            },
        }

    def release(self, row: Row) -> Json:
        return {
            "name": row["name"],
            "tag_name": row["tag"],
            "body": row["body"],
            "author": self.user(row["author"]),
            "assets": [],
        }

    def commit(self, repository: Repository, commit: Commit) -> Json:
        """Of `GET commits/:sha`."""
        full_name = repository.full_name
        api = self.url("api/v3/repos", full_name, "commits", commit.id)
        kinds = (("added", commit.added), ("deleted", commit.removed), ("modified", commit.modified))
        return {
            "url": api,
            "sha": commit.id,
            "html_url": self.url(full_name, "commit", commit.id),
            "comment_url": self.base_url,
            "commit": {
                "url": api,
                "author": _person(commit.author_name, commit.author_email, commit.authored_at),
                "committer": _person(commit.committer_name, commit.committer_email, commit.committed_at),
                "message": commit.message,
                "comment_count": 0,
                "tree": {"url": self.url("api/v3/repos", full_name, "tree", commit.id), "sha": commit.id},
            },
            "author": self.user(commit.author_name),
            "committer": self.user(commit.committer_name),
            "parents": [
                {"url": self.url("api/v3/repos", full_name, "tree", parent), "sha": parent} for parent in commit.parents
            ],
            "files": [{"filename": name, "status": kind} for kind, names in kinds for name in names],
        }

    def push_payload(
        self, repository: Repository, *, ref: str, before: str, after: str, commits: Sequence[Commit], pusher: str
    ) -> Json:
        """Of a push event; `commits` are the oldest first, and none for a tag or a deletion."""
        full_name = repository.full_name
        listed = [self._pushed(repository, commit) for commit in commits]
        if not commits:
            compare = self.url(full_name)
        elif len(commits) == 1:
            compare = self.url(full_name, "commit", after)
        else:
            first = f"{commits[0].id}^" if before == ZERO else before
            compare = self.url(full_name, "compare", f"{first}...{after}")
        return {
            "pusher": {"name": pusher, "email": f"{pusher}@localhost"},
            "sender": self.user(pusher),
            "ref": ref,
            "before": before,
            "after": after,
            "commits": listed,
            "repository": self.repository(repository),
            "compare": compare,
            "head_commit": listed[-1] if listed else None,
        }

    def _pushed(self, repository: Repository, commit: Commit) -> Json:
        return {
            "id": commit.id,
            "message": commit.message,
            "timestamp": when(commit.committed_at),
            "added": commit.added,
            "removed": commit.removed,
            "modified": commit.modified,
            "author": _person(commit.author_name, commit.author_email, commit.authored_at),
            "committer": _person(commit.committer_name, commit.committer_email, commit.committed_at),
            "url": self.url("api/v3", repository.full_name, "commits", commit.id),
            "html_url": self.url(repository.full_name, "commit", commit.id),
        }


def _person(name: str, email: str, date: datetime) -> Json:
    return {"name": name, "email": email, "date": when(date)}


def delivery_request(
    payload: str, *, content_type: str, secret: str | None, guid: str
) -> tuple[bytes, Mapping[str, str]]:
    """Body and headers of a push event, signed when the hook has a secret."""
    if content_type == "form":
        body = urlencode({"payload": payload}).encode()
        media_type = "application/x-www-form-urlencoded; charset=UTF-8"
    else:
        body = payload.encode()
        media_type = "application/json"
    headers = {"Content-Type": media_type, "X-Github-Event": "push", "X-Github-Delivery": guid}
    if secret and secret.strip():
        key = secret.encode()
        headers["X-Hub-Signature"] = "sha1=" + hmac.new(key, body, hashlib.sha1).hexdigest()
        headers["X-Hub-Signature-256"] = "sha256=" + hmac.new(key, body, hashlib.sha256).hexdigest()
    return body, headers


def dumps(value: Json) -> str:
    """JSON on one line, in any language's letters."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
