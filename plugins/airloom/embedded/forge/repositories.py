"""Bare repositories on disk, and what pages and events need to know of them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from airloom.errors import NotFoundError
from airloom.hooks.git import REPO_PATTERN
from airloom.hooks.git_command import run_git

ZERO = "0" * 40
_COMMITS_AT_MOST = 250
_FIELD, _RECORD = "\x1f", "\x1e"
_COMMIT_FORMAT = _RECORD + _FIELD.join(("%H", "%P", "%an", "%ae", "%aI", "%cn", "%ce", "%cI", "%B", ""))

# A push is refused rather than half understood; the first wait for a lock is long because many tags come at once.
_CONFIG = {
    "http.receivepack": "true",
    "http.uploadpack": "true",
    "receive.fsckObjects": "true",
    "receive.denyDeleteCurrent": "refuse",
    "receive.autogc": "false",
    "core.filesRefLockTimeout": "10000",
    "core.packedRefsTimeout": "10000",
    "uploadpack.allowAnySHA1InWant": "true",
}


@dataclass(frozen=True)
class Commit:
    """One commit; paths are those that it changed against its first parent."""

    id: str
    parents: list[str]
    author_name: str
    author_email: str
    authored_at: datetime
    committer_name: str
    committer_email: str
    committed_at: datetime
    message: str
    added: list[str]
    removed: list[str]
    modified: list[str]


@dataclass(frozen=True)
class Tag:
    """One tag and the commit that it leads to."""

    name: str
    commit: str
    message: str
    created_at: datetime


@dataclass(frozen=True)
class Repository:
    """One bare repository."""

    owner: str
    name: str
    path: Path

    @property
    def full_name(self) -> str:
        return f"{self.owner}/{self.name}"

    def git(self, *arguments: str, check: bool = True) -> bytes:
        """Standard output of a git command; empty when it fails and `check` is off."""
        done = run_git(arguments, git_dir=self.path, check=check, timeout_seconds=60)
        return done.stdout if done.returncode == 0 else b""

    def resolve(self, rev: str) -> str | None:
        """The commit that a branch, tag or hash names."""
        found = self.git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{rev}^{{commit}}", check=False)
        return found.decode().strip().splitlines()[-1] if found.strip() else None

    def branches(self) -> dict[str, str]:
        """Branch -> commit."""
        listed = self.git("for-each-ref", "--format=%(refname:strip=2)%00%(objectname)", "refs/heads")
        rows = (line.partition("\0") for line in listed.decode(errors="replace").splitlines())
        return {name: sha for name, _, sha in rows}

    def tags(self, name: str | None = None, *, limit: int | None = None) -> list[Tag]:
        """All tags, or the one of that name; newest first."""
        form = "%00".join(
            ("%(refname:strip=2)", "%(objectname)", "%(*objectname)", "%(creatordate:unix)", "%(contents)", "")
        )
        count = [f"--count={limit}"] if limit else []
        pattern = f"refs/tags/{name}" if name else "refs/tags"
        listed = self.git("for-each-ref", "--sort=-creatordate", *count, f"--format={form}", pattern)
        fields = listed.decode(errors="replace").split("\0")
        rows = [fields[start : start + 5] for start in range(0, len(fields) - 1, 5)]
        return [
            Tag(
                name=found.lstrip("\n"),
                commit=target or object_id,
                message=contents.strip() if target else "",
                created_at=datetime.fromtimestamp(int(created or 0), UTC),
            )
            for found, object_id, target, created, contents in rows
            if name is None or found.lstrip("\n") == name
        ]

    def commits(self, *revisions: str, limit: int = _COMMITS_AT_MOST) -> list[Commit]:
        """What `git log` shows of these revisions, newest first; empty when one of them is unknown."""
        listed = self.git(
            "log",
            f"-{limit}",
            "--no-renames",
            "--diff-merges=first-parent",
            "--name-status",
            "-z",
            "--root",
            f"--format={_COMMIT_FORMAT}",
            "--end-of-options",
            *revisions,
            "--",
            check=False,
        )
        records = listed.decode(errors="replace").split(_RECORD)[1:]
        return [_commit(record) for record in records if record.count(_FIELD) >= 9]

    def description(self) -> str:
        try:
            return (self.path / "description").read_text(encoding="utf-8").strip()
        except OSError:
            return ""

    def remove_stale_locks(self) -> None:
        """Remove what killed writers left. Only while nobody else writes to this repository."""
        for pattern in ("*.lock", "refs/**/*.lock"):
            for lock in self.path.glob(pattern):
                lock.unlink(missing_ok=True)


class Repositories:
    """All repositories below one folder: `<owner>/<name>.git`."""

    def __init__(self, root: Path, hooks_dir: Path) -> None:
        self._root = root
        self._hooks_dir = hooks_dir

    def get(self, owner: str, name: str) -> Repository:
        """One repository.

        Raises:
            NotFoundError: there is none of that name.
        """
        if not (_is_name(owner) and _is_name(name)):
            raise NotFoundError(f"no repository {owner}/{name}")
        path = self._root / owner / f"{name}.git"
        if not (path / "HEAD").is_file():
            raise NotFoundError(f"no repository {owner}/{name}")
        return Repository(owner, name, path)

    def create(self, owner: str, name: str, description: str = "") -> Repository:
        """Make a repository; one that is there already is brought up to date and kept.

        Raises:
            ValueError: that is no name.
        """
        if not (_is_name(owner) and _is_name(name)):
            raise ValueError(f"{owner}/{name} is not a repository's name")
        path = self._root / owner / f"{name}.git"
        if not (path / "HEAD").is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            made = Path(tempfile.mkdtemp(prefix=".new-", dir=path.parent))
            run_git(("init", "--quiet", "--bare", "--template=", "-b", "main", str(made)))
            (made / "info").mkdir(exist_ok=True)
            (made / "description").write_text(description, encoding="utf-8")
            self.configure(Repository(owner, name, made))
            try:
                made.rename(path)
            except OSError:
                shutil.rmtree(made, ignore_errors=True)
        return self.get(owner, name)

    def configure(self, repository: Repository) -> None:
        """Write the settings that this server needs; they may be of an earlier version of it."""
        wanted = {**_CONFIG, "core.hooksPath": str(self._hooks_dir)}
        listed = repository.git("config", "--local", "-z", "--list").decode()
        rows = [line.split("\n", 1) for line in listed.split("\0") if "\n" in line]
        found = {row[0]: row[1] for row in rows}
        for key, value in wanted.items():
            if found.get(key.lower()) != value:
                repository.git("config", "--local", key, value)

    def all(self) -> list[Repository]:
        """Every repository, by owner and name."""
        found = sorted(path.parent for path in self._root.glob("[!.]*/[!.]*.git/HEAD"))
        return [Repository(path.parent.name, path.name.removesuffix(".git"), path) for path in found]


def _is_name(text: str) -> bool:
    return bool(REPO_PATTERN.fullmatch(text)) and not text.endswith((".git", ".lock"))


def _commit(record: str) -> Commit:
    sha, parents, name, email, authored, by, by_email, committed, rest = record.split(_FIELD, 8)
    message, _, changes = rest.rpartition(_FIELD)
    added, removed, modified = _changes(changes.strip("\0\n").split("\0"))
    return Commit(
        id=sha,
        parents=parents.split(),
        author_name=name,
        author_email=email,
        authored_at=datetime.fromisoformat(authored),
        committer_name=by,
        committer_email=by_email,
        committed_at=datetime.fromisoformat(committed),
        message=message.strip(),
        added=added,
        removed=removed,
        modified=modified,
    )


def _changes(fields: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    added: list[str] = []
    removed: list[str] = []
    modified: list[str] = []
    kinds = {"A": added, "D": removed}
    for status, path in zip(fields[::2], fields[1::2], strict=False):
        kinds.get(status.strip()[:1], modified).append(path)
    return added, removed, modified
